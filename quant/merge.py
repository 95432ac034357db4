"""Merge adapters (LoRA) into a transformer before it is quantized."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.files.adapter import Fitted, Update, fit, read_adapter
from skyrun.kernels.files.safetensors_header import StoredTensor
from skyrun.quant.sources.families import Family
from skyrun.quant.sources.source import Added, SourceTensor

Lora = tuple[Path, float]  # an adapter file, and how much of it is added


def merged(family: Family, loras: Sequence[Lora]) -> tuple[Family, tuple[str, ...]]:
    """A transformer whose tensors have adapters added, and sentences about what of these is not used.

    Raises SkyrunError for an adapter of which nothing fits.
    """
    shapes = {tensor.name: tensor.shape for tensor in family.tensors}
    adapters = [fit(read_adapter(path), shapes, strength) for path, strength in loras]
    added: dict[str, list[Added]] = defaultdict(list)
    for adapter in adapters:
        for name, update in adapter.updates.items():
            if adapter.strength:
                added[name].append(_added(adapter, update))
    tensors = tuple(
        replace(tensor, source=replace(tensor.source, added=tuple(added[tensor.name])))
        if tensor.name in added
        else tensor
        for tensor in family.tensors
    )
    return replace(family, tensors=tensors), tuple(notice for adapter in adapters for notice in adapter.notices)


def check_merge(transformers: Sequence[Family], loras: Sequence[Lora]) -> None:
    """Raise SkyrunError if there is not just one transformer to merge adapters into."""
    if loras and len(transformers) != 1:
        count = "none" if not transformers else f"{len(transformers)}: {', '.join(f.task or '?' for f in transformers)}"
        hint = "give the folder of one transformer" if transformers else "leave out --lora"
        raise SkyrunError(f"--lora is about one transformer, the source has {count}", hint)


def _added(adapter: Fitted, update: Update) -> Added:
    def source(stored: StoredTensor) -> SourceTensor:
        return SourceTensor(update.name, stored.shape, stored.dtype, adapter.path, stored.offset)

    down = source(update.down) if update.down else None
    return Added(source(update.up), down, adapter.strength * update.scale)
