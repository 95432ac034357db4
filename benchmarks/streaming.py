"""Does the stream hide reading? python benchmarks/streaming.py [--share 0.8] [--blocks 12]

A model of real matrix products runs over blocks twice: from memory, and streamed by a reader slowed down to `share` of
the computing time per block. Hidden means that both take the same time.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from environment import environment

from skyrun.kernels import FORMATS
from skyrun.kernels.gguf_file import TensorInfo
from skyrun.stream import Block, BlockStream, FileReader, lay_out

DIM, PASSES = 1024, 3


class SlowReader(FileReader):
    """Reads, then waits until `seconds` have passed since it began."""

    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__(path)
        self._seconds = seconds

    def read(self, block: Block, buffer: torch.Tensor) -> None:
        start = time.perf_counter()
        super().read(block, buffer)
        time.sleep(max(0.0, self._seconds - (time.perf_counter() - start)))


def write_blocks(path: Path, count: int) -> list[Block]:
    rng, blocks = np.random.default_rng(0), []
    with open(path, "wb") as file:
        for _ in range(count):
            data = (rng.standard_normal((DIM, DIM)) / DIM**0.5).astype(np.float32)
            info = TensorInfo("w.weight", (DIM, DIM), FORMATS["F32"], file.tell(), data.nbytes)
            file.write(data.tobytes())
            blocks.append(lay_out({info.name: info}))
    return blocks


def seconds_of(stream: BlockStream, x: torch.Tensor) -> float:
    """Median over the passes after the first, which fills the caches."""
    times = []
    with stream:
        for _ in range(PASSES):
            start = time.perf_counter()
            for weights, _ in stream.blocks():
                for _ in range(8):
                    x = weights.linear("w", x)
            times.append(time.perf_counter() - start)
    return median(times[1:])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--blocks", type=int, default=12)
    arguments = parser.parse_args()
    print(environment())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "blocks.bin"
        blocks = write_blocks(path, arguments.blocks)
        x, cpu = torch.randn(2048, DIM), torch.device("cpu")
        kept = frozenset(range(arguments.blocks))
        compute = seconds_of(BlockStream(path, blocks, cpu, passes=PASSES, resident=kept), x)
        slow = SlowReader(path, arguments.share * compute / arguments.blocks)
        stream = BlockStream(path, blocks, cpu, passes=PASSES, reader=slow)
        streamed = seconds_of(stream, x)
    per_block = 1000 / arguments.blocks
    print(f"computing alone: {compute * per_block:.1f} ms a block")
    print(f"streamed, reading takes {arguments.share:.0%} of that: {streamed * per_block:.1f} ms a block")
    print(f"ratio {streamed / compute:.3f}; the model waited {stream.stats.stall_seconds:.3f} s, first block included")


if __name__ == "__main__":
    main()
