"""What is not read is named in a sentence or two that says what to do, however many tensors it has."""

import gzip
import json
import re
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from skyrun.errors import SkyrunError
from skyrun.kernels import FORMATS
from skyrun.quant.sources.families import find_families

BLOCKS = 12
CUT = re.compile(r"download (it|them|the \w+)? ?again")


@pytest.fixture(scope="module")
def large(checkpoint):
    """A transformer of many blocks, as the real one has."""
    tensors = load_file(checkpoint.parent / "v2v-tiny/transformer/diffusion_pytorch_model.safetensors")
    block = {name: tensor for name, tensor in tensors.items() if name.startswith("blocks.0.")}
    outer = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.")}
    return outer | {name.replace("s.0.", f"s.{n}."): tensor for n in range(BLOCKS) for name, tensor in block.items()}


@pytest.fixture(scope="module")
def vae(checkpoint):
    return load_file(checkpoint / "vae/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def text(checkpoint):
    return load_file(checkpoint / "text_encoder/model.safetensors")


@pytest.fixture(scope="module")
def audio(checkpoint):
    return load_file(checkpoint.parent / "a2v-tiny/chinese-wav2vec2-base/model.safetensors")


@pytest.fixture(scope="module")
def avatar(checkpoint):
    tensors = {}
    for path in sorted((checkpoint.parent / "a2v-tiny").glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def note(**said):
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def layers(tensors, change):
    """Every matrix of the blocks as the tensors that `change` makes of it, by their endings."""
    out = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and name.startswith("blocks."):
            out |= {name.removesuffix(".weight") + ending: part for ending, part in change(tensor).items()}
        else:
            out[name] = tensor
    return out


def bytes_of(rows, cols):
    return torch.zeros(rows, cols, dtype=torch.uint8)


def packed(**more):
    """Two numbers of 4 bits in a byte, and what lies beside them."""
    beside = {"." + name.replace("__", "."): value for name, value in more.items()}
    return lambda w: {".weight": bytes_of(w.shape[0], w.shape[1] // 2)} | beside


NVFP4 = {"weight_scale": torch.ones(256, 16).to(torch.float8_e4m3fn), "weight_scale_2": torch.ones(())}
E4M3 = torch.float8_e4m3fn
LORA = {
    f"diffusion_model.blocks.{n}.ffn.0.lora_{part}.weight": torch.zeros(8, 4) for n in range(BLOCKS) for part in "AB"
}
ADAPTER = {f"lora_unet_blocks_{n}_ffn_0.lora_down.weight": torch.zeros(8, 4) for n in range(BLOCKS)}

# What is written: (tensors by the fixtures, texts of the header), and what is said: (message, hint).
MODELS = {
    "nvfp4": (lambda f: layers(f("large"), packed(**NVFP4)), "is in nvfp4", "BF16, F16, fp8 or GGUF"),
    "nvfp4 by its notes": (
        lambda f: layers(f("large"), packed(comfy_quant=note(format="nvfp4"))),
        "is in nvfp4",
        "BF16, F16, fp8 or GGUF",
    ),
    "mxfp8": (
        lambda f: layers(f("large"), lambda w: {".weight": w.to(E4M3), ".weight_scale": bytes_of(256, 8)}),
        "is in mxfp8",
        "BF16",
    ),
    "rotated int8": (
        lambda f: layers(
            f("large"),
            lambda w: {
                ".weight": w.to(torch.int8),
                ".weight_scale": torch.ones(w.shape[0], 1),
                ".comfy_quant": note(format="int8_tensorwise", convrot=True, convrot_groupsize=256),
            },
        ),
        r"is in int8 with rotated weights \(ConvRot\)",
        "BF16",
    ),
    "a format of tomorrow": (
        lambda f: layers(f("large"), packed(comfy_quant=note(format="nf3_fancy"))),
        "is in nf3_fancy",
        "BF16",
    ),
    "bitsandbytes": (
        lambda f: layers(f("large"), packed(weight__absmax=torch.ones(4), weight__quant_map=torch.ones(16))),
        "is in a format of bitsandbytes",
        "BF16",
    ),
    "bitsandbytes in 8 bits": (
        lambda f: layers(f("large"), lambda w: {".weight": w.to(torch.int8), ".SCB": torch.ones(w.shape[0])}),
        "is in a format of bitsandbytes",
        "BF16",
    ),
    "quanto": (
        lambda f: layers(
            f("large"), lambda w: {".weight._data": w.to(torch.int8), ".weight._scale": torch.ones(w.shape[0], 1)}
        ),
        "is in a format of quanto",
        "BF16",
    ),
    "nunchaku": (
        lambda f: layers(f("large"), lambda w: {".qweight": bytes_of(4, 4), ".wscales": torch.ones(4)}),
        "is in nunchaku's 4-bit format",
        "BF16",
    ),
    "GPTQ": (
        lambda f: layers(f("large"), lambda w: {".qweight": torch.ones(4, 4, dtype=torch.int32)}),
        "is in a format of GPTQ or AWQ",
        "BF16",
    ),
    "int8 without scales": (
        lambda f: layers(f("large"), lambda w: {".weight": w.to(torch.int8)}),
        f"{10 * BLOCKS} tensors are I8, such as blocks.0.*; expected .*I8.* with scales",
        "skyrun pull",
    ),
    "integers": (
        lambda f: layers(f("large"), lambda w: {".weight": w.to(torch.int32)}),
        f"{10 * BLOCKS} tensors are I32, such as",
        "skyrun pull",
    ),
    "LoRA": (lambda f: LORA, "is a LoRA, which changes a model", "merge it"),
    "LoRA of kohya": (lambda f: ADAPTER, "is a LoRA, which changes a model", "merge it"),
    "audio modules alone": (
        lambda f: {n: t for n, t in f("avatar").items() if re.search(r"audio_proj|audio_cross_attn|norm_x", n)},
        "holds the audio modules of a talking avatar without their transformer",
        "whole transformer",
    ),
    "first and last frame": (
        lambda f: f("avatar") | {"img_emb.emb_pos": torch.ones(1, 2, 2)},
        "is a Wan model that makes clips between a first and a last frame",
        "skyrun pull",
    ),
    "VACE": (lambda f: f("large") | {"vace_blocks.0.after_proj.weight": torch.ones(2)}, "is VACE", "skyrun pull"),
    "Animate": (lambda f: f("large") | {"face_adapter.fuser.weight": torch.ones(2)}, "is Wan Animate", "skyrun pull"),
    "S2V": (lambda f: f("large") | {"casual_audio_encoder.weights": torch.ones(2)}, "is Wan S2V", "skyrun pull"),
    "camera": (lambda f: f("large") | {"control_adapter.conv.weight": torch.ones(2)}, "camera control", "skyrun pull"),
    "Wan 2.2's autoencoder": (
        lambda f: f("vae") | {"decoder.conv_in.weight": torch.zeros(16, 48, 3, 3, 3)},
        "is the autoencoder of Wan 2.2, whose latents have 48 channels",
        "Wan2.1_VAE.pth",
    ),
    "large wav2vec2": (
        lambda f: (
            f("audio")
            | {f"wav2vec2.feature_extractor.conv_layers.{n}.layer_norm.weight": torch.ones(32) for n in range(1, 7)}
        ),
        "is a large wav2vec2",
        "chinese-wav2vec2-base",
    ),
    "wav2vec2 of 24 blocks": (
        lambda f: (
            f("audio")
            | {
                n.replace("layers.0.", f"layers.{k}."): t
                for n, t in f("audio").items()
                if ".layers.0." in n
                for k in range(12, 24)
            }
        ),
        "is a wav2vec2 of 24 blocks",
        "chinese-wav2vec2-base",
    ),
    "T5 v1.1": (
        lambda f: {n: t for n, t in f("text").items() if not re.search(r"block\.1\..*relative", n)},
        "is a T5 v1.1 such as Flux and SD3 use",
        "umt5-xxl",
    ),
    "another model": (
        lambda f: {f"model.layers.{n}.mlp.weight": torch.zeros(4) for n in range(400)},
        "holds no model that skyrun knows",
        "expected SkyReels-V3",
    ),
    "tensors that are too many": (
        lambda f: f("large") | {f"blocks.{n}.extra.weight": torch.zeros(4) for n in range(BLOCKS)},
        "(?s)blocks.0.extra.weight .4. is not a tensor of this model.*and 9 others are not of this model",
        "skyrun pull",
    ),
    "tensors that are too few": (
        lambda f: {n: t for n, t in f("large").items() if ".ffn.0.bias" not in n},
        "(?s)blocks.0.ffn.0.bias is missing.*and 9 others are missing",
        "skyrun pull",
    ),
    "tensors of other shapes": (
        lambda f: f("large") | {f"blocks.{n}.ffn.0.bias": torch.zeros(7) for n in range(BLOCKS)},
        "(?s)has shape .7.*and 9 others have other shapes",
        "skyrun pull",
    ),
    "scales that fit nothing": (
        lambda f: layers(f("large"), lambda w: {".weight": w.to(E4M3), ".weight_scale": torch.ones(7, 3)}),
        "(?s)expected one number or 256, or a grid over blocks.*and 117 others do not fit",
        "compare them",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_is_not_read_is_named(request, tmp_path, case):
    make, message, hint = MODELS[case]
    tensors = {name: tensor.contiguous().clone() for name, tensor in make(request.getfixturevalue).items()}
    save_file(tensors, tmp_path / "m.safetensors")
    for source in (tmp_path, tmp_path / "m.safetensors"):
        with pytest.raises(SkyrunError) as error:
            find_families(source)
        said = error.value
        assert re.search(message, said.message), said.message
        assert hint in said.hint, said.hint
        assert len(said.message) < 1500 and len(said.message.splitlines()) < 9, said.message
        assert not CUT.search(said.hint), said.hint


def test_a_format_that_the_header_names(large, tmp_path):
    said = {"format_version": "1.0", "layers": {"blocks.0.ffn.0": {"format": "nvfp4"}}}
    tensors = {name: tensor.clone() for name, tensor in large.items()}
    save_file(tensors, tmp_path / "m.safetensors", {"_quantization_metadata": json.dumps(said)})
    with pytest.raises(SkyrunError, match="is in nvfp4"):
        find_families(tmp_path)
    for harmless in (
        "{",
        "[]",
        '{"layers": 3}',
        '{"layers": {"a": {"format": "float8_e4m3fn"}}}',
        '{"layers": {"a": 1}}',
    ):
        save_file(tensors, tmp_path / "m.safetensors", {"_quantization_metadata": harmless})
        assert len(find_families(tmp_path).families) == 1


BESIDE = {
    "LoRA": (LORA, "is a LoRA"),
    "an autoencoder of Wan 2.2": ({"decoder.conv1.weight": torch.zeros(16, 48, 3, 3, 3)}, "of Wan 2.2"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_lies_beside_a_whole_checkpoint_is_passed_over_and_said(checkpoint, tmp_path, case):
    tensors, message = BESIDE[case]
    source = shutil.copytree(checkpoint, tmp_path / "source")
    save_file(tensors, source / "more.safetensors")
    found = find_families(source)
    assert [family.role for family in found.families] == ["transformer", "text_encoder", "vae"]
    assert len(found.notes) == 1 and re.search(f"not used: more.safetensors .*{message}", found.notes[0])


def test_a_transformer_that_is_not_read_is_not_passed_over(checkpoint, large, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    shutil.rmtree(source / "transformer")
    tensors = {name: tensor.clone() for name, tensor in layers(large, packed(**NVFP4)).items()}
    save_file(tensors, source / "m.safetensors")
    with pytest.raises(SkyrunError, match="m.safetensors is in nvfp4"):
        find_families(source)


def test_a_folder_of_many_files_is_summed_up(checkpoint, tmp_path):
    """As the folders of other programs have them."""
    for number in range(60):
        save_file({f"model.{number}.weight": torch.zeros(1)}, tmp_path / f"{number:02}.safetensors")
    with pytest.raises(SkyrunError, match="and 57 others are not used either") as error:
        find_families(tmp_path)
    assert len(error.value.message) < 800
    source = shutil.copytree(checkpoint, tmp_path / "source")
    for number in range(60):
        save_file({f"model.{number}.weight": torch.zeros(1)}, source / f"{number:02}.safetensors")
    assert len(find_families(source).notes) == 4
    for number in range(60):
        (source / f"{number:02}.safetensors").write_bytes(LFS)
    with pytest.raises(SkyrunError, match="and 40 more lines like these") as error:
        find_families(source)
    assert len(error.value.message.splitlines()) < 24


# --- files that are something else

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21461\nsize 12345\n"
KINDS = {
    "git-lfs": (LFS, "is a pointer of git-lfs", "git lfs pull"),
    "a page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page", "download button"),
    "a page with a mark": (b"\xef\xbb\xbf<HTML><head>", "is a web page", "download button"),
    "an error in XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page", "download"),
    "an answer in JSON": (b'{"error": "Repository not found"}' + b" " * 99, "is JSON or text", "weights"),
    "gzip": (gzip.compress(b"x" * 99), "is packed with gzip", "unpack"),
    "7-Zip": (b"7z\xbc\xaf\x27\x1c" + bytes(99), "is packed with 7-Zip", "unpack"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file", ".safetensors"),
    "an old pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "torch 1.6", "newer torch"),
    "nothing": (b"", "is empty|is not a zip file: it is empty|0 bytes|4 bytes", ""),
    "zeros": (bytes(4096), "begins with zeros", "not finished"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf", ".pth", ".bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_named(tmp_path, kind, suffix):
    content, message, hint = KINDS[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(SkyrunError) as error:
        find_families(tmp_path)
    assert re.search(message, error.value.message), error.value.message
    assert hint in error.value.hint, error.value.hint
    assert str(path) in error.value.message


@pytest.mark.parametrize(("suffix", "other"), [(".safetensors", ".gguf"), (".pth", ".gguf"), (".gguf", ".pth")])
def test_a_model_under_the_suffix_of_another(tmp_path, checkpoint, converted, suffix, other):
    sources = {
        ".gguf": next(converted("Q8_0").glob("SkyReels*")),
        ".pth": checkpoint.parent / "v2v-tiny/Wan2.1_VAE.pth",
    }
    shutil.copy(sources[other], tmp_path / f"m{suffix}")
    with pytest.raises(SkyrunError, match="it is a (GGUF|zip) file") as error:
        find_families(tmp_path)
    assert f"{other}" in error.value.hint


NOT_DECODED = [kind.name for kind in gguf.GGMLQuantizationType if kind.name not in FORMATS and kind <= 41]


@pytest.mark.parametrize("type", NOT_DECODED)
def test_a_gguf_type_that_is_not_decoded_is_named(tmp_path, type):
    kind = gguf.GGMLQuantizationType[type]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
    writer.add_tensor("blocks.0.ffn.0.weight", np.zeros((2, nbytes), np.uint8), raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(SkyrunError, match=f"blocks.0.ffn.0.weight has type number {kind.value}, {type}") as error:
        find_families(tmp_path)
    assert "one of these types" in error.value.hint and not CUT.search(error.value.hint)
    assert block
