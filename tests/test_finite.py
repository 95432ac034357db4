"""Values that become infinite or NaN end a run with their cause, and what was finished before is kept."""

import dataclasses
import shutil

import pytest
import torch
from loras import layers, random_pairs, write_adapter
from safetensors.torch import load_file, save_file
from small_run import STEPS, small_request

from skyrun.cli import main
from skyrun.engine import checkpoint as keeper
from skyrun.engine.checkpoint import load_state
from skyrun.engine.output import state_path
from skyrun.engine.resume import resume
from skyrun.engine.run import run_job
from skyrun.errors import BAD_INPUT, FAILED, SkyrunError
from skyrun.events import drain
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.models import umt5
from skyrun.models.dit_header import canonical_tensors
from skyrun.pipelines.conditioning import Condition
from skyrun.pipelines.finite import check_step
from skyrun.planning.job import prepare

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def saved_after_every_step(monkeypatch, tmp_path):
    monkeypatch.setattr(keeper, "_SHARE", INF)
    monkeypatch.setenv("SKYRUN_CACHE", str(tmp_path / "cache"))  # of prompts: the text encoder has to run


def made_wrong(monkeypatch, owner, name, value, call):
    """Let a function return a tensor full of a value in that call of it."""
    right, calls = getattr(owner, name), iter(range(1 << 20))

    def wrong(*arguments, **keywords):
        result = right(*arguments, **keywords)
        return torch.full_like(result, value) if next(calls) == call else result

    monkeypatch.setattr(owner, name, wrong)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_step_ends_the_run_and_the_steps_before_are_kept(converted, tmp_path, monkeypatch, value):
    whole = drain(run_job(prepare(small_request(tmp_path, converted("Q8_0"), output=None))))
    request = small_request(tmp_path, converted("Q8_0"))
    with monkeypatch.context() as patch:
        made_wrong(patch, Condition, "guided", value, 2)
        with pytest.raises(SkyrunError, match=f"after step 3 of {STEPS} the latents are infinite or NaN") as error:
            drain(run_job(prepare(request)))
    assert error.value.code == FAILED and "SkyReels-V3-R2V" in error.value.hint
    assert [path.name for path in request.output.parent.iterdir()] == [state_path(request.output).name]
    assert load_state(state_path(request.output))[0].steps == 2
    job, state = resume(request.output)
    assert torch.equal(drain(run_job(job, state=state)).latents, whole.latents)


@pytest.mark.parametrize("damaged", [NAN, INF, 1e30])
def test_an_adapter_is_named(converted, tmp_path, damaged):
    model = converted("Q8_0")
    shapes = canonical_tensors(open_gguf(next(model.glob("SkyReels*.gguf"))))
    pairs = random_pairs({name: info.shape for name, info in shapes.items()}, layers(2), 4)
    down, up = pairs["blocks.1.ffn.0"]
    path = write_adapter(tmp_path / "style.safetensors", pairs | {"blocks.1.ffn.0": (down * damaged, up)}, "comfyui")
    request = small_request(tmp_path, model, loras=(path,))
    with pytest.raises(SkyrunError, match=r"after step 1 of 4 .*too strong \(style.safetensors\)") as error:
        drain(run_job(prepare(request)))
    assert "--lora" in error.value.hint and not request.output.exists()


def test_causes_are_those_of_the_run(converted, tmp_path):
    job = prepare(small_request(tmp_path, converted("Q8_0")))
    latents = torch.zeros(16, 2, 4, 6)
    check_step(latents, 1, 4, job.files, job.plan)
    latents[3, 1, 2, 2] = NAN
    for dtype, is_said in (("float32", False), ("float16", True)):
        with pytest.raises(SkyrunError) as error:
            check_step(latents, 1, 4, job.files, dataclasses.replace(job.plan, dtype=dtype))
        assert ("float16" in error.value.message) == ("--dtype float32" in error.value.hint) == is_said
        assert "adapter" not in error.value.message


def test_a_text_encoder_is_named_and_its_output_not_kept(converted, tmp_path, monkeypatch):
    request = small_request(tmp_path, converted("Q8_0"))
    with monkeypatch.context() as patch:
        made_wrong(patch, umt5, "umt5_block", NAN, 0)
        with pytest.raises(SkyrunError, match=r"what .*umt5.*\.gguf makes is infinite or NaN"):
            drain(run_job(prepare(request)))
    assert drain(run_job(prepare(request))).frames.size


@pytest.mark.parametrize("part", ["encoder.conv1.weight", "decoder.conv1.weight"])
def test_an_autoencoder_is_named(converted, tmp_path, part):
    model = shutil.copytree(converted("Q8_0"), tmp_path / "model")
    (path,) = (path for path in model.glob("*.safetensors") if "decoder.conv1.weight" in load_file(path))
    tensors = load_file(path)
    tensors[part][0] = NAN
    save_file(tensors, path)
    request = small_request(tmp_path, model)
    with pytest.raises(SkyrunError, match=f"what {path} makes is infinite or NaN"):
        drain(run_job(prepare(request)))
    assert not request.output.exists()


@pytest.mark.parametrize("kind", ["transformer", "text encoder", "autoencoder", "adapter"])
def test_nothing_of_the_kind_is_converted(checkpoint, converted, tmp_path, capsys, kind):
    source, options = shutil.copytree(checkpoint, tmp_path / "source"), []
    if kind == "adapter":
        shapes = canonical_tensors(open_gguf(next(converted("Q8_0").glob("SkyReels*.gguf"))))
        pairs = random_pairs({name: info.shape for name, info in shapes.items()}, layers(2), 4)
        pairs["blocks.1.ffn.0"][0].fill_(NAN)
        options = ["--lora", str(write_adapter(tmp_path / "style.safetensors", pairs, "comfyui"))]
    else:
        folder = {"transformer": "transformer", "text encoder": "text_encoder", "autoencoder": "vae"}[kind]
        path = sorted((source / folder).glob("*.safetensors"))[0]
        tensors = load_file(path)
        name = max(tensors, key=lambda name: tensors[name].numel())
        tensors[name].view(-1)[7] = NAN
        save_file(tensors, path)
    assert main(["convert", str(source), "-o", str(tmp_path / "out"), "--quant", "Q8_0", *options]) == BAD_INPUT
    said = capsys.readouterr().err
    assert ("style.safetensors adds to it is infinite or NaN" if kind == "adapter" else "are NaN or infinite") in said
