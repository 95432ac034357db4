"""What a transformer block allocates on a card, replayed through the rules of torch's allocator, against the plan.

No GPU is needed: the code that runs on a card runs on tensors without data, and launches of kernels do nothing. A block
is recorded once for a way of computing and a number of tokens; the recording is replayed after everything that stays in
memory: the ring with the blocks that are kept, what lies outside of blocks, the tokens, the rotary table.

    python benchmarks/block_memory.py
    python benchmarks/block_memory.py --fixed     # with segments of fixed size, as on Windows
"""

import argparse
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from unittest.mock import patch

import torch
from allocator import Allocator, Block, OutOfMemory
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from skyrun.kernels import FORMATS, QuantizedWeight, decode, elementwise, float16_sums, matmul
from skyrun.kernels import attention as attention_kernels
from skyrun.kernels import selection as selection_kernels
from skyrun.kernels.machine.capability import OLDEST
from skyrun.kernels.quantized_keys import PRECISIONS
from skyrun.kernels.tiles import USUAL
from skyrun.models.dit import Context, dit_block
from skyrun.models.dit.spans import Span, chunks, hearing
from skyrun.models.dit.sparse import AllToAll, Learned, SelfCheck
from skyrun.models.dit.tile_order import Frames, tile_order
from skyrun.models.dit_header import HEAD_DIM, DiTDims
from skyrun.parallel import group as groups
from skyrun.parallel.attention import SharedAttention
from skyrun.parallel.group import Arriving, Group
from skyrun.planning.published import transformer_table
from skyrun.planning.request import Request
from skyrun.planning.what_if import Planned, plan_request
from skyrun.presets.machine.cards import CARDS, Card
from skyrun.presets.machine.hardware import stated
from skyrun.presets.memory import CONTEXT_BYTES, GIB, RING_SLOTS, way_of
from skyrun.presets.workload import Workload
from skyrun.streaming.low_rank import Addition
from skyrun.streaming.tokens import HeldTokens
from skyrun.streaming.weights import Weight, Weights
from skyrun.tasks import TASKS

META = torch.device("meta")
# Of linear layers and attention. Float8 takes as much as int8.
_PRECISIONS = (("exact", "exact"), ("exact", "int8"), ("exact", "full-int8"), ("fast", "int8"), ("fast", "full-int8"))
_PRECISIONS += (("exact", "exact,sparse"), ("fast", "full-int8,sparse"))
RAM, DISK = 64, 2.0
_TYPE = "Q8_0"  # of the recorded weights; what a block allocates does not depend on it
_PASSES = 3  # of the recording: memory that one leaves cut up is met by the next
_IMAGE_TOKENS = 257
_OUTER_TENSORS = 40  # outside of blocks
_WORKSPACE = 32 << 20  # of cuBLAS on Hopper; other cards take less
_CHOICES = {"exact": "decode", "float16 sums": "decode, float16 sums", "int8": "triton", "plain": "decode"}

Log = list[tuple[int, int]]  # (number of the allocation, its bytes, or 0 where it is freed)


class Recorder(TorchDispatchMode):
    """Logs when operations allocate memory on the meta device, and when the last tensor that uses it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.log: Log = []
        self._users: dict[int, int] = {}
        self._numbers: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or tensor.device != META or not tensor.untyped_storage().nbytes():
                continue
            storage = _storage(tensor)
            if storage not in self._numbers:
                if storage in given:
                    continue  # it was there before
                self._numbers[storage] = len(self.log)
                self.log.append((len(self.log), tensor.untyped_storage().nbytes()))
            self._users[storage] = self._users.get(storage, 0) + 1
            weakref.finalize(tensor, self._drop, storage)
        return result

    def _drop(self, storage: int) -> None:
        self._users[storage] -= 1
        if not self._users[storage]:
            del self._users[storage]
            self.log.append((self._numbers.pop(storage), 0))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def pretended_card(way: str) -> Iterator[None]:
    """Let tensors without data pass for those of a card on which one way of computing is the fastest."""

    def fastest(device, key, candidates):  # type: ignore[no-untyped-def]
        wanted = (_CHOICES[way], *PRECISIONS)
        return next((name for name in wanted if name in candidates), next(iter(candidates)))

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
        torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)  # the logarithms of its sums
        return out

    with ExitStack() as stack:
        for module in (attention_kernels, selection_kernels, decode, elementwise, matmul):
            stack.enter_context(patch.object(module, "uses_triton", lambda device: way != "plain"))
        for module in (attention_kernels, matmul):
            stack.enter_context(patch.object(module, "fastest", fastest))
        stack.enter_context(patch.object(float16_sums, "float16_sums_are_quick", lambda device: way == "float16 sums"))
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(patch.object(kind, "run", lambda self, *args, **kwargs: None))
        stack.enter_context(patch.object(torch.nn.functional, "scaled_dot_product_attention", flash))
        stack.enter_context(patch.object(torch.Tensor, "tolist", lambda self: [True] * self.numel()))
        stack.enter_context(patch.object(torch.Tensor, "cpu", lambda self: torch.zeros(self.shape)))
        yield


@cache
def recorded(
    task: str,
    way: str,
    attention: str,
    tokens: int,
    frames: int,
    rows: int | None,
    parked: bool,
    rank: int = 0,
    nag: bool = False,
    sparse: bool = False,
    devices: int = 1,
) -> tuple[int, ...]:
    """The log of a block, flattened: the first chunks of all tokens, and the last one.

    rank: of adapters. nag: whether there is normalized attention guidance. sparse: whether attention skips tiles; then
    there is a block of the first step, and one of a later step. devices: how many there are; the log is the last one's.
    """
    seen, group = Recorder(), Lonely(devices - 1, devices, META)
    with torch.inference_mode(), pretended_card(way), patch.object(groups, "_here", group):
        checks, whole = _checks(tokens, TASKS[task].dims["dim"] // HEAD_DIM), [slice(0, tokens)]
        block = one_block(task, way, attention, tokens, frames, rows, parked, rank, nag, checks[0].shares(whole))
        with seen:
            for one in [check.block(0, 0, whole) for check in checks] if sparse else [AllToAll()]:
                block(one)
    return tuple(number for entry in seen.log for number in entry)


def _checks(tokens: int, heads: int) -> list[SelfCheck]:
    """Of a first step and of a later one."""
    order, shape = tile_order([Frames(1, True)], 1, tokens, USUAL), (1, 1, heads)
    levels = torch.full(shape, 5, dtype=torch.int8)
    return [SelfCheck(0.01, order, shape, known) for known in (Learned(), Learned(levels))]


def one_block(
    task: str,
    way: str,
    attention: str,
    tokens: int,
    frames: int = 1,
    rows: int | None = None,
    parked: bool = False,
    rank: int = 0,
    nag: bool = False,
    shares: Sequence[slice] = (),
) -> Callable[..., None]:
    """What computes a block of a task with tokens that have no data, perhaps with attention that skips.

    It is made and called on a `pretended_card`. shares: the tokens of each of several devices, of which it is the last.
    """
    spec = TASKS[task]
    dims = DiTDims(spec.dims["dim"], spec.dims["dim"] // HEAD_DIM, 40, spec.dims["ffn"], 16, 16, 4096, 256)
    shares = shares or [slice(0, tokens)]
    x = _Waiting(tokens, dims.dim) if parked else HeldTokens((tokens, dims.dim), torch.bfloat16, META, shares[-1])
    rope = (_empty(tokens, HEAD_DIM // 2, dtype=torch.float32),) * 2
    context = Context(
        _empty(512, dims.dim),
        _empty(_IMAGE_TOKENS, dims.dim) if spec.sees_image else None,
        _empty(frames, spec.dims["context_tokens"], spec.dims["audio_dim"]) if "audio_dim" in spec.dims else None,
        _empty(512, dims.dim) if nag else None,
    )
    time = (_empty(dims.dim, dtype=torch.float32), _empty(6, dims.dim, dtype=torch.float32))
    parts_of = [chunks(share.start, share.stop, rows) for share in shares]
    spans_of = [
        [
            hearing(Span(part, time), tokens // frames, None, META)
            for part in (*parts[: min(3, len(parts) - 1)], parts[-1])
        ]
        for parts in parts_of
    ]
    weights = _weights(task, way, attention, rank)
    shared = SharedAttention(groups.here(), shares, spans_of, dims.dim, dims.heads) if len(shares) > 1 else None
    return partial(dit_block, x, weights, spans_of[-1], context, rope, dims, shared=shared)


class Lonely(Group):
    """A group of which only this rank is there: what the others would send is empty memory."""

    def _send(self, parts: Tensor, sending: list[int], receiving: list[int]) -> Arriving:
        return Arriving(None, parts.new_empty(sum(receiving)), parts)


class _Waiting:
    """Parked tokens, as far as the card sees them."""

    parked = True

    def __init__(self, tokens: int, dim: int) -> None:
        self.shape, self.dtype = torch.Size((tokens, dim)), torch.bfloat16

    def fetch(self, rows: slice) -> Tensor:
        return _empty(rows.stop - rows.start, self.shape[1])

    def store(self, rows: slice, values: Tensor) -> None:
        pass


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _weights(task: str, way: str, attention: str, rank: int) -> Weights:
    spec, format = TASKS[task], FORMATS[_TYPE]
    views: dict[str, Weight] = {}
    added = {}
    for name, shape in transformer_table(spec).shapes("original", {**spec.dims, "layers": 1}).items():
        if name.startswith("blocks.0.") and len(shape) == 2:
            data = torch.empty(shape[0], format.row_bytes(shape[1]), dtype=torch.uint8, device=META)
            views[name.removeprefix("blocks.0.")] = QuantizedWeight(data, _TYPE, way != "plain", way == "int8", name)
            if rank:
                addition = Addition(_empty(shape[0], rank), _empty(rank, shape[1]), 1.0)
                added[name.removeprefix("blocks.0.")] = [addition]
        elif name.startswith("blocks.0."):
            views[name.removeprefix("blocks.0.")] = _empty(*shape, dtype=torch.float32)
    return Weights("the recorded block", views, None, attention, added)


@dataclass(frozen=True)
class Replay:
    """A plan's memory in bytes. counted: what the plan counts. reserved: what the replay has taken at most; None if it
    ran out of memory. CUDA's context is in both."""

    planned: Planned
    way: str
    counted: int
    reserved: int | None

    @property
    def limit(self) -> int:
        return self.planned.plan.limit_bytes


def replay(planned: Planned, expandable: bool = True) -> Replay:
    """Replay the denoising of a plan."""
    plan, work, hardware = planned.plan, planned.workload, planned.hardware
    way = way_of(True, hardware.capability, plan.dtype, plan.precision == "fast")
    counted = next(stage.device_bytes for stage in plan.stages if stage.name == "denoise")
    log = _log(planned, way)
    allocator = Allocator(plan.limit_bytes - CONTEXT_BYTES, expandable)
    try:
        slots = RING_SLOTS if plan.resident_blocks < work.layers else 0
        for nbytes in _before(work, slots + plan.resident_blocks, plan.parked_tokens):
            allocator.take(nbytes)
        for _ in range(_PASSES):
            _replay_block(log, allocator)
    except OutOfMemory:
        return Replay(planned, way, counted, None)
    return Replay(planned, way, counted, allocator.peak + CONTEXT_BYTES)


def _log(planned: Planned, way: str) -> tuple[int, ...]:
    plan, work = planned.plan, planned.workload
    rows, parked, nag = plan.token_rows, plan.parked_tokens, work.avoided_tokens > 0
    tokens, frames = work.tokens, work.latent_frames
    how = work.adapter_rank, nag, bool(plan.sparse), work.devices
    return recorded(work.task, way, plan.attention, tokens, frames, rows, parked, *how)


def _before(work: Workload, blocks: int, parked: bool) -> Iterator[int]:
    """What is allocated before the first block, in order."""
    yield _WORKSPACE
    yield blocks * work.block_bytes
    for _ in range(_OUTER_TENSORS):
        yield work.outer_bytes // _OUTER_TENSORS
    if not parked:
        yield from [2 * work.own_tokens * work.dim] * work.contexts
    yield from (4 * work.tokens * HEAD_DIM // 2,) * 2
    yield from [2 * work.context_tokens * work.dim] * work.contexts
    if work.avoided_tokens:
        yield 2 * work.avoided_tokens * work.dim


def _replay_block(log: tuple[int, ...], allocator: Allocator) -> None:
    held: dict[int, Block] = {}
    for number, nbytes in zip(log[::2], log[1::2], strict=True):
        if nbytes:
            held[number] = allocator.take(nbytes)
        else:
            allocator.give(held.pop(number))
    for block in held.values():
        allocator.give(block)


def live_bytes(one: Replay) -> int:
    """What the tensors of a replayed plan take at most, without the context."""
    plan, work = one.planned.plan, one.planned.workload
    log = _log(one.planned, one.way)
    slots = RING_SLOTS if plan.resident_blocks < work.layers else 0
    taken = peak = sum(_before(work, slots + plan.resident_blocks, plan.parked_tokens)) - _WORKSPACE
    held = {}
    for number, nbytes in zip(log[::2], log[1::2], strict=True):
        held[number] = nbytes or held[number]
        taken += nbytes or -held[number]
        peak = max(peak, taken)
    return peak + CONTEXT_BYTES


def cases(cards: Iterable[Card], system: str = "") -> Iterator[Planned]:
    """The plans of cards for every task, resolution and way of computing, but those that do not fit."""
    for card in cards:
        for task in TASKS:
            for resolution in ("480P", "720P"):
                if resolution in TASKS[task].resolutions:
                    for precision, attention in _PRECISIONS if card.capability >= OLDEST else _PRECISIONS[:1]:
                        request = Request(task, "", resolution=resolution)
                        hardware = dataclasses.replace(stated(card, RAM, DISK), system=system)
                        planned = plan_request(request, hardware, precision=precision, attention=attention)
                        if not planned.plan.problem:
                            yield planned


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixed", action="store_true", help="segments of fixed size, and plans for Windows")
    fixed = parser.parse_args().fixed
    columns = "card, task, clip, way, attention, tokens at a time, blocks kept, limit, counted, replayed, of the limit"
    print(f"| {columns.replace(', ', ' | ')} |")
    print("|" + " --- |" * 11)
    for planned in cases(CARDS, "Windows" if fixed else ""):
        one, plan = replay(planned, expandable=not fixed), planned.plan
        rows = "all" if plan.token_rows is None else f"{plan.token_rows:,}" + ", parked" * plan.parked_tokens
        taken = "out of memory" if one.reserved is None else f"{one.reserved / GIB:.2f}"
        share = "" if one.reserved is None else f"{one.reserved / one.limit:.0%}"
        cells = [planned.hardware.name, planned.workload.task, str(planned.request.resolution), one.way, plan.asked]
        cells += [rows, str(plan.resident_blocks), f"{one.limit / GIB:.2f}", f"{one.counted / GIB:.2f}", taken, share]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
