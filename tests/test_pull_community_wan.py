"""Wan 2.1 and SkyReels-V2 from the community's GGUF files, beside the UMT5 of another repository.

The autoencoder and CLIP come from the published checkpoint, in its authors' layout: .pth files. The transformer and the
text encoder of that are not fetched.
"""

import shutil

import pytest
from hub_server import community_file
from PIL import Image
from test_pull_community import FILE_TYPES, TOKENS
from wan_checkpoint import write_original, write_wan

from skyrun.cli import main
from skyrun.hub.client import list_repository
from skyrun.hub.gguf_repo import look, roles_in
from skyrun.hub.manifest import Manifest
from skyrun.media.video_writer import read_request
from skyrun.tasks.sources import SOURCES, tasks_of

(UMT5,) = SOURCES["t2v"].text_encoder
# By the name of a model, what its files are called in the community's repository.
FILES = {
    "t2v": "Skywork-SkyReels-V2-T2V-14B-540P",
    "i2v-720p": "Skywork-SkyReels-V2-I2V-14B-720P",
    "wan2.1-t2v-14b": "wan2.1-t2v-14b",
    "wan2.1-i2v-480p": "wan2.1-i2v-14b-480p",
}
SMALL = ["--size", "32x48", "--frames", "5", "--steps", "2", "--device", "cpu", "--seed", "3"]


@pytest.fixture(scope="module")
def made(write_gguf, tmp_path_factory):
    """made("wan2.1-t2v-14b") has the checkpoint, and the repository of GGUF files made from it."""
    done = {}

    def make(name):
        if name not in done:
            place, (task,) = tmp_path_factory.mktemp(name), tasks_of(name)
            title = SOURCES[name].checkpoint.split("/")[1]
            parts = write_wan(place / "diffusers", "Wan2.1", task == "i2v")
            write_original(place / title, parts)
            for quant in ("Q8_0", "Q4_K_M"):
                assert main(["convert", str(place / title), "-o", str(place / quant), "--quant", quant]) == 0
                (source,) = (place / quant).glob(f"{title}*.gguf")
                file = place / "gguf" / f"{FILES[name]}-{quant}.gguf"
                community_file(source, file, write_gguf, general__file_type=FILE_TYPES[quant])
            (source,) = (place / "Q8_0").glob("umt5*")
            (place / "umt5").mkdir()
            shutil.copy(source, place / "umt5" / "umt5-xxl-encoder-Q8_0.gguf")
            done[name] = place
        return done[name]

    return make


@pytest.fixture
def community(hub, made):
    """community("wan2.1-t2v-14b") serves what the model is made of."""

    def serve(name):
        place, source = made(name), SOURCES[name]
        hub.repos |= {source.checkpoint: place / source.checkpoint.split("/")[1], UMT5: place / "umt5"}
        hub.repos |= {source.gguf[0]: place / "gguf"}
        return hub

    return serve


@pytest.mark.parametrize("name", FILES)
def test_a_model_is_put_together_from_three_repositories_and_runs(community, tmp_path, name, capsys):
    hub, source, (task,) = community(name), SOURCES[name], tasks_of(name)
    assert main(["pull", f"{name}:Q4_K_M"]) == 0
    folder = tmp_path / "models" / f"{name}-Q4_K_M"
    seen = {"image_encoder"} if task == "i2v" else set()
    assert roles_in(folder) == {"transformer", "text_encoder", "vae"} | seen
    assert set(Manifest.read(folder).commits) == {source.gguf[0], UMT5, source.checkpoint}
    assert f"{FILES[name]}-Q4_K_M.gguf" in {path.name for path in folder.iterdir()}
    for file in ("diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth"):
        assert "" not in hub.asked(f"{source.checkpoint}/resolve/{hub.commit}/{file}"), file
    assert "the published checkpoint would be " in capsys.readouterr().err
    hub.requests.clear()
    Image.new("RGB", (96, 64), "teal").save(tmp_path / "picture.png")
    image = ["--image", str(tmp_path / "picture.png")] if task == "i2v" else []
    clip, command = tmp_path / "clip.mp4", ["run", task, "-p", "a sea", *SMALL, *image]
    assert main([*command, "--model", f"{name}:Q4_K_M", "-o", str(clip)]) == 0 and not hub.requests
    said = capsys.readouterr().err
    assert "does not say which model" not in said and "does not say its task" not in said
    assert read_request(clip)["variant"] == name


def test_the_usual_model_of_a_task_is_fetched_by_its_task(community, tmp_path, capsys):
    community("t2v")
    assert main(["run", "t2v", "-p", "a sea", *SMALL, "--quant", "Q8_0", "-o", str(tmp_path / "clip.mp4")]) == 0
    assert f"from {SOURCES['t2v'].gguf[0]} at" in capsys.readouterr().err
    assert read_request(tmp_path / "clip.mp4")["variant"] == "t2v"


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_is_its_header_says(community, name):
    community(name)
    found = {model.quant: model for model in look(list_repository(SOURCES[name].gguf[0]))}
    assert set(found) == {"Q8_0", "Q4_K_M"}
    for model in found.values():
        assert (model.role, model.task, model.refused) == ("transformer", *tasks_of(name), "")


def test_a_repository_by_its_own_name(community, tmp_path):
    """It has nothing but transformers: the rest is that of the model which it belongs to."""
    community("wan2.1-t2v-14b")
    source = SOURCES["wan2.1-t2v-14b"]
    (repository,) = source.gguf
    assert main(["pull", f"{repository}:Q8_0"]) == 0
    (folder,) = (tmp_path / "models").glob("city96*")
    assert roles_in(folder) == {"transformer", "text_encoder", "vae"}
    assert set(Manifest.read(folder).commits) == {repository, UMT5, source.checkpoint}
    clip, command = tmp_path / "clip.mp4", ["run", "t2v", "-p", "a sea", *SMALL]
    assert main([*command, "--model", f"{repository}:Q8_0", "-o", str(clip)]) == 0
    assert read_request(clip)["variant"] == "wan2.1-t2v-14b"


def test_the_encoder_of_another_model_is_shared(community, made, tmp_path):
    hub = community("t2v")
    assert main(["pull", "t2v:Q8_0"]) == 0
    community("wan2.1-t2v-14b")
    hub.repos[UMT5] = made("t2v") / "umt5"
    hub.requests.clear()
    assert main(["pull", "wan2.1-t2v-14b:Q8_0"]) == 0
    assert "" not in hub.asked("umt5-xxl-encoder-Q8_0.gguf")


def test_without_an_encoder_in_gguf_the_published_one_is_converted(community, tmp_path, write_gguf, made):
    hub = community("wan2.1-t2v-14b")
    shutil.copytree(made("wan2.1-t2v-14b") / "umt5", tmp_path / "umt5")
    (file,) = (tmp_path / "umt5").iterdir()
    community_file(file, file.with_name("other.gguf"), write_gguf, general__file_type=7)
    file.unlink()
    hub.repos[UMT5] = tmp_path / "umt5"
    assert main(["pull", "wan2.1-t2v-14b:Q8_0"]) == 0
    assert roles_in(tmp_path / "models" / "wan2.1-t2v-14b-Q8_0") == {"transformer", "text_encoder", "vae"}


def test_the_words_of_the_communitys_encoder_are_read(community, tmp_path, write_gguf, made):
    """UMT5's tokenizer stands in the arrays of ggml there."""
    hub = community("wan2.1-t2v-14b")
    shutil.copytree(made("wan2.1-t2v-14b") / "umt5", tmp_path / "umt5")
    (file,) = (tmp_path / "umt5").iterdir()
    community_file(file, file, write_gguf, general__file_type=7, **TOKENS)
    hub.repos[UMT5] = tmp_path / "umt5"
    assert main(["pull", "wan2.1-t2v-14b:Q8_0"]) == 0
    assert set(Manifest.read(tmp_path / "models" / "wan2.1-t2v-14b-Q8_0").commits) == {
        UMT5,
        SOURCES["wan2.1-t2v-14b"].checkpoint,
        *SOURCES["wan2.1-t2v-14b"].gguf,
    }
