"""Show a run while it works: bars on a terminal, plain lines elsewhere. Everything goes to stderr."""

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from skyrun.cli.console import emit
from skyrun.events import BlockDone, Event, Notice, StageEnded, StageStarted, as_json, now
from skyrun.events import Progress as StageProgress
from skyrun.units import duration, size

T = TypeVar("T")


class Bar(Protocol):
    """Draws one piece of work at a time."""

    def start(self, name: str) -> None: ...
    def update(self, fraction: float, text: str) -> None: ...
    def finish(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...


class Display:
    """Turns events into positions and times left."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._name, self._unit = "", ""
        self._total, self._done, self._partial, self._before = 1, 0.0, 0.0, 0.0
        self._start = now()
        self._windows: list[tuple[int, float]] = []  # that were entered, and when

    def show(self, event: Event) -> None:
        """One event of a pipeline."""
        if isinstance(event, StageStarted):
            if event.part is not None:
                self._enter(*event.part)
            self.begin(event.stage, event.total, event.unit)
            if event.before:
                self.resume(event.before)
        elif isinstance(event, Notice):
            self._bar.note(event.text)
        elif isinstance(event, BlockDone):
            self._partial = (event.index + 1) / event.total
            self._update()
        elif isinstance(event, StageProgress):
            self._done, self._partial = event.done, 0.0
            self._update()
        elif isinstance(event, StageEnded):
            read = f", read {size(event.bytes_read)}" if event.bytes_read else ""
            self._bar.finish(f"{duration(event.seconds)}{read}")

    def _enter(self, window: int, total: int) -> None:
        """A stage of a window begins. Of a new one its number is said, and how long all that are left will take."""
        if self._windows and self._windows[-1][0] == window:
            return
        self._windows.append((window, now()))
        (first, began), (_, here) = self._windows[0], self._windows[-1]
        left = ""
        if window > first:
            left = f", about {duration((here - began) / (window - first) * (total - window + 1))} left in all"
        self._bar.note(f"window {window} of {total}{left}")

    def begin(self, name: str, total: int, unit: str) -> None:
        """A piece of work of `total` units."""
        self._name, self._total, self._unit = name, total, unit
        self._done, self._partial, self._start, self._before = 0.0, 0.0, now(), 0.0
        self._bar.start(name)

    def resume(self, units: float) -> None:
        """Units that were done before, which say nothing about the time that the rest takes."""
        self._done = self._before = units
        self._update()

    def advance(self, units: float) -> None:
        """Some more units are done."""
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
        """The work is over."""
        self._bar.finish(duration(now() - self._start))

    def _update(self) -> None:
        position = min(self._done + self._partial, self._total)
        elapsed = now() - self._start
        worked, ahead = position - self._before, self._total - position
        left = f", {duration(elapsed * ahead / worked)} left" if worked > 0 and ahead > 0 else ""
        self._bar.update(position / self._total, f"{self._count()}{left}")

    def _count(self) -> str:
        if self._unit == "bytes":
            return f"{size(self._done)} of {size(self._total)}"
        return f"{int(self._done)} of {self._total} {self._unit}"


class _TerminalBar:
    """A rich bar per piece of work."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars

    def start(self, name: str) -> None:
        self._task = self._bars.add_task(name, total=1.0, text="")

    def update(self, fraction: float, text: str) -> None:
        self._bars.update(self._task, completed=fraction, text=text)

    def finish(self, text: str) -> None:
        self._bars.update(self._task, completed=1.0, text=text)

    def note(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)


class _Lines:
    """For logs: a line at every tenth of the work, seconds apart, and one at its end."""

    _APART = 5.0

    def start(self, name: str) -> None:
        self._name, self._tenth, self._last = name, 0, now()

    def update(self, fraction: float, text: str) -> None:
        tenth = int(fraction * 10)
        if self._tenth < tenth < 10 and now() - self._last > self._APART:
            self._tenth, self._last = tenth, now()
            print(f"{self._name}: {text}", file=sys.stderr, flush=True)

    def finish(self, text: str) -> None:
        print(f"{self._name}: done in {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress() -> Iterator[Display]:
    """A display for the terminal or the log that stderr is."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Display(_Lines())
        return
    columns = (TextColumn("{task.description:>10}"), BarColumn(32), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console) as bars:
        yield Display(_TerminalBar(bars))


def shown(events: Generator[Event, None, T], as_json_too: bool) -> T:
    """Do the work of a generator of events, show them, and return its value. as_json_too: also as lines of JSON."""
    with progress() as display:
        while True:
            try:
                event = next(events)
            except StopIteration as stop:
                value: T = stop.value
                return value
            display.show(event)
            if as_json_too:
                emit(as_json(event))
