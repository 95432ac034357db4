"""Stop a run whose values have become infinite or NaN: all that would follow is computed from them."""

from pathlib import Path

from torch import Tensor

from skyrun.errors import FAILED, SkyrunError
from skyrun.kernels.float16_sums import are_finite
from skyrun.models.folder import ModelFiles
from skyrun.presets import Plan


def check_output(output: Tensor, file: Path) -> None:
    """Raise SkyrunError if what a model of that file has made is not finite. Call it where the host waits anyway."""
    if not are_finite([output]):
        message = f"what {file} makes is infinite or NaN: the file is damaged"
        raise SkyrunError(message, "pull or convert it again", FAILED)


def check_step(latents: Tensor, step: int, steps: int, files: ModelFiles, plan: Plan) -> None:
    """Raise SkyrunError, with what may have caused it, if the latents after a step are not finite.

    Args:
        latents: on the host.
        step: the number of the step, from 1 on.
        steps: how many there are.
        files: the transformer and its adapters.
        plan: dtype of the activations.
    """
    if are_finite([latents]):
        return
    causes, cures = [], []
    if files.adapters:
        names = ", ".join(adapter.path.name for adapter in files.adapters)
        causes.append(f"an adapter is damaged, or too strong ({names})")
        cures.append("try it without --lora, or with less of it, such as F:0.5")
    if plan.dtype == "float16":
        causes.append("values left the range of float16")
        cures.append("--dtype float32 has a larger range")
    causes.append(f"{files.transformer.path.name} is damaged")
    cures.append(f"pull or convert {files.transformer.path.name} again")
    message = f"after step {step} of {steps} the latents are infinite or NaN: {', or '.join(causes)}"
    raise SkyrunError(message, "; ".join(cures), FAILED)
