"""Seconds of a forward pass against what other programs were measured to take with the same model and kernels.

81 frames are 32,760 tokens at 480P and 75,600 at 720P; a step with guidance is two passes. Programs with dense 16-bit
kernels compare to exact ones, those with SageAttention to int8 scores; linear layers in fp8 are as quick on GeForce
cards as ours in 16 bits. Left out are programs that skip steps or lose time elsewhere: the model's own, diffusers,
stable-diffusion.cpp, TeaCache.
"""

from dataclasses import replace

import pytest
from plans import clip_of

from skyrun.planning.what_if import request_workload
from skyrun.presets.autoencoder import fit
from skyrun.presets.machine.cards import find_card
from skyrun.presets.machine.hardware import stated
from skyrun.presets.timing import decode_time, step_time, with_tokens

LARGE = request_workload(clip_of("r2v", quant="Q8_0"))
SMALL = replace(LARGE, dim=1536, ffn_dim=8960, layers=30)  # Wan 2.1 with 1.3B weights
CLOSE = 0.25

MEASURED = [  # program, card, model, tokens, attention, seconds
    ("LightX2V bf16 and SageAttention2", "H200", LARGE, 32760, "int8", 2.70),
    ("the same", "H200", LARGE, 75600, "int8", 9.39),
    ("SGLang", "H100", LARGE, 32760, "exact", 3.06),
    ("LightX2V", "H100", LARGE, 32760, "exact", 2.59),
    ("SGLang", "H100", LARGE, 75600, "exact", 9.70),
    ("vLLM-Omni, a talking avatar", "H20", LARGE, 33390, "exact", 17.74),
    ("musubi-tuner, SDPA", "RTX A6000", LARGE, 32760, "exact", 19.02),
    ("Wan2GP", "RTX 3090", LARGE, 32760, "exact", 34.00),
    ("Wan2GP", "RTX 3090", LARGE, 75600, "exact", 133.50),
    ("Wan2GP with SageAttention", "RTX 3060", LARGE, 32760, "int8", 54.16),
    ("Wan2GP, profile 3", "RTX 4090", LARGE, 32760, "exact", 9.74),
    ("edge-dit.cpp, 16 bits", "RTX 4090", SMALL, 17160, "exact", 0.82),
    ("LightX2V fp8 and SageAttention2, offloading", "RTX 4090", LARGE, 32760, "int8", 9.22),
    ("the same", "RTX 4090", LARGE, 75600, "int8", 30.91),
    ("LightX2V fp8 and SageAttention2", "RTX 4090", LARGE, 32760, "int8", 7.88),
    ("the same", "RTX 4090", LARGE, 75600, "int8", 27.11),
    ("FastVideo", "RTX 4090 D", LARGE, 32760, "exact", 11.33),
    ("LightX2V", "RTX 4090 D", LARGE, 32760, "int8", 10.13),
    ("TurboDiffusion's baseline, Wan 2.2", "RTX 5090", LARGE, 75600, "exact", 56.86),
    ("ComfyUI, Q6_K", "RTX 5090", LARGE, 63600, "int8", 17.50),
    ("ComfyUI, Q4_K_M", "RTX 5090", LARGE, 63600, "int8", 17.80),
    ("ComfyUI, Q4_K_M", "RTX 5090", LARGE, 144000, "int8", 93.00),
]


@pytest.mark.parametrize(("program", "card", "model", "tokens", "attention", "measured"), MEASURED)
def test_a_pass_takes_as_long_as_others_have_measured(program, card, model, tokens, attention, measured):
    hardware = stated(find_card(card), 64, 5)
    predicted = step_time(hardware, with_tokens(model, tokens), attention=attention).compute
    assert predicted == pytest.approx(measured, rel=CLOSE), program


@pytest.mark.parametrize(
    ("card", "resolution", "frames", "times", "measured"),
    [("RTX 4090", "480P", 41, 1, 2.7), ("H100", "720P", 81, 2, 6.9)],  # diffusers; SGLang in TF32, at half the rate
)
def test_decoding_takes_as_long_as_others_have_measured(card, resolution, frames, times, measured):
    work = replace(request_workload(clip_of("r2v", resolution)), frames=frames, decoded_frames=frames)
    vae = fit(work, "decode", "bfloat16", 1 << 40, True)
    predicted = times * decode_time(stated(find_card(card), 64, 5), work, vae).compute
    assert predicted == pytest.approx(measured, rel=CLOSE)


@pytest.mark.parametrize(
    ("card", "peak"),
    [("RTX 2080 Ti", 13.45), ("RTX 3090", 35.6), ("RTX 4090", 82.6), ("RTX 5090", 104.8), ("RTX A6000", 38.7)]
    + [("V100", 15.7), ("A100 40GB", 19.5), ("H100 80GB HBM3", 66.9), ("H20", 39.5), ("L40S", 91.6)],
)
def test_float32_stays_below_what_data_sheets_promise(card, peak):
    """Outside of tensor cores, of which torch uses none for 3-D convolutions in float32."""
    found = find_card(card)
    assert 0.9 * peak <= found.float32 <= 1.04 * peak  # at the clock of its tensor cores, and rounded
    rates, work = found.rates, request_workload(clip_of("r2v", "720P"))
    assert rates.float32 == pytest.approx(0.4e12 * found.float32)
    assert rates.float32 <= 1.03 * rates.convolution / 2
    seconds = [
        decode_time(stated(found, 64, 5), work, fit(work, "decode", dtype, 1 << 40, True)).compute
        for dtype in ("float32", "bfloat16")
    ]
    assert seconds[0] / seconds[1] == pytest.approx(rates.convolution / rates.float32)
