"""Cards by the names that people, drivers and skyrun itself give them, and what is said of those in no table."""

import itertools

import pytest

from skyrun.presets.machine.card import Card
from skyrun.presets.machine.cards import CARDS, card_like, card_rows, find_card, why_unknown
from skyrun.presets.machine.hardware import stated, unknown_card


@pytest.mark.parametrize(
    ("name", "found", "vram"),
    [
        ("RTX 4090 24 GB", "RTX 4090", 24),
        ("RTX 3060 12 GB", "RTX 3060", 12),
        ("RTX 3060 8GB", "RTX 3060", 8),
        ("RTX 3060", "RTX 3060", 12),
        ("RTX 3080 12 GB", "RTX 3080", 12),
        ("RTX 4060 Ti 16G", "RTX 4060 Ti", 16),
        ("rtx4060ti16gb", "RTX 4060 Ti", 16),
        ("RTX 3090 24 GiB", "RTX 3090", 24),
        ("4070S", "RTX 4070 SUPER", 12),
        ("4070 Ti S", "RTX 4070 Ti SUPER", 16),
        ("4070tis", "RTX 4070 Ti SUPER", 16),
        ("  nvidia   GEFORCE rtx 2060 super ", "RTX 2060 SUPER", 8),
        ("RTX 2060", "RTX 2060", 6),
        ("RTX 2060 6GB", "RTX 2060", 6),
        ("2060 12 gb", "RTX 2060", 12),
        ("2070", "RTX 2070", 8),
        ("2080", "RTX 2080", 8),
        ("TITAN RTX", "TITAN RTX", 24),
        ("NVIDIA GeForce RTX 2070 with Max-Q Design", "RTX 2070 Laptop", 8),
        ("NVIDIA GeForce RTX 3050 6GB Laptop GPU", "RTX 3050 Laptop", 6),
        ("3050 Ti laptop", "RTX 3050 Ti Laptop", 4),
        ("RTX 3070 Ti Laptop", "RTX 3070 Ti Laptop", 8),
        ("RTX 3080 Ti mobile", "RTX 3080 Ti Laptop", 16),
        ("4050 Laptop GPU", "RTX 4050 Laptop", 6),
        ("RTX 5050 Laptop", "RTX 5050 Laptop", 8),
        ("RTX 5060 notebook", "RTX 5060 Laptop", 8),
        ("RTX 5070 Laptop", "RTX 5070 Laptop", 8),
        ("4090D", "RTX 4090 D", 24),
        ("NVIDIA GeForce RTX 4090 D", "RTX 4090 D", 24),
        ("RTX 4090 48GB", "RTX 4090", 48),
        ("RTX 2080 Ti 22GB", "RTX 2080 Ti", 22),
        ("H100", "H100 80GB HBM3", 80),
        ("H100 SXM5", "H100 80GB HBM3", 80),
        ("NVIDIA H100 PCIe", "H100 PCIe", 80),
        ("NVIDIA H100 NVL", "H100 NVL", 94),
        ("H200 NVL", "H200 NVL", 141),
        ("NVIDIA GH200 480GB", "GH200 480GB", 96),
        ("GH200", "GH200 480GB", 96),
        ("NVIDIA GH200 144G HBM3e", "GH200 144GB", 144),
        ("A100", "A100", 40),
        ("NVIDIA A100-SXM4-80GB", "A100", 80),
        ("NVIDIA A100 80GB PCIe", "A100", 80),
        ("NVIDIA A10", "A10", 24),
        ("NVIDIA A10G", "A10G", 24),
        ("RTX A6000", "RTX A6000", 48),
        ("A6000", "RTX A6000", 48),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 48),
        ("RTX PRO 6000", "RTX PRO 6000", 96),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000", 96),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Max-Q", 96),
        ("NVIDIA L4", "L4", 24),
        ("L40", "L40", 48),
        ("L40S", "L40S", 48),
        ("Tesla T4", "T4", 16),
        ("Tesla V100-SXM2-16GB", "V100", 16),
        ("V100 32GB", "V100", 32),
        ("NVIDIA GB10", "GB10", 119),
        ("DGX Spark", "GB10", 119),
    ],
)
def test_names_that_people_and_drivers_give(name, found, vram):
    card = find_card(name)
    assert (card.name, card.vram) == (found, vram)


def test_names_that_skyrun_prints_are_found():
    for card in CARDS:
        assert find_card(stated(card, 16, 0.5).name) == card
        assert find_card(f"NVIDIA GeForce {card.name.lower()} {card.vram:g}GB") == card
    assert {find_card(card.name).name for card in CARDS} == {card.name for card in CARDS}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Radeon RX 7900 XTX", "made by AMD"),
        ("7800 XT", "made by AMD"),
        ("MI300X", "made by AMD"),
        ("Ryzen AI Max", "made by AMD"),
        ("Arc B580", "made by Intel"),
        ("A770", "made by Intel"),
        ("Apple M4", "made by Apple"),
        ("M3 Max", "made by Apple"),
        ("GTX 1080 Ti", "no tensor cores"),
        ("1660 SUPER", "no tensor cores"),
        ("Tesla P40", "no tensor cores"),
        ("P100", "no tensor cores"),
        ("Quadro P4000", "no tensor cores"),
        ("RTX 3066", "such as RTX 3060"),
        ("RTX 6000", "such as RTX A6000"),
        ("", "such as RTX 3060"),
        ("48 GB", "such as"),
    ],
)
def test_what_is_said_of_other_cards(name, said):
    assert find_card(name) is None
    text = why_unknown(name)
    assert said in text and repr(name) in text and "\n" not in text


def test_a_card_like_another_has_another_memory():
    card, known = card_like("RTX 3090", 48), find_card("RTX 3090")
    assert card.vram == 48 and card.rates == known.rates and "like RTX 3090" in stated(card, 16, 0.5).name
    assert card_like("RTX 3066", 48) is None


def test_the_list_has_every_card():
    titles, *rows = card_rows()
    assert len(rows) == len(CARDS) and {len(row) for row in rows} == {len(titles)}
    assert ["RTX 4090", "24 GB", "1008 GB/s", "Ada"] in rows and ["GB10", "119 GB", "273 GB/s", "Blackwell"] in rows


@pytest.mark.parametrize(
    ("name", "float16", "int8"),
    [
        *(("T4", 65, 130), ("V100", 125, 125), ("RTX 2080 Ti", 53.8, 215.2), ("RTX 3090", 71, 284)),
        *(("RTX A6000", 154.8, 309.7), ("A10", 125, 250), ("A100", 312, 624), ("RTX 4090", 165.2, 660.6)),
        *(("RTX 6000 Ada", 364.2, 728.5), ("L4", 121, 242), ("L40S", 362, 733), ("L40", 181, 362)),
        *(("H100", 989, 1979), ("H100 PCIe", 756, 1513), ("H100 NVL", 835, 1671), ("H20", 148, 296)),
        *(("RTX 5090", 209.5, 838), ("RTX PRO 6000", 503.8, 1007.6), ("B200", 2250, 4500)),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name, float16, int8):
    """Dense float16 with float32 sums, and int8, in 10^12 operations per second."""
    card = find_card(name)
    assert card.float16 == pytest.approx(float16, rel=0.02) and card.int8 == pytest.approx(int8, rel=0.02)


@pytest.mark.parametrize(
    ("name", "processors"), [("A100", 108), ("H100", 132), ("B200", 148), ("V100", 80), ("RTX 4090", 128)]
)
def test_a_card_in_no_table_has_the_peaks_of_its_generation(name, processors):
    card = find_card(name)
    guessed = unknown_card("a new card", card.capability, int(card.vram) << 30, processors)
    assert isinstance(guessed, Card) and 0.6 < guessed.float16 / card.float16 < 1.3
    assert guessed.int8 / guessed.float16 == pytest.approx(card.int8 / card.float16, rel=0.02)


def test_sizes_of_one_card_are_apart():
    for one, other in itertools.combinations(CARDS, 2):
        assert one.name != other.name or abs(one.vram - other.vram) >= 2
