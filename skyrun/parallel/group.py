"""The processes that work on one clip together, one for each device: what they exchange, through torch.distributed.

Tensors travel by one operation, an all-to-all with parts of any size; plain values go from rank 0 to all others.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from skyrun.errors import BAD_INPUT, FAILED, SkyrunError
from skyrun.kernels.machine.failures import is_out_of_memory

T = TypeVar("T")

_LONG = timedelta(days=7)  # others wait that long for rank 0, which encodes the text and writes the clip
_ANSWER = timedelta(minutes=10)  # within which a rank must be where the others are; the first block compiles kernels
_CPU = torch.device("cpu")


class PeerLost(SkyrunError):
    """Another process of the group ended or does not answer: not the cause, but what became of it here."""


class Arriving:
    """Tensors on their way, to be waited for once. Both are kept until then, and let go of."""

    def __init__(self, work: "dist.Work | None", received: Tensor, sent: Tensor) -> None:
        self._work = work
        self._tensors = [received, sent]

    def wait(self) -> Tensor:
        """All parts that were sent to this rank, in the order of the ranks: uint8 [bytes]."""
        if self._work is not None:
            with _peers_named():
                self._work.wait()
        self._work = None
        received, _ = self._tensors
        self._tensors.clear()
        return received


class Group:
    """This process among those that make a clip. A group of one sends nothing.

    rank: the number of this process; rank 0 owns the run's state and writes. size: how many there are. device: its
    own. sent: bytes of tensors that it has sent to other ranks so far.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device = _CPU) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.sent = 0
        self._tensors: dist.ProcessGroup | None = None

    def open(self) -> None:
        """Meet the others, where the environment says: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        if self.device.type == "cuda" and not dist.is_nccl_available():
            raise SkyrunError(
                "this torch has no NCCL, through which GPUs exchange tensors", "it comes with torch on Linux"
            )
        try:
            dist.init_process_group(backend, rank=self.rank, world_size=self.size, timeout=_LONG)
            self._tensors = dist.new_group(timeout=_ANSWER)
        except (RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise SkyrunError(f"device {self.rank} cannot meet the others: {first}", "see docs/devices.md") from error

    def close(self) -> None:
        """Leave the others."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def shares(self, count: int) -> list[slice]:
        """`count` things divided among the ranks, as evenly as possible and in order."""
        edges = [rank * count // self.size for rank in range(self.size + 1)]
        return [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]

    def exchange(self, parts: Tensor, sending: Sequence[int], receiving: Sequence[int]) -> Arriving:
        """Send a part to every rank, this one included, and receive one from each: the one all-to-all.

        Args:
            parts: uint8 [sum of sending], the parts in the order of the ranks.
            sending: bytes of each part.
            receiving: bytes that each rank sends to this one.
        """
        if self.size == 1:
            return Arriving(None, parts, parts)
        self.sent += sum(sending) - sending[self.rank]
        return self._send(parts, list(sending), list(receiving))

    def _send(self, parts: Tensor, sending: list[int], receiving: list[int]) -> Arriving:
        received = parts.new_empty(sum(receiving))
        with _peers_named():
            work = dist.all_to_all_single(received, parts, receiving, sending, group=self._tensors, async_op=True)
        return Arriving(work, received, parts)

    def gathered(self, rows: Tensor, counts: Sequence[int], to: int | None = None) -> Tensor:
        """The rows of all ranks, in their order [sum of counts, ...]; only on rank `to` if it is given, else on all.

        Args:
            rows: of this rank, contiguous [counts[rank], ...].
            counts: how many rows each rank has.
            to: the rank that gets them; the others get an empty tensor.
        """
        if self.size == 1:
            return rows
        width = rows[:1].nbytes if len(rows) else rows.element_size() * rows[0:0].new_empty(1, *rows.shape[1:]).numel()
        asked = [to in (None, rank) for rank in range(self.size)]
        sent = as_bytes(rows)
        parts = sent.repeat(sum(asked))
        receiving = [count * width if asked[self.rank] else 0 for count in counts]
        got = self.exchange(parts, [len(sent) if wants else 0 for wants in asked], receiving).wait()
        return got.view(rows.dtype).view(-1, *rows.shape[1:])

    def hand_over(self, value: T) -> T:
        """The value of rank 0, on every rank. It is a plain value, or holds tensors of the CPU."""
        if self.size == 1:
            return value
        values: list[Any] = [value if self.rank == 0 else None]
        with _peers_named():
            dist.broadcast_object_list(values, src=0, device=_CPU)
        handed: T = values[0]
        return handed

    def collected(self, value: T) -> list[T]:
        """The plain values of all ranks, in their order, on every rank. Each may come as late as it likes."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _peers_named():
            dist.all_gather_object(values, value)
        return values


def as_bytes(values: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, uint8 [nbytes]."""
    return values.reshape(-1).view(torch.uint8)


_ALONE = Group()
_here = _ALONE


def here() -> Group:
    """The group of this process; one of its own if it has not joined any."""
    return _here


@contextmanager
def joined(rank: int, size: int, device: torch.device) -> Iterator[Group]:
    """Be this rank of a group, as long as the block lasts."""
    global _here
    group = Group(rank, size, device)
    if size > 1:
        group.open()
    _here = group
    try:
        yield group
    finally:
        _here = _ALONE
        group.close()


@contextmanager
def apart() -> Iterator[None]:
    """Be alone as long as the block lasts. The others of the group are met again after it."""
    global _here
    group, _here = _here, _ALONE
    try:
        yield
    finally:
        _here = group


class Place(NamedTuple):
    """The place of a process among those of torch's launcher. local_rank, local_size: among those of its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def stated_place() -> Place | None:
    """What torch's launcher says to a process that it starts; None elsewhere.

    Raises SkyrunError if it says something else than numbers.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        return Place(*(int(os.environ[name]) for name in names))
    except (KeyError, ValueError) as error:
        said = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise SkyrunError(f"the launcher says {said}, expected numbers", "start with torchrun", BAD_INPUT) from error


@contextmanager
def _peers_named() -> Iterator[None]:
    """Turn an error of the communication into a PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PeerLost(f"another device is gone or does not answer: {first}", "", FAILED) from error
