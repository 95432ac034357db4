"""What each command does: call one function, show what it says."""

from argparse import Namespace
from pathlib import Path

from skyrun.cli.console import emit, say
from skyrun.errors import FAILED, WILL_NOT_FIT


def run(arguments: Namespace) -> int:
    """Make clips, or say with --dry-run how they would be made."""
    from skyrun.cli.commands.run import run_clips

    return run_clips(arguments)


def plan(arguments: Namespace) -> int:
    """Say what would run, here or on another machine. Exit code 3 if it will not fit."""
    from skyrun.cli.plan_report import planned_text
    from skyrun.planning.request import Request
    from skyrun.planning.what_if import plan_request, stated_hardware

    _use_pulled_model(arguments)
    request = Request(
        arguments.task,
        "",
        model=arguments.model,
        quant=arguments.quant,
        resolution=arguments.resolution,
        seconds=arguments.seconds,
        prefer=arguments.prefer,
    )
    parts = (arguments.gpu, arguments.vram, arguments.ram, arguments.disk)
    planned = plan_request(request, stated_hardware(arguments.preset, *parts, arguments.model))
    if arguments.plot:
        from skyrun.cli.plan_chart import write_plan_picture

        write_plan_picture(arguments.plot, planned)
        say(f"{arguments.plot}: memory over the run, and the time of a step against its tokens")
    if arguments.json:
        emit({"event": "plan"} | planned.as_json())
    else:
        print(planned_text(planned))
    return WILL_NOT_FIT if planned.plan.problem else 0


def _use_pulled_model(arguments: Namespace) -> None:
    """On this machine, plan with the model that a run would take; say so if it is not there."""
    from skyrun.hub.store import sources_text, wanted_name, whole_folder

    elsewhere = (arguments.gpu, arguments.preset, arguments.vram, arguments.ram, arguments.disk)
    name = wanted_name(str(arguments.model) if arguments.model else None, arguments.task, arguments.quant)
    if name is None or any(value is not None for value in elsewhere):
        return
    if folder := whole_folder(name):
        arguments.model, arguments.quant = folder, None
    else:
        say(sources_text(name))
        arguments.model, arguments.quant = None, name.quant or None


def tune(arguments: Namespace) -> int:
    """Measure this machine, keep it, and show what plans were made with before and are made with now."""
    from skyrun.cli.commands.tune import tune

    return tune(arguments)


def resume(arguments: Namespace) -> int:
    """Go on with a clip whose run ended early."""
    from skyrun.cli.commands.run import resume_clip

    return resume_clip(arguments)


def demo(arguments: Namespace) -> int:
    """Build a small model, convert it, and make a clip with it."""
    from skyrun.cli.commands.run import follow
    from skyrun.cli.demo import run_demo

    summary = run_demo(arguments.output, say, lambda job: follow(job, arguments.json))
    if arguments.json:
        emit({"event": "result"} | summary)
    return 0


def pull(arguments: Namespace) -> int:
    """Fetch a model, or say what would be fetched."""
    from skyrun.cli.commands.pull import pull

    return pull(arguments)


def list_models(arguments: Namespace) -> int:
    """Say which models were fetched."""
    from skyrun.cli.commands.pull import list_models

    return list_models(arguments)


def remove(arguments: Namespace) -> int:
    """Delete a model that was fetched."""
    from skyrun.cli.commands.pull import remove

    return remove(arguments)


def convert(arguments: Namespace) -> int:
    """Plan a conversion, print it, write it, and draw what it lost."""
    from skyrun.cli.progress import shown
    from skyrun.cli.report import conversion_text
    from skyrun.quant.plan import Settings
    from skyrun.quant.target_size import parse_size
    from skyrun.tools import convert as tool

    if arguments.report:
        tool.check_report(arguments.report, arguments.dry_run)
    settings = Settings(
        quant=arguments.quant,
        text_encoder_quant=arguments.text_encoder_quant,
        type_rules=tuple(arguments.type_rule),
        target_size=parse_size(arguments.target_size) if arguments.target_size else None,
        imatrix=arguments.imatrix,
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


def calibrate(arguments: Namespace) -> int:
    """Collect importance, or merge files of it."""
    from skyrun.cli.report import importance_text
    from skyrun.quant.importance import read_importance
    from skyrun.tools.calibrate import merge_files

    if arguments.merge:
        importance = merge_files(arguments.merge, arguments.output)
    else:
        _calibrate(arguments)
        importance = read_importance(arguments.output)
    say(importance_text(arguments.output, importance))
    if arguments.json:
        summary = {"output": str(arguments.output), "weights": len(importance.sums), "clips": importance.chunks}
        emit({"event": "result"} | summary)
    return 0


def _calibrate(arguments: Namespace) -> None:
    from tempfile import TemporaryDirectory

    from skyrun.cli.batch import read_prompts
    from skyrun.cli.progress import shown
    from skyrun.cli.report import calibration_text
    from skyrun.tools.calibrate import collect, collected_clips, plan_calibration
    from skyrun.tools.calibration_prompts import FRAMES, PROMPTS, draw_pictures

    prompts = read_prompts(arguments.prompts) if arguments.prompts else PROMPTS
    with TemporaryDirectory(prefix="skyrun-") as folder:
        calibration = plan_calibration(
            arguments.model,
            arguments.output,
            prompts,
            arguments.image or draw_pictures(Path(folder))[: len(prompts)],
            seed=arguments.seed,
            size=arguments.size,
            resolution=arguments.resolution or "480P",
            frames=FRAMES if arguments.frames is arguments.seconds is None else arguments.frames,
            seconds=arguments.seconds,
            steps=arguments.steps,
            device=arguments.device,
            dtype=arguments.dtype,
            max_vram=arguments.max_vram,
            max_ram=arguments.max_ram,
        )
        say(calibration_text(calibration))
        if calibration.pending:
            try:
                shown(collect(calibration), arguments.json)
            except BaseException:
                if clips := collected_clips(calibration):
                    kept = f"{clips} of {len(calibration.clips)} clips are in {calibration.output}"
                    say(f"{kept}: the same command goes on")
                raise


def info(arguments: Namespace) -> int:
    """Describe a file, and compare it with its source."""
    from skyrun.cli.report import description_text, errors_text
    from skyrun.tools.inspect import describe

    description = describe(arguments.file)
    text = description_text(description)
    if arguments.against:
        from skyrun.cli.progress import shown
        from skyrun.tools.convert import compare

        errors = shown(compare(arguments.file, arguments.against), False)
        description["errors"] = [error.as_json() for error in errors]
        text = f"{text}\nerror against {arguments.against}:\n{errors_text(errors)}"
    if arguments.json:
        emit(description)
    else:
        print(text)
    return 0


def doctor(arguments: Namespace) -> int:
    """Check the machine. Exit code 1 if something will fail."""
    from skyrun.tools.doctor import examine

    findings = examine()
    if arguments.json:
        emit({"findings": [finding.as_json() for finding in findings]})
    else:
        for finding in findings:
            print(finding.text())
    return FAILED if any(finding.verdict == "fails" for finding in findings) else 0


def bench(arguments: Namespace) -> int:
    """Measure this machine. Exit code 1 if a kernel is wrong."""
    from skyrun.cli.commands.bench import bench

    return bench(arguments)


def completion(arguments: Namespace) -> int:
    """Print a shell's script."""
    from shtab import complete

    from skyrun.cli.parser import parser

    print(complete(parser(), arguments.shell))
    return 0
