"""Products with float16 sums: what leaves their range is noticed, computed anew, and not tried again."""

import pytest
import torch

from skyrun.events import drain
from skyrun.kernels import QuantizedWeight, float16_sums, matmul
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.kernels.float16_sums import multiply, within_range
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


@pytest.fixture(autouse=True)
def as_on_a_card(monkeypatch):
    """As if float16 sums were the quickest here."""
    monkeypatch.setattr(float16_sums, "float16_sums_are_quick", lambda device: True)


def weight(name, scale=0.05):
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(len(name))) * scale
    return QuantizedWeight(quantize(values, "Q8_0"), "Q8_0", name=name)


def norm(x):
    return x / x.square().mean(-1, keepdim=True).sqrt()


def chain(x, weights, calls):
    """The layers' products, with a norm before each, in x's dtype; only those where it is allowed sum in float16."""

    def compute():
        calls.append(1)
        y = x.to(float16_sums.handed_on(x.dtype, CPU))
        for w in weights:
            y = norm(y)
            y = multiply(y, w, None) if float16_sums.are_used(CPU) else torch.nn.functional.linear(y, w.dense(y.dtype))
        return y.to(x.dtype)

    return within_range("chain", compute, lambda y: [y])


@pytest.mark.parametrize(
    ("scales", "times"),
    [((0.05, 0.05, 0.05), 1), ((0.05, 1e6, 0.05), 2), ((1e6, 0.05, 0.05), 2), ((0.05, 1e6, 1e5), 2)],
)
def test_what_overflows_is_computed_anew(looks, scales, times):
    """A product that leaves the range makes what is computed from it infinite or NaN too, through norms as well."""
    x = torch.randn(70, 64, generator=torch.Generator().manual_seed(7)).to(DTYPE)
    weights = [weight(f"layer {index}", scale) for index, scale in enumerate(scales)]
    calls, untouched = [], x.clone()
    got = chain(x, weights, calls)
    assert len(calls) == len(looks) == times and torch.equal(x, untouched)
    exact = x.double()
    for w in weights:
        exact = norm(exact) @ w.dense(torch.float64).T
    assert float((got - exact).norm() / exact.norm()) < 0.02
    assert torch.equal(chain(x, weights, calls), got)
    assert len(calls) == times + 1  # remembered: once is enough, and nobody looks again
    assert len(looks) == (2 if times == 1 else times)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_comes_in_broken_goes_out_broken(bad):
    x = torch.full((70, 64), bad, dtype=DTYPE)
    assert not chain(x, [weight("a"), weight("b")], []).isfinite().any()
    assert not float16_sums._overflowed  # it is not float16's fault


def test_the_outermost_looks_for_all(looks):
    x, calls = torch.randn(70, 64).to(DTYPE), []
    within_range("all", lambda: [chain(x, [weight(name)], calls) for name in "abc"], lambda found: found)
    assert looks == [(3,)] and len(calls) == 3
    with pytest.raises(ZeroDivisionError):
        within_range("all", lambda: multiply(x, weight("a"), None) / (1 // 0), lambda y: [y])
    chain(x, [weight("d")], calls)
    assert looks == [(3,), (1,)]


def test_nobody_looks_where_nothing_is_summed_in_float16(looks):
    assert within_range("seven", lambda: 7, lambda _: pytest.fail("looked at")) == 7 and not looks


@pytest.mark.parametrize(("dtype", "inner"), [(DTYPE, torch.float16), (torch.float32, torch.float32)])
def test_only_16_bits_become_other_16_bits(dtype, inner):
    x = torch.zeros(1, dtype=dtype)
    assert within_range("a", lambda: float16_sums.handed_on(dtype, CPU), lambda _: [x]) == inner
    assert float16_sums.handed_on(dtype, CPU) == dtype  # outside nobody would look


@pytest.fixture
def overflowing(monkeypatch):
    """Names of weights whose products leave the range. All others sum in float16 too."""
    names = set()

    def exact(x, w, bias):
        flat = x.reshape(-1, x.shape[-1])
        if not float16_sums.are_used(CPU):
            return matmul._decoded(flat, w, bias).view(*x.shape[:-1], -1)
        y = multiply(flat, w, bias)
        return (y * 1e9 if w.name in names else y).view(*x.shape[:-1], -1)

    monkeypatch.setattr(matmul, "_exact", exact)
    return names


@pytest.fixture
def sample(goldens, converted, looks):
    """sample(dtype, rows): the velocity that the tiny model predicts."""
    golden = goldens("dit_r2v/t6_4x6")
    file = open_gguf(next(converted("Q8_0").glob("SkyReels*.gguf")))

    def run(dtype=DTYPE, rows=None):
        dit = DiT(file, CPU, dtype, rows=rows)
        (time,) = dit.embed_times(golden["in.timesteps"].tolist()[:1])
        latents = golden["in.hidden_states"][0]
        context, rope = Context(dit.embed_text(golden["in.context_valid"])), dit.rope(latents)
        with BlockStream(file.path, block_layouts(file), CPU) as stream:
            looks.clear()
            return drain(dit.forward(stream, latents, [time] * latents.shape[1], context, rope))

    return run


@pytest.mark.parametrize("rows", [None, 20])
def test_a_transformer_whose_blocks_overflow(looks, sample, overflowing, rows):
    exact, plain = sample(torch.float32, rows), sample(rows=rows)
    spans = 1 if rows is None else 2
    assert len(looks) == 2 * (1 + spans)  # for the keys of both blocks, and for every span
    for name in ("blocks.0.ffn.2.weight", "blocks.1.self_attn.k.weight", "blocks.1.cross_attn.q.weight"):
        overflowing.add(name)
        again = sample(rows=rows)
        for result in (plain, again):
            assert float((result - exact).norm() / exact.norm()) < 0.02
    assert len(float16_sums._overflowed) == 2  # blocks
    assert torch.equal(sample(rows=rows), again)
    assert not looks  # what is known to overflow is not looked at


@pytest.mark.parametrize("part", ["self_attn.q", "self_attn.v", "self_attn.o", "cross_attn.v", "ffn.0", "ffn.2"])
def test_no_overflow_is_hidden_by_what_comes_after(sample, overflowing, part):
    overflowing.add(f"blocks.0.{part}.weight")
    sample()
    assert len(float16_sums._overflowed) == 1
