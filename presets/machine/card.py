"""A graphics card: its peak rates, and the rates that a run is expected to reach."""

from dataclasses import dataclass

from skyrun.kernels.machine.capability import FLOAT8, OLDEST

TERA, GIGA = 1e12, 1e9

# Shares of the peak that long clips reached in published measurements. In order: matmuls in bfloat16 with float32
# accumulation; matmuls with float16 accumulation, for cards where that is twice as fast; int8 matmuls including
# quantization; memory bandwidth.
_LINEAR, _LINEAR16, _INT8, _MEMORY = 0.65, 0.58, 0.42, 0.65
# Attention, exact, with int8 scores, and with values in 8 bits too, in shares of the float16 peak with float32
# accumulation: by generation of cards whose float16 accumulation is quicker, and of all others, where int8 gains
# nothing. The RTX 4090 reaches 162, 317 and 490 of 165 TFLOPS (FlashAttention-2, SageAttention and SageAttention2++,
# heads of 128, 32k tokens), and takes as long for values in int8 as in float8. The others are what steps of whole clips
# took (tests/test_published_times.py), in which nobody has seen values in 8 bits gain anything.
_ATTENTION = {
    "Turing": (0.60, 0.60, 0.60),
    "Ampere": (0.60, 1.02, 1.02),
    "Ada": (0.97, 1.92, 2.96),
    "Blackwell": (0.60, 1.35, 1.35),
}
_OTHER_ATTENTION = (0.60, 0.60, 0.60)
# Convolutions of the autoencoder in a 16-bit dtype: 0.40 on an RTX 4090, half of that on an H100.
_CONVOLUTION, _SERVER_CONVOLUTION = 0.40, 0.20
# Anything in float32, outside of tensor cores: torch uses no TF32 in matmuls, and since 2.9.1 none in 3-D convolutions
# (pytorch pull request 167024). Assumed is the share of 16 bits on an RTX 4090.
_FLOAT32 = 0.40
_LANE = {3: 0.77, 4: 1.53, 5: 3.1}  # GB/s that one lane of a PCIe generation transfers from page-locked memory
_GENERATIONS = {(7, 0): "Volta", (7, 5): "Turing", (8, 0): "Ampere", (8, 6): "Ampere", (8, 9): "Ada", (9, 0): "Hopper"}


@dataclass(frozen=True)
class Rates:
    """Operations or bytes that a machine processes per second. A multiply-add counts as two operations.

    linear, attention: operations of exact matmuls and attention. fast_linear: of matmuls in int8. int8_attention,
    full_int8_attention, fp8_attention: of attention in its other precisions. What the machine has no kernels for is 0.
    convolution: operations of the VAE in a 16-bit dtype, on a CPU in float32. decode: bytes that are read and written
    when weights are decoded. float32: operations of anything in float32 on a GPU.
    """

    linear: float
    attention: float
    fast_linear: float
    int8_attention: float
    convolution: float
    decode: float
    full_int8_attention: float = 0.0
    fp8_attention: float = 0.0
    float32: float = 0.0

    def attention_in(self, precision: str) -> float:
        """Operations of attention in a precision, 0 if the machine has no kernel for it."""
        rates = {"int8": self.int8_attention, "full-int8": self.full_int8_attention, "fp8": self.fp8_attention}
        return self.attention if precision == "exact" else rates[precision]


@dataclass(frozen=True)
class Card:
    """A graphics card.

    capability: its CUDA compute capability. vram: GiB. memory: its bandwidth in GB/s. pcie: generation and lanes.
    float16, float16_sums, int8, float32: dense peaks in 10^12 operations per second, of float16 with float32
    accumulation, of float16 with float16 accumulation, of int8, and of float32 outside of tensor cores.
    """

    name: str
    capability: tuple[int, int]
    vram: float
    memory: int
    pcie: tuple[int, int]
    float16: int
    float16_sums: int
    int8: int
    float32: int

    @property
    def bfloat16(self) -> bool:
        """Whether its tensor cores support bfloat16."""
        return self.capability >= OLDEST

    @property
    def generation(self) -> str:
        """The architecture, as NVIDIA names it."""
        return _GENERATIONS.get(self.capability, "Blackwell")

    @property
    def rates(self) -> Rates:
        """The rates that a run is expected to reach."""
        triton, halved = self.capability >= OLDEST, self.float16_sums > self.float16
        exact, int8, bits8 = _ATTENTION[self.generation] if halved else _OTHER_ATTENTION
        server = self.capability in ((7, 0), (8, 0), (9, 0), (10, 0))
        return Rates(
            linear=max(_LINEAR * self.float16, _LINEAR16 * self.float16_sums) * TERA,
            attention=exact * self.float16 * TERA,
            fast_linear=_INT8 * self.int8 * TERA if triton else 0.0,
            int8_attention=int8 * self.float16 * TERA if triton else 0.0,
            convolution=(_SERVER_CONVOLUTION if server else _CONVOLUTION) * self.float16 * TERA,
            decode=_MEMORY * self.memory * GIGA,
            full_int8_attention=bits8 * self.float16 * TERA if triton else 0.0,
            fp8_attention=bits8 * self.float16 * TERA if self.capability >= FLOAT8 else 0.0,
            float32=_FLOAT32 * self.float32 * TERA,
        )

    @property
    def link_rate(self) -> float:
        """Bytes per second from page-locked memory to the card."""
        return link_rate(*self.pcie)


def link_rate(generation: int, lanes: int) -> float:
    """Bytes per second that a PCIe link is expected to transfer."""
    return _LANE[min(5, max(3, generation))] * lanes * GIGA
