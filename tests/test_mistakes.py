"""Every mistake a user can make with a command: what is said, and with which exit code."""

import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from skyrun.cli import main
from skyrun.errors import BAD_INPUT, MODEL_MISSING, WILL_NOT_FIT, SkyrunError


def damaged(pattern, change):
    """Makes a copy of a model in which the bytes of one file are changed."""

    def make(folder, model):
        shutil.copytree(model, folder)
        (path,) = folder.glob(pattern)
        path.write_bytes(change(path.read_bytes()))

    return make


def renamed(old, new):
    assert len(old) == len(new)
    return lambda content: content.replace(old, new, 1)


BAD_MODELS = {
    "cut": damaged("SkyReels*", lambda content: content[: len(content) // 2]),
    "foreign": damaged("SkyReels*", renamed(b"r2v", b"a2v")),
    "liar": damaged("SkyReels*", renamed(b"skyrun.layers\x04\0\0\0\x02", b"skyrun.layers\x04\0\0\0\x09")),
    "misshapen": damaged(
        "SkyReels*", renamed(b"patch_embedding.weight\5\0\0\0\2", b"patch_embedding.weight\5\0\0\0\1")
    ),
    "headless": damaged("SkyReels*", renamed(b"head.head.bias", b"head.head.bios")),
    "many_blocks": damaged("SkyReels*", renamed(b"blocks.1.self_attn.q.bias", b"blocks.99999.lf_attn.q.bi")),
    "odd_block": damaged("SkyReels*", renamed(b"blocks.1.ffn.0.bias", b"blocks.x.ffn.0.bias")),
    "cut_vae": damaged("*.safetensors", lambda content: content[:-1]),
    "long_vae": damaged("*.safetensors", lambda content: content + b"x"),
    "hole_in_vae": damaged("*.safetensors", renamed(b"decoder.middle.1.proj.weight", b"decoder.middle.1.prox.weight")),
    "odd_vae": damaged("*.safetensors", renamed(b"decoder.upsamples.3.", b"decoder.upsamples.x.")),
    "hole_in_text": damaged("umt5*", renamed(b"blk.1.ffn_down", b"blk.1.ffn_dawn")),
    "odd_text": damaged("umt5*", renamed(b"enc.blk.1.attn_q.weight", b"enc.blk.y.attn_q.weight")),
    "no_tokenizer": damaged("umt5*", lambda content: content.replace(b"tokenizer.", b"tokenizes.")),
}


def edit(folder, file, change):
    path = folder / file
    path.write_bytes(change(path.read_bytes()))


def bad_checkpoints(source, folder):
    """Copies of the checkpoint, each with something wrong."""
    for name in ("holes", "bad_tokenizer", "bad_index", "bad_config"):
        shutil.copytree(source, folder / name)
    shard = next((folder / "holes" / "transformer").glob("*00002.safetensors"))
    tensors = load_file(shard)
    del tensors["blocks.1.attn1.to_q.weight"]
    save_file(tensors | {"proj_out.bias": torch.zeros(3)}, shard)
    edit(folder / "bad_tokenizer", "tokenizer/tokenizer.json", lambda _: b"{}")
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    edit(folder / "bad_index", index, lambda _: b'{"weight_map": [1]}')
    edit(folder / "bad_config", "transformer/config.json", lambda text: text.replace(b"1e-06", b"null"))


@pytest.fixture(scope="module")
def places(tmp_path_factory, converted, checkpoint):
    """Good and bad files that arguments can name."""
    folder = tmp_path_factory.mktemp("places")
    Image.new("RGB", (60, 40), "teal").save(folder / "picture.png")
    Image.new("F", (60, 40)).save(folder / "float.tiff")
    (folder / "text.png").write_text("not a picture")
    (folder / "file.mp4").touch()
    (folder / "empty").mkdir()
    for name, make in BAD_MODELS.items():
        make(folder / name, converted("Q8_0"))
    bad_checkpoints(checkpoint, folder)
    found = {path.name.split(".")[0]: str(path) for path in folder.iterdir()}
    vae = next(converted("Q8_0").glob("*.safetensors"))
    return found | {"all": folder, "model": str(converted("Q8_0")), "vae": str(vae), "checkpoint": str(checkpoint)}


RUN = ["run", "r2v", "--device", "cpu"]
TEXT = ["-p", "a sea"]
IMAGE = ["--image", "{picture}"]
INPUTS = [*RUN, *TEXT, *IMAGE]
GOOD = [*INPUTS, "--model", "{model}"]
SMALL = ["--size", "32x48", "--frames", "5"]
CONVERT = ["convert", "{checkpoint}", "-o"]

# fmt: off
MISTAKES = [
    # pictures and prompt
    ([*RUN, *TEXT, "--image", "none.png"], BAD_INPUT, "none.png does not exist", "run --help"),
    ([*RUN, *TEXT, "--image", "{empty}"], BAD_INPUT, "empty is a folder", ""),
    ([*RUN, *TEXT, "--image", "{text}", "--model", "{model}"], BAD_INPUT, "text.png is not a readable image", "PNG"),
    ([*RUN, *TEXT, "--image", "{float}", "--model", "{model}"], BAD_INPUT, "floating-point", "8 bits"),
    ([*GOOD, "--image", *["{picture}"] * 4], BAD_INPUT, "got 5 reference images, expected 1 to 4", "run --help"),
    ([*RUN, *TEXT], BAD_INPUT, "got 0 reference images, expected 1 to 4", "run --help"),
    ([*RUN, "-p", "  ", *IMAGE], BAD_INPUT, "the prompt is empty", "run --help"),
    # shape
    ([*GOOD, "--size", "100x200"], BAD_INPUT, "size 100x200 is not on the grid of 16 pixels; .* 96x192", ""),
    ([*GOOD, "--size", "big"], BAD_INPUT, "size 'big' is not HxW, .* such as 480x832", ""),
    ([*GOOD, "--resolution", "4K"], BAD_INPUT, "unknown resolution '4K', expected 480P, 540P, 720P", ""),
    ([*GOOD, "--frames", "10"], BAD_INPUT, "10 frames are not 4 k \\+ 1; the nearest is 9", ""),
    ([*GOOD, "--frames", "-3"], BAD_INPUT, "-3 frames are not 4 k \\+ 1; the nearest is 1", ""),
    ([*GOOD, "--frames", "5001"], BAD_INPUT, "5001 frames are too many, the model has positions for 4077", ""),
    ([*GOOD, "--seconds", "-1"], BAD_INPUT, "got -1 seconds", ""),
    ([*GOOD, "--seconds", "nan"], BAD_INPUT, "got nan seconds", ""),
    ([*GOOD, "--seconds", "1e308"], BAD_INPUT, "got 1e\\+308 seconds, expected more than 0 and at most 169", ""),
    # choices
    ([*GOOD, "--steps", "0"], BAD_INPUT, "got 0 steps", ""),
    ([*GOOD, "--seed", "-3"], BAD_INPUT, "seed -3 is not between", ""),
    ([*GOOD, "--max-ram", "0"], BAD_INPUT, "--max-ram 0 GiB is not a limit", ""),
    ([*GOOD, "--max-vram", "inf"], BAD_INPUT, "--max-vram inf GiB is not a limit", ""),
    # places to write to
    ([*GOOD, "-o", "clip.gif"], BAD_INPUT, "clip.gif does not end in .mp4", ""),
    ([*GOOD, "-o", "{file}/x.mp4"], BAD_INPUT, "x.mp4 cannot be written: .* is a file", ""),
    ([*GOOD, "--save-latents", "{empty}"], BAD_INPUT, "is a folder, expected the name of a file", ""),
    ([*GOOD, "--save-latents", "{picture}"], BAD_INPUT, "picture.png is what the clip is made from, .* lost", ""),
    ([*GOOD, "--save-latents", "{vae}"], BAD_INPUT, "is a file of the model, it would be lost", "another name"),
    ([*GOOD, "-o", "x.mp4", "--save-latents", "x.mp4"], BAD_INPUT, "the clip and the latents cannot both be x.mp4", ""),
    # several at once
    ([*GOOD, "--size", "1x1", "--steps", "0"], BAD_INPUT, "(?s)cannot be run:.*grid.*0 steps", ""),
    ([*GOOD, "--size", "big", "--steps", "0"], BAD_INPUT, "(?s)is not HxW.*0 steps", ""),
    ([*RUN, *TEXT, "--image", "{text}", "--model", "nowhere"], BAD_INPUT, "(?s)readable.*nowhere does not", "PNG"),
    # memory
    ([*GOOD, *SMALL, "--max-ram", "0.1"], WILL_NOT_FIT, "will not fit: .* 0.1 GiB may be used", "--resolution"),
    ([*GOOD, "--resolution", "720P", "--max-ram", "0.6"], WILL_NOT_FIT, "will not fit", "fewer --seconds"),
    # models
    (INPUTS, MODEL_MISSING, "no model was given", "unset HF_HUB_OFFLINE"),
    ([*INPUTS, "--model", "nowhere"], MODEL_MISSING, "the model nowhere does not exist", "skyrun convert"),
    ([*INPUTS, "--model", "{empty}"], MODEL_MISSING, "(?s)no transformer.*no text encoder.*no autoencoder", "convert"),
    ([*INPUTS, "--model", "{checkpoint}"], MODEL_MISSING, "published checkpoint, which has to be converted", ""),
    ([*GOOD, "--quant", "Q2_K"], MODEL_MISSING, "has no Q2_K transformer", "it has Q8_0"),
    ([*INPUTS, "--model", "{vae}"], BAD_INPUT, "is not a usable GGUF file", ""),
    ([*INPUTS, "--model", "{cut}"], BAD_INPUT, "is not a usable GGUF file: .* ends at byte", "convert"),
    ([*INPUTS, "--model", "{foreign}"], BAD_INPUT, "is a model for a2v, not for r2v", "run a2v"),
    ([*INPUTS, "--model", "{liar}"], BAD_INPUT, "its metadata says layers = 9, its tensors 2", "again"),
    ([*INPUTS, "--model", "{headless}"], BAD_INPUT, "head.head.bias is missing .expected shape .64..", "again"),
    ([*INPUTS, "--model", "{misshapen}"], BAD_INPUT, "patch_embedding.weight has shape .*1, 2, 1., expected", "again"),
    ([*INPUTS, "--model", "{many_blocks}"], BAD_INPUT, "has 3 blocks blocks.N, blocks up to 99999", "again"),
    ([*INPUTS, "--model", "{odd_block}"], BAD_INPUT, "has a tensor blocks.x.ffn.0.bias of no block", "again"),
    ([*INPUTS, "--model", "{cut_vae}"], BAD_INPUT, "ends at byte .*, the data at", "convert"),
    ([*INPUTS, "--model", "{long_vae}"], BAD_INPUT, "its tensors do not cover", "convert"),
    ([*INPUTS, "--model", "{hole_in_vae}"], BAD_INPUT, "has no tensor decoder.middle.1.proj.weight", "again"),
    ([*INPUTS, "--model", "{odd_vae}"], BAD_INPUT, "has no tensor decoder.upsamples.3", "again"),
    ([*INPUTS, "--model", "{hole_in_text}"], BAD_INPUT, "block 1 of .* has no tensor ffn_down.weight", "again"),
    ([*INPUTS, "--model", "{odd_text}"], BAD_INPUT, "has a tensor enc.blk.y.attn_q.weight of no block", "again"),
    ([*INPUTS, "--model", "{no_tokenizer}"], BAD_INPUT, "has no tokenizer inside", "skyrun convert"),
    # conversion
    (["convert", "nowhere", "-o", "x"], MODEL_MISSING, "nowhere does not exist", ""),
    (["convert", "{empty}", "-o", "x"], BAD_INPUT, "is not a checkpoint: it holds nothing", "SkyReels-V3"),
    (["convert", "{picture}", "-o", "x"], BAD_INPUT, "is not a file of tensors", "checkpoint folder"),
    (["convert", "{holes}", "-o", "x"], BAD_INPUT, "(?s)to_q.weight is missing.*\\[3\\], expected \\[64\\]", "again"),
    (["convert", "{bad_tokenizer}", "-o", "x"], BAD_INPUT, "tokenizer.json is not a tokenizer", "download it again"),
    (["convert", "{bad_index}", "-o", "x"], BAD_INPUT, "has no weight_map of tensors to files", "download it again"),
    (["convert", "{bad_config}", "-o", "x"], BAD_INPUT, "says eps = None", "expected a number"),
    ([*CONVERT, "x", "--quant", "Q9"], BAD_INPUT, "cannot write a file of type 'Q9'", "Q8_0, Q6_K"),
    ([*CONVERT, "{picture}"], BAD_INPUT, "cannot write to the folder .*picture.png", "is not a folder"),
    ([*CONVERT, "{picture}/x", "--dry-run"], BAD_INPUT, "cannot write to the folder .*x", "is not a folder"),
    # info and demo
    (["info", "nowhere"], MODEL_MISSING, "nowhere does not exist", ""),
    (["info", "{picture}"], BAD_INPUT, "is not a kind of file that skyrun knows", "GGUF, safetensors and video"),
    (["info", "{empty}"], BAD_INPUT, "is a folder", ""),
    (["demo", "-o", "{file}"], BAD_INPUT, "file.mp4 exists, and is not a clip", "--overwrite"),
    (["demo", "-o", "{file}/x.mp4"], BAD_INPUT, "x.mp4 cannot be written: .* is a file", ""),
]
# fmt: on


@pytest.mark.parametrize(("arguments", "code", "message", "hint"), MISTAKES)
def test_a_mistake_gets_a_sentence_and_a_code(places, capsys, arguments, code, message, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(places["all"].rglob("*"))
    assert main([argument.format(**places) for argument in arguments]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(message, output.err), output.err
    assert hint in output.err.split("hint: ")[-1]
    assert "Traceback" not in output.err
    assert sorted(places["all"].rglob("*")) == before
    assert not list(tmp_path.iterdir())


def test_files_of_others_in_the_folder_do_not_matter(places, tmp_path, converted):
    crowded = tmp_path / "crowded"
    shutil.copytree(converted("Q8_0"), crowded)
    (crowded / "download.gguf").write_bytes(b"GGUF")
    (crowded / "folder.gguf").mkdir()
    (crowded / "strange.safetensors").write_text("x")
    for model in (crowded, next(crowded.glob("SkyReels*.gguf"))):
        arguments = [*INPUTS, *SMALL, "--dry-run", "--model", str(model)]
        assert main([argument.format(**places) for argument in arguments]) == 0


@pytest.mark.parametrize("message", ["x" * 100_000, "a\n" * 100_000, "\n".join(["y" * 3000] * 50)])
def test_a_message_keeps_its_ends_and_is_bounded(message):
    """What files say may be of any length."""
    error = SkyrunError(f"clip.mp4 says {message}, expected a number", "hint")
    assert error.message.startswith("clip.mp4 says ") and error.message.endswith(", expected a number")
    assert len(error.message) < 50_000 and max(map(len, error.message.splitlines())) < 2000
    assert str(error) == error.message
