"""`skyrun convert`: a checkpoint becomes GGUF files."""

from argparse import Namespace
from pathlib import Path

from skyrun.cli.console import emit, say
from skyrun.cli.progress import progress
from skyrun.errors import SkyrunError
from skyrun.planning.problems import place_problems
from skyrun.quant.compare import compare
from skyrun.quant.conversion import check_device, check_space, write_file
from skyrun.quant.error_map import check_suffix, error_map, write_error_map
from skyrun.quant.partial import partial_path
from skyrun.quant.plan import Conversion, PlannedFile, Settings
from skyrun.quant.planner import plan_conversion
from skyrun.quant.target_size import parse_size
from skyrun.units import size, table


def execute(arguments: Namespace) -> int:
    """Plan a conversion, print it, write it, and draw what it lost."""
    if arguments.report:
        _check_report(arguments.report, arguments.dry_run)
    check_device(arguments.device)
    settings = Settings(
        quant=arguments.quant,
        text_encoder_quant=arguments.text_encoder_quant,
        type_rules=tuple(arguments.type_rule),
        target_size=parse_size(arguments.target_size) if arguments.target_size else None,
        imatrix=arguments.imatrix,
    )
    with progress() as display:
        on_measured = display.counter("measuring what types lose", "matrices")
        conversion = plan_conversion(arguments.source, arguments.output, settings, on_measured)
    check_space(conversion)
    say(conversion_text(conversion))
    if not arguments.dry_run:
        for file in conversion.files:
            _write(file, arguments.device)
        if arguments.report:
            _draw_errors(conversion, arguments.report, arguments.imatrix)
    if arguments.json:
        emit({"event": "plan" if arguments.dry_run else "result"} | conversion.summary())
    return 0


def _check_report(report: Path, dry_run: bool) -> None:
    """Better before the conversion than after it."""
    check_suffix(report)
    if dry_run:
        raise SkyrunError("--report draws what was written, --dry-run writes nothing", "leave out one of them")
    if problems := place_problems(report):
        raise SkyrunError.listing("the report cannot be written", problems, "choose another place for --report")


def _write(file: PlannedFile, device: str) -> None:
    """Write a file and show how far it is. If it stops, say what is kept."""
    try:
        with progress() as display:
            display.begin(file.path.name, file.nbytes, "bytes")
            finished = write_file(file, device)
            if before := next(finished):
                say(f"{size(before)} were finished before: going on from there")
            display.resume(before)
            for nbytes in finished:
                display.advance(nbytes)
            display.end()
    except KeyboardInterrupt:
        if (kept := partial_path(file.path)).exists():
            say(f"what is finished is kept in {kept}: run the same command again to go on from there")
        raise


def _draw_errors(conversion: Conversion, report: Path, imatrix: Path | None) -> None:
    """One picture for each transformer."""
    files = [file for file in conversion.files if file.role == "transformer"] or list(conversion.files[:1])
    for file in files:
        importances = {tensor.name: tensor.importance for tensor in file.tensors}
        with progress() as display:
            errors = compare(file.path, conversion.source, importances.get, display.counter("comparing", "bytes"))
        path = report if len(files) == 1 else report.with_stem(f"{report.stem}-{file.task}")
        weighing = f", weighted by {imatrix.name}" if imatrix else ""
        write_error_map(path, error_map(f"{file.path.name}{weighing}", errors))
        say(f"{path}: the error of every tensor of {file.path.name}")


def conversion_text(conversion: Conversion) -> str:
    """The files that will be written, with sizes, types, expected errors, and what could not be as asked."""
    rows = [("found", "file", "size", "error", "types")]
    notes = []
    for file in conversion.files:
        summary = file.summary()
        types = ", ".join(f"{count} {name}" for name, count in summary["types"].items())
        found = f"{file.task} {file.role.replace('_', ' ')}".strip()
        error = f"{file.error:.2%}{' *' * file.weighted}" if file.errors else "-"
        rows.append((found, str(file.path), size(file.nbytes), error, types))
        reasons: dict[str, list[str]] = {}
        for name, why in summary["fallbacks"].items():
            reasons.setdefault(why, []).append(name)
        notes += [f"{len(names)} matrices are F16: {why}; {names[0]}, ..." for why, names in reasons.items()]
    if any(file.errors for file in conversion.files):
        notes.append("(error: how far the outputs of matrices will be off, relative to them; from a sample of rows)")
    if any(file.weighted for file in conversion.files):
        notes.append("* weighted by importance: not to be compared with an error that is not")
    return "\n".join([table(rows), *notes, *conversion.notes])
