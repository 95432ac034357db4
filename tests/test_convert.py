"""Converted files: what other tools need of them, and what happens when a checkpoint is wrong."""

import json
import shutil
import subprocess
import sys

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from skyrun.errors import SkyrunError
from skyrun.kernels import dequantize
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.kernels.name_tables import UMT5_ENCODER, WAN_TRANSFORMER, WAN_VAE
from skyrun.quant import convert
from skyrun.quant.plan import Settings
from skyrun.quant.planner import plan_conversion


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


@pytest.mark.parametrize("quant", ["F32", "BF16", "Q8_0", "Q4_K"])
def test_the_file_meets_the_rules_of_all_readers(converted, quant):
    reader = gguf.GGUFReader(only(converted(quant), "SkyReels*.gguf"))
    fields = reader.fields
    assert fields["general.architecture"].contents() == "wan"
    assert fields["general.quantization_version"].contents() == 2
    assert "general.file_type" in fields
    assert not [name for name, field in fields.items() if field.types[:1] == [gguf.GGUFValueType.ARRAY]]
    assert reader.alignment == 32
    for tensor in reader.tensors:
        shape, kind = [int(n) for n in tensor.shape[::-1]], tensor.tensor_type.name
        assert len(tensor.name) <= 127
        if tensor.name == "patch_embedding.weight":
            assert (shape, kind) == ([256, 16, 1, 2, 2], "F32")
        elif tensor.name.endswith("modulation"):
            assert (shape[0], len(shape), kind) == (1, 3, "F32")
        elif len(shape) == 1:
            assert kind == "F32"
        elif tensor.name.startswith("blocks."):
            assert (len(shape), kind) == (2, quant)
        else:
            assert kind in ("F32", "BF16")


def test_blocks_follow_each_other_in_execution_order(converted):
    file = open_gguf(only(converted("Q8_0"), "SkyReels*.gguf"))
    in_file = sorted(file.tensors.values(), key=lambda info: info.offset)
    owners = [info.name.split(".")[1] for info in in_file if info.name.startswith("blocks.")]
    assert owners == sorted(owners)


def test_every_value_survives_in_float32(checkpoint, converted):
    """Renaming is a permutation of the checkpoint: nothing lost, nothing swapped."""
    source = {}
    for path in (checkpoint / "transformer").glob("*.safetensors"):
        source |= load_file(path)
    file = open_gguf(only(converted("F32"), "SkyReels*.gguf"))
    rows = WAN_TRANSFORMER.expand(2)
    assert len(rows) == len(file.tensors) == len(source)
    for row in rows:
        original, diffusers = row.names
        info = file.tensors[original]
        data = torch.frombuffer(file.read(info), dtype=torch.uint8)
        assert torch.equal(dequantize(data, "F32").view(info.shape), source[diffusers].float()), original


def test_the_text_encoder_brings_its_tokenizer(checkpoint, converted):
    file = open_gguf(only(converted("Q4_K"), "umt5*.gguf"))
    assert file.architecture == "t5encoder"
    assert file.metadata["tokenizer.huggingface.json"] == (checkpoint / "tokenizer/tokenizer.json").read_text()
    assert {info.format.name for info in file.tensors.values()} == {"Q8_0", "F32"}  # never below Q8_0 by itself


def test_text_encoder_names_are_those_of_gguf():
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    for row in UMT5_ENCODER.expand(2):
        assert names.get_name(row.name(1), try_suffixes=(".weight",)) == row.name()


def test_the_autoencoder_says_its_dims(converted):
    with safe_open(str(only(converted("F32"), "*.safetensors")), "pt") as file:
        said = json.loads(file.metadata()["skyrun"])
        assert (said["base_dim"], said["z_dim"], len(said["latents_mean"])) == (4, 16, 16)
        assert sorted(file.keys()) == sorted(row.name() for row in WAN_VAE.rows)


def test_rows_that_do_not_fit_fall_back_and_are_reported(checkpoint, tmp_path):
    summary = convert(checkpoint, tmp_path, "Q4_K", "Q4_K")
    _, encoder, _ = summary["files"]
    assert encoder["types"] == {"Q5_0": 15, "F32": 7}  # as llama.cpp falls back
    assert encoder["fallbacks"]["enc.blk.0.attn_q.weight"] == "rows of 128 are not a multiple of Q4_K's 256"


def test_the_plan_is_what_gets_written(checkpoint, tmp_path):
    plan = plan_conversion(checkpoint, tmp_path, Settings("Q4_K"))
    assert not list(tmp_path.iterdir())
    convert(checkpoint, tmp_path, "Q4_K")
    for file in plan.files:
        assert file.path.stat().st_size == file.nbytes


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint, converted, tmp_path):
    convert(checkpoint, tmp_path, "Q4_K")
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (converted("Q4_K") / path.name).read_bytes()


def edit(copy, name, change):
    """Rewrite a shard of the transformer with one tensor changed or, for None, removed."""
    for path in (copy / "transformer").glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file({key: value for key, value in tensors.items() if value is not None}, path)


def test_all_that_is_wrong_with_a_checkpoint_is_listed(copy, tmp_path):
    edit(copy, "blocks.1.attn1.to_q.weight", lambda _: None)
    edit(copy, "blocks.0.ffn.net.2.bias", lambda bias: bias[:7].clone())
    edit(copy, "proj_out.bias", lambda bias: bias)
    shard = next((copy / "transformer").glob("*.safetensors"))
    save_file(load_file(shard) | {"mystery.weight": torch.zeros(2)}, shard)
    with pytest.raises(SkyrunError) as error:
        convert(copy, tmp_path / "out")
    assert "blocks.1.attn1.to_q.weight is missing (expected shape [256, 256])" in error.value.message
    assert "blocks.0.ffn.net.2.bias has shape [7], expected [256]" in error.value.message
    assert "mystery.weight [2] is not a tensor of this model" in error.value.message
    assert not (tmp_path / "out").exists()


def drop(*parts):
    def change(copy):
        path = copy.joinpath(*parts)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def cut(copy):
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def damage_index(copy):
    (copy / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text("{")


def lie_about_layers(copy):
    path = copy / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 40}))


def not_finite(copy):
    edit(copy, "blocks.1.ffn.net.2.weight", lambda w: torch.full_like(w, float("nan")))


def integers(copy):
    edit(copy, "proj_out.bias", lambda bias: torch.zeros(bias.shape, dtype=torch.int8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("transformer", "diffusion_pytorch_model-00002-of-00002.safetensors"), "00002.safetensors is missing"),
        (drop("tokenizer"), "no tokenizer.json"),
        (cut, "vae.* is not a usable safetensors file"),
        (damage_index, "is not JSON"),
        (lie_about_layers, "config.json says num_layers = 40, the tensors say 2"),
        (not_finite, "blocks.1.ffn.net.2.weight in .* as Q8_0: 65536 weights are NaN"),
        (integers, "proj_out.bias in .* is I8, expected F32, F16, BF16"),
    ],
)
def test_a_bad_checkpoint_leaves_what_was_there(copy, tmp_path, change, message):
    out = tmp_path / "out"
    convert(copy, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    change(copy)
    with pytest.raises(SkyrunError, match=message):
        convert(copy, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(SkyrunError, match="is not a checkpoint: it holds holiday.jpg"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(SkyrunError, match="does not exist"):
        convert(tmp_path / "none", tmp_path / "out")


def test_a_part_alone_is_converted(copy, tmp_path):
    shutil.rmtree(copy / "transformer")
    shutil.rmtree(copy / "text_encoder")
    assert [file["role"] for file in convert(copy, tmp_path / "out")["files"]] == ["vae"]


_MEASURE = """
import re, sys
from pathlib import Path
from skyrun.quant.conversion import Settings, plan_conversion, write_file
# not getrusage: its maximum is inherited from the process that started this one
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
base = peak()
for file in plan_conversion(Path(sys.argv[1]), Path(sys.argv[2]), Settings(sys.argv[3])).files:
    for _ in write_file(file, workers=0):  # as a worker encodes, but in this process
        pass
print((peak() - base) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("quant", ["Q8_0", "F32"])
def test_a_tensor_larger_than_the_budget_is_converted_in_pieces(copy, tmp_path, quant):
    """The embedding table is 300 MB, 600 in float32; at most 450 MB may be held beyond the interpreter with torch."""
    path = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["shared.weight"] = torch.zeros(1_200_000, 128, dtype=torch.bfloat16)
    save_file(tensors, path)
    config = copy / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 1_200_000}))
    command = [sys.executable, "-c", _MEASURE, str(copy), str(tmp_path / "out"), quant]
    measured = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(measured.stdout) < 450, measured.stdout
