"""Lay out blocks: where their tensors lie in the file, and where they belong in a buffer."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from skyrun.errors import SkyrunError
from skyrun.kernels.files.adapter import DTYPES, Fitted, Update
from skyrun.kernels.files.gguf_file import TensorInfo
from skyrun.kernels.files.safetensors_header import StoredTensor
from skyrun.kernels.planes import FIELDS
from skyrun.presets.memory import ALIGNMENT
from skyrun.streaming.low_rank import Addition
from skyrun.streaming.reader import PAGE, Extent
from skyrun.streaming.weights import Observe, Weights, as_weight, has_planes

_WIDEST = 4  # bytes of a value of an adapter
_GAP = 1 << 16  # extents closer than this are read as one
_GRAIN = 16  # blocks of a tensor in planes that a share is a multiple of: its part of every plane stays aligned


@dataclass(frozen=True)
class Piece:
    """A part of a run of bytes in the file, and where it belongs in the block's buffer.

    offset, nbytes: the part's bytes in the file. at: where the whole run is placed in the buffer. start: bytes from the
    beginning of the run to the part. info: the tensor, if the run is one whose blocks are repacked into planes; other
    runs have the same layout in the buffer as in the file. file: as in Extent.
    """

    offset: int
    nbytes: int
    at: int
    start: int = 0
    info: TensorInfo | None = None
    file: int = 0

    def split(self, limit: int) -> "Iterator[Piece]":
        """Split into pieces of at most `limit` bytes, which are whole blocks if they are repacked."""
        step = limit // self.info.format.block_bytes * self.info.format.block_bytes if self.info else limit
        for start in range(0, self.nbytes, step):
            yield self.part(start, min(start + step, self.nbytes))

    def part(self, start: int, end: int) -> "Piece":
        """The bytes [start, end) of the piece."""
        return replace(self, offset=self.offset + start, nbytes=end - start, start=self.start + start)

    def cut(self, near: float) -> int:
        """Where the piece may be cut into shares, in bytes from its beginning: next to a place of that kind."""
        grain = _GRAIN * self.info.format.block_bytes if self.info else ALIGNMENT
        return max(0, min(round(near / grain) * grain, self.nbytes))

    @property
    def places(self) -> list[slice]:
        """Where the bytes belong in the block's buffer: one place, or one in each plane of a tensor."""
        if self.info is None:
            return [slice(self.at + self.start, self.at + self.start + self.nbytes)]
        width = self.info.format.block_bytes
        total, before, count = (nbytes // width for nbytes in (self.info.nbytes, self.start, self.nbytes))
        places = []
        for part in FIELDS[self.info.format.name]:
            start = self.at + total * part.plane_start + before * part.width
            places.append(slice(start, start + count * part.width))
        return places

    def moves(self, buffer: Tensor, staged: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The copies, (to, from), that move the piece from the staging buffer to its block's buffer."""
        sizes = [place.stop - place.start for place in self.places]
        sources = staged[: self.nbytes].split(sizes)
        return [(buffer[place], source) for place, source in zip(self.places, sources, strict=True)]


@dataclass(frozen=True)
class PlacedUpdate:
    """An update of an adapter, and the places in the buffer of its tensors, as in Update.parts.

    scale: what the product is multiplied by.
    """

    update: Update
    places: tuple[int, ...]
    scale: float

    def addition(self, buffer: Tensor) -> Addition:
        """Views of the buffer."""
        *down, up = (_viewed(buffer, at, part) for at, part in zip(self.places, self.update.parts, strict=True))
        return Addition(up, down[0] if down else None, self.scale)


def _viewed(buffer: Tensor, at: int, stored: StoredTensor) -> Tensor:
    return buffer[at : at + stored.nbytes].view(getattr(torch, DTYPES[stored.dtype])).view(stored.shape)


@dataclass(frozen=True)
class Block:
    """A block of a file, and what adapters add to it.

    tensors: (name within the block, info, place in the buffer). extents: what to read to get them. nbytes: of a buffer.
    updates: of adapters, by name within the block.
    """

    tensors: tuple[tuple[str, TensorInfo, int], ...]
    extents: tuple[Extent, ...]
    nbytes: int
    updates: tuple[tuple[str, PlacedUpdate], ...] = ()

    @property
    def lead(self) -> int:
        """The block's offset in its page of the file. Reading is fastest to the same offset in a page of memory."""
        lead = self.extents[0].offset % PAGE
        return 0 if lead % ALIGNMENT else lead

    def weights(
        self,
        owner: str,
        buffer: Tensor,
        observe: Observe | None = None,
        planar: bool = False,
        fast: bool = False,
        attention: str = "exact",
    ) -> Weights:
        """The block's weights as views of its buffer, without a copy.

        Args:
            owner: the block, named in errors.
            buffer: holds the block's bytes.
            observe: called with the name and the input of every linear layer that is used.
            planar: whether tensors that need planes were repacked.
            fast: whether linear layers multiply in rotated int8.
            attention: its precision, of kernels.quantized_keys.
        """
        views = {name: as_weight(buffer[at : at + info.nbytes], info, planar, fast) for name, info, at in self.tensors}
        additions: dict[str, list[Addition]] = defaultdict(list)
        for name, placed in self.updates:
            additions[name].append(placed.addition(buffer))
        return Weights(owner, views, observe, attention, additions)

    def runs(self, planar: bool) -> list[Piece]:
        """All bytes of the block. planar: whether tensors that need planes are repacked, which are pieces of their own
        then; else there is one for each extent."""
        runs: list[Piece] = []
        for _, info, at in self.tensors:
            apart = info if planar and has_planes(info) else None
            last = runs[-1] if runs else None
            if last and last.info is apart is None and at - info.offset == last.at - last.offset:
                runs[-1] = replace(last, nbytes=at + info.nbytes - last.at)
            else:
                runs.append(Piece(info.offset, info.nbytes, at, info=apart))
        return runs + [Piece(one.offset, one.nbytes, one.at, file=one.file) for one in self.extents if one.file]

    def shares(self, count: int, planar: bool) -> list[list[Piece]]:
        """The block divided into `count` shares of nearly the same size. planar: as in `runs`."""
        runs = self.runs(planar)
        shares: list[list[Piece]] = [[] for _ in range(count)]
        whole, before = sum(run.nbytes for run in runs), 0
        for run in runs:
            edges = [run.cut(whole * number / count - before) for number in range(1, count)]
            for share, start, end in zip(shares, [0, *edges], [*edges, run.nbytes], strict=True):
                if end > start:
                    share.append(run.part(start, end))
            before += run.nbytes
        return shares


def lay_out(tensors: dict[str, TensorInfo]) -> Block:
    """Place the tensors of a block in a buffer in the same order as in the file, without large gaps."""
    extents: list[Extent] = []
    placed = []
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        last = extents[-1] if extents else None
        if last and info.offset - (last.offset + last.nbytes) < _GAP:
            extents[-1] = Extent(last.offset, info.offset + info.nbytes - last.offset, last.at)
        else:
            end = last.at + last.nbytes if last else 0
            extents.append(Extent(info.offset, info.nbytes, -(-end // ALIGNMENT) * ALIGNMENT))
        placed.append((name, info, extents[-1].at + info.offset - extents[-1].offset))
    return Block(tuple(placed), tuple(extents), extents[-1].at + extents[-1].nbytes)


def with_adapters(blocks: Sequence[Block], prefix: str, adapters: Sequence[Fitted]) -> list[Block]:
    """The blocks `prefix0.`, `prefix1.`, ... with what adapters add to them, whose files are numbers 1, 2, ..."""
    if not adapters:
        return list(blocks)
    return [_with_updates(block, f"{prefix}{index}.", adapters) for index, block in enumerate(blocks)]


def _with_updates(block: Block, prefix: str, adapters: Sequence[Fitted]) -> Block:
    extents, placed, end = list(block.extents), list(block.updates), block.nbytes
    for number, adapter in enumerate(adapters, 1):
        updates = adapter.within(prefix)
        stored = sorted({part for one in updates.values() for part in one.parts}, key=lambda part: part.offset)
        places = {}
        for part in stored:
            last = extents[-1]
            follows = last.file == number and last.offset + last.nbytes == part.offset and end % _WIDEST == 0
            if follows:
                extents[-1] = replace(last, nbytes=last.nbytes + part.nbytes)
            else:
                end = -(-end // ALIGNMENT) * ALIGNMENT
                extents.append(Extent(part.offset, part.nbytes, end, number))
            places[part] = end
            end += part.nbytes
        for name, one in updates.items():
            where = tuple(places[part] for part in one.parts)
            placed.append((name, PlacedUpdate(one, where, adapter.strength * one.scale)))
    return replace(block, extents=tuple(extents), updates=tuple(placed), nbytes=end)


def lay_out_blocks(path: Path, tensors: Mapping[str, TensorInfo], prefix: str) -> list[Block]:
    """The blocks `prefix0.`, `prefix1.`, ... of a file, in order. Raises SkyrunError if a number is missing."""
    numbered = re.compile(re.escape(prefix) + r"(\d{1,5})\.(.+)")
    blocks: dict[int, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if match := numbered.fullmatch(name):
            blocks.setdefault(int(match[1]), {})[match[2]] = info
        elif name.startswith(prefix):
            raise SkyrunError(f"{path} has a tensor {name} of no block", "convert or download it again")
    if not blocks or max(blocks) != len(blocks) - 1:
        found = f"blocks up to {max(blocks)}" if blocks else "none"
        raise SkyrunError(f"{path} has {len(blocks)} blocks {prefix}N, {found}", "convert or download it again")
    return [lay_out(blocks[index]) for index in range(len(blocks))]
