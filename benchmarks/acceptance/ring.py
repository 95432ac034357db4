"""Blocks that stream while streams of the device are delayed at random: does every kernel see the bytes of the file."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from acceptance.step import Figure, Scale
from skyrun.kernels import QuantizedWeight
from skyrun.kernels.files.gguf_file import TensorInfo
from skyrun.kernels.formats import FORMATS
from skyrun.kernels.planes import to_planes
from skyrun.streaming.layout import Block, lay_out
from skyrun.streaming.reader import FileReader
from skyrun.streaming.shares import Neighbours
from skyrun.streaming.stream import BlockStream, spread
from skyrun.streaming.tokens import ParkedTokens
from skyrun.tools.bench.synthetic_weight import random_blocks

_PASSES = 3
_ROUNDS = 3  # of parked tokens, there and back
_TYPES = ("Q8_0", "Q4_K", "Q6_K")  # with planes and without
_CYCLES = 20_000_000  # of the device's clock that a delay takes at most: 10 ms
_SECONDS = 0.002  # that one takes on a CPU


@dataclass(frozen=True)
class _File:
    """A file of blocks of random bytes, and the sum of each tensor as kernels read it."""

    path: Path
    blocks: list[Block]
    sums: list[dict[str, int]]


def ring(scale: Scale) -> Iterator[Figure]:
    """Every number of slots and kept blocks, through the page cache and around it; then parked tokens."""
    count, rows = scale.of((40, 2048), (6, 64))
    with TemporaryDirectory() as folder:
        file = written(Path(folder) / "blocks.bin", count, rows, planar=not scale.small)
        for direct in (False, True):
            for slots in (2, 3):
                for kept in (0, count // 2):
                    start = time.perf_counter()
                    wrong = streamed(scale, file, slots, kept, direct)
                    name = f"{slots} slots, {kept} kept, {'around' if direct else 'through'} the page cache"
                    yield Figure(f"wrong blocks, {name}", wrong, most=0)
                    read = _PASSES * (count - kept) + kept
                    rate = read * file.blocks[0].nbytes / (time.perf_counter() - start)
                    yield Figure(f"streamed, {name}, delays included", rate / 1e9, "GB/s")
    yield from _parked(scale)


def written(path: Path, count: int, rows: int, planar: bool) -> _File:
    """Write blocks of random bytes, the same ones each time."""
    generator, blocks, sums = torch.Generator().manual_seed(0), [], []
    cols = 4 * rows
    with open(path, "wb") as file:
        for _ in range(count):
            infos, found = {}, {}
            for type in _TYPES:
                data = random_blocks(type, rows, cols, generator)
                infos[type] = TensorInfo(type, (rows, cols), FORMATS[type], file.tell(), data.nbytes)
                found[type] = _sum(to_planes(data, type) if planar else data).item()
                file.write(data.numpy().tobytes())
            blocks.append(lay_out(infos))
            sums.append(found)
    return _File(path, blocks, sums)


def _sum(data: Tensor) -> Tensor:
    """A sum of all bytes that also depends on their places, modulo 2^64."""
    words = data.flatten()[: data.numel() // 8 * 8].view(torch.int64)
    return (words * (2 * torch.arange(len(words), device=data.device) + 1)).sum()


@torch.inference_mode()
def streamed(
    scale: Scale, file: _File, slots: int, kept: int, direct: bool, neighbours: Neighbours | None = None
) -> int:
    """Stream the file and sum up its blocks. Returns how many tensors were wrong. neighbours: read shares of them."""
    delays, sums = _Delays(scale), []
    with BlockStream(
        file.path,
        file.blocks,
        scale.device,
        passes=_PASSES,
        slots=slots,
        resident=spread(kept, len(file.blocks)),
        reader=FileReader(file.path, direct=direct),
        neighbours=neighbours,
    ) as stream:
        delays.before_copies(stream)
        for _ in range(_PASSES):
            for index, (weights, _) in enumerate(stream.blocks()):
                delays.here()
                for type in _TYPES:
                    weight = weights[type]
                    assert isinstance(weight, QuantizedWeight)
                    sums.append((file.sums[index][type], _sum(weight.data)))
        return sum(expected != int(got) for expected, got in sums)


class _Delays:
    """Delays on streams of the device, or of the thread on a CPU."""

    def __init__(self, scale: Scale) -> None:
        self._small, self._random = scale.small, random.Random(0)

    def here(self) -> None:
        """Delay the current stream, half of the time."""
        if self._random.random() < 0.5:
            return
        if self._small:
            time.sleep(self._random.random() * _SECONDS)
        else:
            torch.cuda._sleep(int(self._random.random() * _CYCLES))

    def before_copies(self, stream: BlockStream) -> None:
        """Delay the copies of a stream."""
        ring = stream._ring
        send = ring.send

        def delayed(moves: list[tuple[Tensor, Tensor]], slot: int | None) -> object:
            if self._small:
                self.here()
            else:
                with torch.cuda.stream(ring._copies):  # type: ignore[attr-defined]
                    self.here()
            return send(moves, slot)

        ring.send = delayed  # type: ignore[method-assign, assignment]


@torch.inference_mode()
def _parked(scale: Scale) -> Iterator[Figure]:
    """Tokens that wait on the host: parts go to the device, are changed after a delay, and come back."""
    tokens, dim, part = scale.of((126_000, 5120, 15_750), (1000, 256, 300))
    parked, delays = ParkedTokens((tokens, dim), torch.bfloat16, scale.device), _Delays(scale)
    parts = [slice(start, min(start + part, tokens)) for start in range(0, tokens, part)]
    try:
        for rows in parts:
            parked.store(rows, torch.full((rows.stop - rows.start, dim), 0.0, dtype=torch.bfloat16).to(scale.device))
        start = time.perf_counter()
        for _ in range(_ROUNDS):
            for number, rows in enumerate(parts):
                values = parked.fetch(rows)
                delays.here()
                parked.store(rows, values + number + 1)
        seconds = time.perf_counter() - start
        wrong = 0
        for number, rows in enumerate(parts):
            wrong += int((parked.fetch(rows) != _ROUNDS * (number + 1)).sum())
        yield Figure("wrong values of parked tokens", wrong, most=0)
        yield Figure("parked, delays included", 2 * _ROUNDS * 2 * tokens * dim / seconds / 1e9, "GB/s")
    finally:
        parked.close()
