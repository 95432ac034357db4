"""Predict what several cards gain over one: a table for two and four cards on PCIe 4, for docs/devices.md.

No GPU is needed: these are plans. One machine with 32 GB of RAM, a disk of 2 GB/s and cards that reach each other
through the host; r2v, 720P, 5 s.

    python benchmarks/devices.py
"""

from dataclasses import replace

from skyrun.planning.request import Request
from skyrun.planning.what_if import plan_request
from skyrun.presets import Hardware, Plan, Workload
from skyrun.presets.machine.card import link_rate
from skyrun.presets.machine.cards import find_card
from skyrun.presets.machine.hardware import STATED, stated
from skyrun.presets.memory import GIB, denoise_bytes, way_of
from skyrun.presets.timing import planned_sending
from skyrun.units import duration

CARDS, LANES, DEVICES = ("RTX 3060", "RTX 4090"), (8, 16), (2, 4)
RAM, DISK = 32, 2.0


def activations(hardware: Hardware, workload: Workload, plan: Plan) -> int:
    """Bytes that denoising holds on one card beside blocks of weights and CUDA, if all its tokens pass at a time."""
    way = way_of(True, hardware.capability, plan.dtype, plan.precision == "fast")
    return denoise_bytes(workload, plan.dtype, None, False, way, plan.attention, bool(plan.sparse))


def main() -> None:
    """Print the table."""
    print(
        "| cards | PCIe 4 | whole run | of one | step | of one | sent | activations | of one | least memory | of one |"
    )
    print("|" + " --- |" * 11)
    for name in CARDS:
        card = find_card(name)
        assert card is not None
        for lanes in LANES:
            hardware = stated(card, RAM, DISK).linked(STATED, link_rate(4, lanes))
            for devices in DEVICES:
                request = Request("r2v", "", resolution="720P", devices=devices)
                planned = plan_request(request, hardware)
                least = plan_request(replace(request, prefer="memory"), hardware)
                plan, alone = planned.plan, planned.alone
                assert alone is not None and least.alone is not None
                memory, of_one = least.plan.peak_bytes / GIB, least.plan.peak_bytes / least.alone.peak_bytes
                held, by_one = (activations(hardware, replace(planned.workload, devices=n), plan) for n in (devices, 1))
                cells = [f"{devices} x {name}", f"x{lanes}", duration(plan.seconds)]
                cells += [f"{plan.seconds / alone.seconds:.2f}", duration(plan.step_seconds)]
                cells += [f"{plan.step_seconds / alone.step_seconds:.2f}"]
                cells += [
                    f"{planned_sending(planned.workload, plan) / 1e9:.1f} GB",
                    f"{held / GIB:.1f} GiB",
                    f"{held / by_one:.2f}",
                    f"{memory:.1f} GiB",
                    f"{of_one:.2f}",
                ]
                print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
