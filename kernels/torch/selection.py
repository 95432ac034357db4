"""The choice of key tiles in plain torch: the twin of `triton.selection`."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from skyrun.kernels.quantized_keys import HEAD_DIM
from skyrun.kernels.tiles import ALIKE, HALVINGS, Pools, Selection, Tiles

_LEVELS = 127
FACTOR = math.log2(math.e) / math.sqrt(HEAD_DIM)  # of scores, so that exp2 makes probabilities of them
LARGEST = 60000.0  # scores are kept in float16


def pool(x: Tensor, tile: int, mean: Tensor | None) -> Pools:
    """Means of tiles of rows [N, H * 128]. mean: float32 [H * 128], taken away from all rows; None takes none away."""
    rows = x.float() if mean is None else x.float() - mean
    count = -(-len(x) // tile)
    heads = pad(rows, (0, 0, 0, count * tile - len(x))).view(count, tile, -1, HEAD_DIM)
    members = torch.full((count, 1, 1), float(tile), device=x.device)
    members[-1] -= count * tile - len(x)
    means = heads.sum(1) / members
    units = heads * heads.square().sum(3, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
    alike = (units.sum(1) / members).square().sum(2) >= ALIKE
    scales = means.abs().amax(2) / _LEVELS
    codes = (means / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(2)).round().to(torch.int8)
    return Pools(codes.flatten(1), scales.T.contiguous(), alike.T.contiguous())


def choose(q: Pools, k: Pools, shares: Tensor, starts: Tensor, always: Tensor, keys: int, tiles: Tiles) -> Selection:
    """The key tiles that hold a share of the probability of each query tile.

    Args:
        q: T tiles of queries.
        k: K tiles of keys.
        shares: float32 [H], of the probability; 1 or more selects all.
        starts: int32 [T], the number of each query tile's first query among the keys.
        always: bool [K], key tiles that are selected anyway.
        keys: how many there are.
        tiles: their sizes.
    """
    heads, count = k.scales.shape
    ours, theirs = (p.codes.view(-1, heads, HEAD_DIM).transpose(0, 1).float() for p in (q, k))
    scores = (ours @ theirs.mT) * (q.scales * FACTOR).unsqueeze(2) * k.scales.unsqueeze(1)
    scores = scores.clamp(-LARGEST, LARGEST).half().float()
    shared = (scores - scores.amax(2, keepdim=True)).exp2()
    number = torch.arange(count, device=starts.device)
    own = (number >= (starts // tiles.keys).unsqueeze(1)) & (
        number <= ((starts + tiles.queries - 1) // tiles.keys).unsqueeze(1)
    )
    whole = keys // tiles.keys
    kept = own | (always | (number >= whole) | ~k.alike).unsqueeze(1)
    need = shares.view(-1, 1) * shared.sum(2) - (shared * kept).sum(2)
    others = shared.masked_fill(kept, -1)
    low, high = torch.zeros_like(need), torch.ones_like(need)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = torch.where(others >= middle.unsqueeze(2), others, 0.0).sum(2) >= need
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    low = torch.where(need <= 0, 2.0, low)  # what is kept anyway has the share
    low = torch.where((shares >= 1).view(-1, 1) | ~q.alike, -1.0, low)  # all
    chosen = (kept | (others >= low.unsqueeze(2)) | others.isnan()) & (number < whole)
    lists = torch.where(chosen, number, count).sort(2).values.to(torch.int16)
    return Selection(lists, chosen.sum(2, dtype=torch.int32), keys, tiles)
