"""Wan's models as they are published: repositories in diffusers' layout, and single files as ComfyUI has them."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from wan_checkpoint import renamed, write_wan

from skyrun import Request, run
from skyrun.cli import main
from skyrun.hub.store import stored
from skyrun.kernels.name_tables import TRANSFORMERS, WAN_VAE
from skyrun.media.video_writer import read_request

SMALL = {"size": (32, 48), "frames": 5, "steps": 2, "device": "cpu", "seed": 3}
OPTIONS = ["--size", "32x48", "--frames", "5", "--steps", "2", "--device", "cpu", "--seed", "3"]


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (96, 64), "teal").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def single_files(parts, folder, transformer):
    """The files of Comfy-Org/Wan_2.1_ComfyUI_repackaged but the text encoder, with their names and naming."""
    weights = renamed(parts["transformer"].state_dict(), TRANSFORMERS, "original")
    files = {
        f"diffusion_models/{transformer}": {f"model.diffusion_model.{name}": w for name, w in weights.items()},
        "vae/wan_2.1_vae.safetensors": renamed(parts["vae"].state_dict(), WAN_VAE, "original"),
    }
    if "image_encoder" in parts:
        files["clip_vision/clip_vision_h.safetensors"] = parts["image_encoder"].state_dict()
        (folder / "clip_vision").mkdir(parents=True, exist_ok=True)
        (folder / "clip_vision" / "tiny_dims.json").write_text('{"clip_visual": {"num_heads": 4}}')
    for name, tensors in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)
    return [folder / name for name in files]


@pytest.mark.parametrize(
    ("task", "transformer", "title", "variant"),
    [
        ("t2v", "wan2.1_t2v_1.3B_fp16.safetensors", "Wan2.1-T2V-1.3B", "wan2.1-t2v-1.3b"),
        ("i2v", "wan2.1_i2v_480p_14B_fp16.safetensors", "Wan2.1-I2V-14B-480P", "wan2.1-i2v-480p"),
        ("i2v", "wan2.1_i2v_720p_14B_fp8_e4m3fn.safetensors", "Wan2.1-I2V-14B-720P", "wan2.1-i2v-720p"),
    ],
)
def test_single_files_make_the_clip_of_the_checkpoint(tmp_path, image, task, transformer, title, variant):
    parts = write_wan(tmp_path / title, "Wan2.1", task == "i2v")
    whole, single = tmp_path / "whole", tmp_path / "single"
    assert main(["convert", str(tmp_path / title), "-o", str(whole), "--quant", "F32"]) == 0
    for file in single_files(parts, tmp_path / "split_files", transformer):
        assert main(["convert", str(file), "-o", str(single), "--quant", "F32"]) == 0
    (encoder,) = whole.glob("umt5*")
    shutil.copy(encoder, single)
    images = (image,) if task == "i2v" else ()
    clips = [run(Request(task, "a sea", images, model=model, guidance=3.0, **SMALL)) for model in (whole, single)]
    assert torch.equal(clips[0].latents, clips[1].latents)
    assert [clip.request.variant for clip in clips] == [variant, variant]


@pytest.mark.parametrize(
    ("repository", "family", "variant"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan2.1", "wan2.1-t2v-1.3b"),
        ("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", "Wan2.1", "wan2.1-i2v-720p"),
        ("Skywork/SkyReels-V2-T2V-14B-720P-Diffusers", "SkyReels-V2", "t2v-720p"),
        ("Skywork/SkyReels-V2-DF-14B-540P-Diffusers", "SkyReels-V2", "df"),
    ],
)
def test_a_repository_of_diffusers_is_fetched_by_its_name_and_runs(hub, tmp_path, image, repository, family, variant):
    task = "i2v" if "I2V" in repository else "t2v"
    write_wan(tmp_path / repository, family, task == "i2v")
    hub.repos[repository] = tmp_path / repository
    assert main(["pull", f"{repository}:F32"]) == 0
    (model,) = stored()
    assert model.complete
    images = ["--image", str(image)] if task == "i2v" else []
    clip = tmp_path / "clip.mp4"
    command = ["run", task, "-p", "a sea", "--model", f"{repository}:F32", *images, *OPTIONS, "-o", str(clip)]
    assert main(command) == 0
    assert read_request(clip)["variant"] == variant


def test_a_repository_of_single_files_is_refused_with_a_way_to_use_them(hub, tmp_path, capsys):
    parts = write_wan(tmp_path / "diffusers", "Wan2.1", True)
    folder, repository = tmp_path / "comfy", "Comfy-Org/Wan_2.1_ComfyUI_repackaged"
    for name in ("wan2.1_i2v_480p_14B_fp16.safetensors", "wan2.1_i2v_480p_14B_fp8_e4m3fn.safetensors"):
        single_files(parts, folder / "split_files", name)
    hub.repos[repository] = folder
    assert main(["pull", f"{repository}:Q8_0"]) == 2
    assert "skyrun convert" in capsys.readouterr().err
