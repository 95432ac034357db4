"""Time decoding, linear layers, attention and a whole block, each beside the resident weight."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.errors import SkyrunError
from skyrun.events import Event, Progress, StageEnded, StageStarted, now
from skyrun.kernels import FORMATS, QuantizedWeight, linear
from skyrun.kernels.attention import Keys, attend, quick_precisions, ways
from skyrun.kernels.selection import tiles_for
from skyrun.kernels.tiles import Selection
from skyrun.kernels.torch import decode as torch_decode
from skyrun.models.dit import Context, dit_block
from skyrun.models.dit.spans import Span
from skyrun.models.dit_header import HEAD_DIM, DiTDims
from skyrun.models.rope import rope_table
from skyrun.models.umt5 import TEXT_LENGTH
from skyrun.planning.published import LAYERS
from skyrun.streaming.device import choose_device, peak_bytes
from skyrun.streaming.tokens import HeldTokens
from skyrun.streaming.weights import Weight, Weights
from skyrun.tasks import skyreels_v3 as tasks
from skyrun.tools.bench.measurement import Clock, Measurement
from skyrun.tools.bench.synthetic_weight import random_blocks, random_weight
from skyrun.units import GIB

QUANTIZED = tuple(name for name, format in FORMATS.items() if format.block_size > 1)
ROWS = {"cuda": (1, 64, 512, 2048, 8192, 32760, 75600), "cpu": (1, 64)}
TYPES = {"cuda": QUANTIZED, "cpu": ("Q8_0", "Q6_K", "Q4_K")}
_STAGE = "measure"
_COPY_BYTES = {"cuda": GIB, "cpu": 64 << 20}
DENSITIES = (1.0, 0.5, 0.3, 0.15)  # of tiles that attention to lists reads
_FEWEST_TOKENS = 512  # for attention and a block


def _wan_14b() -> DiTDims:
    dims = tasks.WAN_14B
    return DiTDims(
        dim=dims["dim"],
        heads=dims["dim"] // HEAD_DIM,
        layers=LAYERS,
        ffn_dim=dims["ffn"],
        in_channels=dims["in"],
        out_channels=dims["out"],
        text_dim=dims["text"],
        freq_dim=dims["freq"],
    )


WAN_14B = _wan_14b()


@dataclass(frozen=True)
class Bench:
    """What to measure: the device, the types, the rows of activations, and the dims of the model."""

    device: torch.device
    types: tuple[str, ...] = QUANTIZED
    rows: tuple[int, ...] = ROWS["cpu"]
    dims: DiTDims = WAN_14B

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations, as plans choose it."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, cols) of the weights of a block."""
        dim, ffn = self.dims.dim, self.dims.ffn_dim
        return (dim, dim), (ffn, dim), (dim, ffn)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The numbers of rows that a clip could have; the largest one if none could."""
        return tuple(rows for rows in self.rows if rows >= _FEWEST_TOKENS) or (max(self.rows),)

    @property
    def total(self) -> int:
        """How many measurements there will be."""
        per_type = len(self.shapes) * (1 + 3 * len(self.rows))
        listed = len(list_precisions(self)) * len(DENSITIES)
        ways = (len(attention_ways(self)) + listed) * len(self.tokens)
        return 1 + len(self.types) * per_type + len(self.shapes) * len(self.rows) + ways + self._blocks

    @property
    def _blocks(self) -> int:
        return len(self.tokens) * (1 + 2 * len(self.types))

    def random(self, *shape: int) -> Tensor:
        """Random activations."""
        return torch.randn(shape, dtype=self.dtype, device=self.device)


def attention_ways(bench: Bench) -> tuple[str, ...]:
    """The names of the attention backends that run on this device."""
    tiny = torch.empty(1, bench.dims.heads * HEAD_DIM, dtype=bench.dtype, device=bench.device)
    return *ways(tiny, Keys(tiny, tiny, bench.dims.heads)), *quick_precisions(bench.device)


def attention_way(name: str, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention by the backend of that name, which may be a precision. Keys are prepared anew."""
    precision = name if name in quick_precisions(q.device) else "exact"
    return ways(q, Keys(k, v, heads, precision))[name]()


def list_precisions(bench: Bench) -> tuple[str, ...]:
    """The precisions of attention to chosen tiles that run on this device."""
    return "exact", *quick_precisions(bench.device)


def drawn_lists(queries: int, keys: int, heads: int, density: float, device: torch.device) -> Selection:
    """Lists of tiles drawn at random, the same number for every tile of queries."""
    tiles = tiles_for(keys, device)
    count, rows = keys // tiles.keys, heads * tiles.count_queries(queries)
    read = max(1, round(density * count))
    lists = torch.rand(rows, count, device=device).argsort(1)[:, :read].sort(1).values.short()
    room = torch.zeros(rows, 1, dtype=torch.int16, device=device)  # kernels look one ahead
    counts = torch.full((heads, rows // heads), read if count else 0, dtype=torch.int32, device=device)
    return Selection(torch.cat((lists, room), 1).view(heads, rows // heads, -1), counts, keys, tiles)


def list_way(precision: str, q: Tensor, k: Tensor, v: Tensor, heads: int, chosen: Selection) -> Tensor:
    """Attention to chosen tiles in a precision. Keys are prepared anew."""
    keys = Keys(k, v, heads, precision)
    if precision != "exact":
        _ = keys.quantized
    return attend(q, keys, chosen)


@torch.inference_mode()
def measure_kernels(bench: Bench) -> Generator[Event, None, list[Measurement]]:
    """Take all measurements."""
    start, measured = now(), []
    yield StageStarted(_STAGE, bench.total, "figures")
    for one in _measurements(bench):
        measured.append(one)
        yield Progress(_STAGE, len(measured))
    yield StageEnded(_STAGE, now() - start, peak_bytes(bench.device))
    return measured


def _measurements(bench: Bench) -> Iterator[Measurement]:
    clock = Clock(bench.device)
    yield _copy(bench, clock)
    for out, cols in bench.shapes:
        for rows in bench.rows:
            yield _resident(bench, clock, rows, out, cols)
        for type in bench.types:
            yield from _linear(bench, clock, type, out, cols)
    for tokens in bench.tokens:
        yield from _attention(bench, clock, tokens)
        yield from _blocks(bench, clock, tokens)


def _copy(bench: Bench, clock: Clock) -> Measurement:
    source = torch.empty(_COPY_BYTES[bench.device.type], dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = clock.seconds(lambda: target.copy_(source))
    return Measurement("copy", "device memory", 0, "copy", seconds, 2 * source.nbytes)


def _resident(bench: Bench, clock: Clock, rows: int, out: int, cols: int) -> Measurement:
    """The baseline: a weight in memory in the activations' dtype."""
    x, weight = bench.random(rows, cols), bench.random(out, cols)
    seconds = clock.seconds(lambda: F.linear(x, weight))
    return Measurement("linear", f"{out}x{cols}", rows, "resident", seconds, 0, 2 * rows * out * cols)


def _linear(bench: Bench, clock: Clock, type: str, out: int, cols: int) -> Iterator[Measurement]:
    exact = random_weight(type, out, cols, bench.device)
    fast = replace(exact, fast=True)
    blocks = random_blocks(type, out, cols).to(bench.device)
    decoded = out * cols * torch.finfo(bench.dtype).bits // 8
    seconds = clock.seconds(lambda: exact.dense(bench.dtype))
    yield Measurement("decode", f"{type} {out}x{cols}", 0, "decode", seconds, blocks.nbytes + decoded)
    for rows in bench.rows:
        x = bench.random(rows, cols)
        for way, work in _linear_ways(x, exact, fast, blocks).items():
            seconds = clock.seconds(work)
            yield Measurement("linear", f"{type} {out}x{cols}", rows, way, seconds, 0, 2 * rows * out * cols)


def _linear_ways(
    x: Tensor, exact: QuantizedWeight, fast: QuantizedWeight, blocks: Tensor
) -> dict[str, Callable[[], Tensor]]:
    return {
        "exact": lambda: linear(x, exact),
        "fast": lambda: linear(x, fast),
        # What ComfyUI-GGUF and diffusers do.
        "torch decode": lambda: F.linear(x, torch_decode.dequantize(blocks, exact.type, x.dtype)),
    }


def _attention(bench: Bench, clock: Clock, tokens: int) -> Iterator[Measurement]:
    heads = bench.dims.heads
    q, k, v = (bench.random(tokens, heads * HEAD_DIM) for _ in range(3))
    for name in attention_ways(bench):
        # The time includes preparing the keys, which a run does once for each block.
        seconds = clock.seconds(partial(attention_way, name, q, k, v, heads))
        operations = 4 * tokens * tokens * heads * HEAD_DIM
        yield Measurement("attention", f"{heads} heads", tokens, name, seconds, 0, operations)
    for name in list_precisions(bench):
        for density in DENSITIES:
            chosen = drawn_lists(tokens, tokens, heads, density, bench.device)
            seconds = clock.seconds(partial(list_way, name, q, k, v, heads, chosen))
            way = f"{name}, density {density:g}"
            yield Measurement("attention", f"{heads} heads", tokens, way, seconds, 0, int(density * operations))


def _blocks(bench: Bench, clock: Clock, tokens: int) -> Iterator[Measurement]:
    dims = bench.dims
    values, context = bench.random(tokens, dims.dim), Context(bench.random(TEXT_LENGTH, dims.dim))
    x = HeldTokens((tokens, dims.dim), bench.dtype, bench.device)
    x.store(slice(0, tokens), values)
    spans = [Span(slice(0, tokens), (values.new_empty(0), torch.randn(6, dims.dim, device=bench.device)))]
    rope = rope_table([0], 1, tokens, HEAD_DIM, bench.device)

    def measured(what: str, way: str, weights: Weights) -> Measurement:
        seconds = clock.seconds(lambda: dit_block(x, weights, spans, context, rope, dims))
        return Measurement("block", what, tokens, way, seconds)

    yield measured(str(bench.dtype).removeprefix("torch."), "resident", block_weights(bench, None))
    for type in bench.types:
        for way in ("exact", "fast"):
            yield measured(type, way, block_weights(bench, type, way == "fast"))


def block_weights(bench: Bench, type: str | None, fast: bool = False) -> Weights:
    """A block of random weights, with matrices of a quantized type or in the activations' dtype.

    Args:
        bench: The dims and the device.
        type: The type of the matrices; None stands for the dtype of the activations.
        fast: Whether linear layers and the scores of attention run in int8.
    """
    dims, device = bench.dims, bench.device
    weights: dict[str, Weight] = {"modulation": torch.randn(1, 6, dims.dim, device=device)}
    matrices = {f"{part}.{name}": (dims.dim, dims.dim) for part in ("self_attn", "cross_attn") for name in "qkvo"}
    matrices |= {"ffn.0": (dims.ffn_dim, dims.dim), "ffn.2": (dims.dim, dims.ffn_dim)}
    for name, (out, cols) in matrices.items():
        weights[f"{name}.weight"] = (
            random_weight(type, out, cols, device, fast=fast) if type else bench.random(out, cols) / cols**0.5
        )
        weights[f"{name}.bias"] = torch.zeros(out, device=device)
    norms = ["norm3.weight", *(f"{part}.norm_{name}.weight" for part in ("self_attn", "cross_attn") for name in "qk")]
    weights |= {name: torch.ones(dims.dim, device=device) for name in norms}
    weights["norm3.bias"] = torch.zeros(dims.dim, device=device)
    return Weights(f"a random block of {type}", weights, attention="int8" if fast else "exact")


def plan_bench(device: str | None, types: Sequence[str] | None, rows: Sequence[int] | None) -> Bench:
    """Decide what to measure. Raises SkyrunError for a type that is not quantized, or for rows below one.

    Args:
        device: "cuda" or "cpu"; None stands for a GPU if there is one.
        types: The quantized types; None stands for the default of the device.
        rows: The numbers of rows of activations; None stands for the default of the device.
    """
    chosen = choose_device(device)
    names = TYPES[chosen.type] if types is None else tuple(name.upper() for name in types)
    counts = ROWS[chosen.type] if rows is None else tuple(rows)
    problems = [f"{name} is not a quantized type, use {', '.join(QUANTIZED)}" for name in {*names} - {*QUANTIZED}]
    problems += [f"{count} rows cannot be measured" for count in counts if count < 1]
    if problems:
        raise SkyrunError.listing("this cannot be measured", problems, "see `skyrun bench --help`")
    return Bench(chosen, names, counts)
