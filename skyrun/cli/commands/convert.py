"""`skyrun convert`: convert a checkpoint to GGUF files."""

from argparse import Namespace

from skyrun.cli.console import emit, say
from skyrun.cli.progress import shown
from skyrun.hub.adapters import fetch_adapters
from skyrun.planning.lora import parse_lora
from skyrun.quant.choose.target_size import parse_size
from skyrun.quant.plan import Conversion, Settings
from skyrun.tools import convert as tool
from skyrun.units import size, table


def execute(arguments: Namespace) -> int:
    """Plan a conversion, print it, write the files, and draw their errors."""
    if arguments.report:
        tool.check_report(arguments.report, arguments.dry_run)
    adapters = shown(fetch_adapters([parse_lora(text) for text in arguments.lora], arguments.dry_run), False)
    settings = Settings(
        quant=arguments.quant,
        text_encoder_quant=arguments.text_encoder_quant,
        type_rules=tuple(arguments.type_rule),
        target_size=parse_size(arguments.target_size) if arguments.target_size else None,
        imatrix=arguments.imatrix,
        loras=tuple((lora.path, lora.strength) for lora in adapters),
    )
    conversion = shown(tool.plan(arguments.source, arguments.output, settings, arguments.device), False)
    say(conversion_text(conversion))
    if not arguments.dry_run:
        try:
            shown(tool.write(conversion, arguments.device), False)
        except KeyboardInterrupt:
            for kept in tool.unfinished(conversion):
                say(f"what is finished is kept in {kept}: run the same command again to go on from there")
            raise
        if arguments.report:
            shown(tool.draw_errors(conversion, arguments.report, arguments.imatrix), False)
    if arguments.json:
        emit({"event": "plan" if arguments.dry_run else "result"} | conversion.summary())
    return 0


def conversion_text(conversion: Conversion) -> str:
    """The files that will be written, with sizes, types, expected errors and fallbacks."""
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
        notes += [f"{len(names)} matrices have another type: {why}; {names[0]}, ..." for why, names in reasons.items()]
    if any(file.errors for file in conversion.files):
        notes.append("(error: how far the outputs of matrices will be off, relative to them; from a sample of rows)")
    if any(file.weighted for file in conversion.files):
        notes.append("* weighted by importance: not to be compared with an error that is not")
    return "\n".join([table(rows), *notes, *conversion.notes])
