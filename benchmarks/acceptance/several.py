"""Several devices: bytes reach the right ones, tokens that are divided attend as those of one do, and how fast."""

import multiprocessing
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from acceptance.ring import streamed, written
from acceptance.step import Figure, NotHere, Scale
from skyrun.kernels.attention import Keys, attend
from skyrun.kernels.machine.device import median_seconds
from skyrun.models.dit_header import HEAD_DIM
from skyrun.parallel.attention import SharedAttention
from skyrun.parallel.group import Group, joined

_MOST, _ON_CPU = 4, 2  # devices that are tried together; processes where there is no card
_LAUNCHES = 5  # of an exchange, the same number on every device
_TOKENS, _ROWS, _HEADS = 1001, 128, 4  # of the attention that is divided; tokens that pass at a time


@dataclass(frozen=True)
class _Span:
    rows: slice


def several_devices(scale: Scale) -> Iterator[Figure]:
    """An all-to-all of odd parts, blocks read in shares, self-attention, and the rate of large parts; by NCCL between
    cards, else by gloo."""
    from skyrun.tools.bench.checks import ROUNDING  # not at the top: the processes of the devices have no stand-ins

    size = min(_MOST, torch.cuda.device_count()) if not scale.small else _ON_CPU
    if size < 2:
        raise NotHere("needs a second card")
    spawn = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [spawn.Pipe(duplex=False) for _ in range(size)]
    ranks = [spawn.Process(target=_rank, args=(n, size, port, scale, pipes[n][1])) for n in range(size)]
    for rank, (_, sender) in zip(ranks, pipes, strict=True):
        rank.start()
        sender.close()
    found = [receiver.recv() for receiver, _ in pipes]
    for rank in ranks:
        rank.join()
    yield Figure("devices", size)
    limits = {"wrong bytes": 0, "wrong blocks": 0, "attention": ROUNDING[scale.dtype]}
    for key, most in limits.items():
        yield Figure(key, max(one[key] for one in found), "relative error" if key == "attention" else "", most=most)
    yield Figure("sent by each", min(one["rate"] for one in found) / 1e9, "GB/s")


def _rank(rank: int, size: int, port: int, scale: Scale, sender: Connection) -> None:
    """One of the processes: send what it has found."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = scale.device if scale.small else torch.device("cuda", rank)
    if not scale.small:
        torch.cuda.set_device(device)
    with torch.inference_mode(), joined(rank, size, device) as group:
        found: dict[str, Any] = {"wrong bytes": _wrong_bytes(group), "wrong blocks": _wrong_blocks(group, scale)}
        sender.send(found | {"attention": _attention(group, scale), "rate": _rate(group, scale)})


def _wrong_bytes(group: Group) -> int:
    """Of parts whose lengths and values say from where to where they go."""

    def part(sender: int, receiver: int) -> Tensor:
        return torch.full((1000 + 77 * sender + receiver,), 16 * sender + receiver, dtype=torch.uint8)

    ours = [part(group.rank, other) for other in range(group.size)]
    expected = [part(other, group.rank) for other in range(group.size)]
    sent = torch.cat(ours).to(group.device)
    got = group.exchange(sent, [len(one) for one in ours], [len(one) for one in expected]).wait()
    return int((got.cpu() != torch.cat(expected)).sum())


def _wrong_blocks(group: Group, scale: Scale) -> int:
    """Of blocks of which this device reads a share, with streams delayed at random."""
    count, rows = scale.of((16, 2048), (6, 64))
    with TemporaryDirectory() as folder:
        file = written(Path(folder) / "blocks.bin", count, rows, planar=not scale.small)
        return sum(
            streamed(Scale(group.device), file, slots, kept, False, group) for slots, kept in ((2, 0), (3, count // 2))
        )


def _attention(group: Group, scale: Scale) -> float:
    """How far what this device's tokens find is from what they find on one device."""
    g = torch.Generator().manual_seed(0)
    width = _HEADS * HEAD_DIM
    q, k, v = (torch.randn(_TOKENS, width, generator=g).to(group.device, scale.dtype) for _ in range(3))
    shares = group.shares(_TOKENS)
    spans = [
        [_Span(slice(first, min(first + _ROWS, own.stop))) for first in range(own.start, own.stop, _ROWS)]
        for own in shares
    ]
    shared = SharedAttention(group, shares, spans, width, _HEADS)

    def project(span: _Span, keys: Tensor, values: Tensor) -> None:
        keys.copy_(k[span.rows])
        values.copy_(v[span.rows])

    like = torch.empty(0, dtype=scale.dtype, device=group.device)
    keys, alone = Keys(*shared.keys(project, like), shared.heads), attend(q, Keys(k, v, _HEADS))
    found = shared.attended(lambda span: q[span.rows], lambda queries, _: attend(queries, keys), like)
    return max(float((mixed - alone[span.rows]).norm() / alone[span.rows].norm()) for span, mixed in found)


def _rate(group: Group, scale: Scale) -> float:
    """Bytes per second that this device sends to the others."""
    nbytes = scale.of(256 << 20, 1 << 20)
    parts = torch.zeros(group.size * nbytes, dtype=torch.uint8, device=group.device)
    counts = [nbytes] * group.size
    seconds = median_seconds(group.device, lambda: group.exchange(parts, counts, counts).wait(), _LAUNCHES)
    return (group.size - 1) * nbytes / seconds
