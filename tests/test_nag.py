"""Normalized attention guidance against diffusers with a processor for cross-attention, and with every task."""

import dataclasses
from pathlib import Path

import pytest
import torch
from small_run import followed, small_request, stopped
from test_tasks_end_to_end import CASES
from test_tasks_end_to_end import request_of as v3_request
from test_wan import NEGATIVE, checkpoints, family_of, files, picture, request_of  # noqa: F401 -- fixtures
from torch.nn import functional as F
from wan_checkpoint import reference_latents

from skyrun import run
from skyrun.cli import main
from skyrun.engine.resume import resume
from skyrun.engine.run import run_job
from skyrun.media.video_writer import read_request
from skyrun.models.dit import guided_away
from skyrun.planning.job import prepare
from skyrun.planning.request import Request
from skyrun.planning.what_if import described_hardware, plan_request
from skyrun.presets.timing import step_operations

TEXT = 512


def published(positive, negative, scale, tau=2.5, alpha=0.25):
    """The formula of Chen et al. 2025, as their code for Wan has it, for what tokens [..., D] have read."""
    guided = positive * scale - negative * (scale - 1)
    before, after = (x.abs().sum(-1, keepdim=True) for x in (positive, guided))
    ratio = torch.nan_to_num(after / before, 10)
    guided = torch.where(ratio > tau, guided / (after + 1e-7) * before * tau, guided)
    return guided * alpha + positive * (1 - alpha)


class Guided:
    """A processor of diffusers for the cross-attention of Wan's transformer. away: the negative prompt, projected."""

    def __init__(self, away, scale):
        self.away, self.scale = away, scale

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *_, **__):
        images, text = encoder_hidden_states[:, :-TEXT], encoder_hidden_states[:, -TEXT:]
        q = attn.norm_q(attn.to_q(hidden_states))

        def read(k, v):
            split = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)

        wanted, avoided = (read(attn.norm_k(attn.to_k(x)), attn.to_v(x)) for x in (text, self.away))
        mixed = published(wanted, avoided, self.scale)
        if images.shape[1]:
            mixed = mixed + read(attn.norm_added_k(attn.add_k_proj(images)), attn.add_v_proj(images))
        return attn.to_out[1](attn.to_out[0](mixed))


def guided_by(request):
    """Put the processor into a pipeline. With the negative prompt itself as the prompt it changes nothing."""

    def change(pipe):
        embedding = pipe.encode_prompt(request.negative_prompt, None, False, max_sequence_length=TEXT)[0]
        away = pipe.transformer.condition_embedder.text_embedder(embedding)
        for block in pipe.transformer.blocks:
            block.attn2.set_processor(Guided(away, request.nag))

    return change


@pytest.mark.parametrize(("guidance", "nag"), [(1.0, 11.0), (5.0, 9.0), (1.0, 1.5)])
@pytest.mark.parametrize("model", ["Wan2.1-T2V-1.3B", "Wan2.1-I2V-14B-480P", "SkyReels-V2-I2V-14B-720P"])
def test_latents_are_those_of_diffusers(checkpoints, files, picture, model, guidance, nag):  # noqa: F811
    request = request_of(model, files(model), picture, guidance=guidance, nag=nag, shift=3.0)
    made = run(request).latents
    expected = reference_latents(family_of(model), checkpoints(model)[1], request, guided_by(request))
    assert float((made - expected).abs().max()) < 1e-3
    plain = run(dataclasses.replace(request, nag=None)).latents
    assert float((made - plain).abs().max()) > 5e-3


@pytest.mark.parametrize("scale", [1.5, 5.0, 11.0])
def test_tokens_are_guided_as_published(scale):
    generator = torch.Generator().manual_seed(0)
    positive = torch.randn(40, 256, generator=generator, dtype=torch.float64)
    negative = positive + torch.randn(40, 256, generator=generator) * torch.linspace(0, 2, 40)[:, None]
    positive[3] = negative[3] = negative[5] = 0
    expected = published(positive, negative, scale)
    exact = guided_away(positive.float(), negative.float(), scale)
    assert torch.allclose(exact.double(), expected, atol=1e-5) and not exact.isnan().any()
    for dtype in (torch.bfloat16, torch.float16):
        rough = guided_away(positive.to(dtype), negative.to(dtype), scale)
        assert rough.dtype == dtype
        assert float((rough.double() - expected).norm() / expected.norm()) < (0.03 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("task", ["r2v", *CASES])
def test_every_distilled_task_has_it(goldens, converted, tmp_path, task):
    """Away from the prompt itself it changes nothing; away from another it does. The weights are read once a step."""
    model = converted("F32", "v2v" if task == "shot" else task)
    if task in CASES:
        request = v3_request(task, goldens(f"e2e/{CASES[task]}/golden"), model, steps=1)
    else:
        request = small_request(tmp_path, model, output=None, steps=1)
    plain, same, away = (
        run(dataclasses.replace(request, **changes))
        for changes in (
            {},
            {"nag": 11.0, "negative_prompt": request.prompt},
            {"nag": 11.0, "negative_prompt": NEGATIVE},
        )
    )
    if len(prepare(request).windows) == 1:  # later windows of an avatar have another prompt
        assert float((same.latents - plain.latents).abs().max()) < 1e-4
    assert float((away.latents - plain.latents).abs().max()) > 1e-3
    read = [sum(stage.bytes_read for stage in made.stages if stage.stage == "denoise") for made in (plain, away)]
    assert read[0] == read[1] > 0


def test_a_stopped_clip_goes_on_where_it_was(files, picture, tmp_path):  # noqa: F811
    model = "Wan2.1-T2V-1.3B"
    request = request_of(model, files(model), picture, guidance=1.0, nag=11.0)
    whole = run(request)
    stopped(prepare(dataclasses.replace(request, output=tmp_path / "clip.mp4")), "denoise", 2)
    job, state = resume(tmp_path / "clip.mp4")
    assert state.steps == 2 and "negative" in state.encoded and job.request.nag == 11
    result, _ = followed(run_job(job, state=state))
    assert torch.equal(result.latents, whole.latents)


def test_the_command_line_has_it_and_the_clip_says_so(run_command, converted, capsys):
    command = [*run_command, "--model", str(converted("F32"))]
    assert main([*command, "--negative-prompt", "rain"]) == 2
    assert "r2v takes --negative-prompt only with --nag: its model is distilled" in capsys.readouterr().err
    assert main([*command, "--negative-prompt", "rain", "--nag"]) == 0
    said = read_request(Path(command[command.index("-o") + 1]))
    assert (said["nag"], said["negative_prompt"]) == (11, "rain")
    assert main([*command, "--nag", "1", "--overwrite"]) == 2
    assert "--nag 1 is not a scale" in capsys.readouterr().err


def test_a_negative_prompt_that_nothing_uses_is_said(files, picture):  # noqa: F811
    model, said = "Wan2.1-T2V-1.3B", "the negative prompt has no effect with --guidance 1"
    for changes, expected in (({}, True), ({"nag": 11.0}, False), ({"negative_prompt": None}, False)):
        job = prepare(request_of(model, files(model), picture, guidance=1.0, **changes))
        assert any(said in notice for notice in job.notices) is expected


@pytest.mark.parametrize(("task", "guidance"), [("r2v", None), ("t2v", 1.0), ("t2v", 6.0)])
def test_a_plan_counts_what_it_takes(task, guidance):
    def planned(nag):
        request = Request(task, "", guidance=guidance, nag=nag, quant="Q8_0", resolution="480P")
        return plan_request(request, described_hardware(gpu="RTX 4090"))

    plain, with_nag = planned(None), planned(11.0)
    work, contexts = plain.workload, plain.workload.contexts
    linear, scores = (
        contexts * (b - a) for a, b in zip(step_operations(work), step_operations(with_nag.workload), strict=True)
    )
    assert linear == work.layers * 2 * TEXT * 2 * work.dim**2
    assert scores == work.layers * 4 * work.tokens * TEXT * work.dim
    assert 1 < with_nag.plan.step_seconds / plain.plan.step_seconds < 1.1
    peaks = [next(s.device_bytes for s in one.plan.stages if s.name == "denoise") for one in (plain, with_nag)]
    kept = [one.plan.resident_blocks * one.workload.block_bytes for one in (plain, with_nag)]
    assert (peaks[1] - kept[1]) - (peaks[0] - kept[0]) == 3 * TEXT * work.dim * 2


def test_a_clip_from_a_clip_is_guided_too(run_command, converted, tmp_path):
    command = [*run_command, "--model", str(converted("F32")), "--nag", "7", "--negative-prompt", "rain", "--seed", "1"]
    assert main(command) == 0
    clip, again = tmp_path / "clip.mp4", tmp_path / "again.mp4"
    assert main(["run", "--from", str(clip), "--nag", "5", "--device", "cpu", "-o", str(again)]) == 0
    assert [read_request(path)["nag"] for path in (clip, again)] == [7, 5]
    assert read_request(again)["negative_prompt"] == "rain" and read_request(again)["seed"] == 1
