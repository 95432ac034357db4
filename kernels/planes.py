"""Repack blocks into planes, one per field, so that a GPU can read every field in wide, aligned words.

The block size of most types is not a multiple of 16 bytes. A tensor of such a type is repacked: each plane holds one
field of all n = rows * blocks_per_row blocks in order, and the planes follow each other in the tensor's own bytes. Wide
fields come first, which keeps their planes aligned. A slice of rows of a repacked tensor is meaningless.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.formats import block_format

_CHUNK_BYTES = 1 << 18  # repacked at a time, so that all fields but the first are read from the CPU's cache


@dataclass(frozen=True)
class Field:
    """A field: bytes [block_start, block_start + width) of each block. For n blocks its plane is at n * plane_start."""

    name: str
    width: int
    block_start: int
    plane_start: int


# Each type's fields with their bytes in the order of the block (ggml-common.h), then in the order of the planes.
_ORDERS = {
    "Q8_0": ("d2 qs32", "qs d"),
    "Q6_K": ("ql128 qh64 scales16 d2", "ql qh scales d"),
    "Q3_K": ("hmask32 qs64 scales12 d2", "qs hmask scales d"),
    "Q2_K": ("scales16 qs64 dm4", "qs scales dm"),
    "Q5_1": ("dm4 qh4 qs16", "qs qh dm"),
    "Q5_0": ("d2 qh4 qs16", "qs qh d"),
    "Q4_1": ("dm4 qs16", "qs dm"),
    "Q4_0": ("d2 qs16", "qs d"),
    "IQ4_NL": ("d2 qs16", "qs d"),
    "IQ4_XS": ("d2 high2 low4 qs128", "qs low high d"),
}


def _fields(block: str, planes: str) -> tuple[Field, ...]:
    where, start = {}, 0
    for field in block.split():
        name = field.rstrip("0123456789")
        width = int(field[len(name) :])
        where[name] = width, start
        start += width
    fields, plane_start = [], 0
    for name in planes.split():
        width, start = where[name]
        fields.append(Field(name, width, start, plane_start))
        plane_start += width
    return tuple(fields)


FIELDS: dict[str, tuple[Field, ...]] = {name: _fields(*orders) for name, orders in _ORDERS.items()}


def needs_planes(type: str) -> bool:
    """Whether the Triton kernels read the type from planes. The other types have aligned blocks or no blocks."""
    return type in FIELDS


def decoded_shape(blocks: Tensor, type: str) -> tuple[int, ...]:
    """The shape that blocks uint8 [..., row_bytes] decode to. Raises SkyrunError unless the rows are whole blocks."""
    format = block_format(type)
    if blocks.dtype != torch.uint8 or blocks.shape[-1] % format.block_bytes:
        raise SkyrunError(
            f"got {blocks.dtype} rows of {blocks.shape[-1]} for {type}, "
            f"expected uint8 rows that are a multiple of {format.block_bytes} bytes",
            "check the type against the file's header",
        )
    return (*blocks.shape[:-1], blocks.shape[-1] // format.block_bytes * format.block_size)


def to_planes(blocks: Tensor, type: str, out: Tensor | None = None) -> Tensor:
    """Repack blocks uint8 [rows, row_bytes] into planes -> uint8 of the same shape, written to `out` if it is given.

    Tensors of types that need no planes are returned unchanged.
    """
    return _repacked(blocks, type, out, apart=True)


def from_planes(planes: Tensor, type: str, out: Tensor | None = None) -> Tensor:
    """The inverse of `to_planes`."""
    return _repacked(planes, type, out, apart=False)


def _repacked(data: Tensor, type: str, out: Tensor | None, apart: bool) -> Tensor:
    if not needs_planes(type):
        return data if out is None else out.copy_(data)
    data = data.contiguous()
    out = torch.empty_like(data) if out is None else out
    if not data.numel():
        return out
    copy = _copy_on_host if data.device.type == out.device.type == "cpu" else _copy
    blocks, planes = (data, out) if apart else (out, data)
    copy(blocks.view(-1), planes.view(-1), type, apart)
    return out


def _copy(blocks: Tensor, planes: Tensor, type: str, apart: bool) -> None:
    width = block_format(type).block_bytes
    n = blocks.numel() // width
    for field in FIELDS[type]:
        inside = blocks.view(n, width).narrow(1, field.block_start, field.width)
        plane = planes.narrow(0, n * field.plane_start, n * field.width).view(n, field.width)
        (plane if apart else inside).copy_(inside if apart else plane)


def _copy_on_host(blocks: Tensor, planes: Tensor, type: str, apart: bool) -> None:
    """Copy with numpy, where one item is one field of one block: its strided copies are twice as fast as torch's."""
    width = block_format(type).block_bytes
    n = blocks.numel() // width
    pairs = []
    for field in FIELDS[type]:
        item = np.dtype((np.void, field.width))
        inside = np.ndarray(n, item, blocks.numpy(), field.block_start, (width,))
        plane = np.ndarray(n, item, planes.numpy(), n * field.plane_start)
        pairs.append((plane, inside) if apart else (inside, plane))
    step = _CHUNK_BYTES // width
    for start in range(0, n, step):
        for to, source in pairs:
            np.copyto(to[start : start + step], source[start : start + step])
