"""What cannot be converted is refused before anything is written, in words that say what is wrong and what to do."""

import os
import pickle
import re
import shutil
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from skyrun.errors import BAD_INPUT, MODEL_MISSING, SkyrunError
from skyrun.quant.sources.families import find_families

T5 = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
SHARD_1, SHARD_2 = (f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2))
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def a2v(checkpoint, tmp_path):
    return shutil.copytree(checkpoint.parent / "a2v-tiny", tmp_path / "a2v")


def edit(path, **changes):
    """Rewrite a file with tensors changed or, for None, removed; `__` in names stands for a dot."""
    loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    for name, value in changes.items():
        loaded[name.replace("__", ".")] = value
    kept = {name: value for name, value in loaded.items() if value is not None}
    save_file(kept, path) if path.suffix == ".safetensors" else torch.save(kept, path)


def cut(name, share=0.6):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return change


def remove(*names):
    return lambda folder: [
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink() for name in names
    ]


def replace(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def tensors(name, **changes):
    return lambda folder: edit(folder / name, **changes)


def twice(folder):
    first = load_file(folder / SHARD_1)
    edit(folder / SHARD_2, patch_embedding__bias=first["patch_embedding.bias"])


def compressed(folder):
    with zipfile.ZipFile(folder / T5) as source, zipfile.ZipFile(folder / "x.pth", "w", zipfile.ZIP_DEFLATED) as out:
        for info in source.infolist():
            out.writestr(info.filename, source.read(info))
    os.replace(folder / "x.pth", folder / T5)


def legacy(folder):
    loaded = torch.load(folder / T5, weights_only=True)
    torch.save(loaded, folder / T5, _use_new_zipfile_serialization=False)


def transposed(folder):
    weight = torch.load(folder / T5, weights_only=True)["blocks.0.attn.q.weight"]
    edit(folder / T5, blocks__0__attn__q__weight=weight.t())


def second_text_encoder(folder):
    (folder / "more").mkdir()
    shutil.copy(folder / T5, folder / "more" / "again.pth")


DAMAGES = {
    "missing shard": (remove(SHARD_2), f"{SHARD_2} is missing", "download"),
    "missing numbered shard": (remove(INDEX, SHARD_1), f"{SHARD_1} is missing", "download"),
    "broken index": (lambda f: (f / INDEX).write_text("{"), "index.json is not JSON", "download"),
    "impossible name": (replace(INDEX, SHARD_2, "x" * 300), "x{300} is missing", "download"),
    "half a character": (replace(INDEX, SHARD_2, "\\ud800"), "\ud800 is missing", "download"),
    "index of nothing": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "has no weight_map", "download"),
    "tensor twice": (twice, f"patch_embedding.bias is in both {SHARD_1} and {SHARD_2}", "download"),
    "cut shard": (cut(SHARD_2), f"{SHARD_2} is not a usable safetensors file", "download"),
    "cut zip": (cut(T5), f"{T5} is damaged", "download"),
    "empty zip": (cut(T5, 0), f"{T5} is not a zip file", "safetensors"),
    "compressed zip": (compressed, f"{T5} is compressed", "publisher"),
    "old torch": (legacy, f"{T5} is not a zip file: it was not saved by torch 1.6", "newer torch"),
    "no dictionary": (lambda f: torch.save([torch.zeros(3)], f / T5), f"{T5} holds no tensors by name", "state_dict"),
    "transposed": (transposed, "attn.q.weight in .* is stored with strides .1, 128., not row after row", "contiguous"),
    "sparse": (tensors(T5, norm__weight=torch.eye(2).to_sparse()), "norm.weight in .* is torch.sparse_coo", "again"),
    "integers": (tensors(T5, norm__weight=torch.zeros(128, dtype=torch.int8)), "norm.weight in .* is int8, exp", ""),
    "audio": (
        tensors(SHARD_2, audio_proj__proj2__bias=None, audio_proj__proj9__bias=torch.zeros(2)),
        "(?s)audio_proj.proj9.bias .2. is not a tensor of this model.*audio_proj.proj2.bias is missing .*32",
        "download",
    ),
    "misshapen": (
        tensors(SHARD_2, blocks__1__cross_attn__k_img__weight=torch.zeros(256, 255)),
        "blocks.1.cross_attn.k_img.weight has shape .256, 255., expected .256, 256.",
        "download",
    ),
    "no block": (
        tensors(CLIP, visual__transformer__1__norm1__bias=None),
        "visual.transformer.1.norm1.bias is missing",
        "download",
    ),
    "several at once": (
        lambda f: [tensors(T5, norm__weight=None)(f), tensors(CLIP, visual__pos_embedding=None)(f)],
        "(?s)cannot be converted.*norm.weight is missing.*visual.pos_embedding is missing",
        "download",
    ),
    "wav2vec2": (
        tensors("chinese-wav2vec2-base/model.safetensors", wav2vec2__encoder__layer_norm__bias=torch.zeros(31)),
        "wav2vec2.encoder.layer_norm.bias has shape .31., expected .32.",
        "download",
    ),
    "orphan scale": (
        tensors(SHARD_1, nothing__scale_weight=torch.ones(())),
        "nothing.scale_weight in .* belongs to no weight",
        "download",
    ),
    "odd scale": (
        tensors(SHARD_1, blocks__0__ffn__0__weight_scale=torch.ones(7)),
        "ffn.0.weight_scale in .* is F32 .7., expected one number or 256",
        "download",
    ),
    "config": (
        replace("config.json", '"num_layers": 2', '"num_layers": 40'),
        "config.json says num_layers = 40, the tensors say 2",
        "download",
    ),
    "window": (replace("config.json", '"audio_window": 5', '"audio_window": "x"'), "says audio_window = 'x'", "number"),
    "audio config": (
        replace("chinese-wav2vec2-base/config.json", '"conv_kernel": [\n    10', '"conv_kernel": [\n    11'),
        "says conv_kernel = .11, 3, .* the tensors say .10, 3",
        "download",
    ),
    "other norm": (
        replace("chinese-wav2vec2-base/config.json", '"group"', '"layer"'),
        "says feat_extract_norm = layer",
        "download",
    ),
    "no tokenizer": (remove("google"), f"{T5} is a text encoder, and there is no tokenizer.json near it", "tokenizer/"),
    "bad tokenizer": (
        lambda f: (f / "google/umt5-xxl/tokenizer.json").write_text("{}"),
        "tokenizer.json is not a tokenizer",
        "download",
    ),
    "two text encoders": (second_text_encoder, f"two text_encoders: {T5} and more/again.pth", "give the file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(a2v, damage):
    change, message, hint = DAMAGES[damage]
    change(a2v)
    with pytest.raises(SkyrunError) as error:
        find_families(a2v)
    assert re.search(message, error.value.message), error.value.message
    assert hint in error.value.hint
    assert error.value.code == BAD_INPUT


class Evil:
    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


def test_a_malicious_pickle_is_not_executed(a2v, tmp_path):
    for state in ({"norm.weight": Evil(tmp_path / "owned")}, {"x": torch.zeros(2), "y": [Evil(tmp_path / "owned")]}):
        torch.save(state, a2v / T5)
        with pytest.raises(SkyrunError, match="holds more than tensors, and skyrun runs no code from files"):
            find_families(a2v)
    (a2v / T5).write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    with pytest.raises(SkyrunError, match="is not a zip file"):
        find_families(a2v)
    assert not (tmp_path / "owned").exists()


def test_a_dictionary_that_holds_itself(tmp_path):
    state = {}
    state["model"] = state
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(SkyrunError, match="holds no tensors by name"):
        find_families(tmp_path)


def test_storages_must_lie_inside_the_file(a2v):
    """A pickle may say that a tensor is larger than the bytes that are there for it."""
    content = (a2v / T5).read_bytes()
    name = b"token_embedding.weightq"
    assert content.count(name) == 1
    at = content.index(name)
    grown = content[:at] + content[at:].replace(b"M\x00\x03K\x80", b"M\x00\x7fK\x80", 1)  # 768 rows become 32512
    (a2v / T5).write_bytes(grown)
    with pytest.raises(SkyrunError, match=f"{T5}"):
        find_families(a2v / T5)


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "chinese-wav2vec2-base/model.safetensors"])
def test_corrupted_files_never_crash(checkpoint, tmp_path, name, data):
    content = bytearray((checkpoint.parent / "a2v-tiny" / name).read_bytes())
    directory = 20_000  # at either end: the pickle or header, and the directory of the zip file
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, directory), st.integers(len(content) - directory, len(content) - 8)))
        patch = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, b"\x00" * 4])))
        content[at : at + len(patch)] = patch
    path = tmp_path / name.split("/")[-1]
    path.write_bytes(content)
    try:
        for family in find_families(path).families:
            for tensor in family.tensors:
                tensor.source.read()
    except SkyrunError as error:
        assert error.hint


# --- what is there and of no use


def test_strangers_in_a_folder_are_noted(a2v):
    save_file({"alien.weight": torch.zeros(3)}, a2v / "alien.safetensors")
    (a2v / "xlm-roberta-large").mkdir()
    torch.save({"roberta.x": torch.zeros(3)}, a2v / "xlm-roberta-large" / "pytorch_model.bin")
    (a2v / "chinese-wav2vec2-base" / "fairseq.pt").write_bytes(b"x")
    found = find_families(a2v)
    assert len(found.families) == 5
    assert found.notes == (
        "not used: alien.weight in alien.safetensors",
        "not used: roberta.x in xlm-roberta-large/pytorch_model.bin",
    )


def test_of_two_formats_the_better_is_taken(a2v):
    folder = a2v / "chinese-wav2vec2-base"
    (folder / "pytorch_model.bin").write_bytes(b"of no interest beside model.safetensors")
    assert find_families(a2v).notes == ()
    torch.save(load_file(folder / "model.safetensors"), folder / "model.pth")
    found = find_families(a2v)
    assert [f.tensors[0].source.file.name for f in found.families if f.role == "audio_encoder"] == ["model.safetensors"]
    assert "model.pth, the same audio_encoder is in" in found.notes[0]


def test_a_named_file_must_be_of_use(tmp_path):
    save_file({"alien.weight": torch.zeros(3)}, tmp_path / "alien.safetensors")
    for source in (tmp_path, tmp_path / "alien.safetensors"):
        with pytest.raises(SkyrunError, match="holds no model that skyrun knows.*alien.weight") as error:
            find_families(source)
        assert error.value.code == BAD_INPUT


def test_a_transformer_without_blocks_lacks_one(checkpoint, tmp_path):
    tensors = {}
    for path in (checkpoint / "transformer").glob("*.safetensors"):
        tensors |= {name: tensor for name, tensor in load_file(path).items() if not name.startswith("blocks.")}
    save_file(tensors, tmp_path / "outer.safetensors")
    with pytest.raises(SkyrunError, match="blocks.0.attn1.to_q.weight is missing"):
        find_families(tmp_path)


def test_an_index_names_files_beside_it(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint / "transformer", tmp_path / "transformer")
    os.replace(folder / SHARD_1, tmp_path / SHARD_1)
    replace(INDEX, SHARD_1, "../" + SHARD_1)(folder)
    with pytest.raises(SkyrunError, match=f"transformer/{SHARD_1} is missing"):
        find_families(folder)


def test_a_shard_stands_for_its_set(checkpoint):
    (family,) = find_families(checkpoint / "transformer" / SHARD_2).families
    assert len(family.tensors) == 69


def test_what_is_not_there(tmp_path):
    with pytest.raises(SkyrunError, match="does not exist") as error:
        find_families(tmp_path / "none")
    assert error.value.code == MODEL_MISSING
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SkyrunError, match="is not a file of tensors"):
        find_families(tmp_path / "notes.txt")
    with pytest.raises(SkyrunError, match="is not a checkpoint: it holds notes.txt"):
        find_families(tmp_path)
