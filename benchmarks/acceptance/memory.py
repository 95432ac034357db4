"""What a block of the real shape takes on the card against what plans count for it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from acceptance.step import Figure, Scale
from skyrun.kernels import matmul
from skyrun.models.dit import Context, dit_block
from skyrun.models.dit.spans import Span, chunks
from skyrun.models.dit_header import HEAD_DIM
from skyrun.models.umt5 import TEXT_LENGTH
from skyrun.planning.published import published_workload
from skyrun.presets.memory import ALLOCATOR_BYTES, CONTEXT_BYTES, FRAGMENTS, GIB, RING_SLOTS, denoise_bytes
from skyrun.presets.workload import Workload
from skyrun.streaming.device import finish, reset_peak, vram_limited
from skyrun.streaming.tokens import HeldTokens, ParkedTokens
from skyrun.tools.bench.kernels import WAN_14B, Bench, block_weights

_TYPE = "Q8_0"
_BLOCKS = 2  # memory that one leaves cut up is met by the next
_LATENT_ROWS = 3600  # tokens of a frame of 720P
# Tokens, how many pass through a block at a time, whether the others wait on the host: as plans for 24, 12, 8 and 6 GB.
_SHAPES = ((126_000, None, False), (126_000, 63_000, False), (126_000, 15_750, False), (126_000, 3_938, True))
_WAYS = {"exact": "decode", "float16 sums": "decode, float16 sums", "int8": "triton"}


@torch.inference_mode()
def block_memory(scale: Scale) -> Iterator[Figure]:
    """The peaks of a block for each way of computing, beside a ring and all that stays in memory."""
    ways = ("plain",) if scale.small else tuple(_WAYS)
    for tokens, rows, parked in scale.of(_SHAPES, ((600, None, False), (600, 200, True))):
        for way in ways:
            yield from _measured(scale, way, tokens, rows, parked)


def _measured(scale: Scale, way: str, tokens: int, rows: int | None, parked: bool) -> Iterator[Figure]:
    work, device = _workload(scale, tokens), scale.device
    dims = scale.of(WAN_14B, replace(WAN_14B, dim=256, heads=2, ffn_dim=512))
    dtype = str(scale.dtype).removeprefix("torch.")
    held: list[Tensor] = [torch.empty((RING_SLOTS - 1) * work.block_bytes, dtype=torch.uint8, device=device)]
    held.append(torch.empty(work.outer_bytes, dtype=torch.uint8, device=device))
    weights = block_weights(Bench(device, dims=dims), _TYPE, way == "int8")
    rope = (torch.ones(tokens, HEAD_DIM // 2, device=device), torch.zeros(tokens, HEAD_DIM // 2, device=device))
    context = Context(torch.randn(TEXT_LENGTH, dims.dim, device=device, dtype=scale.dtype))
    time = (torch.zeros(dims.dim, device=device), torch.randn(6, dims.dim, device=device) / 10)
    parts = chunks(0, tokens, rows)
    x = (ParkedTokens if parked else HeldTokens)((tokens, dims.dim), scale.dtype, device)
    spans = [Span(part, time) for part in parts]
    counted, most = _counted(work, dtype, rows, parked, way)
    with _computing(way):
        for part in parts:
            x.store(part, torch.randn(part.stop - part.start, dims.dim, device=device, dtype=scale.dtype))
        dit_block(x, weights, spans, context, rope, dims)  # compiles, and measures what is quickest
        finish(device)
        reset_peak(device)
        with vram_limited(device, most):
            try:
                for _ in range(_BLOCKS):
                    dit_block(x, weights, spans, context, rope, dims)
                fits = 1.0
            except torch.OutOfMemoryError:
                fits = 0.0
    name = f"{way}, {tokens} tokens, {rows or 'all'} at a time" + ", parked" * parked
    yield Figure(f"runs in what is counted, {name}", fits, least=1)
    if not scale.small:
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.max_memory_allocated(device)
        yield Figure(f"allocated, {name}", allocated / GIB, "GiB")
        yield Figure(f"allocated, {name}", allocated / counted, "/ counted", 0.9, 1.03)
        yield Figure(f"reserved, {name}", torch.cuda.max_memory_reserved(device) / most, "/ counted", most=1)
        outside = total - free - torch.cuda.memory_reserved(device)
        yield Figure(f"outside of torch, {name}", outside / GIB, "GiB", most=CONTEXT_BYTES / GIB)
    x.close()


def _counted(work: Workload, dtype: str, rows: int | None, parked: bool, way: str) -> tuple[int, int]:
    """Bytes of tensors, and with what the allocator may take besides, as a plan counts them."""
    denoise = denoise_bytes(work, dtype, rows, parked, way, "int8" if way == "int8" else "exact")
    counted = denoise + RING_SLOTS * work.block_bytes
    fixed = "expandable_segments:False" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    return counted, counted + ALLOCATOR_BYTES + int(FRAGMENTS * denoise if fixed else 0)


def _workload(scale: Scale, tokens: int) -> Workload:
    """The published model with a clip of that many tokens, or a small one."""
    work = published_workload("r2v", _TYPE)
    if scale.small:
        work = replace(work, dim=256, ffn_dim=512, block_bytes=1 << 20, outer_bytes=1 << 20)
    return replace(work, latent_frames=1, height=16, width=16 * tokens)


@contextmanager
def _computing(way: str) -> Iterator[None]:
    """Let products run by one way, whichever is quickest here; "plain" is the only one where it is meant."""

    def fastest(device: torch.device, key: str, candidates: Mapping[str, object]) -> str:
        return _WAYS[way] if _WAYS[way] in candidates else next(iter(candidates))

    with ExitStack() as stack:
        if way in _WAYS:
            stack.enter_context(patch.object(matmul, "fastest", fastest))
            stack.enter_context(patch.object(matmul, "float16_sums_are_quick", lambda _: way == "float16 sums"))
        yield
