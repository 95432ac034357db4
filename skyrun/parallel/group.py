"""The processes that work on one clip together, one for each device: what they exchange, through torch.distributed.

Activations travel by one operation, an all-to-all with parts of any size; plain values go from rank 0 to all others.
Shares of weights are sent from the buffers that they belong in, and received there. Both use one communicator, in the
order in which they are started: two at a time could wait for each other on a GPU.
"""

import os
from collections.abc import Callable, Iterator, Sequence
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


class Completing:
    """Parts of a buffer on their way, to be waited for once."""

    def __init__(self, works: "Sequence[dist.Work]" = ()) -> None:
        self._works = works

    def wait(self) -> None:
        """Wait until all are there, or make a GPU's work that is enqueued from now on wait."""
        with _peers_named():
            for work in self._works:
                work.wait()


class Group:
    """This process among those that make a clip. A group of one sends nothing.

    rank: the number of this process; rank 0 owns the run's state and writes. size: how many there are. device: its
    own. near: those of this machine. sent: bytes of tensors that it has sent to other ranks so far. has_begun: whether
    rank 0 has handed anything over; until then the others wait for that.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, device: torch.device = _CPU, near: Sequence[int] | None = None
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.near = range(size) if near is None else near
        self.sent = 0
        self.has_begun = False
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

    def complete(self, parts: Sequence[tuple[int, Tensor]]) -> Completing:
        """Start to send the own ones of some tensors to the others of this machine, and to receive theirs in place.

        Args:
            parts: contiguous tensors, the same list on all of them, each with the rank that has its content.
        """
        self.sent += sum(part.nbytes for rank, part in parts if rank == self.rank) * (len(self.near) - 1)
        return self._complete(parts)

    def _complete(self, parts: Sequence[tuple[int, Tensor]]) -> Completing:
        wanted: list[tuple[Callable[..., Any], Tensor, int]] = []
        for rank, part in parts:
            if rank == self.rank:
                wanted += [(dist.isend, part, other) for other in self.near if other != rank]
            else:
                wanted.append((dist.irecv, part, rank))
        if not wanted:
            return Completing()
        with _peers_named():
            return Completing(dist.batch_isend_irecv([dist.P2POp(*one, group=self._tensors) for one in wanted]))

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
        self.has_begun = True
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
def joined(rank: int, size: int, device: torch.device, near: Sequence[int] | None = None) -> Iterator[Group]:
    """Be this rank of a group, as long as the block lasts. near: the ranks on this machine, by default all."""
    global _here
    group = Group(rank, size, device, near)
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
