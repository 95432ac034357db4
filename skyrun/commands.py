"""What each command does: call one function, show what it says."""

import json
import shlex
import sys
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from skyrun.errors import FAILED, WILL_NOT_FIT, SkyrunError


def _say(text: str = "") -> None:
    print(text, file=sys.stderr)


def _emit(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def run(arguments: Namespace) -> int:
    """Make a clip, or say with --dry-run how it would be made."""
    from skyrun.locate import located
    from skyrun.request import Request
    from skyrun.resume import continue_or_start

    _force_preset(arguments)
    request = Request(
        task=arguments.task,
        prompt=arguments.prompt,
        images=tuple(arguments.image),
        video=arguments.video,
        audio=arguments.audio,
        transition=arguments.transition,
        join=arguments.join,
        output=arguments.output,
        quant=arguments.quant,
        size=arguments.size,
        resolution=arguments.resolution,
        frames=arguments.frames,
        seconds=arguments.seconds,
        steps=arguments.steps,
        seed=arguments.seed,
        device=arguments.device,
        dtype=arguments.dtype,
        precision=arguments.precision,
        max_vram=arguments.max_vram,
        max_ram=arguments.max_ram,
        save_latents=arguments.save_latents,
    )
    request, missing = located(request, arguments.model, _say, arguments.dry_run)
    if missing is not None:
        _say("without --dry-run this is fetched first, then the clip is made")
        if arguments.json:
            _emit({"event": "pull"} | missing.as_json())
        return 0
    job, state = continue_or_start(request)
    if job.request.output is None:
        output = _free_name(f"{request.task}-{job.request.seed}", ".mp4")
        job = replace(job, request=replace(job.request, output=output))
    return _make(job, state, arguments.json, arguments.dry_run)


def _force_preset(arguments: Namespace) -> None:
    """Limits of the preset that is asked for, where no others are given."""
    from skyrun.presets.named import preset_limits

    if arguments.preset == "cpu":
        arguments.device = arguments.device or "cpu"
    elif arguments.preset:
        for name, limit in preset_limits(arguments.preset).items():
            if getattr(arguments, name) is None:
                setattr(arguments, name, limit)


def plan(arguments: Namespace) -> int:
    """Say what would run, here or on another machine. Exit code 3 if it will not fit."""
    from skyrun.plan_report import planned_text
    from skyrun.planning import plan_from

    planned = plan_from(arguments)
    if arguments.plot:
        from skyrun.plan_picture import write_picture

        write_picture(arguments.plot, planned)
        _say(f"{arguments.plot}: memory over the run, and the time of a step against its tokens")
    if arguments.json:
        _emit({"event": "plan"} | planned.as_json())
    else:
        print(planned_text(planned))
    return WILL_NOT_FIT if planned.plan.problem else 0


def tune(arguments: Namespace) -> int:
    """Measure this machine, keep it, and show what plans were made with before and are made with now."""
    from skyrun.tuning_report import tune_and_tell

    summary, text = tune_and_tell(arguments.device, arguments.model)
    if arguments.json:
        _emit({"event": "result"} | summary)
    else:
        print(text)
    return 0


def resume(arguments: Namespace) -> int:
    """Go on with a clip whose run ended early."""
    from skyrun.resume import resume

    limits = {"device": arguments.device, "max_vram": arguments.max_vram, "max_ram": arguments.max_ram}
    return _make(*resume(arguments.file, **limits), arguments.json)


def _make(job: Any, state: Any, as_json: bool, dry_run: bool = False) -> int:
    """Make the clip of a job.Job, or what is missing of it after a run_state.RunState."""
    from skyrun.report import plan_text, result_text, state_text

    _say(plan_text(job))
    if state is not None:
        _say(state_text(job, state))
    if as_json:
        _emit({"event": "plan"} | job.as_json())
    if dry_run:
        return 0
    result = follow(job, as_json, state)
    _say(result_text(result))
    if as_json:
        stages: dict[str, float] = {}
        for stage in result.stages:
            stages[stage.stage] = round(stages.get(stage.stage, 0.0) + stage.seconds, 3)
        _emit({"event": "result", "output": str(result.output), "seed": result.request.seed, "seconds": stages})
    return 0


def _free_name(stem: str, suffix: str) -> Path:
    """A name in the current folder that no clip has, finished or not."""
    from skyrun.run_state import state_path

    path, number = Path(stem + suffix), 1
    while path.exists() or state_path(path).exists():
        path, number = Path(f"{stem}-{number}{suffix}"), number + 1
    return path


def follow(job: Any, as_json: bool, state: Any = None) -> Any:
    """Run a job.Job, from a run_state.RunState on, and show its events. The value is a runner.Result."""
    from skyrun.events import as_json as event_json
    from skyrun.forecast import Forecast
    from skyrun.interrupts import raise_if_asked
    from skyrun.progress import progress
    from skyrun.runner import run_job

    events, forecast = run_job(job, keep_frames=False, state=state), Forecast(job.plan)
    try:
        with progress() as display:
            while True:
                try:
                    event = next(events)
                except StopIteration as stop:
                    return stop.value
                display.show(event)
                if (notice := forecast.after(event)) is not None:
                    display.show(notice)
                if as_json:
                    _emit(event_json(event))
                raise_if_asked()
    except BaseException as error:
        with suppress(BaseException):  # this one again, or what became of it
            events.throw(error)  # the run saves its state, unless the error came from there: then it has
        _say_what_is_kept(job, error)
        raise


def _say_what_is_kept(job: Any, error: BaseException) -> None:
    from skyrun.run_state import state_path

    for note in getattr(error, "__notes__", ()):
        _say(note)
    if (kept := state_path(job.request.output)).exists():
        _say(f"what is finished is kept; go on with: skyrun resume {shlex.quote(str(kept))}")


def demo(arguments: Namespace) -> int:
    """Build a small model, convert it, and make a clip with it."""
    from skyrun.demo import run_demo

    summary = run_demo(arguments.output, _say, lambda job: follow(job, arguments.json))
    if arguments.json:
        _emit({"event": "result"} | summary)
    return 0


def pull(arguments: Namespace) -> int:
    """Fetch a model, or say what would be fetched."""
    from skyrun.locate import obtain
    from skyrun.pulled import parse_name

    pull = obtain(parse_name(arguments.model, arguments.quant), _say, arguments.output, arguments.dry_run)
    if not arguments.dry_run:
        _say(f"{pull.folder}: ready, for skyrun run ... --model {shlex.quote(str(arguments.output or pull.name))}")
    if arguments.json:
        _emit({"event": "plan" if arguments.dry_run else "result"} | pull.as_json())
    return 0


def convert(arguments: Namespace) -> int:
    """Plan a conversion, print it, write it, and draw what it lost."""
    from skyrun.progress import progress
    from skyrun.quant.conversion import check_device, check_space
    from skyrun.quant.plan import Settings
    from skyrun.quant.planner import plan_conversion
    from skyrun.quant.target_size import parse_size
    from skyrun.report import conversion_text

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
    _say(conversion_text(conversion))
    if not arguments.dry_run:
        for file in conversion.files:
            _write(file, arguments.device)
        if arguments.report:
            _draw_errors(conversion, arguments.report, arguments.imatrix)
    if arguments.json:
        _emit({"event": "plan" if arguments.dry_run else "result"} | conversion.summary())
    return 0


def _check_report(report: Path, dry_run: bool) -> None:
    """Better before the conversion than after it."""
    from skyrun.quant.error_map import check_suffix
    from skyrun.request import place_problems

    check_suffix(report)
    if dry_run:
        raise SkyrunError("--report draws what was written, --dry-run writes nothing", "leave out one of them")
    if problems := place_problems(report):
        raise SkyrunError.listing("the report cannot be written", problems, "choose another place for --report")


def _write(file: Any, device: str) -> None:
    """Write a plan.PlannedFile and show how far it is. If it stops, say what is kept."""
    from skyrun.progress import progress, size
    from skyrun.quant.conversion import write_file
    from skyrun.quant.partial import partial_path

    try:
        with progress() as display:
            display.begin(file.path.name, file.nbytes, "bytes")
            finished = write_file(file, device)
            if before := next(finished):
                _say(f"{size(before)} were finished before: going on from there")
            display.resume(before)
            for nbytes in finished:
                display.advance(nbytes)
            display.end()
    except KeyboardInterrupt:
        if (kept := partial_path(file.path)).exists():
            _say(f"what is finished is kept in {kept}: run the same command again to go on from there")
        raise


def _draw_errors(conversion: Any, report: Path, imatrix: Path | None) -> None:
    """One picture for each transformer; the conversion is a plan.Conversion."""
    from skyrun.progress import progress
    from skyrun.quant.compare import compare
    from skyrun.quant.error_map import error_map, write_error_map

    files = [file for file in conversion.files if file.role == "transformer"] or list(conversion.files[:1])
    for file in files:
        importances = {tensor.name: tensor.importance for tensor in file.tensors}
        with progress() as display:
            errors = compare(file.path, conversion.source, importances.get, display.counter("comparing", "bytes"))
        path = report if len(files) == 1 else report.with_stem(f"{report.stem}-{file.task}")
        weighing = f", weighted by {imatrix.name}" if imatrix else ""
        write_error_map(path, error_map(f"{file.path.name}{weighing}", errors))
        _say(f"{path}: the error of every tensor of {file.path.name}")


def calibrate(arguments: Namespace) -> int:
    """Collect importance, or merge files of it."""
    from skyrun.calibration import merge_files
    from skyrun.quant.importance import read_importance
    from skyrun.report import importance_text

    if arguments.merge:
        importance = merge_files(arguments.merge, arguments.output)
    else:
        _calibrate(arguments)
        importance = read_importance(arguments.output)
    _say(importance_text(arguments.output, importance))
    if arguments.json:
        summary = {"output": str(arguments.output), "weights": len(importance.sums), "clips": importance.chunks}
        _emit({"event": "result"} | summary)
    return 0


def _calibrate(arguments: Namespace) -> None:
    from tempfile import TemporaryDirectory

    from skyrun.calibration import plan_calibration, read_prompts
    from skyrun.calibration_clips import FRAMES, PROMPTS, draw_pictures
    from skyrun.report import calibration_text

    prompts = read_prompts(arguments.prompts) if arguments.prompts else PROMPTS
    with TemporaryDirectory(prefix="skyrun-") as folder:
        calibration = plan_calibration(
            arguments.model,
            arguments.output,
            prompts,
            arguments.image or draw_pictures(Path(folder))[: len(prompts)],
            seed=arguments.seed,
            size=arguments.size,
            resolution=arguments.resolution,
            frames=FRAMES if arguments.frames is arguments.seconds is None else arguments.frames,
            seconds=arguments.seconds,
            steps=arguments.steps,
            device=arguments.device,
            dtype=arguments.dtype,
            max_vram=arguments.max_vram,
            max_ram=arguments.max_ram,
        )
        _say(calibration_text(calibration))
        if calibration.pending:
            _follow_calibration(calibration, arguments.json)


def _follow_calibration(calibration: Any, as_json: bool) -> None:
    """Run the pending clips of a calibration.Calibration and show its events. If it stops, say what is kept."""
    from skyrun.calibration import collect
    from skyrun.events import Progress
    from skyrun.events import as_json as event_json
    from skyrun.progress import progress

    finished = len(calibration.clips) - len(calibration.pending)
    try:
        with progress() as display:
            for event in collect(calibration):
                display.show(event)
                if as_json:
                    _emit(event_json(event))
                if isinstance(event, Progress) and event.done == int(event.done):
                    finished += 1
    except BaseException:
        if finished:
            _say(f"{finished} of {len(calibration.clips)} clips are in {calibration.output}: the same command goes on")
        raise


def info(arguments: Namespace) -> int:
    """Describe a file, and compare it with its source."""
    from skyrun.inspection import describe
    from skyrun.report import description_text, errors_text

    description = describe(arguments.file)
    text = description_text(description)
    if arguments.against:
        from skyrun.progress import progress
        from skyrun.quant.compare import compare

        with progress() as display:
            errors = compare(arguments.file, arguments.against, on_done=display.counter("comparing", "bytes"))
        description["errors"] = [error.as_json() for error in errors]
        text = f"{text}\nerror against {arguments.against}:\n{errors_text(errors)}"
    if arguments.json:
        _emit(description)
    else:
        print(text)
    return 0


def doctor(arguments: Namespace) -> int:
    """Check the machine. Exit code 1 if something will fail."""
    from skyrun.doctor import examine

    findings = examine()
    if arguments.json:
        _emit({"findings": [finding.as_json() for finding in findings]})
    else:
        for finding in findings:
            print(finding.text())
    return FAILED if any(finding.verdict == "fails" for finding in findings) else 0


def bench(arguments: Namespace) -> int:
    """Measure this machine. Exit code 1 if a kernel is wrong."""
    from skyrun.bench import command

    return (command.kernels if arguments.what == "kernels" else command.step)(arguments, _say, _emit)
