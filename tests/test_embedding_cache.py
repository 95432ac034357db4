"""Embeddings of prompts are kept on disk: the same numbers, never another prompt's or another encoder's."""

import os
import shutil
import stat
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from skyrun.events import BlockDone, StageEnded
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.models.umt5 import UMT5
from skyrun.pipelines import embedding_cache
from skyrun.pipelines.stages import encode_text

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SKYRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("skyrun.pipelines.stages.block_layouts", lambda file: [])  # nothing to read ahead
    return tmp_path / "cache" / "prompts"


@pytest.fixture
def encoder(converted):
    return UMT5(open_gguf(next(converted("Q8_0").glob("umt5*"))))


def encode(encoder, prompt="a sea"):
    """The embedding, and whether the encoder ran for it."""
    files, plan = SimpleNamespace(transformer=encoder.file), SimpleNamespace(ring_slots=3)
    job = SimpleNamespace(encoder=encoder, device=CPU, files=files, plan=plan)
    events, generator = [], torch.inference_mode()(encode_text)(job, prompt)
    while True:
        try:
            events.append(next(generator))
        except StopIteration as stop:
            assert isinstance(events[-1], StageEnded)
            ran = any(isinstance(event, BlockDone) for event in events)
            assert ran == (events[-1].bytes_read > 0)
            return stop.value.clone(), ran


def test_the_second_time_it_is_read(folder, encoder):
    first, ran = encode(encoder)
    assert ran
    again, ran = encode(encoder, "  a\n sea")  # what matters is the prompt after cleaning
    assert not ran
    assert torch.equal(again, first)
    assert again.dtype == torch.float32
    (path,) = folder.iterdir()
    assert torch.equal(load_file(path)["embedding"], first)


def test_another_prompt_and_another_encoder_are_not_mistaken_for_it(folder, encoder, tmp_path):
    encode(encoder)
    assert encode(encoder, "a lake")[1]
    source = encoder.file.path
    copy = tmp_path / "copy.gguf"
    shutil.copyfile(source, copy)
    os.utime(copy, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
    assert not encode(UMT5(open_gguf(copy)))[1]  # the same file in another place
    os.utime(copy)
    assert encode(UMT5(open_gguf(copy)))[1]
    assert len(list(folder.iterdir())) == 3


def damage(path, how):
    embedding = load_file(path)["embedding"]
    changed = {
        "shape": {"embedding": embedding[1:].clone()},
        "dtype": {"embedding": embedding.half()},
        "name": {"something": embedding},
        "nan": {"embedding": embedding * torch.nan},
    }
    if how in changed:
        save_file(changed[how], path)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["shape", "dtype", "name", "nan", "cut", "empty"])
def test_a_damaged_one_counts_for_nothing_and_is_written_anew(folder, encoder, how):
    first, _ = encode(encoder)
    (path,) = folder.iterdir()
    damage(path, how)
    again, ran = encode(encoder)
    assert ran
    assert torch.equal(again, first)
    assert not encode(encoder)[1]


def test_no_flipped_bit_makes_another_clip(folder, encoder):
    first, _ = encode(encoder)
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cached = embedding_cache.CachedEmbedding(encoder.file, encoder.token_ids("a sea"), encoder.dim, CPU)
    assert torch.equal(cached.load(), first)
    for place in [*range(header), *range(header, len(whole), 97)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert (found := cached.load()) is None or torch.equal(found, first)
    assert found is None


def test_another_prompts_entry_is_not_taken(folder, encoder):
    first, _ = encode(encoder, "a sea")
    (path,) = folder.iterdir()
    encode(encoder, "a tea")
    (other,) = set(folder.iterdir()) - {path}
    shutil.copyfile(other, path)
    again, ran = encode(encoder, "a sea")
    assert ran
    assert torch.equal(again, first)


def test_a_cache_that_cannot_be_written_does_no_harm(folder, encoder):
    first, _ = encode(encoder)
    (path,) = folder.iterdir()
    damage(path, "folder")
    again, ran = encode(encoder)
    assert ran
    assert torch.equal(again, first)
    assert [path] == list(folder.iterdir())


def test_only_the_last_used_stay(folder, encoder, monkeypatch):
    monkeypatch.setattr(embedding_cache, "_MOST", 3)
    encode(encoder, "0")
    (oldest,) = folder.iterdir()
    for prompt in "12":
        encode(encoder, prompt)
    for age, path in enumerate(folder.iterdir()):
        os.utime(path, (1000 - age, 1000 - age))
    os.utime(oldest, (1, 1))
    assert not encode(encoder, "0")[1]  # used: now the newest
    encode(encoder, "3")
    assert len(list(folder.iterdir())) == 3
    assert oldest.exists()
    assert not encode(encoder, "0")[1]
