"""A graphics card: its peaks, and what of them a run is expected to reach."""

from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9

# Shares of the peak that long clips reached in published measurements; good to 15 to 30 %. Products in bfloat16 with
# sums in float32, or in float16 with float16 sums where a card is twice as quick so; products in int8 with all that
# belongs to them; attention; attention with int8 scores, in shares of plain attention; convolutions; memory.
_LINEAR, _LINEAR16, _INT8, _ATTENTION, _ATTENTION_INT8, _CONVOLUTION, _MEMORY = 0.65, 0.58, 0.42, 0.60, 1.7, 0.40, 0.65
_OLDEST = (8, 0)  # that Triton's kernels and bfloat16 are for
_LANE = {3: 0.77, 4: 1.53, 5: 3.1}  # GB/s that one lane of a PCIe generation carries from page-locked memory
_GENERATIONS = {(7, 0): "Volta", (7, 5): "Turing", (8, 0): "Ampere", (8, 6): "Ampere", (8, 9): "Ada", (9, 0): "Hopper"}


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second: operations, additions and multiplications counted singly, or bytes.

    fast_linear, fast_attention: in int8, 0 where there is none. convolution: of the autoencoder in 16 bits; it takes
    twice as long in float32 on a GPU. decode: bytes that decoding a matrix reads and writes.
    """

    linear: float
    attention: float
    fast_linear: float
    fast_attention: float
    convolution: float
    decode: float


@dataclass(frozen=True)
class Card:
    """capability: as CUDA counts it. vram: GiB. memory: GB/s. pcie: generation and lanes. Peaks in 10^12 operations
    per second, dense: float16 with float32 sums, with float16 sums, int8."""

    name: str
    capability: tuple[int, int]
    vram: float
    memory: int
    pcie: tuple[int, int]
    float16: int
    float16_sums: int
    int8: int

    @property
    def bfloat16(self) -> bool:
        """Whether tensor cores take it."""
        return self.capability >= _OLDEST

    @property
    def generation(self) -> str:
        """The architecture, as NVIDIA names it."""
        return _GENERATIONS.get(self.capability, "Blackwell")

    @property
    def rates(self) -> Rates:
        """What a run is expected to reach."""
        attention = _ATTENTION * self.float16 * TERA
        triton = self.capability >= _OLDEST
        gains = self.float16_sums > self.float16  # server cards have one rate for both sums, and int8 gains less
        return Rates(
            linear=max(_LINEAR * self.float16, _LINEAR16 * self.float16_sums) * TERA,
            attention=attention,
            fast_linear=_INT8 * self.int8 * TERA if triton else 0.0,
            fast_attention=attention * (_ATTENTION_INT8 if gains else 1.0) if triton else 0.0,
            convolution=_CONVOLUTION * self.float16 * TERA,
            decode=_MEMORY * self.memory * GIGA,
        )

    @property
    def link_rate(self) -> float:
        """Bytes per second from page-locked memory to the card."""
        return link_rate(*self.pcie)


def link_rate(generation: int, lanes: int) -> float:
    """Bytes per second that a PCIe link is expected to carry."""
    return _LANE[min(5, max(3, generation))] * lanes * GIGA
