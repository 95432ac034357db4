"""Models are fetched from a hub on this machine: whole, in pieces, interrupted, up to the clip of a first run."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import COMMIT, gguf_repository
from huggingface_hub import constants

from skyrun.cli import main
from skyrun.cli.progress import Display
from skyrun.errors import SkyrunError
from skyrun.events import Progress, StageStarted, drain
from skyrun.hub import client as hub_module
from skyrun.hub.client import fetch, list_repository, partial_of, read_start
from skyrun.hub.gguf_repo import roles_in
from skyrun.hub.manifest import Manifest
from skyrun.tasks import sources
from skyrun.tasks.sources import SOURCES, Source

R2V = SOURCES["r2v"].checkpoint
SHARD = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"


def digests(folder):
    """The files of a model, without what skyrun notes down beside them."""
    files = [path for path in folder.iterdir() if path.suffix in (".gguf", ".safetensors")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.name not in (".lock", "skyrun-model.json"))


def progress_of(events):
    """Bytes that were there before and then, one after the other."""
    return [
        e.before if isinstance(e, StageStarted) else e.done for e in events if isinstance(e, StageStarted | Progress)
    ]


# one file


def test_a_cut_connection_is_taken_up_where_it_was_cut(hub, tmp_path):
    file = next(file for file in list_repository(R2V).files if file.path == SHARD)
    hub.cut[SHARD] = [600_000, 100, 900_000]
    seen = progress_of(fetch(file, tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == (hub.repos[R2V] / SHARD).read_bytes()
    assert seen[0] == 0 and seen[-1] == file.nbytes
    first, *others = hub.asked(SHARD)
    assert first == "" and len(others) == 3 and all(bounds.startswith("bytes=") for bounds in others)
    assert not partial_of(tmp_path / "x").exists()


def test_what_has_arrived_survives_the_process_and_is_checked(hub, tmp_path):
    file = next(file for file in list_repository(R2V).files if file.path == SHARD)
    content = (hub.repos[R2V] / SHARD).read_bytes()
    partial_of(tmp_path / "x").write_bytes(content[:1000])
    drain(fetch(file, tmp_path / "x"))
    assert hub.asked(SHARD) == [f"bytes=1000-{len(content) - 1}"]
    partial_of(tmp_path / "y").write_bytes(b"?" + content[1:1000])
    with pytest.raises(SkyrunError, match="arrived damaged: its sha256 is"):
        drain(fetch(file, tmp_path / "y"))
    assert not (tmp_path / "y").exists() and not partial_of(tmp_path / "y").exists()
    partial_of(tmp_path / "y").write_bytes(content + b"more")
    drain(fetch(file, tmp_path / "y"))
    assert (tmp_path / "y").read_bytes() == content


def test_a_server_without_ranges(hub, tmp_path):
    hub.ranges = False
    hub.cut[SHARD] = [100, 600_000, 500_000]  # the first of them while its beginning is read
    file = next(file for file in list_repository(R2V).files if file.path == SHARD)
    assert len(read_start(file, 100)) == 100
    seen = progress_of(fetch(file, tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == (hub.repos[R2V] / SHARD).read_bytes()
    assert seen[0] == 0 and seen[-1] == file.nbytes


def test_a_server_that_sends_too_little_is_given_up(hub, tmp_path):
    hub.short.add(SHARD)
    file = next(file for file in list_repository(R2V).files if file.path == SHARD)
    with pytest.raises(SkyrunError, match="arrived damaged"):
        drain(fetch(file, tmp_path / "x"))
    assert len(hub.asked(SHARD)) < 10


def test_small_files_are_checked_too(hub, tmp_path):
    file = next(file for file in list_repository(R2V).files if file.path == "tiny_dims.json")
    assert not file.sha256
    hub.damaged.add(file.path)
    with pytest.raises(SkyrunError, match="its sha1 is"):
        drain(fetch(file, tmp_path / "x"))


def test_a_token_stays_with_the_hub(hub, tmp_path, monkeypatch):
    hub.token, hub.redirect, hub.cut[SHARD] = "hf_secret", True, [600_000]
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    file = next(file for file in list_repository(R2V).files if file.path == SHARD)
    drain(fetch(file, tmp_path / "x"))
    assert any(bounds.startswith("bytes=") for bounds in hub.asked(f"cdn/{R2V}/{SHARD}"))
    sent = {(host, path.partition("/")[0] == "cdn"): token for (host, path), token in hub.tokens.items()}
    assert sent == {("127.0.0.1", False): "Bearer hf_secret", ("localhost", True): None}


def test_what_is_in_the_cache_of_huggingface_is_not_fetched(hub, tmp_path):
    huggingface_hub.hf_hub_download(R2V, SHARD, revision=COMMIT, endpoint=hub.url)
    before = len(hub.asked(SHARD))
    file = next(file for file in list_repository(R2V).files if file.path == SHARD)
    drain(fetch(file, tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == (hub.repos[R2V] / SHARD).read_bytes()
    assert len(hub.asked(SHARD)) == before
    (tmp_path / "x").unlink()
    assert hub_module.try_to_load_from_cache(R2V, SHARD, revision=COMMIT)


# a checkpoint


def test_a_checkpoint_becomes_what_convert_makes_of_it(hub, tmp_path, converted, capsys):
    most, total = [0], [0]
    measure = Display.show

    def show(self, event):
        work = tmp_path / "models" / "r2v-Q4_K" / ".fetched"
        on_disk = sum(p.stat().st_size for p in work.rglob("*") if p.stat().st_size > 300_000)
        most[0] = max(most[0], on_disk)
        files = [path for path in (tmp_path / "models").rglob("*") if path.suffix not in (".json", ".model")]
        total[0] = max(total[0], sum(path.stat().st_blocks * 512 for path in files if path.is_file()))
        measure(self, event)

    Display.show = show
    try:
        assert main(["pull", "r2v", "--quant", "q4_k", "--json"]) == 0
    finally:
        Display.show = measure
    assert digests(tmp_path / "models" / "r2v-Q4_K") == digests(converted("Q4_K"))
    largest = max(path.stat().st_size for path in hub.repos[R2V].rglob("*.safetensors"))
    assert 0 < most[0] <= largest, "more than one file of the checkpoint was on the disk"
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["event"] == "result" and result["repositories"] == {R2V: COMMIT}
    assert total[0] <= result["disk_bytes"] + 200_000, "the disk held more than was announced"
    assert "5.5 MB to fetch" in said.err and "ready, for skyrun run" in said.err
    assert names_in(tmp_path / "models") == sorted(["r2v-Q4_K", *digests(converted("Q4_K"))])
    asked = len(hub.requests)
    assert main(["pull", "r2v:Q4_K"]) == 0
    assert len(hub.requests) == asked, "what is complete needs no network"


@pytest.mark.parametrize("task", ["v2v", "shot", "a2v"])
def test_other_tasks(hub, tmp_path, task):
    from skyrun.quant import convert

    assert main(["pull", task, "-o", str(tmp_path / "model")]) == 0
    convert(hub.repos[SOURCES[task].checkpoint], tmp_path / "whole")
    whole, there = digests(tmp_path / "whole"), digests(tmp_path / "model")
    other = {"v2v": "SHOT", "shot": "V2V"}.get(task, "none")
    assert there == {name: digest for name, digest in whole.items() if other not in name}


def test_what_a_pth_file_is_its_beginning_tells(hub, tmp_path):
    """Names that say nothing, or something else."""
    shutil.copytree(hub.repos[SOURCES["v2v"].checkpoint], tmp_path / "renamed")
    (tmp_path / "renamed" / "Wan2.1_VAE.pth").rename(tmp_path / "renamed" / "decoder.pth")
    (tmp_path / "renamed" / "models_t5_umt5-xxl-enc-bf16.pth").rename(tmp_path / "renamed" / "words.pth")
    hub.repos["owner/renamed"] = tmp_path / "renamed"
    assert main(["pull", "owner/renamed", "--json"]) == 0
    folder = tmp_path / "models" / "owner--renamed-Q8_0"
    assert roles_in(folder) == {"transformer", "text_encoder", "vae"}
    assert set(Manifest.read(folder).commits) == {"owner/renamed"}


def test_interrupted_again_and_again_it_goes_on(hub, tmp_path, monkeypatch, converted, capsys):
    steps = [0]
    right = Display.show

    def show(self, event):
        right(self, event)
        steps[0] += isinstance(event, Progress)
        if steps[0] % 13 == 0 and isinstance(event, Progress):
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "show", show)
    codes, left = [], []
    while not codes or codes[-1]:
        codes.append(main(["pull", "r2v", "--quant", "Q4_K"]))
        assert len(codes) < 40
        left.append(re.search(r"(\S+ .B) to fetch", capsys.readouterr().err)[1])
    assert set(codes[:-1]) == {130} and len(codes) > 4
    assert left[0] == "5.5 MB" and "3.2 MB" in left, "what is converted is not announced again"
    folder = tmp_path / "models" / "r2v-Q4_K"
    assert digests(folder) == digests(converted("Q4_K"))
    assert names_in(folder) == sorted(digests(folder))
    whole = [bounds for bounds in hub.asked(SHARD) if not bounds]
    assert len(whole) <= 1, "a file was fetched from its beginning twice"


def test_a_killed_process_has_lost_nothing_that_matters(hub, tmp_path):
    hub.stall[SHARD] = 1_000_000
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "skyrun", "pull", "r2v"]
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
        assert hub.stalled.wait(30)
        part = tmp_path / "models" / "r2v-Q8_0" / ".fetched" / R2V / COMMIT / f"{SHARD}.part"
        while not part.exists() or part.stat().st_size < 700_000:
            pass
        assert main(["pull", "r2v"]) == 1, "two processes into one folder"
        process.send_signal(signal.SIGKILL)
    hub.go_on.set()
    there = part.stat().st_size
    assert main(["pull", "r2v"]) == 0
    assert hub.asked(SHARD)[-1].startswith(f"bytes={there}-")


def test_a_file_that_was_written_just_before_the_end_counts(hub, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("skyrun.hub.convert.Step.clean", stop)
        assert main(["pull", "r2v"]) == 130
    folder = tmp_path / "models" / "r2v-Q8_0"
    manifest = Manifest.read(folder)
    assert len(manifest.done) == 2
    manifest.done.clear()
    manifest.begun = [path.name for path in folder.glob("SkyReels*")]
    manifest.write(folder)
    hub.requests.clear()
    assert main(["pull", "r2v"]) == 0
    assert all(bounds for bounds in hub.asked(SHARD)), "only its header is read"


def test_offline_the_cache_of_huggingface_is_enough(hub, tmp_path, monkeypatch, converted, capsys):
    for path in hub.repos[R2V].rglob("*"):
        if path.is_file() and "vae" not in path.parts:
            huggingface_hub.hf_hub_download(R2V, path.relative_to(hub.repos[R2V]).as_posix(), endpoint=hub.url)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["pull", "r2v:Q4_K"]) == 2
    assert f"{R2V} has no vae" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("vae/config.json", "vae/diffusion_pytorch_model.safetensors"):
        huggingface_hub.hf_hub_download(R2V, name, endpoint=hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["pull", "r2v:Q4_K"]) == 0
    assert digests(tmp_path / "models" / "r2v-Q4_K") == digests(converted("Q4_K"))
    assert huggingface_hub.try_to_load_from_cache(R2V, SHARD), "the cache keeps what it had"


def test_what_another_model_has_is_not_fetched_again(hub, tmp_path, converted, capsys):
    assert main(["pull", "r2v:Q8_0"]) == 0 and main(["pull", "v2v"]) == 0
    hub.requests.clear()
    assert main(["pull", "r2v:Q4_K"]) == 0 and main(["pull", "shot"]) == 0
    assert digests(tmp_path / "models" / "r2v-Q4_K") == digests(converted("Q4_K"))
    assert not hub.asked(".pth") and all(hub.asked("text_encoder/model.safetensors"))
    assert "wan-vae-244K.safetensors (here already)" in capsys.readouterr().err
    here, there = (tmp_path / "models" / f"r2v-{quant}" / "wan-vae-244K.safetensors" for quant in ("Q8_0", "Q4_K"))
    assert here.samefile(there)
    assert main(["pull", "r2v:F16"]) == 0  # whose encoder is F16 too
    assert any(path.name.endswith("F16.gguf") for path in (tmp_path / "models" / "r2v-F16").glob("umt5*"))


def test_what_was_deleted_is_made_again_and_a_failure_leaves_no_folder(hub, tmp_path, converted):
    folder = tmp_path / "models" / "r2v-Q8_0"
    assert main(["pull", "owner/none:Q8_0"]) == 4 and not [*tmp_path.glob("models/*")]
    assert main(["pull", "r2v"]) == 0
    next(folder.glob("SkyReels*")).unlink()
    hub.requests.clear()
    assert main(["pull", "r2v"]) == 0
    assert digests(folder) == digests(converted("Q8_0"))
    assert "" in hub.asked(SHARD) and "" not in hub.asked("vae/diffusion_pytorch_model.safetensors")
    (folder / "skyrun-model.json").write_text("{")
    assert main(["pull", "r2v"]) == 0 and Manifest.read(folder).complete


# GGUF files


def test_gguf_files_are_taken_as_they_are(hub, tmp_path, converted):
    gguf_repository(hub, tmp_path / "repo", converted("Q4_K"), converted("Q8_0"))
    assert main(["pull", "owner/gguf:Q4_K"]) == 0
    assert digests(tmp_path / "models" / "owner--gguf-Q4_K") == digests(converted("Q4_K"))
    assert main(["pull", "owner/gguf", "-o", str(tmp_path / "other")]) == 0  # Q8_0 is there
    assert digests(tmp_path / "other") == digests(converted("Q8_0"))


def test_what_a_gguf_repository_lacks_comes_from_the_checkpoint(hub, tmp_path, converted):
    gguf_repository(hub, tmp_path / "repo", converted("Q4_K"), parts="SkyReels*")
    assert main(["pull", "owner/gguf:Q4_K"]) == 0
    assert digests(tmp_path / "models" / "owner--gguf-Q4_K") == digests(converted("Q4_K"))
    assert not any(bounds == "" for bounds in hub.asked(SHARD))


def test_gguf_sources_of_a_task_come_first(hub, tmp_path, converted, monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "r2v", Source(R2V, gguf=("owner/gguf",)))
    gguf_repository(hub, tmp_path / "repo", converted("Q4_K"))
    assert main(["pull", "r2v:Q4_K"]) == 0 and not hub.asked(SHARD)
    assert main(["pull", "r2v:Q8_0"]) == 0 and hub.asked(SHARD)
    assert Manifest.read(tmp_path / "models" / "r2v-Q8_0").commits == {R2V: COMMIT}


# runs


def test_a_first_run_from_nothing_to_the_clip(hub, tmp_path, run_command, capsys, monkeypatch):
    assert main([*run_command, "--dry-run", "--json"]) == 0
    said = capsys.readouterr()
    assert "5.5 MB to fetch" in said.err and json.loads(said.out)["event"] == "pull"
    assert not (tmp_path / "models").exists() and all(hub.asked("model.safetensors"))
    right, calls = Display.show, iter(range(1 << 20))

    def show(self, event):
        right(self, event)
        if isinstance(event, Progress) and next(calls) == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "show", show)
    assert main(run_command) == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    assert main(run_command) == 0
    assert (tmp_path / "clip.mp4").stat().st_size > 0
    said = capsys.readouterr().err
    assert "no model was given, and r2v:Q8_0 is not there as a whole" in said
    asked = len(hub.requests)
    assert main([*run_command, "--dry-run", "--overwrite"]) == 0
    assert len(hub.requests) == asked


def test_a_model_by_name(hub, tmp_path, run_command, converted, capsys):
    gguf_repository(hub, tmp_path / "repo", converted("Q4_K"))
    assert main([*run_command, "--model", "owner/gguf:Q4_K", "--dry-run"]) == 0
    assert not (tmp_path / "models").exists()
    assert main(["pull", "owner/gguf:Q4_K"]) == 0
    assert main([*run_command, "--model", "owner/gguf:Q4_K", "--dry-run"]) == 0
    assert "Q4_K.gguf on" in capsys.readouterr().err
    assert main(["pull", "r2v", "--quant", "Q8_0"]) == 0
    assert main([*run_command, "--model", "r2v", "--dry-run", "--json"]) == 0
    assert main([*run_command, "--quant", "Q8_0", "--dry-run", "--json"]) == 0
    plans = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {Path(plan["model"]["transformer"]).parent.name for plan in plans} == {"r2v-Q8_0"}
