"""Plan and write conversions, compare files with their source, and draw errors. All of them yield events.

The quantizer does not know events: it reports progress to callbacks, and this module turns the reports into events.
"""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event as Flag
from typing import TypeVar

from torch import Tensor

from skyrun.errors import SkyrunError
from skyrun.events import Event, Notice, Progress, StageEnded, StageStarted, now
from skyrun.planning.problems import place_problems
from skyrun.quant.compare import TensorError
from skyrun.quant.compare import compare as compare_files
from skyrun.quant.conversion import check_device, check_space, write_file
from skyrun.quant.error_map import check_suffix, error_map, write_error_map
from skyrun.quant.partial import partial_path
from skyrun.quant.plan import Conversion, PlannedFile, Settings
from skyrun.quant.planner import plan_conversion
from skyrun.units import size

T = TypeVar("T")
Report = Callable[[int, int], None]  # called with the number of units that are done, and of all units

_POLL = 0.1  # seconds


def plan(source: Path, out: Path, settings: Settings, device: str = "cpu") -> Generator[Event, None, Conversion]:
    """Plan every file, name and type, and check device and disk space. Writes nothing.

    Args:
        source: A checkpoint's folder or a file.
        out: The folder for the results.
        settings: Types, rules and importance.
        device: The device that encodes weights.
    """
    check_device(device)
    conversion = yield from _reported("measure", "matrices", lambda on: plan_conversion(source, out, settings, on))
    check_space(conversion)
    return conversion


def write(conversion: Conversion, device: str = "cpu") -> Generator[Event, None, None]:
    """Write the files of a conversion, or resume an interrupted one."""
    for file in conversion.files:
        yield from _write(file, device)


def _write(file: PlannedFile, device: str) -> Generator[Event, None, None]:
    start, stage, finished = now(), f"convert {file.path.name}", write_file(file, device)
    done = before = next(finished)
    if before:
        yield Notice(f"{size(before)} were finished before: going on from there")
    yield StageStarted(stage, file.nbytes, "bytes", before)
    for nbytes in finished:
        done += nbytes
        yield Progress(stage, done)
    yield StageEnded(stage, now() - start)


def unfinished(conversion: Conversion) -> list[Path]:
    """The partial files of an interrupted conversion."""
    partials = (partial_path(file.path) for file in conversion.files)
    return [path for path in partials if path.exists()]


def compare(
    path: Path, source: Path, importance: Callable[[str], Tensor | None] = lambda name: None
) -> Generator[Event, None, list[TensorError]]:
    """Measure the error of every tensor of a file against its source.

    Args:
        path: The file.
        source: What it was converted from.
        importance: Returns the importance of a tensor's input channels by name, or None.
    """
    return (yield from _reported("compare", "bytes", lambda on: compare_files(path, source, importance, on)))


def check_report(report: Path, dry_run: bool) -> None:
    """Raise SkyrunError if errors cannot be drawn there. Called before the conversion, which may take hours."""
    check_suffix(report)
    if dry_run:
        raise SkyrunError("--report draws what was written, --dry-run writes nothing", "leave out one of them")
    if problems := place_problems(report):
        raise SkyrunError.listing("the report cannot be written", problems, "choose another place for --report")


def draw_errors(conversion: Conversion, report: Path, imatrix: Path | None = None) -> Generator[Event, None, None]:
    """Draw the errors of each written transformer in an image; without a transformer, those of the first file.

    Args:
        conversion: What was written.
        report: The path of the image. If there are several, their tasks are added to the names.
        imatrix: The file of importances that the errors are weighted by, for the title.
    """
    files = [file for file in conversion.files if file.role == "transformer"] or list(conversion.files[:1])
    for file in files:
        importances = {tensor.name: tensor.importance for tensor in file.tensors}
        errors = yield from compare(file.path, conversion.source, importances.get)
        path = report if len(files) == 1 else report.with_stem(f"{report.stem}-{file.task}")
        weighting = f", weighted by {imatrix.name}" if imatrix else ""
        write_error_map(path, error_map(f"{file.path.name}{weighting}", errors))
        yield Notice(f"{path}: the error of every tensor of {file.path.name}")


class _Stopped(Exception):
    """Ends the work after the generator has been closed."""


def _reported(stage: str, unit: str, work: Callable[[Report], T]) -> Generator[Event, None, T]:
    """Run work in a thread, and yield the progress that it reports as events.

    If the generator is closed early, the work ends with its next report.

    Args:
        stage: The name of the stage.
        unit: What is counted.
        work: Called with the function to report to.
    """
    reports: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
    stop, start, total = Flag(), now(), 0

    def report(done: int, of: int) -> None:
        if stop.is_set():
            raise _Stopped
        reports.put((done, of))

    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(work, report)
        result.add_done_callback(lambda _: reports.put(None))
        try:
            while (said := _next(reports)) is not None:
                if not total:
                    yield StageStarted(stage, total := said[1], unit)
                yield Progress(stage, said[0])
        finally:
            stop.set()
    value = result.result()
    if total:
        yield StageEnded(stage, now() - start)
    return value


def _next(reports: "SimpleQueue[tuple[int, int] | None]") -> tuple[int, int] | None:
    """Wait for the next report in short intervals, so that interrupts are handled on every system."""
    while True:
        with suppress(Empty):
            return reports.get(timeout=_POLL)
