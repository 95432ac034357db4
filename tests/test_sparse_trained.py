"""Attention that skips on trained weights: the error that it states is the one that it has (benchmarks/sparse.py)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from skyrun.hub.built_in import CHECKPOINT
from skyrun.kernels import selection
from skyrun.kernels.tiles import Tiles
from skyrun.quant import convert

ROOT = Path(__file__).parent.parent
with pytest.MonkeyPatch.context() as patch:  # neither is part of the package
    patch.syspath_prepend(str(ROOT))
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    from sparse import measured

    from training.requests import drawn_request, make


LEAST = {0.3: 60, 1.0: 55, 3.0: 45}  # dB against the dense clip, by the bound in percent
CLIPS = 2


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model, and clips that it makes without skipping."""
    folder = tmp_path_factory.mktemp("trained")
    convert(CHECKPOINT, folder / "F32", "F32")
    requests = [drawn_request(number, "sparse", folder)[1] for number in range(CLIPS)]
    return folder / "F32", [(r, make(replace(r, model=folder / "F32", attention="exact"))) for r in requests]


@pytest.mark.parametrize("tiles", [selection.SMALL, Tiles(8, 4)])
@pytest.mark.parametrize("bound", LEAST)
def test_the_stated_error_is_honest(dense, bound, tiles, monkeypatch):
    monkeypatch.setattr(selection, "SMALL", tiles)
    seen, ratios = measured(*dense, bound, "exact")
    true = 100 * torch.cat(seen.true)
    assert (true <= bound).float().mean() >= 0.95 and true.max() <= 3 * bound
    assert min(ratios) >= LEAST[bound]
    density = sum(row[1] for row in seen.steps) / len(seen.steps)
    assert density < (1 if bound < 3 else 0.93)
