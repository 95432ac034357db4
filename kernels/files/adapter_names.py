"""Names in adapter files (LoRA): which tensor of a transformer an entry changes, and what part of the change it is.

Adapters name layers as the original model or as diffusers does, behind prefixes of several programs, or, as kohya's
trainers do, with underscores in place of dots.
"""

import re
from functools import cache
from typing import NamedTuple

from skyrun.kernels.name_tables import TRANSFORMERS

# What ends a name, behind that of the layer.
_ENDINGS = (
    ("down", re.compile(r"(.+)\.(?:lora_down|lora_A|lora_A\.\w+|lora\.down|lora_linear_layer\.down)\.weight")),
    ("up", re.compile(r"(.+)\.(?:lora_up|lora_B|lora_B\.\w+|lora\.up|lora_linear_layer\.up)\.weight")),
    ("alpha", re.compile(r"(.+)\.alpha")),
    ("difference", re.compile(r"(.+)\.(?:diff|w_norm)")),
    ("bias", re.compile(r"(.+)\.(?:diff_b|b_norm)")),
    ("modulation", re.compile(r"(.+)\.diff_m")),
)
_KINDS = (  # of adapters that add something else than a product of two matrices
    ("LoHa", re.compile(r".+\.hada_[wt]\d.*")),
    ("LoKr", re.compile(r".+\.lokr_[wt]\d.*")),
    ("DoRA", re.compile(r".+\.(dora_scale|lora_magnitude_vector.*)")),
    ("OFT", re.compile(r".+\.(oft_.+|vera_.+)")),
    ("LoCon with a core tensor", re.compile(r".+\.lora_mid\.weight")),
    ("GLoRA", re.compile(r".+\.[ab][12]\.weight")),
)
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "model.",
    "unet.",
    "dit.",
)
_UNDERSCORED = re.compile(r"(?:lora_unet|lora_transformer|lycoris)_+(.+)")
_TEXT = re.compile(r"(lora_te\d*_|text_encoders?\.|te\d*\.|text_model\.|conditioner\.|t5\.|umt5\.).*")
_BLOCK = re.compile(r"blocks_(\d{1,5})_(.+)")


class Entry(NamedTuple):
    """A tensor of an adapter. part: "down", "up" or "alpha" of a product; "difference", that of the tensor itself.

    tensor: the one that it changes, by its original name.
    """

    part: str
    tensor: str


def entry_of(name: str) -> Entry | None:
    """What a tensor of an adapter is; None if it is no part of a change to a transformer's tensor."""
    for part, pattern in _ENDINGS:
        if found := pattern.fullmatch(name):
            if part == "bias":
                tensor = _tensor(found[1], ".bias")
            elif part == "modulation":
                tensor = _tensor(found[1], ".modulation") or _tensor(found[1], "")
            else:
                tensor = _tensor(found[1], ".weight") or _tensor(found[1], "")
            kept = part if part in ("down", "up", "alpha") else "difference"
            return Entry(kept, tensor) if tensor else None
    return None


def is_for_text(name: str) -> bool:
    """Whether a tensor of an adapter is for a text encoder."""
    return _TEXT.fullmatch(name) is not None


def other_kind(name: str) -> str:
    """The kind of adapter that has a tensor of this name, if it is none that adds products; otherwise ""."""
    return next((kind for kind, pattern in _KINDS if pattern.fullmatch(name)), "")


def layer_of(name: str) -> str:
    """The layer that a tensor of an adapter names, as it names it."""
    return next((found[1] for _, pattern in _ENDINGS if (found := pattern.fullmatch(name))), name)


def _tensor(layer: str, ending: str) -> str:
    """The original name of a layer's tensor; "" if no transformer has it."""
    if flat := _UNDERSCORED.fullmatch(layer):
        numbered = _BLOCK.fullmatch(flat[1])
        pattern = f"blocks_{{n}}_{numbered[2]}" if numbered else flat[1]
        layer = _with_dots().get(pattern, "").replace("{n}", numbered[1] if numbered else "")
    while prefix := next((prefix for prefix in _PREFIXES if layer.startswith(prefix)), ""):
        layer = layer.removeprefix(prefix)
    for table in TRANSFORMERS:
        for naming in range(len(table.namings)):
            if place := table.locate(layer + ending, naming):
                row, index = place
                return row.name() if index is None else row.for_block(index).name()
    return ""


@cache
def _with_dots() -> dict[str, str]:
    """Layers by their names with underscores; `{n}` stands for the index of the block."""
    names = [name for table in TRANSFORMERS for row in table.rows for name in row.names]
    layers = {name.removesuffix(".weight").removesuffix(".bias") for name in names}
    return {layer.replace(".", "_"): layer for layer in layers}
