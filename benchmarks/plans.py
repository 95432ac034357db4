"""The plan for ten cards, as the table in docs/presets.md: predictions from the table of cards, nothing is measured."""

from skyrun.planning.request import Request
from skyrun.planning.what_if import plan_request
from skyrun.presets.machine.cards import find_card
from skyrun.presets.machine.hardware import stated
from skyrun.presets.memory import GIB
from skyrun.units import duration

CARDS = (
    *(("RTX 3060 Laptop", 6), ("RTX 2060", 12), ("RTX 4060", 8), ("RTX 3060", 12), ("RTX 4060 Ti", 16)),
    *(("RTX 4070", 12), ("RTX 3090", 24), ("RTX 5070 Ti", 16), ("RTX 4090", 24), ("RTX 5090", 32)),
)
RAM, DISK = 16, 0.5


def main() -> None:
    """Print the table."""
    head = (
        "| card | clip | file | matmuls | attention | tokens at a time | blocks kept | VRAM | RAM | a step | in all |"
    )
    print(head + " for speed |")
    print("|" + " --- |" * 12)
    for name, vram in CARDS:
        card = find_card(name, vram)
        assert card is not None
        for size in ("480P", "720P"):
            hardware = stated(card, RAM, DISK)
            plan = plan_request(Request("r2v", "", resolution=size), hardware).plan
            quick = plan_request(Request("r2v", "", resolution=size, prefer="speed"), hardware).plan
            rows = f"{plan.token_rows:,}" + (", parked" if plan.parked_tokens else "") if plan.token_rows else "all"
            host = max(stage.host_bytes for stage in plan.stages)
            cells = [
                f"{name} {vram} GB",
                size,
                plan.weight_type,
                f"{plan.precision}, {plan.dtype}",
                plan.asked,
                rows,
            ]
            cells += [str(plan.resident_blocks), f"{plan.peak_bytes / GIB:.1f}", f"{host / GIB:.1f}"]
            cells += [
                duration(plan.step_seconds),
                duration(plan.seconds),
                f"{duration(quick.seconds)} ({quick.weight_type})",
            ]
            print("| " + " | ".join([plan.problem or cell for cell in cells]) + " |")


if __name__ == "__main__":
    main()
