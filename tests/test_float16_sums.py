"""Products with float16 sums: what leaves their range is noticed, computed anew, and not tried again."""

import pytest
import torch

from skyrun.events import drain
from skyrun.kernels import QuantizedWeight, float16_sums, matmul
from skyrun.kernels.float16_sums import may_overflow, multiply, within_range
from skyrun.kernels.gguf_file import open_gguf
from skyrun.models.dit import Context, DiT
from skyrun.models.dit_header import block_layouts
from skyrun.quant import quantize
from skyrun.streaming.stream import BlockStream

CPU = torch.device("cpu")
DTYPE = torch.bfloat16
pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(autouse=True)
def looks(monkeypatch):
    """How often the host waited for flags; what other tests left is forgotten."""
    counted = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: counted.append(self.shape) or plain(self))
    monkeypatch.setattr(float16_sums, "_overflowed", set())
    return counted


def weight(name, scale=0.05):
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(len(name))) * scale
    return QuantizedWeight(quantize(values, "Q8_0"), "Q8_0", name=name)


def product(x, w):
    if may_overflow(w):
        return torch.nn.functional.linear(x, w.dense(x.dtype))
    return multiply(x, w, None)


def chain(x, weights, calls):
    calls.append(1)
    for w in weights:
        x = product(norm(x), w)
    return x


def norm(x):
    return x / x.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize(
    ("scales", "times"),
    [((0.05, 0.05, 0.05), 1), ((0.05, 1e6, 0.05), 2), ((1e6, 0.05, 0.05), 2), ((0.05, 1e6, 1e5), 3)],
)
def test_what_overflows_is_computed_anew(looks, scales, times):
    """A product that leaves the range makes those after it infinite or NaN too: only the first is at fault."""
    x = torch.randn(70, 64, generator=torch.Generator().manual_seed(7)).to(DTYPE)
    weights = [weight(f"layer {index}", scale) for index, scale in enumerate(scales)]
    calls, untouched = [], x.clone()
    got = within_range(chain, x, weights, calls)
    assert len(calls) == len(looks) == times and torch.equal(x, untouched)
    assert [may_overflow(w) for w in weights] == [scale > 1e3 for scale in scales]
    exact = x.double()
    for w in weights:
        exact = norm(exact) @ w.dense(torch.float64).T
    assert float((got - exact).norm() / exact.norm()) < 0.02
    assert torch.equal(within_range(chain, x, weights, calls), got)
    assert len(calls) == len(looks) == times + 1  # remembered: once is enough


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_comes_in_broken_goes_out_broken(bad):
    x = torch.full((70, 64), bad, dtype=DTYPE)
    assert not within_range(chain, x, [weight("a"), weight("b")], []).isfinite().any()


def test_the_outermost_looks_for_all(looks):
    x, calls = torch.randn(70, 64).to(DTYPE), []
    within_range(lambda: [within_range(chain, x, [weight(name)], calls) for name in "abc"])
    assert looks == [(3,)]
    with pytest.raises(ZeroDivisionError):
        within_range(lambda: multiply(x, weight("a"), None) / (1 // 0))
    within_range(chain, x, [weight("d")], calls)
    assert looks == [(3,), (1,)]


def test_nobody_looks_where_nothing_is_summed_in_float16(looks):
    assert within_range(lambda: 7) == 7 and not looks


@pytest.fixture
def as_on_a_card(monkeypatch):
    """as_on_a_card(names): as if float16 sums were the quickest here, and these weights' products left the range."""

    def exact(x, w, bias):
        flat = x.reshape(-1, x.shape[-1])
        if may_overflow(w):
            return matmul._decoded(flat, w, bias).view(*x.shape[:-1], -1)
        huge = 1e6 if w.name in names else 1
        return multiply(flat * huge, w, bias).view(*x.shape[:-1], -1)

    names = set()
    monkeypatch.setattr(matmul, "_exact", exact)
    return names


@pytest.mark.parametrize("rows", [None, 20])
def test_a_transformer_whose_layers_overflow(goldens, converted, looks, as_on_a_card, rows):
    golden = goldens("dit_r2v/t6_4x6")
    file = open_gguf(next(converted("Q8_0").glob("SkyReels*.gguf")))

    def sample():
        dit = DiT(file, CPU, torch.float32, rows=rows)
        (time,) = dit.embed_times(golden["in.timesteps"].tolist()[:1])
        latents = golden["in.hidden_states"][0]
        context, rope = Context(dit.embed_text(golden["in.context_valid"])), dit.rope(latents)
        with BlockStream(file.path, block_layouts(file), CPU) as stream:
            looks.clear()
            blocks = dit.forward(stream, latents, [time] * latents.shape[1], context, rope)
            return drain(blocks)

    plain = sample()
    spans = 1 if rows is None else 2
    assert len(looks) == 2 * (1 + spans)  # for the keys of both blocks, and for every span
    as_on_a_card.update({"blocks.0.ffn.2.weight", "blocks.1.self_attn.k.weight", "blocks.1.cross_attn.q.weight"})
    again = sample()
    assert all(map(float16_sums._overflowed.__contains__, as_on_a_card))
    assert float((again - plain).abs().max() / plain.abs().max()) < 2e-3
    repeated = len(looks)
    assert torch.equal(sample(), again)
    assert len(looks) == repeated - 3
