"""Tokenizers inside text encoder files: both kinds give the ids of the goldens, here and in SentencePiece itself."""

import base64
import json
import struct

import gguf
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, pre_tokenizers

from skyrun.errors import SkyrunError
from skyrun.kernels.files.ggml_tokenizer import from_gguf, from_json, has_tokenizer, read_tokenizer
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.quant.container import gguf_layout
from skyrun.quant.sources import sentencepiece

ROWS = 768  # of the tiny checkpoint's embedding; its tokenizer has 750 tokens
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@pytest.fixture(scope="module")
def prompts(goldens):
    return goldens("umt5/prompts").notes["tokenizer_table"]


@pytest.fixture(scope="module")
def text(checkpoint):
    return (checkpoint / "tokenizer/tokenizer.json").read_text()


@pytest.fixture(scope="module")
def written(converted):
    return next(converted("Q8_0").glob("umt5*.gguf"))


@pytest.fixture
def with_keys(tmp_path):
    """A GGUF file of these keys alone."""

    def write(keys):
        path = tmp_path / "t5.gguf"
        path.write_bytes(gguf_layout("t5encoder", keys, []).header)
        return open_gguf(path)

    return write


def field(number, value):
    """A field of a protocol buffer."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    if isinstance(value, (bytes, str)):
        data = value.encode() if isinstance(value, str) else value
        return varint(number << 3 | 2) + varint(len(data)) + data
    return varint(number << 3) + varint(value)


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def rebuilt(path):
    """A SentencePiece model out of a file's arrays, read by gguf-py and put together as ComfyUI-GGUF does.

    It always asks for bytes as a last resort, which SentencePiece takes from models with pieces for all 256 only.
    """
    fields = gguf.GGUFReader(path).fields
    said = {
        name.removeprefix("tokenizer.ggml."): f.contents() for name, f in fields.items() if "tokenizer.ggml" in name
    }
    assert said["model"] == "t5"
    assert len(said["tokens"]) == len(said["scores"]) == len(said["token_type"])
    parts = zip(said["tokens"], said["scores"], said["token_type"], strict=True)
    model = b"".join(field(1, field(1, token) + field(2, score) + field(3, kind)) for token, score, kind in parts)
    trainer = field(3, 1) + field(35, int(BYTE in said["token_type"])) + field(4, len(said["tokens"]))
    trainer += field(42, said["eos_token_id"]) + field(43, said["padding_token_id"])
    normalizer = field(3, int(said["add_space_prefix"])) + field(4, int(said["remove_extra_whitespaces"]))
    normalizer += field(2, bytes(value & 255 for value in said.get("precompiled_charsmap", [])))
    return SentencePieceProcessor(model_proto=model + field(2, trainer) + field(3, normalizer))


def test_sentencepiece_gives_the_ids_of_the_goldens(written, prompts):
    model = rebuilt(written)
    assert model.vocab_size() == ROWS
    for row in prompts:
        if "<extra_id" in row["text"]:  # the tokenizers library cuts there before it looks at spaces
            continue
        assert [*model.encode(row["text"]), model.eos_id()] == row["ids"], row["text"]
        assert [*model.encode(row["cleaned"]), model.eos_id()] == row["ids_cleaned"], row["cleaned"]


def test_the_arrays_alone_give_the_ids_of_the_goldens(written, prompts):
    file = open_gguf(written)
    for kept in ("JSON", "arrays"):
        if kept == "arrays":
            del file.metadata["tokenizer.huggingface.json"]
        assert has_tokenizer(file)
        tokenizer = read_tokenizer(file, ROWS)
        for row in prompts:
            assert tokenizer.encode(row["text"]).ids == row["ids"], (kept, row["text"])


def test_the_arrays_are_those_of_the_published_sentencepiece_model(checkpoint, written):
    """But for types of special tokens, which the tokenizer.json decides."""
    published = sentencepiece.parse((checkpoint / "tokenizer/spiece.model").read_bytes())
    ours = from_gguf(open_gguf(written), ROWS)
    count = len(published.pieces)
    assert [piece for piece, _ in ours.pieces[:count]] == [piece for piece, _ in published.pieces]
    assert [score for _, score in ours.pieces[:count]] == pytest.approx([score for _, score in published.pieces])
    assert ours.types[:count] == published.types
    assert {type for (piece, _), type in zip(ours.pieces[count:], ours.types[count:], strict=True)} <= {USER_DEFINED}
    for name in ("charsmap", "end", "prefix_space", "squeeze_spaces"):
        assert getattr(ours, name) == getattr(published, name), name


def test_keys_are_those_that_llama_cpp_and_comfyui_read(written):
    keys, arrays = open_gguf(written).metadata, open_gguf(written).arrays
    expected = {"model": "t5", "pre": "default", "eos_token_id": 1, "padding_token_id": 0, "unknown_token_id": 3}
    expected |= {"add_space_prefix": True, "remove_extra_whitespaces": True}
    assert {name: keys[f"tokenizer.ggml.{name}"] for name in expected} == expected
    kinds = {"tokens": gguf.GGUFValueType.STRING, "scores": gguf.GGUFValueType.FLOAT32}
    kinds |= {"token_type": gguf.GGUFValueType.INT32}
    assert {name: arrays[f"tokenizer.ggml.{name}"].kind for name in kinds} == kinds
    assert {arrays[f"tokenizer.ggml.{name}"].count for name in kinds} == {ROWS}
    types = open_gguf(written).array("tokenizer.ggml.token_type")
    assert types[:4] == [CONTROL, CONTROL, CONTROL, UNKNOWN] and types[750:] == [UNUSED] * 18


def test_bytes_as_a_last_resort(with_keys):
    """A model with pieces for bytes: nothing is unknown to it, here and in SentencePiece."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("a", -3.0)]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    model = from_json(tokenizer.to_str())
    assert model.types[5:] == [BYTE] * 256
    file = with_keys(model.metadata(len(pieces)))
    expected = [3, 4, 3, *(5 + byte for byte in "猫".encode()), 1]
    assert read_tokenizer(file, len(pieces)).encode("a 猫").ids == expected
    assert [*rebuilt(file.path).encode("a 猫"), 1] == expected


def changed(text, change):
    said = json.loads(text)
    change(said)
    return {"tokenizer.huggingface.json": json.dumps(said)}


def arrays(**changes):
    pieces = ("<pad>", "</s>", "<s>", "<unk>", *(f"piece{n}" for n in range(746)))
    keys = {"model": "t5", "tokens": pieces, "scores": (0.0,) * 750, "token_type": (3, 3, 3, 2, *(1,) * 746)}
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | {"eos_token_id": 1} | changes).items()}


def with_charsmap(data):
    return lambda said: said["normalizer"]["normalizers"][0].update(
        precompiled_charsmap=base64.b64encode(data).decode()
    )


REFUSED = {
    "none": (lambda text: {"x": 1}, "has no tokenizer inside"),
    "no JSON": (lambda text: {"tokenizer.huggingface.json": "{"}, "is not a tokenizer"),
    "another JSON": (lambda text: {"tokenizer.huggingface.json": "{}"}, "is not a tokenizer"),
    "too few tokens": (
        lambda text: arrays(tokens=("<pad>", "</s>", "<s>", "<unk>"), scores=(0.0,) * 4, token_type=(3, 3, 3, 2)),
        "has 4 tokens, the embedding 768 rows",
    ),
    "too many tokens": (lambda text: arrays(tokens=("a",) * 769), "has 769 tokens, the embedding 768 rows"),
    "too many in JSON": (
        lambda text: changed(text, lambda s: s["model"]["vocab"].extend([f"more{n}", -9.0] for n in range(50))),
        "has 800 tokens, the embedding 768 rows",
    ),
    "a score too few": (lambda text: arrays(scores=(0.0,) * 749), "750 tokens, 749 scores, 750 types"),
    "another model": (lambda text: arrays(model="gpt2"), "a tokenizer 'gpt2'"),
    "no unknown": (lambda text: arrays(token_type=(3,) * 750), "that works"),
    "an end beyond": (lambda text: arrays(eos_token_id=9999), "that works"),
    "numbers as tokens": (lambda text: arrays(tokens=(1,) * 750), "that works"),
    "a charsmap that is none": (lambda text: arrays(precompiled_charsmap=b"\xff\xff\xff\xff1"), "that works"),
    "a charsmap larger than it is": (lambda text: arrays(precompiled_charsmap=b"\0\0\0\x80"), "2147483648 bytes in 4"),
    "such a one in JSON": (lambda text: changed(text, with_charsmap(b"\0\0\0\x80a\0")), "2147483648 bytes in 6"),
    "a panic on a word": (lambda text: arrays(precompiled_charsmap=b"\4\0\0\0" + b"\xff" * 4 + b"a\0"), "that works"),
    "a panic of JSON": (lambda text: changed(text, with_charsmap(b"\4\0\0\0" + b"\xff" * 4 + b"a\0")), "that works"),
    "fails on a word": (
        lambda text: changed(text, lambda s: s["model"].update(unk_id=None)),
        "is not a tokenizer that works",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_cannot_be_used_is_refused(with_keys, text, case):
    keys, message = REFUSED[case]
    with pytest.raises(SkyrunError, match=message) as error:
        read_tokenizer(with_keys(keys(text)), ROWS)
    assert error.value.hint
    assert len(error.value.message) < 1000


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said["model"].update(type="BPE"),
        lambda said: said["model"].pop("vocab"),
        lambda said: said.update(model=None),
        lambda said: said["model"]["vocab"].__setitem__(1, ["x", 0]),
        lambda said: said["model"]["vocab"].__setitem__(5, ["a", "b", "c"]),
        lambda said: said["model"]["vocab"].append(["a", -1.0]),
    ],
)
def test_what_is_no_unigram_model_has_no_arrays(text, change):
    said = json.loads(text)
    change(said)
    assert from_json(json.dumps(said)) is None
    assert from_json("[" * 100_000) is None


def test_a_large_vocabulary_is_walked_over_in_pieces(with_keys):
    """Texts of all lengths, on both sides of what is read at a time."""
    texts = tuple("x" * (n * 37 % 9000) for n in range(40)) + ("é" * 20_000, "", "last")
    file = with_keys({"before": 1, "texts": texts, "after": "here"})
    assert file.metadata["after"] == "here"
    assert tuple(file.array("texts")) == texts
    content = file.path.read_bytes()
    at = content.index(b"last")
    file.path.write_bytes(content[: at + 2])
    with pytest.raises(SkyrunError, match="bytes at") as error:
        open_gguf(file.path)
    assert "cut" in error.value.hint


def test_embeddings_of_rows_without_a_piece_are_never_asked_for(written):
    """Text that looks like the name of a row that was filled up."""
    file = open_gguf(written)
    del file.metadata["tokenizer.huggingface.json"]
    ids = read_tokenizer(file, ROWS).encode("[PAD750] [PAD767]").ids
    assert max(ids) < 750
    assert torch.tensor(rebuilt(written).encode("[PAD750] [PAD767]")).max() < 750
