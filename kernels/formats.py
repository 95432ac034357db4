"""The block formats of GGUF that skyrun reads: how many weights and bytes a block has."""

from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from skyrun.kernels.errors import SkyrunError

# Best first. The rest of ggml's types are not used for these models.
_NAMES = (
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"),
    *("Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"),
)


@dataclass(frozen=True)
class Format:
    """One GGUF type: `block_size` weights are stored in `block_bytes` bytes."""

    name: str
    id: int
    block_size: int
    block_bytes: int

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` weights. Raises SkyrunError when the row is not a whole number of blocks."""
        if cols % self.block_size:
            raise SkyrunError(
                f"a row of {cols} weights cannot be {self.name}: its blocks hold {self.block_size}",
                "use a type with smaller blocks, or F16",
            )
        return cols // self.block_size * self.block_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size


FORMATS: dict[str, Format] = {
    name: Format(name, int(GGMLQuantizationType[name]), *GGML_QUANT_SIZES[GGMLQuantizationType[name]])
    for name in _NAMES
}
BY_ID: dict[int, Format] = {format.id: format for format in FORMATS.values()}


def block_format(name: str) -> Format:
    """The format called `name`; SkyrunError lists the known ones."""
    if name not in FORMATS:
        raise SkyrunError(f"unknown type {name!r}", f"known types: {', '.join(FORMATS)}")
    return FORMATS[name]
