"""Graphics cards that are not at hand, as data, and what of their peaks a run is expected to reach."""

import re
from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9

# Shares of the peak that long clips reached in published measurements; good to 15 to 30 %. Products in bfloat16 with
# sums in float32, or in float16 with float16 sums where a card is twice as quick so; products in int8 with all that
# belongs to them; attention; attention with int8 scores, in shares of plain attention; convolutions; memory.
_LINEAR, _LINEAR16, _INT8, _ATTENTION, _ATTENTION_INT8, _CONVOLUTION, _MEMORY = 0.65, 0.58, 0.42, 0.60, 1.7, 0.40, 0.65
_OLDEST = (8, 0)  # that Triton's kernels and bfloat16 are for
_LANE = {3: 0.77, 4: 1.53, 5: 3.1}  # GB/s that one lane of a PCIe generation carries from page-locked memory


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
    vram: int
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


_TURING, _AMPERE, _ADA, _HOPPER, _BLACKWELL = (7, 5), (8, 6), (8, 9), (9, 0), (12, 0)

# Peaks are multiprocessors x boost clock x {512, 1024, 2048} operations, as in NVIDIA's papers. Laptop cards differ by
# what power they are given, 25 % either way.
CARDS = tuple(
    Card(*row)
    for row in (
        ("RTX 2060", _TURING, 12, 336, (3, 16), 29, 57, 115),
        ("RTX 2080 Ti", _TURING, 11, 616, (3, 16), 54, 108, 215),
        ("RTX 3050", _AMPERE, 8, 224, (4, 8), 18, 36, 73),
        ("RTX 3060", _AMPERE, 12, 360, (4, 16), 25, 51, 102),
        ("RTX 3060 Ti", _AMPERE, 8, 448, (4, 16), 32, 65, 130),
        ("RTX 3070", _AMPERE, 8, 448, (4, 16), 41, 81, 163),
        ("RTX 3070 Ti", _AMPERE, 8, 608, (4, 16), 43, 87, 174),
        ("RTX 3080", _AMPERE, 10, 760, (4, 16), 60, 119, 238),
        ("RTX 3080", _AMPERE, 12, 912, (4, 16), 61, 123, 245),
        ("RTX 3080 Ti", _AMPERE, 12, 912, (4, 16), 68, 136, 273),
        ("RTX 3090", _AMPERE, 24, 936, (4, 16), 71, 142, 285),
        ("RTX 3090 Ti", _AMPERE, 24, 1008, (4, 16), 80, 160, 320),
        ("RTX 4060", _ADA, 8, 272, (4, 8), 30, 60, 121),
        ("RTX 4060 Ti", _ADA, 8, 288, (4, 8), 44, 88, 177),
        ("RTX 4060 Ti", _ADA, 16, 288, (4, 8), 44, 88, 177),
        ("RTX 4070", _ADA, 12, 504, (4, 16), 58, 117, 233),
        ("RTX 4070 SUPER", _ADA, 12, 504, (4, 16), 71, 142, 284),
        ("RTX 4070 Ti", _ADA, 12, 504, (4, 16), 80, 160, 321),
        ("RTX 4070 Ti SUPER", _ADA, 16, 672, (4, 16), 88, 176, 353),
        ("RTX 4080", _ADA, 16, 717, (4, 16), 97, 195, 390),
        ("RTX 4080 SUPER", _ADA, 16, 736, (4, 16), 104, 209, 418),
        ("RTX 4090", _ADA, 24, 1008, (4, 16), 165, 330, 661),
        ("RTX 5050", _BLACKWELL, 8, 320, (5, 8), 26, 53, 105),
        ("RTX 5060", _BLACKWELL, 8, 448, (5, 8), 38, 77, 153),
        ("RTX 5060 Ti", _BLACKWELL, 8, 448, (5, 8), 47, 95, 190),
        ("RTX 5060 Ti", _BLACKWELL, 16, 448, (5, 8), 47, 95, 190),
        ("RTX 5070", _BLACKWELL, 12, 672, (5, 16), 62, 123, 247),
        ("RTX 5070 Ti", _BLACKWELL, 16, 896, (5, 16), 88, 176, 352),
        ("RTX 5080", _BLACKWELL, 16, 960, (5, 16), 113, 225, 450),
        ("RTX 5090", _BLACKWELL, 32, 1792, (5, 16), 210, 419, 838),
        ("RTX 3060 Laptop", _AMPERE, 6, 336, (4, 8), 26, 52, 105),
        ("RTX 3070 Laptop", _AMPERE, 8, 448, (4, 16), 33, 66, 133),
        ("RTX 3080 Laptop", _AMPERE, 16, 448, (4, 16), 42, 84, 168),
        ("RTX 4060 Laptop", _ADA, 8, 256, (4, 8), 29, 58, 116),
        ("RTX 4070 Laptop", _ADA, 8, 256, (4, 8), 40, 80, 160),
        ("RTX 4080 Laptop", _ADA, 12, 432, (4, 16), 68, 135, 271),
        ("RTX 4090 Laptop", _ADA, 16, 576, (4, 16), 79, 159, 318),
        ("RTX 5070 Ti Laptop", _BLACKWELL, 12, 672, (5, 8), 52, 105, 209),
        ("RTX 5080 Laptop", _BLACKWELL, 16, 896, (5, 16), 70, 141, 281),
        ("RTX 5090 Laptop", _BLACKWELL, 24, 896, (5, 16), 91, 181, 363),
        ("H100 80GB HBM3", _HOPPER, 80, 3350, (5, 16), 989, 989, 1979),
        ("H200", _HOPPER, 141, 4800, (5, 16), 989, 989, 1979),
    )
)


def find_card(name: str, vram: float | None = None) -> Card | None:
    """The card of that name, as people or drivers write it; of several sizes the one nearest to `vram` GiB, or the
    smallest. None if there is none."""
    said = _words(name)
    sizes = {int(word[:-2]) for word in said if word.endswith("gb") and word[:-2].isdigit()}
    found = [card for card in CARDS if said in (_words(card.name), _words(card.name) | {f"{card.vram}gb"})]
    wanted = vram or next(iter(sizes), 0)
    return min(found, key=lambda card: abs(card.vram - wanted), default=None)


def _words(name: str) -> set[str]:
    """The words that tell cards apart: "NVIDIA GeForce RTX 4070 Laptop GPU" is an RTX 4070 Laptop."""
    said = re.findall(r"\d+gb|rtx|ti|super|laptop|[a-z]+|\d+", name.lower())
    return {word for word in said if word not in ("nvidia", "geforce", "gpu", "rtx")}
