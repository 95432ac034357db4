"""Checkpoints as other programs leave them: scales over blocks, int8, wrapped names, parts, CLIP in other names."""

import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from skyrun.errors import BAD_INPUT, SkyrunError
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.kernels.name_tables import CLASS_TASKS, TASKS, needed_roles, role_of
from skyrun.quant import convert
from skyrun.quant.plan import Settings
from skyrun.quant.planner import plan_conversion
from skyrun.quant.sources.families import find_families
from skyrun.quant.sources.source import SourceTensor, scale_blocks

CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


@pytest.fixture(scope="module")
def transformer(checkpoint):
    """The V2V transformer, whose names are the original ones."""
    return load_file(checkpoint.parent / "v2v-tiny/transformer/diffusion_pytorch_model.safetensors")


def save(tensors, path, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def values(family):
    return {tensor.name: tensor.source.read().view(tensor.shape) for tensor in family.tensors}


def same(got, expected, limit):
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert float((got[name] - value.float()).norm()) <= limit * float(value.float().norm()), name


# --- numbers with scales


def matrices(tensors):
    return {name for name, tensor in tensors.items() if tensor.dim() == 2 and name.startswith("blocks.")}


def scaled(tensors, quantize):
    """Every matrix of the blocks by `quantize`, which makes the tensors that stand for it by their endings."""
    out = {name: tensor for name, tensor in tensors.items() if name not in matrices(tensors)}
    for name in matrices(tensors):
        base = name.removesuffix(".weight")
        out |= {base + ending: tensor for ending, tensor in quantize(tensors[name].float()).items()}
    return out


def grid(weight, height, width, top):
    """The weight divided by a scale for each block, and the scales."""
    blocks = weight.view(weight.shape[0] // height, height, weight.shape[1] // width, width)
    scale = blocks.abs().amax((1, 3), keepdim=True) / top
    return (blocks / scale).view(weight.shape), scale[:, 0, :, 0]


def fp8(height, width, ending, shape=lambda scale: scale, dtype=torch.float32):
    def quantize(weight):
        numbers, scale = grid(weight, height or len(weight), width or weight.shape[1], 448)
        return {".weight": numbers.to(torch.float8_e4m3fn), ending: shape(scale).to(dtype)}

    return quantize


def note(**said):
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def int8(height, width, said, ending=".weight_scale"):
    def quantize(weight):
        numbers, scale = grid(weight, height or len(weight), width or weight.shape[1], 127)
        tensors = {".weight": numbers.round().to(torch.int8), ending: scale}
        return tensors | ({".comfy_quant": note(**said)} if said else {})

    return quantize


SCALED = {
    "rows of blocks, as musubi-tuner": (fp8(1, 64, ".scale_weight", lambda scale: scale[:, :, None]), 0.04),
    "blocks in half floats": (fp8(1, 128, ".weight_scale", dtype=torch.bfloat16), 0.04),
    "squares of 64": (fp8(64, 64, ".weight_scale"), 0.04),
    "squares of 128, inverse": (fp8(128, 128, ".weight_scale_inv"), 0.04),
    "one number, inverse": (fp8(0, 0, ".weight_scale_inv", lambda scale: scale.reshape(())), 0.04),
    "int8 by rows": (int8(1, 0, {"format": "int8_tensorwise"}), 0.01),
    "int8 without a note": (int8(1, 0, None), 0.01),
    "int8 as a whole": (int8(0, 0, {"format": "int8_tensorwise"}), 0.03),
    "int8 by blocks": (int8(128, 128, {"format": "int8_blockwise", "group_size": 128}), 0.03),
}


@pytest.mark.parametrize("form", SCALED)
def test_numbers_with_scales_become_weights(transformer, tmp_path, form):
    quantize, limit = SCALED[form]
    tensors = scaled(transformer, quantize) | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    (family,) = find_families(save(tensors, tmp_path / "m.safetensors")).families
    got = values(family)
    same(got, transformer, limit)
    some = next(tensor for tensor in family.tensors if tensor.name == "blocks.1.ffn.2.weight")
    assert torch.equal(some.source.read(100, 200), got[some.name][100:200])
    again = SourceTensor.from_json(json.loads(json.dumps(some.source.as_json())))
    assert again == some.source and torch.equal(again.read(), got[some.name])


@pytest.mark.parametrize(
    ("weight", "scale", "blocks"),
    [
        ((256, 512), (), (256, 512)),
        ((256, 512), (1, 1), (256, 512)),
        ((256, 512), (256,), (1, 512)),
        ((256, 512), (256, 1), (1, 512)),
        ((256, 512), (1, 256), (1, 512)),
        ((256, 512), (256, 8, 1), (1, 64)),
        ((256, 512), (2, 4), (128, 128)),
        ((200, 300), (2, 3), (128, 128)),  # the last blocks are cut
        ((13824, 5120), (108, 40), (128, 128)),
        ((5120, 13824), (80, 216), (64, 64)),
        ((96, 90), (96, 3), (1, 32)),
        ((6, 50), (6, 5), (1, 10)),
        ((256, 512), (7,), None),
        ((256, 512), (7, 3), None),
        ((256, 512), (0,), None),
        ((256, 512), (2,), None),
    ],
)
def test_how_scales_lie_over_a_weight(tmp_path, weight, scale, blocks):
    tensors = [SourceTensor("x", shape, "F32", tmp_path / "x", 0) for shape in (weight, scale)]
    found = scale_blocks(*tensors)
    assert (found and (found.height, found.width)) == blocks


# --- names


def everywhere(word):
    """A wrapper around the model, its blocks and their layers."""
    return lambda name: f"{word}.{name}".replace("blocks.0.", f"blocks.0.{word}.").replace("ffn.", f"ffn.{word}.")


NAMES = {
    "torch.compile": "_orig_mod.{}".format,
    "DDP": "module.{}".format,
    "FSDP": everywhere("_fsdp_wrapped_module"),
    "checkpointing": everywhere("_checkpoint_wrapped_module"),
    "compiled inside DDP": "module._orig_mod.{}".format,
    "compiled under a prefix": "model.diffusion_model._orig_mod.{}".format,
}


@pytest.mark.parametrize("form", NAMES)
def test_wrapped_names(transformer, tmp_path, form):
    tensors = {NAMES[form](name): tensor for name, tensor in transformer.items()}
    (family,) = find_families(save(tensors, tmp_path / "m.safetensors")).families
    same(values(family), transformer, 0)


def test_one_tensor_under_two_wrapped_names(transformer, tmp_path):
    extra = {"_orig_mod.head.head.bias": transformer["head.head.bias"].clone()}
    with pytest.raises(SkyrunError, match="are the same tensor, wrapped"):
        find_families(save(transformer | extra, tmp_path / "m.safetensors"))


def test_markers_are_no_tensors_of_a_model(transformer, tmp_path):
    markers = {"scaled_fp8": torch.zeros(2), "empty": torch.zeros(0), "blocks.0.num_batches_tracked": torch.tensor(3)}
    found = find_families(save(transformer | markers, tmp_path / "m.safetensors"))
    assert len(found.families) == 1 and found.notes == ()


# --- CLIP in transformers' names


def in_transformers(clip, text_tower=False):
    """The vision tower as transformers has it."""
    vision, out = "vision_model.", {}
    out[f"{vision}embeddings.class_embedding"] = clip["visual.cls_embedding"].reshape(-1)
    out[f"{vision}embeddings.patch_embedding.weight"] = clip["visual.patch_embedding.weight"]
    out[f"{vision}embeddings.position_embedding.weight"] = clip["visual.pos_embedding"].squeeze(0)
    out[f"{vision}embeddings.position_ids"] = torch.arange(257)[None]
    outer = {"pre_norm": "pre_layrnorm", "post_norm": "post_layernorm"}
    inner = {"attn.proj": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2"}
    inner |= {"mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    for name, tensor in clip.items():
        parts = name.removeprefix("visual.").split(".")
        if parts[0] in outer:
            out[f"{vision}{outer[parts[0]]}.{parts[1]}"] = tensor
        elif parts[0] == "transformer":
            layer, rest, kind = f"{vision}encoder.layers.{parts[1]}", ".".join(parts[2:-1]), parts[-1]
            if rest == "attn.to_qkv":
                for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                    out[f"{layer}.self_attn.{letter}_proj.{kind}"] = rows
            else:
                out[f"{layer}.{inner[rest]}.{kind}"] = tensor
    out["visual_projection.weight"] = clip["visual.head"].t()
    if text_tower:
        out |= {"text_model.embeddings.position_ids": torch.arange(5)[None], "logit_scale": torch.tensor(1.0)}
        out |= {f"text_model.encoder.layers.0.self_attn.{part}_proj.weight": torch.ones(4, 4) for part in "qkv"}
        out["text_projection.weight"] = torch.ones(4, 4)
    return out


@pytest.fixture(scope="module")
def clip(checkpoint):
    loaded = torch.load(checkpoint.parent / "a2v-tiny" / CLIP, weights_only=True)
    return {name: tensor for name, tensor in loaded.items() if name.startswith("visual.")}


@pytest.fixture
def config(checkpoint, tmp_path):
    """transformers' config beside the file: the tiny model has two heads."""
    said = {"model_type": "clip_vision_model", "hidden_size": 32, "projection_dim": 16, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(said))


@pytest.mark.parametrize("text_tower", [False, True])
@pytest.mark.parametrize("quant", ["F32", "F16", "Q8_0"])
def test_clip_in_transformers_names_becomes_the_same_file(checkpoint, clip, config, tmp_path, quant, text_tower):
    dtype = next(iter(clip.values())).dtype
    save(in_transformers(clip, text_tower), tmp_path / "clip_vision_h.safetensors")
    convert(tmp_path / "clip_vision_h.safetensors", tmp_path / "theirs", quant)
    convert(checkpoint.parent / "a2v-tiny" / CLIP, tmp_path / "ours", quant)
    (ours,), (theirs,) = (list((tmp_path / folder).iterdir()) for folder in ("ours", "theirs"))
    assert dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert ours.read_bytes() == theirs.read_bytes()


def test_clip_is_stored_as_it_lies_where_its_type_stays(clip, tmp_path, config):
    half = {name: tensor.half() for name, tensor in in_transformers(clip).items()}
    convert(save(half, tmp_path / "c.safetensors"), tmp_path / "out", "F16")
    file = open_gguf(next((tmp_path / "out").iterdir()))
    info = file.tensors["v.blk.1.attn_qkv.weight"]
    assert info.format.name == "F16"
    got = torch.frombuffer(file.read(info), dtype=torch.float16).view(info.shape)
    assert torch.equal(got, clip["visual.transformer.1.attn.to_qkv.weight"].half())


def test_clip_without_what_no_run_reads(clip, tmp_path, config):
    """Diffusers' image_encoder has no projection."""
    tensors = in_transformers(clip)
    del tensors["visual_projection.weight"]
    (family,) = find_families(save(tensors, tmp_path / "m.safetensors")).families
    assert "v.head" not in values(family) and "clip.vision.projection_dim" not in family.metadata
    assert family.metadata["clip.vision.attention.head_count"] == 2


def test_clip_with_a_part_missing(clip, tmp_path, config):
    tensors = in_transformers(clip)
    del tensors["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(SkyrunError, match="layers.1.self_attn.k_proj.weight is missing beside .*q_proj.weight"):
        find_families(save(tensors, tmp_path / "m.safetensors"))


# --- GGUF in several files, and by other words


def split(path, parts, folder):
    """As llama-gguf-split does: metadata in the first file, tensors in order."""
    reader = gguf.GGUFReader(path)
    per, files = -(-len(reader.tensors) // parts), []
    for number in range(parts):
        files.append(folder / f"{path.stem}-{number + 1:05}-of-{parts:05}.gguf")
        writer = gguf.GGUFWriter(files[-1], reader.fields["general.architecture"].contents())
        if number:
            writer.kv_data[0].clear()
        for key, field in reader.fields.items() if not number else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                kind = field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], sub_type=kind)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        for tensor in reader.tensors[number * per : (number + 1) * per]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
    return files


@pytest.mark.parametrize("pattern", ["umt5*", "SkyReels*"])
def test_a_gguf_in_parts_is_one_model(converted, tmp_path, pattern):
    path = next(converted("Q8_0").glob(pattern))
    parts = tmp_path / "parts"
    parts.mkdir()
    files = split(path, 3, parts)
    assert [open_gguf(file).part for file in files] == [(1, 3), (2, 3), (3, 3)]
    assert open_gguf(path).part == (1, 1)
    (whole,) = find_families(path).families
    for source in (parts, files[0], files[2]):
        (family,) = find_families(source).families
        assert (family.role, family.task, family.metadata) == (whole.role, whole.task, whole.metadata)
        same(values(family), values(whole), 0)
    convert(parts, tmp_path / "out", "Q8_0")
    again = open_gguf(next((tmp_path / "out").iterdir()))
    first = open_gguf(path)
    for name, info in first.tensors.items():
        assert again.read(again.tensors[name]) == first.read(info), name


def test_a_gguf_with_a_part_missing(converted, tmp_path):
    files = split(next(converted("Q8_0").glob("SkyReels*")), 3, tmp_path)
    files[1].unlink()
    with pytest.raises(SkyrunError, match="00002-of-00003.gguf is missing"):
        find_families(files[0])


@pytest.mark.parametrize("word", ["pig", "wan", "t5", "t5encoder", "clip", "nonsense", ""])
def test_the_word_for_the_architecture_decides_nothing(transformer, write_gguf, tmp_path, word):
    path = write_gguf(tmp_path / "x.gguf", transformer, {"general.architecture": word})
    (family,) = find_families(path).families
    assert (family.role, family.architecture) == ("transformer", "wan")
    assert role_of(open_gguf(path).tensors) == "transformer"


# --- what a transformer was trained for


def classed(name):
    """A copy of the R2V checkpoint whose config names another class."""

    def change(folder):
        path = folder / "transformer/config.json"
        said = json.loads(path.read_text()) | {"_class_name": name}
        path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))

    return change


@pytest.mark.parametrize(
    ("name", "task"),
    [
        *CLASS_TASKS.items(),
        ("SkyReelsV3Transformer3DModel", ""),
        (None, "r2v"),
    ],
)
@pytest.mark.parametrize("pipeline", ["WanPipeline", "SkyReelsV2Pipeline"])
def test_the_class_in_the_config_decides(checkpoint, tmp_path, name, task, pipeline):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    classed(name)(source)
    index = json.loads((source / "model_index.json").read_text()) | {"_class_name": pipeline}
    (source / "model_index.json").write_text(json.dumps(index))
    conversion = plan_conversion(source, tmp_path / "out", Settings("Q8_0"))
    file = conversion.files[0]
    assert file.task == task
    assert ("R2V" in file.path.name) == (task == "r2v")
    said = [note for note in conversion.notes if "not a class that skyrun knows" in note]
    assert bool(said) == (not task) and all(name in note for note in said)


def test_the_tables_know_all_tasks():
    assert TASKS == ("r2v", "v2v", "shot", "t2v", "i2v", "a2v")
    assert set(needed_roles("i2v")) == {"text_encoder", "vae", "image_encoder"}
    assert set(needed_roles("a2v")) == {"text_encoder", "vae", "image_encoder", "audio_encoder"}
    assert {needed_roles(task) for task in ("r2v", "v2v", "shot", "")} == {("text_encoder", "vae")}


def test_of_two_text_encoders_the_one_that_can_be_used_is_taken(checkpoint, write_gguf, converted, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    (own,) = find_families(next(converted("F32").glob("umt5*"))).families
    few = {"tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": ["<pad>", "</s>", "<s>", "<unk>"]}
    few |= {"tokenizer.ggml.scores": [0.0] * 4, "tokenizer.ggml.token_type": [3, 3, 3, 2]}
    other = write_gguf(source / "umt5-xxl-encoder.gguf", values(own), {"general.architecture": "t5encoder"} | few)
    found = find_families(source)
    (encoder,) = [family for family in found.families if family.role == "text_encoder"]
    assert encoder.tensors[0].source.file.name == "model.safetensors"
    assert any("umt5-xxl-encoder.gguf" in note and "4 tokens" in note for note in found.notes)
    with pytest.raises(SkyrunError, match="has 4 tokens, the embedding 768 rows") as error:
        find_families(other)
    assert error.value.code == BAD_INPUT
