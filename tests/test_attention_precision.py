"""The precision of attention on its way from a request through the plan to the kernels, apart from the linears'."""

from dataclasses import replace

import pytest
import torch
from plans import clip_of, plan_clip
from test_fast_models import forward, moved

from skyrun.errors import SkyrunError
from skyrun.kernels import linear, matmul
from skyrun.kernels.attention import quick_precisions
from skyrun.kernels.machine.capability import FLOAT8
from skyrun.kernels.quantized_keys import PRECISIONS
from skyrun.kernels.triton import encode as triton_encode
from skyrun.planning.job import prepare
from skyrun.planning.request import Request
from skyrun.planning.what_if import plan_request
from skyrun.presets.attention import ATTENTIONS
from skyrun.presets.machine.cards import find_card
from skyrun.presets.machine.hardware import stated, stated_cpu
from skyrun.tools.bench.synthetic_weight import random_weight

__all__ = ["forward"]  # a fixture
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("inference")


def test_requests_plans_and_kernels_mean_the_same():
    assert ATTENTIONS == PRECISIONS


@pytest.mark.parametrize(
    ("card", "refused"),
    [("RTX 2080 Ti", True), ("RTX 3060", True), ("A100", True), ("RTX 4060", False), ("H100", False)],
)
def test_cards_without_float8_refuse_it_and_say_what_to_use(card, refused):
    hardware, request = stated(find_card(card), 32, 1.0), Request("r2v", "", attention="fp8")
    if not refused:
        assert plan_request(request, hardware).plan.attention == "fp8"
        return
    with pytest.raises(SkyrunError, match=f"fp8 needs a card of the RTX 4000 series.*{card}") as caught:
        plan_request(request, hardware)
    assert "full-int8" in caught.value.hint


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_both_precisions_are_obeyed(precision, attention):
    for hardware in (stated(find_card("RTX 4070"), 32, 1.0), stated_cpu(64, 1.0)):
        plan = plan_clip(clip_of("r2v"), hardware, precision=precision, attention=attention).plan
        assert (plan.precision, plan.attention) == (precision, attention)


def test_a_cpu_runs_every_precision(converted, request):
    picture = request.path.parent / "data/goldens/e2e/r2v_1img/ref0.png"
    for attention in ATTENTIONS:
        asked = Request("r2v", "x", (picture,), model=converted("F32"), size=(64, 96), frames=5, device="cpu")
        assert prepare(replace(asked, attention=attention)).plan.attention == attention


def test_what_precisions_move_in_a_model(forward):
    """Each moves the velocity of the tiny model by its error, and no two are alike."""
    exact = forward("F32")
    errors = [moved(forward("F32", attention=name), exact) for name in PRECISIONS[1:]]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.034


def test_kernels_that_a_device_has(monkeypatch):
    assert quick_precisions(CPU) == ()
    for capability, count in (((8, 6), 2), ((8, 9), 3), ((12, 0), 3)):
        monkeypatch.setattr("skyrun.kernels.attention.uses_triton", lambda device: True)
        monkeypatch.setattr("skyrun.kernels.attention.has_float8", lambda device, c=capability: c >= FLOAT8)
        assert quick_precisions(CPU) == PRECISIONS[1 : 1 + count]


def test_int8_products_are_measured_by_what_their_last_step_does(monkeypatch):
    """With a gate and a residual they have other tiles, so another way may be the quickest."""
    keys = []

    def fastest(device, key, candidates):
        keys.append(key)
        return "_int_mm"

    monkeypatch.setattr(matmul, "uses_triton", lambda device: True)
    monkeypatch.setattr(matmul, "fastest", fastest)
    monkeypatch.setattr(triton_encode, "encode_weight", matmul.torch_int8.encode_weight)
    weight, x = random_weight("Q8_0", 16, 256, CPU, fast=True), torch.randn(3, 256)
    residual, gate = torch.zeros(3, 16), torch.ones(16)
    for extras in ({}, {"residual": residual}, {"residual": residual, "gate": gate}):
        linear(x, weight, **extras)
    assert len(set(keys)) == 3
