"""What conversions write stays what it was: the bytes of published layouts, and those of the encoders."""

import hashlib
import json

import gguf
import pytest
import torch

from skyrun.kernels import FORMATS
from skyrun.quant import convert, quantize
from skyrun.quant.choose.importance import Importance, write_importance
from skyrun.quant.encoders.encode import ENCODER_VERSION
from skyrun.quant.plan import Settings
from skyrun.quant.planner import plan_conversion

# Of each file written from the tiny checkpoints as Q8_0: digests of the bytes of its tensors and of the metadata that
# files have had from the first version on; of a safetensors file that of all its bytes.
FILES = {
    "r2v/SkyReels-V3-R2V-2.2M-Q8_0.gguf": ("f680b48a12617dbb", "74c053668c78743b"),
    "r2v/umt5-encoder-263K-Q8_0.gguf": ("d05f070c70945a35", "1fb51bbcecabd299"),
    "r2v/wan-vae-244K.safetensors": ("e3434e89fd042b43", ""),
    "v2v/SkyReels-V3-SHOT-1.3M-Q8_0.gguf": ("2d44def1794b5b88", "abb601c9bdddb39a"),
    "v2v/SkyReels-V3-V2V-2.2M-Q8_0.gguf": ("0d6d80e552b1a51c", "e2e930260bf4ec1f"),
    "v2v/umt5-encoder-263K-Q8_0.gguf": ("d05f070c70945a35", "1fb51bbcecabd299"),
    "v2v/wan-vae-244K.safetensors": ("d9bfb4073b983ff1", ""),
    "a2v/SkyReels-V3-A2V-2.8M-Q8_0.gguf": ("c33f51395c56c8ea", "0879f84ad929773f"),
    "a2v/clip-vision-66K-Q8_0.gguf": ("a3e1f8c7236a5100", "6485f2e8cf7414f2"),
    "a2v/umt5-encoder-263K-Q8_0.gguf": ("d05f070c70945a35", "1fb51bbcecabd299"),
    "a2v/wan-vae-244K.safetensors": ("d9bfb4073b983ff1", ""),
    "a2v/wav2vec2-129K.safetensors": ("9710b1507eaddb0b", ""),
}
# What was added since, and what was changed, in files of each kind.
TOKENIZER = ("model", "pre", "tokens", "scores", "token_type", "unknown_token_id", "eos_token_id", "padding_token_id")
TOKENIZER += ("add_space_prefix", "remove_extra_whitespaces", "precompiled_charsmap")
ADDED = {"umt5-encoder": {f"tokenizer.ggml.{key}" for key in TOKENIZER}}
TYPES = {"clip-vision": "clip-vision"}  # general.type, which was "model" before
# Of the bytes that encoders make of the same numbers: change it together with ENCODER_VERSION only.
ENCODED = {2: "1ccc0e3533938cfc"}


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


@pytest.fixture(scope="module")
def written(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for task in ("r2v", "v2v", "a2v"):
        convert(checkpoint.parent / f"{task}-tiny", folder / task, "Q8_0")
    return folder


def test_all_files_are_known(written):
    assert {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_published_layout_gives_the_bytes_that_it_gave(written, name):
    path, (data, metadata) = written / name, FILES[name]
    if path.suffix == ".safetensors":
        assert digest(path.read_bytes()) == data
        return
    reader = gguf.GGUFReader(path)
    assert digest(b"".join(tensor.data.tobytes() for tensor in reader.tensors)) == data
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    kind = next((kind for kind in ("umt5-encoder", "clip-vision") if kind in name), "")
    assert keys.pop("general.type") == TYPES.get(kind, "model")
    added = {key: keys.pop(key) for key in ADDED.get(kind, ())}
    assert all(value not in ("", []) for value in added.values())
    rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in keys.items()}
    assert digest(json.dumps(rounded).encode()) == metadata


def test_the_version_of_the_encoders_is_that_of_their_bytes():
    """Of numbers whose sums are exact, so that no processor's order of adding shows."""
    generator = torch.Generator().manual_seed(14)
    x = torch.randint(-24, 25, (8, 512), generator=generator).float() / 16
    importance = torch.randint(1, 9, (512,), generator=generator).float()
    parts = [quantize(x, type, weights) for type in FORMATS for weights in (None, importance)]
    encoded = digest(b"".join(part.numpy().tobytes() for part in parts))
    assert {ENCODER_VERSION: encoded} == ENCODED, f"raise ENCODER_VERSION, and put {encoded} here"


# --- what a file says is in it


@pytest.mark.parametrize(
    ("quant", "type"),
    [("Q6_K", "Q8_0"), ("Q5_K", "Q5_1"), ("Q4_K", "Q5_0"), ("IQ4_XS", "IQ4_NL"), ("Q3_K", "IQ4_NL"), ("Q2_K", "IQ4_NL")]
    + [("Q4_K_M", "Q5_0"), ("Q3_K_M", "IQ4_NL"), ("Q8_0", "Q8_0"), ("F16", "F16")],
)
def test_a_file_whose_rows_fell_back_says_so(checkpoint, tmp_path, quant, type):
    """Rows of the tiny text encoder have 128 numbers: K types cannot hold them."""
    (file,) = plan_conversion(checkpoint / "text_encoder", tmp_path, Settings(quant)).files
    mostly = {
        name: sum(t.source.numel for t in file.tensors if t.type == name) for name in {t.type for t in file.tensors}
    }
    assert max(mostly, key=mostly.get) == type
    assert file.path.name.endswith(f"-{type}.gguf")
    (tmp_path / "head").write_bytes(file.header + bytes(file.nbytes - len(file.header)))
    fields = gguf.GGUFReader(tmp_path / "head").fields
    expected = {"F16": "MOSTLY_F16"}.get(type, f"MOSTLY_{type}")
    assert fields["general.file_type"].contents() == int(gguf.LlamaFileType[expected])
    assert fields["skyrun.quant"].contents() == type


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q3_K_M", "Q2_K"])
def test_a_file_of_few_fallbacks_keeps_its_recipe(checkpoint, tmp_path, quant):
    """The tiny avatar has rows of 32 in its audio attention only."""
    file = plan_conversion(checkpoint.parent / "a2v-tiny", tmp_path, Settings(quant)).files[0]
    assert file.path.name.endswith(f"-{quant}.gguf")
    assert any(tensor.fallback for tensor in file.tensors)


def test_importance_that_covers_little_says_so(checkpoint, tmp_path):
    name = "blocks.0.ffn.0.weight"
    path = tmp_path / "importance.gguf"
    write_importance(path, Importance({name: torch.ones(256, dtype=torch.float64)}, {name: 4}))
    conversion = plan_conversion(checkpoint, tmp_path / "out", Settings("Q4_K", imatrix=path))
    (said,) = [note for note in conversion.notes if "covers" in note]
    assert "covers 1 of 20 matrices of SkyReels-V3-R2V" in said and "the other 19" in said
