"""What of a request's adapters (LoRA) a model can use, and what that adds to its workload."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from skyrun.errors import SkyrunError
from skyrun.kernels.files.adapter import Fitted, Update, fit, read_adapter
from skyrun.planning.lora import Lora
from skyrun.presets import Workload
from skyrun.presets.memory import ALIGNMENT


def open_adapters(loras: Sequence[Lora], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Fitted, ...]:
    """What of the adapters a model can use; those with strength 0 add nothing and are left out.

    Raises one SkyrunError about all that cannot be used. shapes: of the model's tensors, by original name.
    """
    fitted, failures = [], []
    for lora in loras:
        try:
            fitted.append(fit(read_adapter(lora.path), shapes, lora.strength))
        except SkyrunError as error:
            failures.append(error)
    if failures:
        problems = [failure.message for failure in failures]
        first = failures[0]
        if len(failures) == 1:
            raise first
        raise SkyrunError.listing("these adapters cannot be used", problems, first.hint, first.code)
    return tuple(adapter for adapter in fitted if adapter.strength)


def with_adapters(workload: Workload, adapters: Sequence[Fitted]) -> Workload:
    """The workload with what adapters add to its blocks, which are streamed with them, and to the weights outside."""
    if not adapters:
        return workload
    blocks = [
        [update for adapter in adapters for update in adapter.within(f"blocks.{index}.").values()]
        for index in range(workload.layers)
    ]
    streamed = max(sum(_padded(part.nbytes) for update in block for part in update.parts) for block in blocks)
    outside = [update for adapter in adapters for update in adapter.outside("blocks.").values()]
    return replace(
        workload,
        block_bytes=workload.block_bytes + streamed,
        outer_bytes=workload.outer_bytes + sum(part.nbytes for update in outside for part in update.parts),
        candidates=tuple(replace(one, block_bytes=one.block_bytes + streamed) for one in workload.candidates),
        adapter_weights=max(sum(update.weights for update in block) for block in blocks),
        adapter_rank=sum(max(map(_width, adapter.updates.values())) for adapter in adapters),
    )


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _width(update: Update) -> int:
    """How many columns a layer's input is multiplied with: the rank or, of a whole matrix, as many as it has."""
    return update.rank or (min(update.shape) if len(update.shape) > 1 else 0)
