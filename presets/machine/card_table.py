"""A table of graphics cards, so that plans can be made for cards that this machine does not have.

Multiprocessors, boost clocks, memory and its bandwidth come from NVIDIA's data sheets and architecture papers. Peaks
are multiprocessors x boost clock x operations per clock, which gives the peaks of those papers. Laptop cards are up to
25 % faster or slower, depending on their power limit; cards of 75 watts and less (A2, T4, L4) cannot hold their boost
clock and may take twice as long.
"""

from dataclasses import dataclass
from itertools import chain

from skyrun.presets.machine.card import Card


@dataclass(frozen=True)
class Chip:
    """Dense operations of a multiprocessor per clock.

    float16: with float32 accumulation. float16_sums: float16 with float16 accumulation. int8: with int32 accumulation.
    float32: outside of tensor cores.
    """

    capability: tuple[int, int]
    float16: int = 512
    float16_sums: int = 1024
    int8: int = 2048
    float32: int = 256

    def peaks(self, processors: int, megahertz: float) -> tuple[int, int, int, int]:
        """The peaks of a card with that many multiprocessors, in 10^12 operations per second."""
        rates = (self.float16, self.float16_sums, self.int8, self.float32)
        sums, sums16, int8, single = (round(processors * megahertz * rate / 1e6) for rate in rates)
        return sums, sums16, int8, single


# GeForce cards accumulate float16 in float32 at half the rate, professional cards with the same chips at full rate.
TURING, AMPERE, ADA, BLACKWELL = Chip((7, 5), float32=128), Chip((8, 6)), Chip((8, 9)), Chip((12, 0))
_TURING_PRO = Chip((7, 5), 1024, float32=128)
_AMPERE_PRO, _ADA_PRO, _BLACKWELL_PRO, _GB10 = (
    Chip(capability, 1024) for capability in ((8, 6), (8, 9), (12, 0), (12, 1))
)
_A10G, _L40 = Chip((8, 6), 512, 512, 1024), Chip((8, 9), 512, 512, 1024)
VOLTA = Chip((7, 0), 1024, 1024, 1024, 128)  # its tensor cores have no int8, but no plan uses int8 there
GA100, HOPPER, B200 = (
    Chip((8, 0), 2048, 2048, 4096, 128),
    Chip((9, 0), 4096, 4096, 8192),
    Chip((10, 0), 8192, 8192, 16384),
)
_H20 = Chip((9, 0), 1024, 1024, 2048)

_Row = tuple[str, int, int, int, int]


def _cards(chip: Chip, pcie: tuple[int, int], *rows: _Row) -> list[Card]:
    """Cards from rows of name, GiB, GB/s, multiprocessors, boost MHz. Of equal names the more common card is first."""
    return [
        Card(name, chip.capability, vram, memory, pcie, *chip.peaks(processors, boost))
        for name, vram, memory, processors, boost in rows
    ]


_GEFORCE = (
    _cards(
        TURING,
        (3, 16),
        ("RTX 2060", 6, 336, 30, 1680),
        ("RTX 2060", 12, 336, 34, 1650),
        ("RTX 2060 SUPER", 8, 448, 34, 1650),
        ("RTX 2070", 8, 448, 36, 1620),
        ("RTX 2070 SUPER", 8, 448, 40, 1770),
        ("RTX 2080", 8, 448, 46, 1710),
        ("RTX 2080 SUPER", 8, 496, 48, 1815),
        ("RTX 2080 Ti", 11, 616, 68, 1545),
    ),
    _cards(_TURING_PRO, (3, 16), ("TITAN RTX", 24, 672, 72, 1770)),
    _cards(
        AMPERE,
        (4, 8),
        ("RTX 3050", 8, 224, 20, 1777),
        ("RTX 3050", 6, 168, 18, 1470),
    ),
    _cards(
        AMPERE,
        (4, 16),
        ("RTX 3060", 12, 360, 28, 1777),
        ("RTX 3060", 8, 240, 28, 1777),
        ("RTX 3060 Ti", 8, 448, 38, 1665),
        ("RTX 3070", 8, 448, 46, 1725),
        ("RTX 3070 Ti", 8, 608, 48, 1770),
        ("RTX 3080", 10, 760, 68, 1710),
        ("RTX 3080", 12, 912, 70, 1710),
        ("RTX 3080 Ti", 12, 912, 80, 1665),
        ("RTX 3090", 24, 936, 82, 1695),
        ("RTX 3090 Ti", 24, 1008, 84, 1860),
    ),
    _cards(
        ADA,
        (4, 8),
        ("RTX 4060", 8, 272, 24, 2460),
        ("RTX 4060 Ti", 8, 288, 34, 2535),
        ("RTX 4060 Ti", 16, 288, 34, 2535),
    ),
    _cards(
        ADA,
        (4, 16),
        ("RTX 4070", 12, 504, 46, 2475),
        ("RTX 4070 SUPER", 12, 504, 56, 2475),
        ("RTX 4070 Ti", 12, 504, 60, 2610),
        ("RTX 4070 Ti SUPER", 16, 672, 66, 2610),
        ("RTX 4080", 16, 717, 76, 2505),
        ("RTX 4080 SUPER", 16, 736, 80, 2550),
        ("RTX 4090", 24, 1008, 128, 2520),
        ("RTX 4090 D", 24, 1008, 114, 2520),
    ),
    _cards(
        BLACKWELL,
        (5, 8),
        ("RTX 5050", 8, 320, 20, 2572),
        ("RTX 5060", 8, 448, 30, 2497),
        ("RTX 5060 Ti", 8, 448, 36, 2572),
        ("RTX 5060 Ti", 16, 448, 36, 2572),
    ),
    _cards(
        BLACKWELL,
        (5, 16),
        ("RTX 5070", 12, 672, 48, 2512),
        ("RTX 5070 Ti", 16, 896, 70, 2452),
        ("RTX 5080", 16, 960, 84, 2617),
        ("RTX 5090", 32, 1792, 170, 2407),
    ),
)

_LAPTOPS = (
    _cards(
        TURING,
        (3, 16),
        ("RTX 2060 Laptop", 6, 336, 30, 1560),
        ("RTX 2070 Laptop", 8, 448, 36, 1440),
        ("RTX 2070 SUPER Laptop", 8, 448, 40, 1380),
        ("RTX 2080 Laptop", 8, 448, 46, 1590),
        ("RTX 2080 SUPER Laptop", 8, 448, 48, 1560),
    ),
    _cards(
        AMPERE,
        (4, 8),
        ("RTX 3050 Laptop", 4, 192, 16, 1740),
        ("RTX 3050 Laptop", 6, 168, 20, 1492),
        ("RTX 3050 Ti Laptop", 4, 192, 20, 1695),
        ("RTX 3060 Laptop", 6, 336, 30, 1702),
    ),
    _cards(
        AMPERE,
        (4, 16),
        ("RTX 3070 Laptop", 8, 448, 40, 1620),
        ("RTX 3070 Ti Laptop", 8, 448, 46, 1485),
        ("RTX 3080 Laptop", 8, 448, 48, 1710),
        ("RTX 3080 Laptop", 16, 448, 48, 1710),
        ("RTX 3080 Ti Laptop", 16, 512, 58, 1590),
    ),
    _cards(
        ADA,
        (4, 8),
        ("RTX 4050 Laptop", 6, 192, 20, 2370),
        ("RTX 4060 Laptop", 8, 256, 24, 2370),
        ("RTX 4070 Laptop", 8, 256, 36, 2175),
    ),
    _cards(ADA, (4, 16), ("RTX 4080 Laptop", 12, 432, 58, 2280), ("RTX 4090 Laptop", 16, 576, 76, 2040)),
    _cards(
        BLACKWELL,
        (5, 8),
        ("RTX 5050 Laptop", 8, 384, 20, 2662),
        ("RTX 5060 Laptop", 8, 384, 26, 2497),
        ("RTX 5070 Laptop", 8, 384, 36, 2347),
        ("RTX 5070 Ti Laptop", 12, 672, 46, 2220),
    ),
    _cards(BLACKWELL, (5, 16), ("RTX 5080 Laptop", 16, 896, 60, 2287), ("RTX 5090 Laptop", 24, 896, 82, 2160)),
)

_WORKSTATIONS = (
    _cards(
        _TURING_PRO,
        (3, 16),
        ("Quadro RTX 5000", 16, 448, 48, 1815),
        ("Quadro RTX 6000", 24, 672, 72, 1770),
        ("Quadro RTX 8000", 48, 672, 72, 1770),
    ),
    _cards(
        _AMPERE_PRO,
        (4, 16),
        ("RTX A2000", 6, 288, 26, 1200),
        ("RTX A2000", 12, 288, 26, 1200),
        ("RTX A4000", 16, 448, 48, 1560),
        ("RTX A4500", 20, 640, 56, 1650),
        ("RTX A5000", 24, 768, 64, 1695),
        ("RTX A6000", 48, 768, 84, 1800),
    ),
    _cards(
        _ADA_PRO,
        (4, 16),
        ("RTX 4000 Ada", 20, 360, 48, 2175),
        ("RTX 4500 Ada", 24, 432, 60, 2580),
        ("RTX 5000 Ada", 32, 576, 100, 2550),
        ("RTX 6000 Ada", 48, 960, 142, 2505),
    ),
    _cards(
        _BLACKWELL_PRO,
        (5, 16),
        ("RTX PRO 4000", 24, 672, 70, 2175),
        ("RTX PRO 4500", 32, 896, 82, 2512),
        ("RTX PRO 5000", 48, 1344, 110, 2377),
        ("RTX PRO 6000", 96, 1792, 188, 2617),
        ("RTX PRO 6000 Max-Q", 96, 1792, 188, 2280),
    ),
    _cards(_GB10, (5, 16), ("GB10", 119, 273, 48, 2418)),  # of the 128 GB that it shares with its CPU
)

_SERVERS = (
    _cards(
        VOLTA,
        (3, 16),
        ("V100", 16, 900, 80, 1530),
        ("V100", 32, 900, 80, 1530),
        ("TITAN V", 12, 653, 80, 1455),
    ),
    _cards(_TURING_PRO, (3, 16), ("T4", 16, 320, 40, 1590)),
    _cards(GA100, (4, 16), ("A30", 24, 933, 56, 1440), ("A100", 40, 1555, 108, 1410), ("A100", 80, 1935, 108, 1410)),
    _cards(_AMPERE_PRO, (4, 8), ("A2", 16, 200, 10, 1770)),
    _cards(_AMPERE_PRO, (4, 16), ("A10", 24, 600, 72, 1695), ("A40", 48, 696, 84, 1740)),
    _cards(_A10G, (4, 16), ("A10G", 24, 600, 80, 1710)),
    _cards(_ADA_PRO, (4, 16), ("L4", 24, 300, 58, 2040), ("L40S", 48, 864, 142, 2520)),
    _cards(_L40, (4, 16), ("L20", 48, 864, 92, 2520), ("L40", 48, 864, 142, 2490)),
    _cards(
        HOPPER,
        (5, 16),
        ("H100 80GB HBM3", 80, 3350, 132, 1830),
        ("H100 PCIe", 80, 2039, 114, 1620),
        ("H100 NVL", 94, 3938, 132, 1545),
        ("H800", 80, 3350, 132, 1830),
        ("H200", 141, 4800, 132, 1830),
        ("H200 NVL", 141, 4800, 132, 1545),
        ("GH200 480GB", 96, 4000, 132, 1830),  # of CPU memory
        ("GH200 144GB", 144, 4900, 132, 1830),
    ),
    _cards(_H20, (5, 16), ("H20", 96, 4000, 78, 1830)),
    _cards(B200, (5, 16), ("B200", 180, 8000, 148, 1856)),
)

CARDS = tuple(chain(*_GEFORCE, *_LAPTOPS, *_WORKSTATIONS, *_SERVERS))
