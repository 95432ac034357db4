"""What files of tensors say about themselves is checked when a model is chosen, before anything runs."""

import json
import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from skyrun.errors import SkyrunError
from skyrun.models.folder import open_folder
from skyrun.planning.model import choose_model
from skyrun.tasks import TASKS

DEEP = "[" * 100_000 + "]" * 100_000


def said(path, text, tensors=()):
    """The file with other words about itself, and with other tensors."""
    with safe_open(path, "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()} | dict(tensors)  # noqa: SIM118
    path.unlink()  # others have the same file
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, path, {"skyrun": text})


@pytest.fixture
def avatar(converted, tmp_path):
    return shutil.copytree(converted("Q8_0", "a2v"), tmp_path / "avatar")


def chosen(folder):
    return choose_model(open_folder(folder), TASKS["a2v"]).files


# fmt: off
WORDS = [
    ("wav2vec2*", "{", "has metadata that is not JSON"),
    ("wav2vec2*", DEEP, "not JSON: lists within lists without end"),
    ("wav2vec2*", "[]", "its entry skyrun is of type list, expected an object"),
    ("wav2vec2*", {"conv_stride": 5}, "expected the settings of wav2vec2"),
    ("wav2vec2*", {"conv_stride": [5, 2, 2]}, "expected the settings of wav2vec2"),
    ("wav2vec2*", {"conv_stride": [5, 2, 2, 2, 2, 2, 0]}, "expected the settings of wav2vec2"),
    ("wav2vec2*", {"layer_norm_eps": "small"}, "expected the settings of wav2vec2"),
    ("wav2vec2*", {"num_attention_heads": True}, "expected the settings of wav2vec2"),
    ("wav2vec2*", {"num_hidden_layers": 10**9}, "expected the settings of wav2vec2"),
    ("wav2vec2*", {"num_hidden_layers": 40}, "has no tensor"),
    ("wav2vec2*", {"num_attention_heads": 7}, "cannot divide 32 channels among 7 heads"),
    ("wan-vae*", "{", "has metadata that is not JSON"),
    ("wan-vae*", DEEP, "not JSON: lists within lists without end"),
    ("wan-vae*", "3", "its entry skyrun is of type int, expected an object"),
    ("wan-vae*", {"latents_mean": [10**400] * 16}, "says latents_mean = .*expected 16 numbers"),
    ("wan-vae*", {"latents_std": [float("nan")] * 16}, "says latents_std = .*expected 16 numbers"),
]
# fmt: on


@pytest.mark.parametrize(("name", "words", "message"), WORDS)
def test_nonsense_is_refused(avatar, name, words, message):
    (path,) = avatar.glob(name)
    old = {}
    with safe_open(path, "pt") as file:
        old = json.loads(file.metadata()["skyrun"])
    said(path, json.dumps(old | words) if isinstance(words, dict) else words)
    with pytest.raises(SkyrunError, match=message) as caught:
        chosen(avatar)
    assert path.name in caught.value.message and caught.value.hint


def test_a_tensor_of_the_audio_encoder_is_missing(avatar):
    (path,) = avatar.glob("wav2vec2*")
    with safe_open(path, "pt") as file:
        words = file.metadata()["skyrun"]
    assert chosen(avatar).audio_encoder == path
    said(path, words, {"encoder.layers.1.attention.q_proj.bias": None})
    with pytest.raises(SkyrunError, match="block 1 of .*wav2vec2.* has no tensor attention.q_proj.bias"):
        chosen(avatar)
