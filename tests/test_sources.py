"""Every form that a checkpoint comes in gives the same tensors; every damaged one an error that says what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from skyrun.errors import SkyrunError
from skyrun.kernels import FORMATS, dequantize
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.kernels.name_tables import UMT5_ENCODER, WAN_TRANSFORMER
from skyrun.models.dit_header import read_dims
from skyrun.quant import convert
from skyrun.quant.sources.families import find_families
from skyrun.quant.sources.source import SourceTensor

R2V = WAN_TRANSFORMER, {"layers": 2}


@pytest.fixture(scope="session")
def checkpoints(checkpoint):
    return checkpoint.parent


@pytest.fixture(scope="session")
def weights(checkpoints):
    """State dicts in the names they were published with."""
    loaded = {}
    for role, folder in {"transformer": "transformer", "text": "text_encoder", "vae": "vae"}.items():
        loaded[role] = {}
        for path in sorted((checkpoints / "r2v-tiny" / folder).glob("*.safetensors")):
            loaded[role] |= load_file(path)
    loaded["t5"] = torch.load(checkpoints / "v2v-tiny/models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    loaded["original_vae"] = torch.load(checkpoints / "v2v-tiny/Wan2.1_VAE.pth", weights_only=True)
    return loaded


def values(family):
    return {tensor.name: tensor.source.read().view(tensor.shape) for tensor in family.tensors}


@pytest.fixture(scope="session")
def expected(checkpoint):
    """What the plain checkpoint gives, by role."""
    return {family.role: values(family) for family in find_families(checkpoint).families}


def same(got, expected, limit=0.0):
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        assert float((got[name] - value).norm()) <= limit * float(value.norm()), name


def renamed(tensors, table, layers, naming, to):
    """From one naming of a table to another."""
    names = {row.name(naming): row.name(to) for row in table.expand(layers)}
    return {names[name]: value for name, value in tensors.items()}


def original(weights):
    return renamed(weights["transformer"], WAN_TRANSFORMER, 2, 1, 0)


def prefixed(tensors, prefix):
    return {prefix + name: value for name, value in tensors.items()}


# --- the published repositories


def test_r2v(checkpoints):
    found = find_families(checkpoints / "r2v-tiny")
    assert [(f.role, f.task, f.architecture, len(f.tensors)) for f in found.families] == [
        ("transformer", "r2v", "wan", 69),
        ("text_encoder", "", "t5encoder", 22),
        ("vae", "", "", 194),
    ]
    assert found.notes == ()


def test_v2v_has_two_transformers(checkpoints, expected):
    found = find_families(checkpoints / "v2v-tiny")
    by_task = {family.task: family for family in found.families if family.role == "transformer"}
    assert {task: family.metadata["skyrun.layers"] for task, family in by_task.items()} == {"v2v": 2, "shot": 1}
    assert {family.basename for family in by_task.values()} == {"SkyReels-V3-V2V", "SkyReels-V3-SHOT"}
    others = {family.role: family for family in found.families if family.role != "transformer"}
    # The same weights as in the R2V repository, in the other naming and another format.
    same(values(others["text_encoder"]), expected["text_encoder"])
    same(values(others["vae"]), expected["vae"])


def test_a2v(checkpoints, expected):
    found = find_families(checkpoints / "a2v-tiny")
    families = {family.role: family for family in found.families}
    roles = ["transformer", "text_encoder", "vae", "image_encoder", "audio_encoder"]
    assert list(families) == roles
    transformer = families["transformer"]
    assert (transformer.task, len(transformer.tensors)) == ("a2v", 113)
    audio = {"audio_window": 5, "vae_scale": 4, "audio_layers": 12, "audio_channels": 32, "audio_hidden": 32}
    audio |= {"audio_dim": 32, "context_tokens": 32, "image_dim": 32, "in_channels": 36}
    assert audio.items() <= {key.removeprefix("skyrun."): v for key, v in transformer.metadata.items()}.items()
    same(values(families["text_encoder"]), expected["text_encoder"])
    source = load_file(checkpoints / "a2v-tiny/chinese-wav2vec2-base/model.safetensors")
    got = values(families["audio_encoder"])
    assert all(torch.equal(value, source[f"wav2vec2.{name}"].float()) for name, value in got.items())
    said = json.loads(families["audio_encoder"].metadata["skyrun"])
    assert (said["conv_stride"], said["num_attention_heads"]) == ([5, 2, 2, 2, 2, 2, 2], 2)
    assert (said["conv_kernel"], said["num_conv_pos_embedding_groups"]) == ([10, 3, 3, 3, 3, 2, 2], 16)


def test_clip_is_the_vision_tower(checkpoints):
    name = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    (clip,) = find_families(checkpoints / "a2v-tiny" / name).families
    source = torch.load(checkpoints / "a2v-tiny" / name, weights_only=True)
    got = values(clip)
    assert len(got) == len([name for name in source if name.startswith("visual.")])
    assert torch.equal(got["v.blk.2.attn_qkv.weight"], source["visual.transformer.2.attn.to_qkv.weight"])
    assert torch.equal(got["v.class_embd"], source["visual.cls_embedding"][0, 0])
    assert torch.equal(got["v.position_embd.weight"], source["visual.pos_embedding"][0])
    heads, size = (clip.metadata[f"clip.vision.{key}"] for key in ("attention.head_count", "image_size"))
    assert (heads, size, clip.metadata["clip.has_vision_encoder"]) == (2, 224, True)


def test_blocks_are_whole_and_in_order(checkpoints):
    for folder in ("r2v-tiny", "v2v-tiny", "a2v-tiny"):
        for family in find_families(checkpoints / folder).families:
            places = [name.split(".") for name in (tensor.name for tensor in family.tensors)]
            numbers = [int(p[p.index(k) + 1]) for p in places for k in ("blocks", "blk") if k in p]
            assert numbers == sorted(numbers)


# --- one transformer in every form


def scaled_fp8(tensors, weight, inputs, marker, by_row=False):
    """fp8 with scales as ComfyUI writes them."""
    out = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or not name.startswith("blocks."):
            out[name] = tensor.clone()
            continue
        largest = tensor.float().abs().amax(1, keepdim=True) if by_row else tensor.float().abs().max()
        scale, base = largest / 448, name.removesuffix(".weight")
        out[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        out[base + weight], out[base + inputs] = scale.float().clone(), torch.ones(())
    return out | marker


def single(tensors):
    return lambda folder: save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "m.safetensors")


def saved(state):
    return lambda folder: torch.save(state, folder / "m.pth")


def named_shards(tensors):
    """Two numbered files without an index."""

    def write(folder):
        names = sorted(tensors)
        for number in (0, 1):
            shard = {name: tensors[name] for name in names[number::2]}
            save_file(shard, folder / f"m-0000{number + 1}-of-00002.safetensors")

    return write


def cast(tensors, dtype):
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def flattened(tensors):
    """Axes as stable-diffusion.cpp folds them."""
    fold = {"patch_embedding.weight": lambda t: t.flatten(0, 1)}
    return {name: fold.get(name, lambda t: t.squeeze(0))(tensor) for name, tensor in tensors.items()}


TRANSFORMERS = {
    "diffusers": (lambda w: single(w["transformer"]), 0),
    "original": (lambda w: single(original(w)), 0),
    "comfy": (lambda w: single(prefixed(original(w), "model.diffusion_model.")), 0),
    "diffusion_model": (lambda w: single(prefixed(original(w), "diffusion_model.")), 0),
    "transformer": (lambda w: single(prefixed(w["transformer"], "transformer.")), 0),
    "model": (lambda w: single(prefixed(original(w), "model.")), 0),
    "shards": (lambda w: named_shards(original(w)), 0),
    "pth": (lambda w: saved(original(w)), 0),
    "wrapped": (lambda w: saved({"step": 3, "model": {"state_dict": original(w)}}), 0),
    "fp16": (lambda w: single(cast(original(w), torch.float16)), 0.001),
    "e4m3": (lambda w: single(cast(original(w), torch.float8_e4m3fn)), 0.06),
    "e5m2": (lambda w: single(cast(original(w), torch.float8_e5m2)), 0.1),
    "scaled": (
        lambda w: single(
            scaled_fp8(
                original(w), ".scale_weight", ".scale_input", {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
            )
        ),
        0.04,
    ),
    "scaled_new": (
        lambda w: single(
            scaled_fp8(
                prefixed(original(w), ""),
                ".weight_scale",
                ".input_scale",
                {"blocks.0.ffn.0.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)},
            )
        ),
        0.04,
    ),
    "scaled_rows": (lambda w: single(scaled_fp8(original(w), ".weight_scale", ".input_scale", {}, by_row=True)), 0.04),
}


@pytest.mark.parametrize("form", TRANSFORMERS)
def test_a_transformer_in_any_form(weights, expected, tmp_path, form):
    make, limit = TRANSFORMERS[form]
    make(weights)(tmp_path)
    paths = [tmp_path] + (list(tmp_path.iterdir()) if form != "shards" else [])
    for path in paths:  # the folder and the file give the same
        (family,) = find_families(path).families
        assert family.task == ("r2v" if form in ("diffusers", "transformer") else "")
        same(values(family), expected["transformer"], limit)


def test_a_scale_is_applied_exactly(tmp_path):
    weight = torch.randn(4, 8).to(torch.float8_e4m3fn)
    path = tmp_path / "x.bin"
    scale = torch.tensor([0.5, 2.0, 3.0, 0.25])
    path.write_bytes(scale.numpy().tobytes() + weight.view(torch.uint8).numpy().tobytes())
    rows = SourceTensor("w", (4, 8), "F8_E4M3", path, 16, SourceTensor("s", (4, 1), "F32", path, 0))
    assert torch.equal(rows.read(1, 3), weight.float()[1:3] * scale[1:3, None])
    one = SourceTensor("w", (4, 8), "F8_E4M3", path, 16, SourceTensor("s", (), "F32", path, 4))
    assert torch.equal(one.read(3), weight.float()[3:] * 2)
    assert SourceTensor.from_json(json.loads(json.dumps(rows.as_json()))) == rows


# --- GGUF


def gguf_source(tensors, metadata=None, types=None):
    return tensors, metadata or {}, types


GGUFS = {
    "original": (lambda t: t, {}, ""),
    "prefixed": (lambda t: prefixed(t, "model.diffusion_model."), {}, ""),
    "diffusers": (lambda t: renamed(t, WAN_TRANSFORMER, 2, 0, 1), {}, "r2v"),
    "reversed": (lambda t: dict(reversed(t.items())), {"skyrun.task": "v2v", "skyrun.layers": 2}, "v2v"),
    "folded": (flattened, {"comfy.gguf.orig_shape.patch_embedding.weight": [256, 16, 1, 2, 2]}, ""),
}


@pytest.mark.parametrize("form", GGUFS)
def test_a_gguf_is_a_source(weights, expected, tmp_path, write_gguf, form):
    change, metadata, task = GGUFS[form]
    path = write_gguf(tmp_path / "x.gguf", change(original(weights)), metadata)
    (family,) = find_families(path).families
    assert family.task == task
    same(values(family), expected["transformer"])


def test_a_file_written_here_is_a_source(converted, expected, checkpoint):
    for family in find_families(converted("F32")).families:
        same(values(family), expected[family.role])
        said = {f.role: f.metadata for f in find_families(checkpoint).families}[family.role]
        assert {**family.metadata, "skyrun.eps": 0} == {**said, "skyrun.eps": 0} or family.role != "transformer"
        assert family.task == ("r2v" if family.role == "transformer" else "")
    quantized = {family.role: family for family in find_families(converted("Q4_K")).families}
    same(values(quantized["transformer"]), expected["transformer"], 0.12)
    assert {tensor.source.dtype for tensor in quantized["transformer"].tensors} == {"Q4_K", "F32", "BF16"}


@pytest.mark.parametrize("name", ["v2v-tiny", "a2v-tiny"])
def test_files_of_every_task_are_sources(checkpoints, tmp_path, name):
    before = find_families(checkpoints / name).families
    convert(checkpoints / name, tmp_path, "F32")
    after = find_families(tmp_path).families
    for path in tmp_path.glob("SkyReels*.gguf"):
        assert read_dims(open_gguf(path)).dim == 256
    named = {(family.role, family.task): family for family in after}
    assert len(named) == len(before)
    for family in before:
        again = named[family.role, family.task]
        same(values(again), values(family), 0.001)
        if "skyrun" in family.metadata:
            assert again.metadata == family.metadata
        else:
            assert {
                k: pytest.approx(v) if isinstance(v, float) else v for k, v in again.metadata.items()
            } == family.metadata


@pytest.mark.parametrize("type", FORMATS)
def test_rows_are_slices(goldens, tmp_path, type):
    data = torch.randn(6, 256).view(torch.uint8) if type == "F32" else goldens(f"quant/{type}")["dit.bytes"]
    path = tmp_path / "rows"
    path.write_bytes(b"ab" + data.numpy().tobytes())
    format = FORMATS[type]
    cols = data.shape[1] // format.block_bytes * format.block_size
    tensor = SourceTensor("x", (data.shape[0], cols), type, path, 2)
    whole = dequantize(data, type)
    for start, stop in ((0, None), (0, 1), (1, 3), (2, 2)):
        assert torch.equal(tensor.read(start, stop), whole[start:stop])
    with pytest.raises(IndexError):
        tensor.read(0, data.shape[0] + 1)


@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_plain_types_and_shapes(tmp_path, dtype, shape):
    torch_dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(dtype)
    torch_dtype = torch_dtype or {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    values = torch.randn(shape).to(torch_dtype)
    path = tmp_path / "x"
    path.write_bytes(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    tensor = SourceTensor("x", shape, dtype, path, 0)
    assert torch.equal(tensor.read(), values.float().reshape(tensor.rows, tensor.cols))


# --- the text encoder and its tokenizer


TEXT = {
    "transformers": lambda w: w["text"],
    "original": lambda w: w["t5"],
    "comfy": lambda w: prefixed(w["text"], "text_encoders.umt5xxl.transformer."),
    "tied": lambda w: {n.replace("shared.", "encoder.embed_tokens."): t for n, t in w["text"].items()},
    "both": lambda w: w["text"] | {"encoder.embed_tokens.weight": w["text"]["shared.weight"].clone()},
    "whole": lambda w: w["text"] | {"decoder.block.0.layer.0.layer_norm.weight": torch.ones(128)},
}


@pytest.mark.parametrize("place", ["tokenizer.json", "tokenizer/tokenizer.json", "google/umt5-xxl/tokenizer.json"])
@pytest.mark.parametrize("form", TEXT)
def test_a_text_encoder_in_any_form(weights, expected, tmp_path, checkpoint, form, place):
    save_file(TEXT[form](weights), tmp_path / "t5.safetensors")
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(checkpoint / "tokenizer/tokenizer.json", tmp_path / place)
    (family,) = find_families(tmp_path / "t5.safetensors").families
    same(values(family), expected["text_encoder"])
    assert family.metadata["tokenizer.huggingface.json"] == (checkpoint / "tokenizer/tokenizer.json").read_text()


def tokenizer_arrays(path):
    """The tokenizer as llama.cpp's converter puts it into GGUF."""
    import base64

    said = json.loads(path.read_text())
    special = {token["content"] for token in said["added_tokens"]}
    pieces = said["model"]["vocab"]
    types = [2 if p == "<unk>" else 4 if "extra_id" in p else 3 if p in special else 1 for p, _ in pieces]
    charsmap = base64.b64decode(said["normalizer"]["normalizers"][0]["precompiled_charsmap"])
    scalars = {"model": "t5", "eos_token_id": 1, "unknown_token_id": 3, "add_space_prefix": True}
    scalars |= {"remove_extra_whitespaces": True, "precompiled_charsmap": list(charsmap)}
    arrays = {"tokens": [p for p, _ in pieces], "scores": [float(s) for _, s in pieces], "token_type": types}
    return {f"tokenizer.ggml.{key}": value for key, value in (scalars | arrays).items()}


def test_a_community_text_encoder_brings_its_tokenizer(weights, expected, tmp_path, checkpoint, goldens, write_gguf):
    arrays = tokenizer_arrays(checkpoint / "tokenizer/tokenizer.json")
    tensors = renamed(weights["text"], UMT5_ENCODER, 2, 1, 0)
    path = write_gguf(tmp_path / "t5.gguf", tensors, {"general.architecture": "t5encoder"} | arrays)
    (family,) = find_families(path).families
    same(values(family), expected["text_encoder"])
    tokenizer = Tokenizer.from_str(family.metadata["tokenizer.huggingface.json"])
    for row in goldens("umt5/prompts").notes["tokenizer_table"]:
        assert tokenizer.encode(row["text"]).ids == row["ids"]
        assert tokenizer.encode(row["cleaned"]).ids == row["ids_cleaned"]


def spiece_beside(weights, folder, model):
    save_file(weights["text"], folder / "t5.safetensors")
    shutil.copy(model, folder)


def spiece_inside(weights, folder, model):
    bytes_of = torch.frombuffer(bytearray(model.read_bytes()), dtype=torch.uint8)
    tensors = prefixed(weights["text"] | {"spiece_model": bytes_of}, "text_encoders.umt5xxl.transformer.")
    save_file(tensors, folder / "t5.safetensors")


@pytest.mark.parametrize("write", [spiece_beside, spiece_inside])
def test_a_sentencepiece_model_will_do(weights, expected, tmp_path, checkpoint, goldens, write):
    write(weights, tmp_path, checkpoint / "tokenizer/spiece.model")
    (family,) = find_families(tmp_path).families
    same(values(family), expected["text_encoder"])
    tokenizer = Tokenizer.from_str(family.metadata["tokenizer.huggingface.json"])
    for row in goldens("umt5/prompts").notes["tokenizer_table"]:
        if "<extra_id" not in row["text"]:  # these are added to the model's pieces by the tokenizer.json only
            assert tokenizer.encode(row["text"]).ids == row["ids"]


def test_damaged_sentencepiece_models(weights, checkpoint, tmp_path):
    content = (checkpoint / "tokenizer/spiece.model").read_bytes()
    save_file(weights["text"], tmp_path / "t5.safetensors")
    for damaged in (b"", b"\xff" * 99, content[:5000], content[:-900], b"\x08" + content):
        (tmp_path / "spiece.model").write_bytes(damaged)
        with pytest.raises(SkyrunError, match="spiece.model is not a tokenizer"):
            find_families(tmp_path)


# --- the autoencoder, and several models in one file


VAES = {
    "diffusers": lambda w: single(w["vae"]),
    "original": lambda w: single(w["original_vae"]),
    "first_stage": lambda w: single(prefixed(w["original_vae"], "first_stage_model.")),
    "vae": lambda w: saved(prefixed(w["original_vae"], "vae.")),
    "pth": lambda w: saved(w["vae"]),
}


@pytest.mark.parametrize("form", VAES)
def test_an_autoencoder_in_any_form(weights, expected, tmp_path, form):
    VAES[form](weights)(tmp_path)
    (family,) = find_families(tmp_path).families
    same(values(family), expected["vae"])


def test_one_file_with_everything(weights, expected, tmp_path, checkpoint):
    tensors = prefixed(original(weights), "model.diffusion_model.")
    tensors |= prefixed(weights["original_vae"], "vae.")
    tensors |= prefixed(weights["text"], "text_encoders.umt5xxl.transformer.")
    save_file(tensors | {"extra.logit_scale": torch.zeros(1)}, tmp_path / "all.safetensors")
    shutil.copy(checkpoint / "tokenizer/tokenizer.json", tmp_path)
    found = find_families(tmp_path / "all.safetensors")
    assert [family.role for family in found.families] == ["transformer", "text_encoder", "vae"]
    for family in found.families:
        same(values(family), expected[family.role])
    assert found.notes == ("not used: extra.logit_scale in all.safetensors",)
