"""Training the small model: an interrupted run ends with the bytes of an undisturbed one."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "training").is_dir(), reason="needs a checkout")


@pytest.fixture
def training(monkeypatch):
    """The package beside the tests. It chooses how many threads torch has, for which other tests are too small."""
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    from training import small_model

    yield small_model
    torch.set_num_threads(threads)


class Interrupting:
    """A terminal at which Ctrl-C is pressed when a line begins with the next of some words."""

    def __init__(self, words):
        self.words = list(words)

    def write(self, text):
        if self.words and text.startswith(self.words[0]):
            del self.words[0]
            raise KeyboardInterrupt

    def flush(self):
        pass


def files(folder):
    """What a run hands over, by name; its report has seconds in it."""
    paths = [*(folder / "checkpoint").rglob("*"), *folder.glob("*.png")]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if path.is_file() and path.name != "report.json"
    }


def test_an_interrupted_run_gives_the_same_bytes(training, tmp_path, monkeypatch):
    recipe = training.Recipe(4, latents=6, denoising=3, clips=3, judged=3, save_every=2, threads=1, compiled=False)
    training.train(tmp_path / "undisturbed", recipe)
    # Each time a stage has told of a step that is not saved yet, so this step and the one before are lost.
    terminal = Interrupting(["pictures: step 4", "denoising: step 2", "clips: step 3"])
    monkeypatch.setattr(sys, "stdout", terminal)
    for left in (2, 1, 0):
        with pytest.raises(KeyboardInterrupt):
            training.train(tmp_path / "interrupted", recipe)
        assert len(terminal.words) == left
    training.train(tmp_path / "interrupted", recipe)
    expected = files(tmp_path / "undisturbed")
    assert {"checkpoint/transformer/diffusion_pytorch_model.safetensors", "trained.png"} <= expected.keys()
    assert files(tmp_path / "interrupted") == expected
