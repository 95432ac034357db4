"""Which type each tensor gets, given the type asked for the file."""

from dataclasses import dataclass

from gguf.constants import LlamaFileType

from skyrun.kernels import FORMATS, block_format
from skyrun.kernels.errors import SkyrunError

# What `--quant` accepts, and the number that general.file_type says it with.
FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_K": LlamaFileType.MOSTLY_Q4_K_S,
}


@dataclass(frozen=True)
class Choice:
    """The type of one tensor, and why it is not the one asked for, if it is not."""

    type: str
    fallback: str = ""


def check_quant(quant: str) -> None:
    """SkyrunError unless `quant` is a type that a file can be written in."""
    if quant not in FILE_TYPES:
        raise SkyrunError(f"cannot write a file of type {quant!r}", f"types: {', '.join(FILE_TYPES)}")


def default_text_encoder_quant(quant: str) -> str:
    """The text encoder's type when none is asked for: as the transformer's, but never below Q8_0.

    It runs once per clip and its error is in every step, so bits saved here buy nothing.
    """
    return quant if block_format(quant).bits_per_weight >= FORMATS["Q8_0"].bits_per_weight else "Q8_0"


def _linear(quant: str, shape: tuple[int, ...]) -> Choice:
    format = block_format(quant)
    if shape[-1] % format.block_size:
        return Choice("F16", f"rows of {shape[-1]} are not a multiple of {quant}'s {format.block_size}")
    return Choice(quant)


def tensor_type(role: str, name: str, shape: tuple[int, ...], source: str, quant: str) -> Choice:
    """Matrices of the blocks, and a text encoder's table of embeddings, get `quant`; the rest keeps its precision.

    Other matrices keep their source type. Norms, biases, modulation and convolutions are F32: readers of GGUF use
    those as they are, without a decode.
    """
    kept = source if source in ("F32", "F16", "BF16") else "BF16"
    if not quant:
        return Choice(kept)
    if len(shape) != 2 or name.endswith("attn_rel_b.weight"):
        return Choice("F32")
    if role != "transformer" or name.startswith("blocks."):
        return _linear(quant, shape)
    return Choice("F32" if quant == "F32" else kept)
