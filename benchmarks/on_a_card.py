"""The acceptance run: does skyrun do on a graphics card what its plans and tests say, and how fast.

    python benchmarks/on_a_card.py --out card.jsonl     # 20 minutes on an H100 or H200; a line of JSON per step
    python benchmarks/on_a_card.py --report card.jsonl

Each step has a process of its own and at most four minutes; the others run whatever becomes of it. Without a card the
steps run in a small form, in which speed and memory are not judged. It needs torch, triton, numpy, safetensors, psutil,
tokenizers and pillow; a step that needs another package says so and is skipped.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where skyrun need not be installed

from acceptance.report import report
from acceptance.runner import outcome
from acceptance.steps import STEPS


def main() -> int:
    """Run the steps that the results do not have yet. Returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(f"{number:3}  {step.name}: {step.about}" for number, step in enumerate(STEPS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=_numbers, default=range(len(STEPS)), metavar="A-B", help="only these")
    parser.add_argument(
        "--out", type=Path, metavar="F.jsonl", help="add results; steps that are in it do not run again"
    )
    parser.add_argument("--report", type=Path, metavar="F.jsonl", help="print results as tables, and run nothing")
    arguments = parser.parse_args()
    if arguments.report:
        print(report(_lines(arguments.report)))
        return 0
    import torch

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    there = _lines(arguments.out) if arguments.out and arguments.out.exists() else []
    done = {line["name"] for line in there if line["small"] == (device.type == "cpu")}
    failed = False
    for number in arguments.steps:
        step = STEPS[number]
        if step.name in done:
            print(f"{number} {step.name}: is in {arguments.out} already", file=sys.stderr)
            continue
        print(f"{number} {step.name}: {step.about}", file=sys.stderr, flush=True)
        line = outcome(number, step, device)
        failed |= line["passed"] is False
        text = json.dumps(line)
        print(text, flush=True)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
    return int(failed)


def _numbers(text: str) -> range:
    """The numbers of "3" or "0-4"."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < len(STEPS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a range of steps: they have the numbers 0 to {len(STEPS) - 1}"
        )
    return range(first, last + 1)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The results of a file; a line that was cut off by a crash is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            print(f"{path} has a line that is cut off", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
