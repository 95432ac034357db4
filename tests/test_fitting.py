"""Models that are not whole, or whose tensors do not fit each other, are refused by their headers alone."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from skyrun.errors import SkyrunError
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.models.clip import CLIPVision
from skyrun.models.umt5 import UMT5
from skyrun.models.vae import check_vae

CASES = {  # who reads it, a tensor, its shape in the file (None: it is missing), what is said
    "a layer": (UMT5, "enc.blk.1.ffn_up.weight", (64, 3), "block 1 of .*ffn_up.weight has shape .64, 3., expected"),
    "a norm": (UMT5, "enc.blk.0.attn_norm.weight", (1,), "block 0 of .*attn_norm.weight has shape .1., expected"),
    "a hole": (UMT5, "enc.blk.0.attn_o.weight", None, "block 0 of .* has no tensor attn_o.weight"),
    "the last norm": (UMT5, "enc.output_norm.weight", (7,), "enc.output_norm.weight has shape .7., expected"),
    "fused layers": (CLIPVision, "v.blk.0.attn_qkv.weight", (64, 64), "block 0 of .*attn_qkv.weight has shape"),
    "a bias": (CLIPVision, "v.blk.0.ln2.bias", None, "block 0 of .* has no tensor ln2.bias"),
    "an outer norm": (CLIPVision, "v.pre_ln.bias", (3,), "v.pre_ln.bias has shape .3., expected"),
}
FILES = {UMT5: "umt5*", CLIPVision: "clip*"}


@pytest.mark.parametrize(("model", "name", "shape", "said"), CASES.values(), ids=CASES)
def test_tensors_that_do_not_fit(converted, model, name, shape, said):
    file = open_gguf(next(converted("F32", "a2v").glob(FILES[model])))
    model(file).check()
    tensors = {key: info for key, info in file.tensors.items() if key != name}
    if shape is not None:
        tensors[name] = replace(file.tensors[name], shape=shape)
    with pytest.raises(SkyrunError, match=said):
        model(replace(file, tensors=tensors)).check()


@pytest.mark.parametrize("name", ["v.post_ln.weight", "v.head", "v.blk.{last}.ffn_up.weight"])
def test_what_the_vision_tower_does_not_use_may_be_missing(converted, name):
    file = open_gguf(next(converted("F32", "a2v").glob("clip*")))
    name = name.format(last=CLIPVision(file).layers)
    assert name in file.tensors
    CLIPVision(replace(file, tensors={key: info for key, info in file.tensors.items() if key != name})).check()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("decoder.conv1.weight", lambda weight: weight[:, :15].clone(), "decoder.conv1.weight has shape .*, expected"),
        ("encoder.conv1.weight", lambda weight: weight.half(), None),
        ("encoder.conv1.weight", lambda weight: weight.int(), "is I32, expected F32, F16 or BF16"),
    ],
)
def test_the_autoencoder(converted, tmp_path, name, change, said):
    tensors = load_file(next(converted("F32").glob("*.safetensors")))
    save_file(tensors | {name: change(tensors[name])}, path := tmp_path / "vae.safetensors")
    if said is None:
        check_vae(path)
    else:
        with pytest.raises(SkyrunError, match=said):
            check_vae(path)


@pytest.mark.parametrize("said", ["{", json.dumps({"latents_mean": [0.0]})])
def test_the_autoencoders_metadata(converted, tmp_path, said):
    tensors = load_file(next(converted("F32").glob("*.safetensors")))
    save_file(tensors, path := tmp_path / "vae.safetensors", {"skyrun": said})
    with pytest.raises(SkyrunError, match="metadata that is not JSON|expected 16 numbers"):
        check_vae(path)


def test_a_dry_run_compiles_nothing(converted, run_command):
    """torch imports its compiler, two seconds of it, where a model is run on the meta device."""
    arguments = [*run_command, "--dry-run", "--model", str(converted("Q8_0"))]
    code = "import sys; from skyrun.cli import main; assert main(sys.argv[1:]) == 0; "
    code += "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
