"""The GGUF types that skyrun reads: how many weights a block holds, and in how many bytes."""

from dataclasses import dataclass

from skyrun.kernels.errors import SkyrunError


@dataclass(frozen=True)
class Format:
    """One GGUF type: `block_size` weights are stored in `block_bytes` bytes."""

    name: str
    id: int
    block_size: int
    block_bytes: int

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` weights. Raises SkyrunError if the row is not a whole number of blocks."""
        if cols % self.block_size:
            raise SkyrunError(
                f"a row of {cols} weights cannot be {self.name}: its blocks hold {self.block_size}",
                "use a type with smaller blocks, or F16",
            )
        return cols // self.block_size * self.block_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size


# Best quality first. Written out because importing gguf-py takes 0.2 s and imports numpy; a test compares this table
# with it. ggml's other types are not used for these models.
FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("F32", 0, 1, 4),
        Format("F16", 1, 1, 2),
        Format("BF16", 30, 1, 2),
        Format("Q8_0", 8, 32, 34),
        Format("Q6_K", 14, 256, 210),
        Format("Q5_K", 13, 256, 176),
        Format("Q4_K", 12, 256, 144),
        Format("Q3_K", 11, 256, 110),
        Format("Q2_K", 10, 256, 84),
        Format("Q5_1", 7, 32, 24),
        Format("Q5_0", 6, 32, 22),
        Format("Q4_1", 3, 32, 20),
        Format("Q4_0", 2, 32, 18),
        Format("IQ4_NL", 20, 32, 18),
        Format("IQ4_XS", 23, 256, 136),
    )
}
BY_ID: dict[int, Format] = {format.id: format for format in FORMATS.values()}


def block_format(name: str) -> Format:
    """The format called `name`. The SkyrunError for an unknown one lists those that are known."""
    if name not in FORMATS:
        raise SkyrunError(f"unknown type {name!r}", f"known types: {', '.join(FORMATS)}")
    return FORMATS[name]
