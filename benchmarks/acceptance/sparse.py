"""Attention that skips tiles: the kernel beside its twin, its error beside the bound, and its time by density."""

from collections.abc import Iterator

import torch
from torch import Tensor

from acceptance.step import Figure, Scale
from skyrun.kernels.attention import Keys, attend
from skyrun.kernels.tiles import Selection
from skyrun.kernels.torch import attention as torch_attention
from skyrun.models.dit.sparse import Learned, SelfCheck
from skyrun.models.dit.tile_order import Frames, TileOrder, tile_order
from skyrun.models.dit_header import HEAD_DIM
from skyrun.presets.attention import USUAL_BOUND
from skyrun.tools.bench.checks import ROUNDING, relative_error
from skyrun.tools.bench.kernels import WAN_14B, Bench, drawn_lists, list_precisions, list_way
from skyrun.tools.bench.measurement import Clock

_DENSITIES = (1.0, 0.5, 0.3)
_ABOVE = 0.15  # of the dense time, what choosing tiles and uneven lists may add to the density
_QUERIES, _KEYS = 333, 1111  # whose kernels are compared with their twins: ragged at both ends
_SHARP, _NOISE = 1.5, (0.1, 0.2)  # of queries; of what fields have besides waves, in queries and keys
_WAVES = (8.0, 12.0)  # tokens in which queries and keys, and values, turn by about one


@torch.inference_mode()
def sparse(scale: Scale) -> Iterator[Figure]:
    """Every precision that has a kernel to chosen tiles."""
    names = scale.of(list_precisions(Bench(scale.device)), ("exact", "full-int8"))
    for name in names:
        yield from _beside_its_twin(scale, name)
    for name in names:
        yield from _within_its_bound(scale, name)
    for tokens in scale.of((32_768, 126_000), (700,)):
        yield from _times(scale, tokens, names)


def _beside_its_twin(scale: Scale, name: str) -> Iterator[Figure]:
    """From the same codes and lists: they differ as sums in another order do."""
    q, k, v = (_random(scale, rows, 2) for rows in (_QUERIES, _KEYS, _KEYS))
    chosen = drawn_lists(_QUERIES, _KEYS, 2, 0.3, scale.device)
    if name == "exact":
        twin = torch_attention.attend_plain(q, k, v, chosen)
        got = attend(q, Keys(k, v, 2), chosen)
    else:
        keys = Keys(k, v, 2, name)
        keys.prepare()
        twin, got = torch_attention.attend(q, keys.quantized, chosen), attend(q, keys, chosen)
    yield Figure(f"{name}, from its twin", relative_error(got, twin), "relative error", most=ROUNDING[scale.dtype])


def _within_its_bound(scale: Scale, name: str) -> Iterator[Figure]:
    """A step that learns, then one that skips, on waves in time and space: the largest true error of a head."""
    shape, heads = scale.of((21, 45, 80), (5, 16, 24)), scale.of(8, 2)
    order = tile_order(
        [Frames(1, True), Frames(shape[0] - 1)], *shape[1:], drawn_lists(1, 64, 1, 1, scale.device).tiles
    )
    q, k, v = _waves(scale, shape, heads, order)
    learned = Learned()
    for step in range(2):
        check = SelfCheck(USUAL_BOUND, order, (1, 1, heads), learned)
        block = check.block(0, 0, [slice(0, len(q))])
        keys = block.keys(k.clone(), v.clone(), heads, name)
        if isinstance(keys, Keys):
            yield Figure(f"{name}, skips", "nothing")
            return
        block.look(keys, lambda tiles: torch.cat([q[rows] for rows in tiles]))
        out, dense = block.attend(keys, q, [slice(0, len(q))]), attend(q, keys.keys)
        learned, (event,) = check.finish_step()
        if step:
            off, size = (t.double().unflatten(1, (heads, -1)).square().sum((0, 2)) for t in (out - dense, dense))
            error = float((off / size).sqrt().max())
            yield Figure(f"{name}, the largest error of a head", error, "relative error", most=USUAL_BOUND)
            yield Figure(f"{name}, of its tiles read", event.density, "")


def _times(scale: Scale, tokens: int, names: tuple[str, ...]) -> Iterator[Figure]:
    """Preparing the keys is in all of them, as it is in a run."""
    heads, clock = scale.of(WAN_14B.heads, 2), Clock(scale.device)
    q, k, v = (_random(scale, tokens, heads) for _ in range(3))
    for name in names:
        dense = float("nan")
        for density in _DENSITIES:
            chosen = drawn_lists(tokens, tokens, heads, density, scale.device)
            taken = _seconds(clock, name, q, k, v, heads, chosen)
            if density == 1:
                dense = taken
                yield Figure(f"{name}, {tokens}, all tiles listed", taken, "s")
            else:
                most = scale.on_card(density + _ABOVE)
                yield Figure(f"{name}, {tokens}, density {density:g}", taken / dense, "/ all", most=most)


def _seconds(clock: Clock, name: str, q: Tensor, k: Tensor, v: Tensor, heads: int, chosen: Selection) -> float:
    return clock.seconds(lambda: list_way(name, q, k, v, heads, chosen)) or float("nan")


def _random(scale: Scale, rows: int, heads: int) -> Tensor:
    return torch.randn(rows, heads * HEAD_DIM, device=scale.device, dtype=scale.dtype)


def _waves(scale: Scale, shape: tuple[int, int, int], heads: int, order: TileOrder) -> list[Tensor]:
    """Queries, keys and values that change smoothly over time and space, as those of a video do, in tile order."""
    places = torch.cartesian_prod(*(torch.arange(float(n)) for n in shape))

    def waves(length: float, noise: float, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        width = heads * HEAD_DIM
        turns = places @ (torch.randn(3, width, generator=g) / length) + 2 * torch.pi * torch.rand(width, generator=g)
        found = 2**0.5 * turns.cos() + noise * torch.randn(turns.shape, generator=g)
        return order.arranged(found).to(scale.device, scale.dtype)

    (short, long), (little, more) = _WAVES, _NOISE
    return [_SHARP * waves(short, little, 0), waves(short, more, 0), waves(long, little, 1)]
