"""The launches that compile what a transformer and an autoencoder need: each compiles other kernels, on a few rows."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from skyrun.kernels.formats import block_format
from skyrun.kernels.machine.device import float16_sums_are_quick
from skyrun.kernels.planes import needs_planes
from skyrun.kernels.quantized_keys import HEAD_DIM, QuantizedKeys, for_few_keys
from skyrun.kernels.rotated import RotatedInt8
from skyrun.kernels.tiles import USUAL, Pools, Selection
from skyrun.kernels.torch import attention as torch_attention
from skyrun.kernels.weight import QuantizedWeight

_ROWS = 512  # more than the kernels for few rows take
_OUT = 16  # rows of a weight: how many there are makes no other kernel


@dataclass(frozen=True)
class Blocks:
    """What decides which kernels the blocks of a transformer need.

    weights: the quantized types of their weights with the columns that these have. fast: whether their
    products are in int8. attention: its precision. frames: the numbers of channels that an autoencoder has at its
    resolutions, with each dtype that it works in. sparse_tokens: how many tokens attend to chosen tiles; 0: none do.
    """

    weights: frozenset[tuple[str, int]]
    dim: int
    ffn: int
    dtype: torch.dtype
    fast: bool
    attention: str
    frames: frozenset[tuple[int, torch.dtype]] = frozenset()
    sparse_tokens: int = 0


def launches(blocks: Blocks, device: torch.device) -> list[Callable[[], object]]:
    """Functions without arguments. Each launches kernels on the device that no other one launches."""
    found = [*_elementwise(blocks, device), *_decoding(blocks, device), *_frames(blocks, device)]
    found += _int8(blocks, device) if blocks.fast else []
    found += _sparse(blocks, device) if blocks.sparse_tokens else []
    return found + [*_attention(blocks, device)] if blocks.attention != "exact" else found


def _elementwise(blocks: Blocks, device: torch.device) -> Iterator[Callable[[], object]]:
    from skyrun.kernels.triton import elementwise as kernels

    inner = _inner(blocks, device)
    x, gain = torch.zeros(_ROWS, blocks.dim, dtype=blocks.dtype, device=device), torch.zeros(blocks.dim, device=device)
    y, wide = (torch.zeros(_ROWS, cols, dtype=inner, device=device) for cols in (blocks.dim, blocks.ffn))
    table = torch.zeros(_ROWS, HEAD_DIM // 2, device=device)
    for rotated, dtype in {(False, blocks.dtype), (blocks.fast, inner)}:  # the last norm is not before such a product
        yield partial(kernels.layer_norm, x, gain, gain, 1e-6, rotated, dtype)
    yield partial(kernels.rms_norm, y, gain, 1e-6)
    yield partial(kernels.rms_norm, y, gain, 1e-6, (table, table))
    yield partial(kernels.gelu, wide, blocks.fast)
    if blocks.fast:
        yield partial(kernels.quantize_rows, x)
    else:  # the product of int8 rows adds the residual itself
        yield partial(kernels.add_gated, x, y)
        yield partial(kernels.add_gated, x, y, gain)


def _frames(blocks: Blocks, device: torch.device) -> Iterator[Callable[[], object]]:
    """The norms of an autoencoder. Before its attention, where frames have most channels, there is one without SiLU."""
    from skyrun.kernels.triton import elementwise as kernels

    for channels, dtype in sorted(blocks.frames, key=str):
        x, gain = torch.zeros(1, 1, _ROWS, channels, dtype=dtype, device=device), torch.zeros(channels, device=device)
        yield partial(kernels.norm_silu, x, gain, 1e-6, x)
        if channels == max(channels for channels, _ in blocks.frames):
            yield partial(kernels.rms_norm, x[0, 0], gain, 1e-6)


def _decoding(blocks: Blocks, device: torch.device) -> Iterator[Callable[[], object]]:
    """Exact products decode to the dtype of what they multiply."""
    from skyrun.kernels.triton import decode as triton_decode

    if blocks.fast:
        return
    for type in _types(blocks.weights):
        data = _weight(type, block_format(type).block_size, False, device).data
        yield partial(triton_decode.dequantize, data, type, _inner(blocks, device), needs_planes(type))


def _int8(blocks: Blocks, device: torch.device) -> Iterator[Callable[[], object]]:
    from skyrun.kernels.triton import encode as triton_encode
    from skyrun.kernels.triton import int8 as triton_int8

    for type, cols in sorted(blocks.weights):
        yield partial(triton_encode.encode_weight, _weight(type, cols, True, device))
    residual = torch.zeros(_ROWS, _OUT, dtype=blocks.dtype, device=device)
    vector = torch.zeros(_OUT, device=device)
    alone, added, gated = (), (None, residual), (vector, residual)  # gate and residual
    forms = {blocks.dim: (alone, added, gated), blocks.ffn: (gated,)}
    for cols in sorted({cols for _, cols in blocks.weights}):
        rows, weight = _rotated(_ROWS, cols, blocks.dtype, device), _rotated(_OUT, cols, torch.float32, device)
        for form in forms.get(cols, (alone,)):
            yield partial(triton_int8.multiply, rows, weight, vector, *form)


def _attention(blocks: Blocks, device: torch.device) -> Iterator[Callable[[], object]]:
    from skyrun.kernels.triton import attention as kernels

    def attend() -> None:
        codes, scales = kernels.quantize_keys(x)
        for precision in {blocks.attention, for_few_keys(blocks.attention)}:
            kernels.attend(x, QuantizedKeys(precision, codes, scales, *kernels.quantize_values(x, precision)))

    x = torch.zeros(_ROWS, blocks.dim, dtype=_inner(blocks, device), device=device)
    yield attend


def _sparse(blocks: Blocks, device: torch.device) -> Iterator[Callable[[], object]]:
    """The choice of tiles, and attention to them: in the tokens' dtype, and in float32 to measure errors."""
    from skyrun.kernels.triton import attention as triton_attention
    from skyrun.kernels.triton import selection as triton_selection

    def choose() -> Selection:
        pools = Pools(codes[:1], scales[:, :1], flags[:, :1]), Pools(codes[:count], scales[:, :count], flags[:, :count])
        starts, shares = numbers[0, :1], torch.zeros(heads, device=device)
        return triton_selection.choose(*pools, shares, starts, flags[0], blocks.sparse_tokens, USUAL)

    def attend(dtype: torch.dtype) -> Tensor:
        chosen = Selection(numbers.short().view(heads, 1, -1), numbers[:, :1], _ROWS, USUAL)
        if blocks.attention == "exact":
            return triton_attention.attend_plain(x[:1], x, x, chosen, dtype)
        values = torch_attention.quantize_values(x, blocks.attention)
        keys = QuantizedKeys(blocks.attention, codes[:_ROWS], scales[:, :_ROWS].contiguous(), *values)
        return triton_attention.attend_codes(codes[:1], scales[:, :1].contiguous(), keys, chosen, dtype)

    count, heads = USUAL.count_keys(blocks.sparse_tokens), blocks.dim // HEAD_DIM
    inner, most = _inner(blocks, device), max(_ROWS, count)
    x = torch.zeros(_ROWS, blocks.dim, dtype=inner, device=device)
    codes = torch.zeros(most, blocks.dim, dtype=torch.int8, device=device)
    scales, flags = torch.zeros(heads, most, device=device), torch.zeros(heads, most, dtype=torch.bool, device=device)
    numbers = torch.zeros(heads, most, dtype=torch.int32, device=device)
    yield partial(triton_selection.pool, x, USUAL.keys, torch.zeros(blocks.dim, device=device))
    yield partial(triton_selection.pool, x, USUAL.queries, None)
    yield choose
    for dtype in {inner, torch.float32}:
        yield partial(attend, dtype)


def _types(weights: Iterable[tuple[str, int]]) -> list[str]:
    return sorted({type for type, _ in weights})


def _inner(blocks: Blocks, device: torch.device) -> torch.dtype:
    """The dtype of what layers hand to each other: float16 where they sum in it (`float16_sums.handed_on`)."""
    short = blocks.dtype == torch.bfloat16 and not blocks.fast
    return torch.float16 if short and float16_sums_are_quick(device) else blocks.dtype


def _rotated(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> RotatedInt8:
    codes = torch.zeros(rows, cols, dtype=torch.int8, device=device)
    return RotatedInt8(codes, torch.zeros(rows, device=device), dtype)


def _weight(type: str, cols: int, fast: bool, device: torch.device) -> QuantizedWeight:
    data = torch.zeros(_OUT, block_format(type).row_bytes(cols), dtype=torch.uint8, device=device)
    return QuantizedWeight(data, type, needs_planes(type), fast)
