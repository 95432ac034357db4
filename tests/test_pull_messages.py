"""Everything that can go wrong with fetching a model: what is said, which exit code, what a second try does."""

import errno
import re
import shutil
from collections import namedtuple

import pytest
from filelock import FileLock
from hub_server import gguf_repository
from huggingface_hub import constants
from small_run import fail

from skyrun.cli import main
from skyrun.errors import BAD_INPUT, FAILED, MODEL_MISSING
from skyrun.tasks.sources import SOURCES

R2V = SOURCES["r2v"].checkpoint
SHARD = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
Place = namedtuple("Place", "hub folder patch converted")


def nothing(place):
    pass


def unreachable(place):
    place.patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def offline(place):
    place.patch.setattr(constants, "HF_HUB_OFFLINE", True)


def private(place):
    place.hub.token = "hf_secret"


def gated(place):
    place.hub.gated.add(R2V)


def busy(place):
    place.hub.fail["diffusion_pytorch_model.safetensors"] = 503


def gone(place):
    place.hub.fail["tiny_dims.json"] = 404


def lost(place):
    place.hub.cut[SHARD] = [1_000_000, *[0] * 20]


def damaged(place):
    place.hub.damaged.add(SHARD)


def damaged_text(place):
    place.hub.damaged.add("tokenizer/tokenizer.json")


def moved_on(place):
    lost(place)
    assert main(PULL) == MODEL_MISSING
    place.hub.commit = "f" * 40


def hostile(place):
    place.hub.more_entries.append({"type": "file", "path": "../../x", "oid": "0" * 40, "size": 1})


def no_space(place):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    place.patch.setattr(shutil, "disk_usage", lambda _: usage)


def full_while_fetching(place):
    fail(place.patch, "skyrun.hub.client._append", lambda: OSError(errno.ENOSPC, "No space left on device"), {6})


def full_while_converting(place):
    fail(place.patch, "skyrun.quant.worker.quantize", lambda: OSError(errno.ENOSPC, "No space left on device"), {3})


def a_file_in_the_way(place):
    (place.folder / "models").write_text("")


def fetched_by_another(place):
    folder = place.folder / "models" / "r2v-Q8_0"
    folder.mkdir(parents=True)
    lock = FileLock(folder / ".lock")
    lock.acquire()
    place.patch.setattr(place.hub, "held", lock, raising=False)


def repository(place, name, *files):
    """A repository of empty files."""
    for file in files:
        (place.folder / name / file).parent.mkdir(parents=True, exist_ok=True)
        (place.folder / name / file).write_bytes(b"x" * 100)
    place.hub.repos[f"owner/{name}"] = place.folder / name


def no_weights(place):
    repository(place, "words", "README.md", "config.json")


def no_checkpoint(place):
    repository(place, "odd", "model.safetensors")


def one_type(place):
    gguf_repository(place.hub, place.folder / "gguf", place.converted("Q4_K"))


def two_types(place):
    gguf_repository(place.hub, place.folder / "gguf", place.converted("Q4_K"), place.converted("Q3_K"))


def twice(place):
    one_type(place)
    (path,) = (place.folder / "gguf").glob("SkyReels*")
    (place.folder / "gguf" / f"again-{path.name}").symlink_to(path)


def in_pieces(place):
    one_type(place)
    (path,) = (place.folder / "gguf").glob("SkyReels*")
    path.rename(path.with_name("SkyReels-Q4_K-00001-of-00002.gguf"))


def incomplete(place):
    shutil.copytree(place.hub.repos[R2V], place.folder / "part")
    (place.folder / "part" / SHARD).unlink()
    place.hub.repos[R2V] = place.folder / "part"


PULL = ["pull", "r2v"]
AGAIN = "run the same command again"

# fmt: off
MESSAGES = [
    # names
    (nothing, ["pull", "r3v"], BAD_INPUT, "'r3v' is not the name of a model", "a2v, t2v, .*, demo, or OWNER/NAME"),
    (nothing, ["pull", "a/b/c:Q8_0"], BAD_INPUT, "'a/b/c:Q8_0' is not the name of a model", "OWNER/NAME:TYPE"),
    (nothing, ["pull", "r2v:"], BAD_INPUT, "'r2v:' is not the name of a model", "OWNER/NAME:TYPE"),
    (nothing, ["pull", "bad--/x:Q8_0"], BAD_INPUT, "'bad--/x' is not the name of a repository", "OWNER/NAME"),
    (nothing, ["pull", "r2v:Q4_K", "--quant", "Q8_0"], BAD_INPUT, "got r2v:Q4_K and --quant Q8_0", "leave out"),
    (nothing, ["pull", "r2v:Q9"], BAD_INPUT, "cannot write a file of type 'Q9'", "types: F32"),
    # the hub
    (nothing, ["pull", "owner/none:Q8_0"], MODEL_MISSING, "has no owner/none to show .status 404.", "check the name"),
    (private, PULL, MODEL_MISSING, f"has no {R2V} to show .status 401.*or it is private", "hf auth login.*HF_TOKEN"),
    (gated, PULL, MODEL_MISSING, "is open only to those who have accepted its", f"accept them at http.*/{R2V}"),
    (busy, PULL, MODEL_MISSING, f"answers with status 503 when asked for {R2V}", AGAIN),
    (gone, PULL, MODEL_MISSING, "status 404", "check the name"),
    (unreachable, PULL, MODEL_MISSING, "http://127.0.0.1:9 cannot be reached: .*refused", f"HF_ENDPOINT.*{AGAIN}"),
    (offline, PULL, MODEL_MISSING, "is not on this machine as a whole, and HF_HUB_OFFLINE is", "unset HF"),
    (lost, PULL, MODEL_MISSING, "the connection to http.* was lost", f"{AGAIN} to go on from there"),
    (damaged, PULL, FAILED, f"{SHARD} of {R2V} arrived damaged: its sha256 is .*, the hub says", AGAIN),
    (damaged_text, PULL, FAILED, "tokenizer.json of .* arrived damaged: its sha256 is", AGAIN),
    (moved_on, PULL, MODEL_MISSING, f"{R2V} no longer has the commit 012", "delete the folder of the model"),
    (hostile, PULL, MODEL_MISSING, "has a file '../../x', which would leave its folder", "do not use it"),
    # the disk
    (no_space, PULL, FAILED, "r2v needs 5.. MB more of disk, and .* has 1.0 MB free", "--quant, or set SKYRUN_MODELS"),
    (full_while_fetching, PULL, FAILED, "cannot write .*: .*No space left", f"{AGAIN} to go on from there"),
    (full_while_converting, PULL, FAILED, "cannot write .*SkyReels.*: .*No space left", f"{AGAIN} to go on"),
    (a_file_in_the_way, PULL, BAD_INPUT, "cannot write to the folder .*r2v-Q8_0: .*models is a file", "SKYRUN_MODELS"),
    (fetched_by_another, PULL, FAILED, "another skyrun is downloading into .*r2v-Q8_0", AGAIN),
    # what is in a repository
    (no_weights, ["pull", "owner/words"], BAD_INPUT, "owner/words has no file of weights", "expected a repository"),
    (no_checkpoint, ["pull", "owner/odd"], BAD_INPUT, "is not a usable safetensors file", ""),
    (incomplete, PULL, BAD_INPUT, "00001-of-00002.safetensors is missing", "download them again"),
    (one_type, ["pull", "owner/gguf:Q2_K"], MODEL_MISSING, "owner/gguf has no Q2_K transformer", "it has Q4_K"),
    (two_types, ["pull", "owner/gguf"], BAD_INPUT, "of several types: Q3_K, Q4_K", "such as owner/gguf:Q3_K"),
    (twice, ["pull", "owner/gguf:Q4_K"], BAD_INPUT, "has several Q4_K transformers: SkyReels.*, again", "by hand"),
    (in_pieces, ["pull", "owner/gguf:Q4_K"], BAD_INPUT, "has its Q4_K transformer in several files", "join them"),
    # runs
    (offline, ["run"], MODEL_MISSING, f"{R2V} is not on this machine", "unset HF_HUB_OFFLINE"),
    (no_space, ["run"], FAILED, "r2v needs 5.. MB more of disk", "--quant"),
    (nothing, ["run", "--image", "{text}"], BAD_INPUT, "notes.txt is not a readable image", "PNG"),
    (nothing, ["run", "--model", "nowhere"], MODEL_MISSING, "the model nowhere does not exist", "skyrun pull"),
    (nothing, ["run", "--model", "owner/none:Q8_0"], MODEL_MISSING, "has no owner/none to show", "check the name"),
    (nothing, ["run", "--model", "r2v:Q4_K", "--quant", "Q8_0"], BAD_INPUT, "expected one type", "leave out"),
    (one_type, ["run", "--model", "owner/gguf:Q2_K"], MODEL_MISSING, "has no Q2_K transformer", "it has Q4_K"),
]
# fmt: on


@pytest.mark.parametrize(
    ("setup", "argv", "code", "message", "hint"), MESSAGES, ids=lambda value: getattr(value, "__name__", None)
)
def test_what_is_said(setup, argv, code, message, hint, hub, tmp_path, monkeypatch, converted, run_command, capsys):
    (tmp_path / "notes.txt").write_text("no picture")
    setup(Place(hub, tmp_path, monkeypatch, converted))
    command = run_command if argv[0] == "run" else argv[:1]
    argv = [*command, *(word.format(text=tmp_path / "notes.txt") for word in argv[1:])]
    assert main(argv) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert re.search(f"error: .*{message}", said, re.DOTALL), said
    if hint:
        assert re.search(f"hint: .*{hint}", said), said


@pytest.mark.parametrize("setup", [lost, full_while_fetching, full_while_converting, damaged])
def test_the_same_command_again(setup, hub, tmp_path, converted, capsys):
    with pytest.MonkeyPatch.context() as patch:
        setup(Place(hub, tmp_path, patch, converted))
        assert main(PULL) != 0
    hub.damaged.clear()
    hub.cut.clear()
    assert main(PULL) == 0
    said = capsys.readouterr().err
    assert "of which" in said or setup not in (lost, full_while_converting)
