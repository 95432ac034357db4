"""Show progress on stderr: bars on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from skyrun.cli.console import emit, log, say
from skyrun.cli.signals import raise_if_asked
from skyrun.events import BlockDone, Event, Notice, StageEnded, StageStarted, TimeLeft, as_json, listen, now
from skyrun.events import Progress as StageProgress
from skyrun.units import duration, printable, size

T = TypeVar("T")


class Bar(Protocol):
    """Draws one piece of work at a time."""

    def start(self, name: str) -> None: ...
    def update(self, fraction: float, text: str) -> None: ...
    def finish(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...


class Display:
    """Turns events into progress and time left."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._name, self._unit = "", ""
        self._total, self._done, self._before = 1, 0.0, 0.0
        self._blocks = (0, 1)  # done in the current unit, and how many it has
        self._start = now()
        self._windows: list[tuple[int, float]] = []  # that have begun, and when
        self._corrected = False

    def show(self, event: Event) -> None:
        """Show an event."""
        if isinstance(event, StageStarted):
            if event.part is not None:
                self._enter(*event.part)
            self.begin(event.stage, event.total, event.unit)
            if event.before:
                self.resume(event.before)
        elif isinstance(event, Notice):
            self._bar.note(event.text)
        elif isinstance(event, TimeLeft):
            self._correct(event)
        elif isinstance(event, BlockDone):
            self._blocks = (event.index + 1, event.total)
            self._update()
        elif isinstance(event, StageProgress):
            self._done, self._blocks = event.done, (0, 1)
            self._update()
        elif isinstance(event, StageEnded):
            read = f", read {size(event.bytes_read)}" if event.bytes_read else ""
            self._bar.finish(f"{duration(event.seconds)}{read}")

    def _enter(self, window: int, total: int) -> None:
        """Note the beginning of a window, and how long all that are left will take."""
        if self._windows and self._windows[-1][0] == window:
            return
        self._windows.append((window, now()))
        (first, began), (_, here) = self._windows[0], self._windows[-1]
        left = ""
        if window > first:
            left = f", about {duration((here - began) / (window - first) * (total - window + 1))} left in all"
        self._bar.note(f"window {window} of {total}{left}")

    def _correct(self, left: TimeLeft) -> None:
        """Note the first estimate of the time left; bars and windows show the later ones."""
        if not self._corrected:
            self._corrected = True
            self._bar.note(
                f"a step takes {duration(left.step_seconds)}, {duration(left.planned_step_seconds)} were expected: "
                f"about {duration(left.seconds)} left in all"
            )

    def begin(self, name: str, total: int, unit: str) -> None:
        """Begin work of `total` units."""
        self._name, self._total, self._unit = name, total, unit
        self._done, self._blocks, self._start, self._before = 0.0, (0, 1), now(), 0.0
        self._bar.start(name)

    def resume(self, units: float) -> None:
        """Count units that were done before, which do not count for the time left."""
        self._done = self._before = units
        self._update()

    def advance(self, units: float) -> None:
        """Count more units as done."""
        self._done += units
        self._update()

    def counter(self, name: str, unit: str) -> Callable[[int, int], None]:
        """For work that says how much of it is done, and of how much: begins with the first call."""

        def count(done: int, total: int) -> None:
            if self._name != name:
                self.begin(name, total, unit)
            self._done = done
            self._update()
            if done == total:
                self.end()

        return count

    def end(self) -> None:
        """End the work."""
        self._bar.finish(duration(now() - self._start))

    def _update(self) -> None:
        block, blocks = self._blocks
        position = min(self._done + block / blocks, self._total)
        elapsed = now() - self._start
        worked, ahead = position - self._before, self._total - position
        left = f", {duration(elapsed * ahead / worked)} left" if worked > 0 and ahead > 0 else ""
        self._bar.update(position / self._total if self._total else 1.0, f"{self._count()}{left}")

    def _count(self) -> str:
        if self._unit == "bytes":
            return f"{size(self._done)} of {size(self._total)}"
        block, blocks = self._blocks
        at_work = f", block {block} of {blocks}" if 0 < block < blocks else ""
        return f"{int(self._done)} of {self._total} {self._unit}{at_work}"


class _TerminalBar:
    """Draws a bar for each piece of work with rich."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars

    def start(self, name: str) -> None:
        self._task = self._bars.add_task(printable(name), total=None, text="")  # pulses until there is progress

    def update(self, fraction: float, text: str) -> None:
        self._bars.update(self._task, total=1.0, completed=fraction, text=text)

    def finish(self, text: str) -> None:
        self._bars.update(self._task, total=1.0, completed=1.0, text=text)

    def note(self, text: str) -> None:
        self._bars.console.print(printable(text), markup=False, highlight=False)


class _Lines:
    """Prints lines for logs: at each tenth of the work, seconds apart, and at its end."""

    _APART = 5.0  # seconds

    def start(self, name: str) -> None:
        self._name, self._tenth, self._last = name, 0, now()

    def update(self, fraction: float, text: str) -> None:
        tenth = int(fraction * 10)
        if self._tenth < tenth < 10 and now() - self._last > self._APART:
            self._tenth, self._last = tenth, now()
            say(f"{self._name}: {text}")

    def finish(self, text: str) -> None:
        say(f"{self._name}: done in {text}")

    def note(self, text: str) -> None:
        say(text)


@contextmanager
def progress() -> Iterator[Display]:
    """A display for stderr, be it a terminal or a log."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Display(_Lines())
        return
    columns = (
        TextColumn("{task.description:>10}", markup=False),
        BarColumn(20),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=console) as bars:
        yield Display(_TerminalBar(bars))


def shown(
    events: Generator[Event, None, T], as_json_too: bool, act: Callable[[Event], dict[str, Any]] | None = None
) -> T:
    """Run a generator of events, show the events, and return its value.

    Args:
        events: The generator.
        as_json_too: Whether to print each event as a line of JSON as well.
        act: Called with each event; the values that it returns are added to the line of JSON.
    """

    def on(event: Event) -> None:
        display.show(event)
        values = as_json(event) | (act(event) if act is not None else {})
        log.debug("%s", values)
        if as_json_too:
            emit(values)
        raise_if_asked()

    try:
        with progress() as display:
            return listen(events, on)
    except BaseException as error:
        for note in getattr(error, "__notes__", ()):
            say(note)
        raise
