"""How blocks of weights come from disk. python benchmarks/streaming.py [hiding | reading | memory] [options]

hiding: a model of real matrix products runs over blocks from memory, and streamed by a reader slowed down to `share` of
the computing time per block. Hidden means that both take the same time.
reading: a file of --gb is streamed by a model that does nothing, and read by plain threads, in turn and from a cold
cache, through the page cache and around it.
memory: a process streams a model of --gb in forty blocks; its memory is looked at from outside.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from environment import environment

from skyrun.kernels import FORMATS
from skyrun.kernels.files.gguf_file import TensorInfo
from skyrun.presets.machine.host import forget, read_rate
from skyrun.streaming.layout import Block, lay_out
from skyrun.streaming.reader import Extent, FileReader
from skyrun.streaming.stream import BlockStream

CPU = torch.device("cpu")
DIM, PASSES = 1024, 3  # of hiding
BLOCKS, ROUNDS = 40, 7  # of reading and memory


class SlowReader(FileReader):
    """A disk of its own speed: it reads one block after the other, and each takes `seconds`."""

    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__(path)
        self._seconds, self._disk = seconds, threading.Lock()

    def read(self, extents: Sequence[Extent], buffer: torch.Tensor) -> None:
        with self._disk:
            start = time.perf_counter()
            super().read(extents, buffer)
            time.sleep(max(0.0, self._seconds - (time.perf_counter() - start)))


def write_blocks(path: Path, count: int) -> list[Block]:
    """Blocks of one square matrix each."""
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
def hiding(path: Path, arguments: argparse.Namespace) -> None:
    count = arguments.blocks or 12
    blocks = write_blocks(path, count)
    x, kept = torch.randn(2048, DIM), frozenset(range(count))
    compute = seconds_of(BlockStream(path, blocks, CPU, passes=PASSES, resident=kept), x)
    slow = SlowReader(path, arguments.share * compute / count)
    stream = BlockStream(path, blocks, CPU, passes=PASSES, reader=slow)
    streamed = seconds_of(stream, x)
    per_block = 1000 / count
    print(f"computing alone: {compute * per_block:.1f} ms a block")
    print(f"streamed, reading takes {arguments.share:.0%} of that: {streamed * per_block:.1f} ms a block")
    print(
        f"ratio {streamed / compute:.3f}; the model waited {stream.stats.stall_seconds:.3f} s, first block included; "
        f"{stream.stats.hidden:.0%} of reading was hidden"
    )


def layout(gb: float, count: int) -> list[Block]:
    """Equal blocks of a file, with a small tensor beside a large one, off the borders of pages."""
    numbers, blocks, offset = int(gb * 1e9 / count / 4), [], 96
    for _ in range(count):
        small = TensorInfo("small", (5120,), FORMATS["F32"], offset, 4 * 5120)
        large = TensorInfo("large", (numbers,), FORMATS["F32"], offset + small.nbytes, 4 * numbers)
        offset += small.nbytes + large.nbytes
        blocks.append(lay_out({"small": small, "large": large}))
    return blocks


def write_random(path: Path, blocks: list[Block]) -> None:
    """As many bytes as the blocks take; the same ones over and over, which disks do not see."""
    piece, last = np.random.default_rng(0).bytes(1 << 24), blocks[-1].extents[0]
    with open(path, "wb") as file:
        for _ in range(0, last.offset + last.nbytes, len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def streamed_rate(path: Path, blocks: list[Block], direct: bool) -> float:
    """Bytes per second of a stream, from opening it to the last block."""
    forget(path)
    start = time.perf_counter()
    with BlockStream(path, blocks, CPU, reader=FileReader(path, direct=direct)) as stream:
        for _ in stream.blocks():
            pass
        return stream.stats.bytes_read / (time.perf_counter() - start)


def reading(path: Path, arguments: argparse.Namespace) -> None:
    blocks = layout(arguments.gb, arguments.blocks or BLOCKS)
    write_random(path, blocks)
    for direct in (False, True):
        pairs = [(read_rate(path, direct), streamed_rate(path, blocks, direct)) for _ in range(ROUNDS)]
        plain, streamed = (median(rates) / 1e9 for rates in zip(*pairs, strict=True))
        ratios = sorted(ours / theirs for theirs, ours in pairs)
        print(
            f"{'around' if direct else 'through'} the page cache: plain {plain:.2f} GB/s, streamed {streamed:.2f} GB/s"
        )
        print(
            f"  streamed / plain, of neighbours: median {median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}"
        )


def memory(path: Path, arguments: argparse.Namespace) -> None:
    count = arguments.blocks or BLOCKS
    last = layout(arguments.gb, count)[-1].extents[0]
    with open(path, "wb") as file:
        file.truncate(last.offset + last.nbytes)
    options = ["--gb", str(arguments.gb), "--blocks", str(count), "--file", str(path)]
    command, peaks = [sys.executable, __file__, "streaming", *options], []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        for line in process.stdout:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            assert found
            peaks.append(int(found[1]) * 1024 / 1e6)
            print(f"{line.strip()}: {peaks[-1]:.0f} MB resident at most")
            print("", file=process.stdin, flush=True)
    print(f"for weights: {peaks[-1] - peaks[0]:.0f} MB, of {arguments.gb * 1000:.0f} MB streamed")


def streaming(path: Path, arguments: argparse.Namespace) -> None:
    """The process that `memory` looks at."""
    blocks = layout(arguments.gb, arguments.blocks)
    print("before", flush=True)
    sys.stdin.readline()
    with BlockStream(path, blocks, CPU, passes=2) as stream:
        for _ in range(2):
            for weights, _ in stream.blocks():
                weights.dense("large").sum()
    print("after two passes", flush=True)
    sys.stdin.readline()


MODES = {"hiding": hiding, "reading": reading, "memory": memory, "streaming": streaming}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", default="hiding", choices=MODES, metavar="hiding | reading | memory")
    parser.add_argument("--share", type=float, default=0.8, help="of hiding")
    parser.add_argument("--blocks", type=int, help="12 of hiding, 40 of the others")
    parser.add_argument("--gb", type=float, default=2.0, help="of reading and memory")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mode == "streaming":
        streaming(arguments.file, arguments)
        return
    print(environment())
    with tempfile.TemporaryDirectory() as folder:
        MODES[arguments.mode](Path(folder) / "blocks.bin", arguments)


if __name__ == "__main__":
    main()
