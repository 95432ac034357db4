"""Let memory run out once, at every place that allocates, and look at how the run ends.

A model as small as the architecture allows makes a short clip. A place is a stack of skyrun's own lines that allocates
a tensor, in any thread; it lacks memory at its first and last time, and so do more allocations that a seed draws. Every
run has to end with the latents of an undisturbed one or with exit code 3, and without a thread of its own.
"""

import argparse
import os
import random
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from skyrun import Request
from skyrun.engine.run import Result, run_job
from skyrun.errors import WILL_NOT_FIT, SkyrunError
from skyrun.events import drain
from skyrun.planning.job import prepare
from skyrun.quant import convert
from skyrun.streaming import stream
from skyrun.streaming.ring import HostRing
from skyrun.tools.tiny_checkpoint import CheckpointDims, write_checkpoint

_SMALLEST = CheckpointDims(dim=128, layers=2, ffn=256, text=64, text_layers=1, vae_base=4)
_ROOT = Path(__file__).parent.parent
_OWN = tuple(str(_ROOT / package) + os.sep for package in ("skyrun", "kernels", "presets"))
_CLOSE = 1e-4  # other tiles of the autoencoder change latents as rounding does

Place = tuple[tuple[str, int], ...]  # file and line of our own frames, the innermost first


@dataclass(frozen=True)
class Case:
    """The `time`-th allocation at a place, from 1 on."""

    place: Place
    time: int


class Allocations:
    """Counts allocations by place, and lets one of them fail."""

    def __init__(self, fails: Case | None = None) -> None:
        self.counts: dict[Place, int] = {}
        self.failed = False
        self._fails, self._lock = fails, threading.Lock()

    def at(self, place: Place) -> None:
        """Count an allocation; raises torch.OutOfMemoryError if it is the one that fails."""
        with self._lock:
            count = self.counts[place] = self.counts.get(place, 0) + 1
            fails = self._fails == Case(place, count)
            self.failed |= fails
        if fails:
            raise torch.OutOfMemoryError("made to fail")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch this thread and all that are started meanwhile."""
        run = threading.Thread.run

        def watched_run(thread: threading.Thread) -> None:
            with _Watch(self):
                run(thread)

        with patch.object(threading.Thread, "run", watched_run), _Watch(self):
            yield


class _Watch(TorchDispatchMode):
    """Reports the operations of one thread whose results have memory that none of their arguments had."""

    def __init__(self, allocations: Allocations) -> None:
        super().__init__()
        self._allocations = allocations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._allocations.failed and _memory(result) - _memory((args, kwargs)):
            self._allocations.at(_place())
        return result


def _memory(tree: Any) -> set[int]:
    """The memory that tensors and storages have, by its identity."""
    leaves = [leaf for leaf in tree_iter(tree) if isinstance(leaf, (Tensor, torch.UntypedStorage))]
    storages = [leaf.untyped_storage() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return {storage._cdata for storage in storages if storage.nbytes()}


def _place() -> Place:
    frame, found = sys._getframe(1), []
    while frame is not None:
        if frame.f_code.co_filename.startswith(_OWN):
            found.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)


class Runs:
    """The job, its undisturbed result, and the cases that can be made of its allocations."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._runs = folder, 0
        write_checkpoint(folder / "checkpoint", _SMALLEST)
        convert(folder / "checkpoint", folder / "model", "Q8_0")
        picture = folder / "picture.png"
        Image.linear_gradient("L").resize((48, 32)).convert("RGB").save(picture)
        fixed = {"size": (32, 48), "frames": 5, "steps": 2, "seed": 3, "device": "cpu"}
        self._job = prepare(Request("r2v", "a sea", (picture,), None, model=folder / "model", **fixed))
        allocations = Allocations()
        self._undisturbed = self._made(allocations)
        self.counts = allocations.counts

    def cases(self, drawn: int, seed: int = 0) -> list[Case]:
        """The first and the last time at every place, and as many more as are drawn, in the order of the run."""
        ends = {Case(place, time) for place, count in self.counts.items() for time in (1, count)}
        every = [Case(place, time) for place, count in self.counts.items() for time in range(1, count + 1)]
        others = [case for case in every if case not in ends]
        chosen = ends | set(random.Random(seed).sample(others, min(drawn, len(others))))
        return [case for case in every if case in chosen]

    def outcome(self, case: Case) -> str:
        """Run the job without memory for the case. Returns what is wrong; empty if nothing is."""
        threads, allocations = threading.active_count(), Allocations(case)
        result: Result | None = None
        try:
            result = self._made(allocations)
        except SkyrunError as error:
            if error.code != WILL_NOT_FIT:
                return f"ended with exit code {error.code}: {error.message}"
        except Exception as error:
            return f"ended with {type(error).__name__}: {error}"
        if not allocations.failed:
            return "did not come to the allocation"
        if threading.active_count() != threads:
            return f"left {threading.active_count() - threads} threads"
        if result and not torch.allclose(result.latents, self._undisturbed.latents, rtol=_CLOSE, atol=_CLOSE):
            return "has other latents"
        return ""

    def _made(self, allocations: Allocations) -> Result:
        """Run the job: blocks pass through staging buffers, as on a card, and no prompt is known."""
        self._runs += 1
        os.environ["SKYRUN_CACHE"] = str(self._folder / f"cache-{self._runs}")
        staged = patch.object(HostRing, "staged", True)
        with allocations.watched(), staged, patch.object(stream, "uses_triton", lambda device: True):
            return drain(run_job(self._job))


def _shown(case: Case) -> str:
    lines = [f"{Path(file).relative_to(_ROOT)}:{line}" for file, line in case.place[:4]]
    return f"{' < '.join(lines)}, time {case.time}"


def main() -> int:
    """Print every case that ends wrongly. Returns how many there are, at most 1 for the shell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="", metavar="A-B", help="only these, counted from 0 (default: all)")
    parser.add_argument("--drawn", type=int, default=100, metavar="N", help="allocations besides first and last times")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        cases = runs.cases(arguments.drawn, arguments.seed)
        first, _, last = (arguments.cases or f"0-{len(cases) - 1}").partition("-")
        total = sum(runs.counts.values())
        print(
            f"{total} allocations at {len(runs.counts)} places, {len(cases)} cases; {first} to {last} run", flush=True
        )
        wrong = 0
        for number in range(int(first), int(last or first) + 1):
            if problem := runs.outcome(cases[number]):
                wrong += 1
                print(f"{number}: {_shown(cases[number])}: {problem}", flush=True)
        print(f"{wrong} ended wrongly")
    return min(1, wrong)


if __name__ == "__main__":
    sys.exit(main())
