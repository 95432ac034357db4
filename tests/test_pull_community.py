"""Models from the community's repositories of GGUF files, on a hub that has them in their real layouts."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from hub_server import community_file
from test_pull import digests

from skyrun.cli import main
from skyrun.hub.client import list_repository
from skyrun.hub.gguf_repo import look, roles_in
from skyrun.hub.manifest import Manifest
from skyrun.hub.resolve import Chooser
from skyrun.hub.store import Name
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.tasks import sources
from skyrun.tasks.sources import SOURCES

(SKYREELS,) = SOURCES["r2v"].gguf
(UMT5,) = SOURCES["r2v"].text_encoder
TYPES = {"r2v": ("Q8_0", "Q4_K_M", "Q2_K"), "v2v": ("Q8_0", "Q4_K_M"), "a2v": ("Q8_0", "Q4_K_M")}
FILE_TYPES = {"Q8_0": 7, "Q4_K_M": 15, "Q2_K": 10, "F16": 1}
TOKENS = {"tokenizer__ggml__model": "t5", "tokenizer__ggml__tokens": ["<pad>", "</s>", "<unk>"]}


@pytest.fixture(scope="session")
def published(converted, write_gguf, tmp_path_factory):
    """The two repositories, made once."""
    place = tmp_path_factory.mktemp("community")
    for task, quants in TYPES.items():
        for quant in quants:
            (source,) = converted(quant, task).glob(f"SkyReels-V3-{task.upper()}*")
            file = place / "skyreels" / task / f"SkyReels-v3-{task}-{quant}.gguf"
            community_file(source, file, write_gguf, general__file_type=FILE_TYPES[quant])
    (place / "skyreels" / "README.md").write_text("words")
    for quant in ("Q8_0", "F16"):
        (source,) = converted(quant).glob("umt5*")
        keys = TOKENS | {"general__file_type": FILE_TYPES[quant]}
        community_file(source, place / "umt5" / f"umt5-xxl-encoder-{quant}.gguf", write_gguf, **keys)
    return place


@pytest.fixture
def community(hub, published, tmp_path, converted, write_gguf):
    """The hub with both repositories, which a test may change."""
    hub.converted, hub.write_gguf = converted, write_gguf
    shutil.copytree(published, tmp_path / "community")
    hub.repos |= {SKYREELS: tmp_path / "community" / "skyreels", UMT5: tmp_path / "community" / "umt5"}
    hub.folder = tmp_path / "community"
    return hub


def models(tmp_path):
    return tmp_path / "models"


@pytest.mark.parametrize("task", ["r2v", "v2v", "a2v"])
def test_a_task_is_put_together_from_three_repositories(community, tmp_path, capsys, task):
    checkpoint = SOURCES[task].checkpoint
    assert main(["pull", f"{task}:Q4_K_M"]) == 0
    folder = models(tmp_path) / f"{task}-Q4_K_M"
    there = digests(folder)
    assert f"SkyReels-v3-{task}-Q4_K_M.gguf" in there and "umt5-xxl-encoder-Q8_0.gguf" in there
    spoken = {"image_encoder", "audio_encoder"} if task == "a2v" else set()
    assert roles_in(folder) == {"transformer", "text_encoder", "vae"} | spoken
    manifest = Manifest.read(folder)
    assert set(manifest.commits) == {SKYREELS, UMT5, checkpoint} and manifest.complete
    for path in community.repos[checkpoint].rglob("*"):
        inside = path.relative_to(community.repos[checkpoint]).as_posix()
        if path.is_file() and ("transformer" in inside or "t5" in path.name or "diffusion_pytorch_model-" in inside):
            assert "" not in community.asked(f"{checkpoint}/resolve/{community.commit}/{inside}"), inside
    said = capsys.readouterr().err
    words = f"{task}/SkyReels-v3-{task}-Q4_K_M.gguf of {SKYREELS} does not say its task"
    assert (words in said) is (task != "a2v"), "an avatar is told by its tensors"
    assert "the published checkpoint would be " in said and " more to fetch" in said
    community.requests.clear()
    assert main(["pull", f"{task}:Q4_K_M"]) == 0 and not community.requests


def test_what_is_pulled_runs(community, converted, tmp_path, run_command, capsys):
    (encoder,) = converted("Q8_0").glob("umt5*")
    shutil.copy(encoder, community.folder / "umt5" / "umt5-xxl-encoder-Q8_0.gguf")
    assert main([*run_command, "--quant", "Q8_0"]) == 0
    assert (tmp_path / "clip.mp4").stat().st_size > 0
    assert f"from {SKYREELS} at" in capsys.readouterr().err


def test_the_encoder_of_another_task_is_shared(community, tmp_path):
    assert main(["pull", "r2v:Q8_0"]) == 0
    community.requests.clear()
    assert main(["pull", "v2v:Q8_0"]) == 0
    assert "" not in community.asked("umt5-xxl-encoder-Q8_0.gguf")
    one, other = (models(tmp_path) / f"{task}-Q8_0" / "umt5-xxl-encoder-Q8_0.gguf" for task in ("r2v", "v2v"))
    assert one.samefile(other)


# which file


def test_headers_win_over_names(community, tmp_path, converted):
    folder = community.folder / "skyreels"
    (folder / "r2v" / "SkyReels-v3-r2v-Q8_0.gguf").rename(folder / "r2v" / "SkyReels-v3-r2v-Q2_K.gguf")
    (folder / "a2v" / "SkyReels-v3-a2v-Q8_0.gguf").rename(folder / "a2v" / "SkyReels-v3-r2v-Q8_0.gguf")
    found = {model.file.path: model for model in look(list_repository(SKYREELS))}
    renamed = found["r2v/SkyReels-v3-r2v-Q2_K.gguf"]
    assert (renamed.role, renamed.quant, renamed.task, renamed.by_path) == ("transformer", "Q8_0", "r2v", True)
    avatar = found["a2v/SkyReels-v3-r2v-Q8_0.gguf"]
    assert (avatar.quant, avatar.task, avatar.by_path) == ("Q8_0", "a2v", False)


@pytest.mark.parametrize(
    ("path", "task"),
    [
        ("r2v/model.gguf", "r2v"),
        ("SkyReels-v3-V2V.gguf", "v2v"),
        ("V2V/shot_transformer.gguf", ""),  # two words that contradict
        ("shot-switching/model.gguf", "shot"),
        ("wanr2v.gguf", ""),  # part of another word
        ("a2v/model.gguf", ""),  # what its tensors rule out
        ("model.gguf", ""),
    ],
)
def test_words_of_a_path(community, path, task):
    folder = community.folder / "skyreels"
    file = folder / "r2v" / "SkyReels-v3-r2v-Q8_0.gguf"
    for other in folder.rglob("*.gguf"):
        if other != file:
            other.unlink()
    (folder / path).parent.mkdir(exist_ok=True)
    file.rename(folder / path)
    (model,) = look(list_repository(SKYREELS))
    assert (model.task, model.by_path) == (task, bool(task))


def test_a_transformer_of_another_model_is_none_of_a_task(community, write_gguf, converted, capsys):
    """Wan's image-to-video has the names of a SkyReels transformer, and other channels."""
    source = open_gguf(community.folder / "skyreels" / "r2v" / "SkyReels-v3-r2v-Q8_0.gguf")
    tensors = {
        name: torch.frombuffer(source.read(info), dtype=torch.uint8).view(*info.shape[:-1], -1)
        for name, info in source.tensors.items()
    }
    shape = source.tensors["patch_embedding.weight"].shape
    tensors["patch_embedding.weight"] = torch.zeros(shape[0], 36, *shape[2:])
    types = {name: info.format.name for name, info in source.tensors.items()}
    write_gguf(source.path, tensors, {"general.architecture": "wan"}, types)
    assert main(["pull", "r2v:Q8_0", "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert f"{SKYREELS} has no Q8_0 transformer for r2v, it has Q2_K, Q4_K_M" in said


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [("Q8_0", "Q8_0"), ("Q6_K", "Q8_0"), ("Q4_K", "Q4_K_M"), ("Q3_K", "Q4_K_M"), ("Q2_K", "Q2_K"), ("BF16", None)],
)
def test_the_nearest_better_type(community, wanted, taken):
    chooser = Chooser(Name("r2v", "", ""), wanted, {})
    found = chooser.main()
    assert found.quant == (taken or wanted) and bool(found.model) is bool(taken)
    assert found.repository.name == (SKYREELS if taken else SOURCES["r2v"].checkpoint)
    said = any(f"a plan takes {wanted}" in note and str(taken) in note for note in chooser.notes)
    assert said is (taken not in (None, wanted))
    named = Chooser(Name("r2v", "", wanted), wanted, {}).main()
    assert named.quant == wanted and bool(named.model) is (taken == wanted), "who names a type gets that one"


# what is missing or refused


def no_transformers(hub):
    del hub.repos[SKYREELS]


def refused(hub):
    hub.refused |= {SKYREELS: 403, UMT5: 401}


def gated(hub):
    hub.gated |= {SKYREELS}


def smaller_only(hub):
    for path in (hub.folder / "skyreels").rglob("*Q8_0.gguf"):
        path.unlink()


def in_parts(hub):
    file = hub.folder / "skyreels" / "r2v" / "SkyReels-v3-r2v-Q8_0.gguf"
    file.rename(file.with_name("SkyReels-v3-r2v-Q8_0-00001-of-00002.gguf"))


def small_encoder(hub):
    for path in (hub.folder / "umt5").iterdir():
        path.unlink()


def encoder_without_tokenizer(hub):
    small_encoder(hub)
    (source,) = hub.converted("Q8_0").glob("umt5*")
    community_file(source, hub.folder / "umt5" / "umt5-xxl-encoder-Q8_0.gguf", hub.write_gguf, general__file_type=7)


FALLBACKS = [
    (no_transformers, {UMT5}, f"has no {SKYREELS} to show"),
    (refused, set(), f"has no {UMT5} to show .status 401.*going on without it"),
    (gated, {UMT5}, f"{SKYREELS} is open only to those who"),
    (smaller_only, {UMT5}, f"{SKYREELS} has no Q8_0 transformer for r2v, it has Q2_K, Q4_K_M"),
    (in_parts, {UMT5}, f"{SKYREELS} has no Q8_0 transformer for r2v, it has Q2_K, Q4_K_M"),
    (small_encoder, {SKYREELS}, f"the text encoder of {UMT5} is not there as Q8_0"),
    (encoder_without_tokenizer, {SKYREELS}, f"the text encoder of {UMT5} has no tokenizer"),
]


@pytest.mark.parametrize(("change", "used", "said"), FALLBACKS, ids=lambda value: getattr(value, "__name__", None))
def test_the_published_checkpoint_steps_in(community, change, used, said, tmp_path, converted, capsys):
    change(community)
    assert main(["pull", "r2v:Q8_0"]) == 0
    folder = models(tmp_path) / "r2v-Q8_0"
    assert set(Manifest.read(folder).commits) == used | {SOURCES["r2v"].checkpoint}
    assert re.search(said, capsys.readouterr().err, re.DOTALL)
    ours, there = digests(converted("Q8_0")), digests(folder)
    kept = [name for name in there if name in ours]
    assert all(there[name] == ours[name] for name in kept) and len(kept) == 3 - len(used)


def test_a_busy_hub_is_no_reason_to_fetch_three_times_as_much(community, tmp_path, capsys):
    community.refused[SKYREELS] = 503
    assert main(["pull", "r2v:Q8_0"]) == 4
    assert f"answers with status 503 when asked for {SKYREELS}" in capsys.readouterr().err
    assert not community.asked("model.safetensors")


def test_a_damaged_file_is_thrown_away(community, tmp_path, capsys):
    community.damaged.add("r2v/SkyReels-v3-r2v-Q8_0.gguf")
    assert main(["pull", "r2v:Q8_0"]) == 1
    assert f"r2v/SkyReels-v3-r2v-Q8_0.gguf of {SKYREELS} arrived damaged: its sha256 is" in capsys.readouterr().err
    assert not [*(models(tmp_path) / "r2v-Q8_0").glob("SkyReels*")]


def test_a_pinned_commit_is_the_one_that_is_used(community, tmp_path, monkeypatch):
    there, gone = f"{SKYREELS}@{community.commit}", f"{SKYREELS}@{'f' * 40}"
    monkeypatch.setitem(sources.SOURCES, "r2v", replace(SOURCES["r2v"], gguf=(gone, there)))
    assert main(["pull", "r2v:Q8_0", "--dry-run"]) == 0
    assert not [path for _, path, _ in community.requests if path == f"api/models/{SKYREELS}"]


def test_what_was_begun_from_the_checkpoint_goes_on_from_there(community, tmp_path, monkeypatch):
    kept = community.repos.pop(SKYREELS)
    community.damaged.add("vae/diffusion_pytorch_model.safetensors")
    assert main(["pull", "r2v:Q8_0"]) == 1
    community.damaged.clear()
    community.repos[SKYREELS] = kept
    assert main(["pull", "r2v:Q8_0"]) == 0
    assert SKYREELS not in Manifest.read(models(tmp_path) / "r2v-Q8_0").commits


# a repository by name


def test_a_repository_of_several_tasks(community, tmp_path, run_command, capsys):
    name = f"{SKYREELS}:Q8_0"
    assert main(["pull", name]) == 2
    said = capsys.readouterr().err
    assert f"{SKYREELS} has several Q8_0 transformers: a2v/" in said and "--task a2v or r2v or v2v" in said
    assert main(["pull", name, "--task", "v2v"]) == 0
    assert main([*run_command, "--model", name, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert f"r2v/SkyReels-v3-r2v-Q8_0.gguf of {SKYREELS} does not say its task" in said, "the v2v model is another"
    assert main(["pull", name, "--task", "r2v"]) == 0
    folders = {path.name for path in models(tmp_path).iterdir()}
    assert folders == {f"{SKYREELS.replace('/', '--')}--{task}-Q8_0" for task in ("r2v", "v2v")}


@pytest.mark.parametrize("label", ["../../outside", "Q8_0/../..", "\x1b[31m", "Q" * 40])
def test_a_type_that_is_a_path_is_no_type(community, tmp_path, label):
    file = community.folder / "skyreels" / "r2v" / "SkyReels-v3-r2v-Q8_0.gguf"
    community_file(file, file.with_name("own.gguf"), community.write_gguf, skyrun__quant=label, skyrun__task=label)
    file.unlink()
    found = {model.file.path: model for model in look(list_repository(SKYREELS))}
    assert (found["r2v/own.gguf"].quant, found["r2v/own.gguf"].task) == ("Q8_0", "r2v")
