"""Folders of checkpoints: the links of Hugging Face's cache, and what will be missing after converting."""

import os
import shutil

import pytest

from skyrun.errors import MODEL_MISSING, SkyrunError
from skyrun.quant import convert
from skyrun.quant.plan import Settings
from skyrun.quant.planner import plan_conversion
from skyrun.quant.sources.families import find_families

CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def cached(checkpoint, root):
    """Hugging Face's cache: blobs, and a snapshot of links."""
    snapshot = root / "snapshots" / ("0123456789abcdef" * 3)[:40]
    for folder in ("blobs", "refs"):
        (root / folder).mkdir(parents=True)
    (root / "refs/main").write_text(snapshot.name)
    for number, path in enumerate(sorted(path for path in checkpoint.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / "blobs" / f"{number:040x}")
        link.symlink_to(os.path.relpath(root / "blobs" / f"{number:040x}", link.parent))
    return snapshot


@pytest.fixture
def cache(checkpoint, tmp_path):
    return cached(checkpoint, tmp_path / "models--Skywork--R2V")


needs_links = pytest.mark.skipif(os.name == "nt", reason="links need rights there")


@needs_links
def test_a_folder_of_the_cache_stands_for_its_revision(cache):
    root = cache.parent.parent
    assert [family.role for family in find_families(cache).families] == ["transformer", "text_encoder", "vae"]
    assert find_families(root).families == find_families(cache).families
    other = root / "snapshots/other"
    other.mkdir()
    assert find_families(root).families == find_families(cache).families
    (root / "refs/main").unlink()
    with pytest.raises(SkyrunError, match="with snapshots: 0123.*, other"):
        find_families(root)


@needs_links
@pytest.mark.parametrize("name", ["vae/diffusion_pytorch_model.safetensors", "transformer/config.json"])
def test_a_link_that_leads_nowhere_is_an_error(cache, tmp_path, name):
    (cache / name).resolve().unlink()
    with pytest.raises(SkyrunError, match=f"{name} is a link to .*blobs/.*, which is not there") as error:
        convert(cache, tmp_path / "out")
    assert error.value.code == MODEL_MISSING and "download" in error.value.hint
    assert not (tmp_path / "out").exists()


@needs_links
def test_many_links_that_lead_nowhere_are_counted(cache):
    shutil.rmtree(cache.parent.parent / "blobs")
    (cache.parent.parent / "blobs").mkdir()
    with pytest.raises(SkyrunError, match="is not whole") as error:
        find_families(cache)
    assert len(error.value.message.splitlines()) < 8


# --- what will be missing


def without(*names):
    def change(folder):
        for name in names:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return change


MISSING = {
    "nothing": ("r2v-tiny", without(), ()),
    "no autoencoder": ("r2v-tiny", without("vae"), ("vae",)),
    "a transformer alone": ("r2v-tiny", without("vae", "text_encoder"), ("text_encoder", "vae")),
    "no transformer": ("r2v-tiny", without("transformer"), ()),
    "no image encoder": ("a2v-tiny", without(CLIP), ("image_encoder",)),
    "no audio encoder": ("a2v-tiny", without("chinese-wav2vec2-base"), ("audio_encoder",)),
}
WORDS = {"vae": "autoencoder", "text_encoder": "text encoder", "image_encoder": "image encoder"}
WORDS |= {"audio_encoder": "audio encoder"}


@pytest.mark.parametrize("case", MISSING)
def test_what_a_task_lacks_is_said(checkpoint, tmp_path, case):
    name, change, missing = MISSING[case]
    source = shutil.copytree(checkpoint.parent / name, tmp_path / "source")
    change(source)
    conversion = plan_conversion(source, tmp_path / "out", Settings("Q8_0"))
    assert conversion.missing == missing
    assert conversion.summary()["missing"] == list(missing)
    said = [note for note in conversion.notes if "will not run from there yet" in note]
    assert bool(said) == bool(missing)
    assert all(WORDS[role] in said[0] for role in missing)


def test_what_the_folder_has_already_is_not_missing(checkpoint, tmp_path):
    out = tmp_path / "out"
    convert(checkpoint / "vae", out)
    assert plan_conversion(checkpoint / "transformer", out, Settings("Q8_0")).missing == ("text_encoder",)
    convert(checkpoint / "text_encoder", out)
    assert plan_conversion(checkpoint / "transformer", out, Settings("Q8_0")).missing == ()


# --- a second text encoder
