"""Text to video and image to video from the published layouts to latents and frames, against diffusers' pipelines."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_run import followed, stopped
from wan_checkpoint import LAYERS, reference_frames, reference_latents, write_original, write_wan

from skyrun import Request, run
from skyrun.cli import main
from skyrun.engine.resume import resume
from skyrun.engine.run import run_job
from skyrun.events import BlockDone, StageStarted
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.media.pixels import first_frame
from skyrun.media.video_writer import read_request
from skyrun.planning.job import prepare
from skyrun.planning.problems import value_problems
from skyrun.quant.choose.importance import read_importance
from skyrun.tasks import MODELS as MODELS_OF
from skyrun.tasks import find_spec

PROMPT, NEGATIVE, SEED, STEPS = "a man walking in the city", "a blue sea", 3, 4
SIZE, FRAMES = (32, 48), 9
MODELS = ("Wan2.1-T2V-1.3B", "Wan2.1-I2V-14B-480P", "SkyReels-V2-T2V-14B-540P", "SkyReels-V2-I2V-14B-720P")


def family_of(model):
    return model.split("-T2V")[0].split("-I2V")[0]


def task_of(model):
    return "i2v" if "I2V" in model else "t2v"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """An image of twice the clip's size, in its shape: no model crops it."""
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """checkpoints("Wan2.1-T2V-1.3B") is the folder of a tiny checkpoint in diffusers' layout, and its models."""
    done = {}

    def write(model):
        if model not in done:
            folder = tmp_path_factory.mktemp("checkpoints") / f"{model}-Diffusers"
            parts = write_wan(folder, family_of(model), task_of(model) == "i2v")
            done[model] = folder, parts
        return done[model]

    return write


@pytest.fixture(scope="module")
def files(checkpoints, tmp_path_factory):
    """files("Wan2.1-T2V-1.3B", "original") is the folder of the converted checkpoint."""
    done = {}

    def convert(model, layout="diffusers", quant="F32"):
        key = model, layout, quant
        if key not in done:
            source, parts = checkpoints(model)
            if layout == "original":
                source = tmp_path_factory.mktemp("original") / model
                write_original(source, parts)
            done[key] = tmp_path_factory.mktemp("files")
            assert main(["convert", str(source), "-o", str(done[key]), "--quant", quant]) == 0
        return done[key]

    return convert


def request_of(model, folder, picture, **changes):
    images = (picture,) if task_of(model) == "i2v" else ()
    values = {"model": folder, "size": SIZE, "frames": FRAMES, "steps": STEPS, "seed": SEED, "device": "cpu"}
    return Request(task_of(model), PROMPT, images, **values | {"negative_prompt": NEGATIVE} | changes)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("model", MODELS)
def test_latents_are_those_of_diffusers(checkpoints, files, picture, model, layout, guidance):
    shift = 3.0 if guidance == 1 else 8.0
    request = request_of(model, files(model, layout), picture, guidance=guidance, shift=shift)
    made, expected = run(request), reference_latents(family_of(model), checkpoints(model)[1], request)
    assert made.latents.shape == expected.shape
    assert float((made.latents - expected).abs().max()) < 1e-3


@pytest.mark.parametrize("model", ["Wan2.1-T2V-1.3B", "SkyReels-V2-I2V-14B-720P"])
def test_guidance_reads_every_block_once_a_step(files, picture, model):
    plain, guided = (run(request_of(model, files(model), picture, guidance=scale)) for scale in (1.0, 5.0))
    read = [{s.stage: s.bytes_read for s in made.stages}["denoise"] for made in (plain, guided)]
    assert read[0] == read[1] > 0
    assert [stage.stage for stage in plain.stages].count("text") == 1
    assert [stage.stage for stage in guided.stages].count("text") == 2
    assert float((plain.latents - guided.latents).std()) > 0.02


def test_all_streamed_blocks_are_in_the_steps(files, picture):
    request = request_of("Wan2.1-T2V-1.3B", files("Wan2.1-T2V-1.3B"), picture)
    blocks, stage = 0, ""
    for event in run_job(prepare(request)):
        stage = event.stage if isinstance(event, StageStarted) else stage
        blocks += isinstance(event, BlockDone) and stage == "denoise"
    assert blocks == STEPS * LAYERS


@pytest.mark.parametrize("model", ["SkyReels-V2-T2V-14B-540P", "Wan2.1-I2V-14B-480P"])
def test_frames_are_those_of_diffusers_autoencoder(checkpoints, files, picture, model):
    made, vae = run(request_of(model, files(model), picture)), checkpoints(model)[1]["vae"]
    levels = reference_frames(vae, made.latents)
    assert made.frames.shape == levels.shape == (FRAMES, *SIZE, 3)
    assert float(abs(made.frames - np.trunc(levels)).max()) <= 1


# Limits are a third above what was measured when they were set.
@pytest.mark.parametrize(("quant", "limit"), [("Q8_0", 0.013), ("Q4_K_M", 0.08)])
@pytest.mark.parametrize("model", ["Wan2.1-T2V-1.3B", "SkyReels-V2-I2V-14B-720P"])
def test_error_of_quantized_files(files, picture, model, quant, limit):
    exact, rough = (run(request_of(model, files(model, quant=kind), picture)).latents for kind in ("F32", quant))
    error = float((rough - exact).norm() / exact.norm())
    assert limit / 20 < error < limit


def test_the_command_line_makes_the_same_clip(files, picture, tmp_path, capsys):
    model, clip = "Wan2.1-I2V-14B-480P", tmp_path / "clip.mp4"
    request = request_of(model, files(model), picture, guidance=4.0, shift=6.0)
    latents = tmp_path / "latents.safetensors"
    options = ["--image", str(picture), "--model", str(files(model)), "--size", "32x48", "--frames", str(FRAMES)]
    options += ["--steps", str(STEPS), "--seed", str(SEED), "--device", "cpu", "--negative-prompt", NEGATIVE]
    options += ["--guidance", "4", "--shift", "6", "--save-latents", str(latents), "-o", str(clip)]
    assert main(["run", "i2v", "-p", PROMPT, *options]) == 0
    assert torch.equal(load_file(latents)["latents"], run(request).latents)
    said = read_request(clip)
    assert said["guidance"] == 4 and said["variant"] == "wan2.1-i2v-480p" and said["negative_prompt"] == NEGATIVE
    capsys.readouterr()
    assert main(["run", "t2v", "--from", str(clip), "--model", str(files("Wan2.1-T2V-1.3B")), "--dry-run"]) == 0
    assert "taken over for t2v: prompt, seed" in (told := capsys.readouterr().err) and "50 steps" in told
    again = tmp_path / "again.mp4"
    assert main(["run", "--from", str(clip), "--seed", str(SEED), "--device", "cpu", "-o", str(again)]) == 0
    assert again.read_bytes()[-2000:] != b"" and read_request(again)["shift"] == 6


def test_a_stopped_clip_goes_on_where_it_was(files, picture, tmp_path):
    model = "SkyReels-V2-I2V-14B-720P"
    whole = run(request_of(model, files(model), picture))
    request = request_of(model, files(model), picture, output=tmp_path / "clip.mp4")
    stopped(prepare(request), "denoise", 2)
    job, state = resume(tmp_path / "clip.mp4")
    assert state.steps == 2 and {"text", "negative", "image", "picture"} <= set(state.encoded)
    result, _ = followed(run_job(job, state=state))
    assert torch.equal(result.latents, whole.latents)


# What each model was trained with, by the code and the guides of its authors.
USUAL = {
    "SkyReels-V2-T2V-14B-540P": ("t2v", 24, 30, 8.0, 6.0, (544, 960), 97),
    "SkyReels-V2-T2V-14B-720P": ("t2v", 24, 30, 8.0, 6.0, (720, 1280), 121),
    "SkyReels-V2-I2V-1.3B-540P": ("i2v", 24, 30, 5.0, 5.0, (544, 960), 97),
    "SkyReels-V2-I2V-14B-720P": ("i2v", 24, 30, 5.0, 5.0, (720, 1280), 121),
    "Wan2.1-T2V-1.3B": ("t2v", 16, 50, 8.0, 6.0, (480, 832), 81),
    "Wan2.1-T2V-14B": ("t2v", 16, 50, 5.0, 5.0, (480, 832), 81),
    "Wan2.1-I2V-14B-480P": ("i2v", 16, 40, 3.0, 5.0, (464, 832), 81),
    "Wan2.1-I2V-14B-720P": ("i2v", 16, 40, 5.0, 5.0, (720, 1280), 81),
}


@pytest.mark.parametrize(("title", "usual"), USUAL.items())
def test_a_model_has_the_values_of_its_authors(title, usual):
    task, fps, steps, shift, guidance, size, frames = usual
    spec = next(spec for spec in MODELS_OF[task] if spec.title == title)
    request = Request(task, PROMPT).of(spec)
    assert (spec.fps, request.steps, request.shift, request.guidance) == (fps, steps, shift, guidance)
    assert spec.size(request.resolution, 9, 16) == size
    assert request.frame_count == frames
    assert request.negative_prompt.startswith("镜头晃动" if title.startswith("Wan2.1-I2V") else ("色", "Bright"))


@pytest.mark.parametrize(
    ("task", "text", "title", "is_certain"),
    [
        ("t2v", "wan2.1-t2v-14b-Q8_0", "Wan2.1-T2V-14B", True),
        ("t2v", "wan2.1_t2v_1.3B_fp16", "Wan2.1-T2V-1.3B", True),
        ("t2v", "Wan2_1-T2V-14B_fp8_e4m3fn", "Wan2.1-T2V-14B", True),
        ("t2v", "Skywork-SkyReels-V2-T2V-14B-720P-Q4_K_M", "SkyReels-V2-T2V-14B-720P", True),
        ("i2v", "wan2.1-i2v-14b-480p-Q4_K_M", "Wan2.1-I2V-14B-480P", True),
        ("i2v", "SkyReels-V2-I2V-1.3B-540P", "SkyReels-V2-I2V-1.3B-540P", True),
        ("i2v", "model", "SkyReels-V2-I2V-14B-540P", False),
    ],
)
def test_models_are_known_by_their_names(task, text, title, is_certain):
    spec, certain = find_spec(task, text, {})
    assert (spec.title, certain) == (title, is_certain)


def test_a_model_without_a_name_is_taken_for_the_usual_one_and_that_is_said(files, picture, tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(files("Wan2.1-T2V-1.3B"), folder)
    (file,) = folder.glob("Wan*.gguf")
    opened = open_gguf(file)
    data = file.read_bytes().replace(b"Wan2.1-T2V-1.3B", b"Some-other-name")
    assert len(data) == opened.path.stat().st_size
    file.unlink()
    (folder / "model.gguf").write_bytes(data)
    job = prepare(request_of("Wan2.1-T2V-1.3B", folder, picture))
    assert job.request.variant == "t2v" and any("does not say which model it is" in notice for notice in job.notices)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request("r2v", PROMPT, ("x.png",), guidance=5.0), "r2v has no --guidance: its model is distilled"),
        (Request("a2v", PROMPT, negative_prompt="x"), "a2v takes --negative-prompt only with --nag: its model is dist"),
        (Request("a2v", PROMPT, nag=1.0), "--nag 1 is not a scale, expected more than 1"),
        (Request("shot", PROMPT, shift=5.0), "shot has no --shift: its model is distilled"),
        (Request("t2v", PROMPT, guidance=0.5), "--guidance 0.5 is not a scale, expected 1"),
        (Request("t2v", PROMPT, shift=-1.0), "--shift -1, expected a number above 0"),
        (Request("t2v", PROMPT, fps=30), "--fps 30: the model has only 24 frames per second"),
        (Request("t2v", PROMPT, ("x.png",)), "t2v takes no --image"),
        (Request("i2v", PROMPT), "got 0 images, expected 1"),
    ],
)
def test_options_that_a_task_does_not_have(request_, reason):
    assert any(reason in problem for problem in value_problems(request_))


def test_a_distilled_task_refuses_guidance_with_exit_code_2(run_command, converted, capsys):
    assert main([*run_command, "--model", str(converted("F32")), "--guidance", "5"]) == 2
    assert "its model is distilled, guidance and shift are built in" in capsys.readouterr().err


def test_a_wide_image_is_cropped_to_a_high_clip():
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (90, 0, 110, 100))
    for fit in ("whole", "lanczos", "bicubic"):
        frame, seen = first_frame(image, 96, 48, fit)
        assert frame.shape == (3, 1, 96, 48) and seen.shape[0] == 3
        assert float(frame[2, 0, :, 24].min()) > 0.9 and float(frame[0, 0, :, 2].min()) > 0.9


@pytest.mark.parametrize("model", ["Wan2.1-T2V-1.3B", "Wan2.1-I2V-14B-480P"])
def test_importance_is_collected_with_guidance(files, picture, tmp_path, model):
    prompts, importance = tmp_path / "prompts.txt", tmp_path / "importance.gguf"
    prompts.write_text(PROMPT)
    image = ["--image", str(picture)] if task_of(model) == "i2v" else []
    options = ["--model", str(files(model)), "--prompts", str(prompts), *image, "-o", str(importance)]
    options += ["--size", "32x48", "--frames", "5", "--steps", "2", "--device", "cpu"]
    assert main(["calibrate", *options]) == 0
    collected = read_importance(importance)
    matrices = {"self_attn.q", "cross_attn.k", "ffn.2"} | ({"cross_attn.k_img"} if image else set())
    assert {f"blocks.1.{name}.weight" for name in matrices} <= set(collected.sums)
    tokens, steps, contexts = 2 * 2 * 3, 2, 2
    assert collected.counts["blocks.1.self_attn.q.weight"] == tokens * steps * contexts


def test_files_of_two_models_are_no_candidates_for_one_plan(files, picture, tmp_path):
    folder, other = tmp_path / "models", "SkyReels-V2-T2V-14B-540P"
    shutil.copytree(files("Wan2.1-T2V-1.3B"), folder)
    (rough,) = files(other, quant="Q8_0").glob("SkyReels*.gguf")
    shutil.copy(rough, folder)
    job = prepare(request_of("Wan2.1-T2V-1.3B", folder, picture))
    assert job.request.variant == "wan2.1-t2v-1.3b" and job.files.transformer.path.name.startswith("Wan2.1")
    assert any("another model than Wan2.1-T2V-1.3B" in notice for notice in job.notices)
