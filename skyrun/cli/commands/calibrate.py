"""`skyrun calibrate`: collect importance, or merge files of importance."""

from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from skyrun.cli.batch import read_prompts
from skyrun.cli.console import emit, say
from skyrun.cli.progress import shown
from skyrun.hub.local import model_path
from skyrun.kernels.formats import FORMATS
from skyrun.quant.choose.importance import Importance, read_importance
from skyrun.tools.calibrate import Calibration, collect, collected_clips, merge_files, plan_calibration
from skyrun.tools.calibration_prompts import FRAMES, PROMPTS, draw_images


def execute(arguments: Namespace) -> int:
    """Collect importance, or merge files of importance."""
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
    prompts = read_prompts(arguments.prompts) if arguments.prompts else PROMPTS
    with TemporaryDirectory(prefix="skyrun-") as folder:
        calibration = plan_calibration(
            model_path(arguments.model),
            arguments.output,
            prompts,
            arguments.image or draw_images(Path(folder))[: len(prompts)],
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
            _collect(calibration, arguments.json)


def _collect(calibration: Calibration, as_json_too: bool) -> None:
    """Run the pending clips and show progress. If that is interrupted, say what is kept."""
    try:
        shown(collect(calibration), as_json_too)
    except BaseException:
        if clips := collected_clips(calibration):
            say(f"{clips} of {len(calibration.clips)} clips are in {calibration.output}: the same command goes on")
        raise


def calibration_text(calibration: Calibration) -> str:
    """What will be collected, and what has been collected already."""
    total, pending = len(calibration.clips), len(calibration.pending)
    lines = [calibration.origin]
    if pending < total:
        lines.append(f"{total - pending} of {total} clips are in {calibration.output} already")
    if FORMATS[calibration.model_type].bits_per_weight < FORMATS["Q8_0"].bits_per_weight:
        lines.append(f"the model is {calibration.model_type}: its errors are measured too, Q8_0 or BF16 is better")
    return "\n".join(lines)


def importance_text(path: Path, importance: Importance) -> str:
    """A summary of a file of importance."""
    rows = max(importance.counts.values())
    return f"{path}: {len(importance.sums)} weights, {importance.chunks} clips, up to {rows} rows each"
