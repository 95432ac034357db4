"""The demo: its words, its files, the built-in model as a model like any other, and sizes that a model states."""

import json
from itertools import product

import av
import numpy as np
import pytest
from PIL import Image

from skyrun.cli.main import main
from skyrun.demo.words import COLOURS, MOTIONS, SCENES, SHAPES, Topic, known_in, known_words, pictured
from skyrun.demo.world import sentence
from skyrun.errors import BAD_INPUT, SkyrunError
from skyrun.hub.built_in import CHECKPOINT, is_converted
from skyrun.hub.local import model_path, wanted_name, whole_folder
from skyrun.hub.manifest import Manifest
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.planning.own_clips import OwnClips, read_own_clips
from skyrun.planning.request import Request

PROMPT = "a blue ball spins on white"


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A folder to work in, with a clip of the demo in it."""
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "-p", PROMPT, "-o", "a.mp4"]) == 0
    return tmp_path


def frames(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_topic_is_read_from_each_of_its_sentences():
    draw = np.random.default_rng(0)
    for colour, shape, motion, scene in product(COLOURS, SHAPES, MOTIONS, SCENES):
        prompt = sentence(Topic(colour, shape, motion, scene), draw)
        assert pictured(prompt) == (colour, shape, scene), prompt
        assert set(prompt.lower().strip(".").split()) <= set(known_words())


@pytest.mark.parametrize("prompt", ["a cat", "the on by", "", "Ein roter Stern"])
def test_a_prompt_of_unknown_words_is_refused_with_the_known_ones(prompt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert known_in(prompt) == []
    assert main(["demo", "-p", prompt]) == BAD_INPUT
    assert {*COLOURS, *SHAPES} <= set(capsys.readouterr().err.replace(",", " ").replace(";", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_the_help_names_every_word_and_the_sizes_of_the_checkpoint(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    said = set(capsys.readouterr().out.replace(",", " ").replace(";", " ").replace(".", " ").split())
    sizes = json.loads((CHECKPOINT / "transformer" / "config.json").read_text())["clip_sizes"]
    motions = {word for phrases in MOTIONS.values() for word in phrases[0].split()}
    assert {*COLOURS, *SHAPES, *SCENES, *motions, *sizes} <= said


def test_outputs_have_the_usual_names_and_a_scene_is_a_second_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--size", "48x48"]) == 0
    pictures = {f"skyrun-demo.{part}png" for part in ("", "reference-1.", "reference-2.")}
    assert {path.name for path in tmp_path.iterdir()} == {"skyrun-demo.mp4", *pictures}
    sprite, scene = (np.asarray(Image.open(f"skyrun-demo.reference-{number}.png")) for number in (1, 2))
    assert sprite.shape == scene.shape == (48, 48, 3)
    assert (sprite[0] == 255).all() and (scene != 255).any(-1).all()
    red, green, blue = sprite[24, 24].astype(int)
    assert red > max(green, blue) + 100


def test_pixels_are_shown_as_squares(demo):
    assert {path.name for path in demo.iterdir()} == {"a.mp4", "a.png", "a.reference-1.png"}
    shown = frames(demo / "a.mp4")
    assert shown.shape == (17, 4 * 48, 4 * 80, 3)
    blocks = shown.reshape(17, 48, 4, 80, 4, 3).astype(int)
    assert np.abs(blocks - blocks[:, :, 1:2, :, 1:2]).mean() < 4, "but for what H.264 loses"
    assert Image.open(demo / "a.reference-1.png").size == (80, 48)


def test_the_same_demo_is_there_already_and_another_needs_another_name(demo, capsys):
    before = (demo / "a.mp4").read_bytes()
    assert main(["demo", "-p", PROMPT, "-o", "a.mp4"]) == 0
    assert (demo / "a.mp4").read_bytes() == before
    assert "it is there already" in capsys.readouterr().err
    assert main(["demo", "-p", "a red star grows", "-o", "a.mp4"]) == BAD_INPUT
    assert (demo / "a.mp4").read_bytes() == before
    assert main(["demo", "-p", "a red star grows", "-o", "a.mp4", "--overwrite"]) == 0
    assert (demo / "a.mp4").read_bytes() != before


def test_a_drawn_reference_replaces_no_file_of_the_user(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "a.reference-1.png"
    mine.write_bytes(b"mine")
    assert main(["demo", "-p", PROMPT, "-o", "a.mp4"]) == BAD_INPUT
    assert "a.reference-1.png exists" in capsys.readouterr().err
    assert mine.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [mine]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "96x96"], "makes 48x80, 48x48, 64x64 (height x width)"),
        (["--size", "50x60"], "not on the grid"),
        (["--size", "large"], "is not HxW"),
        (["--image", "none.png"], "none.png does not exist"),
        (["-o", "a.gif"], "does not end in .mp4"),
    ],
)
def test_wrong_inputs_of_the_demo_leave_nothing(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "-p", PROMPT, *arguments]) == BAD_INPUT
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_own_pictures_and_sizes(demo):
    assert main(["demo", "-p", PROMPT, "--image", "a.reference-1.png", "--size", "48x48", "-o", "b.mp4"]) == 0
    assert frames(demo / "b.mp4").shape == (17, 4 * 48, 4 * 48, 3)
    assert not (demo / "b.reference-1.png").exists()
    Image.open("a.reference-1.png").resize((90, 90)).save("square.png")
    assert main(["demo", "-p", PROMPT, "--image", "square.png", "-o", "c.mp4"]) == 0
    assert frames(demo / "c.mp4").shape == (17, 4 * 48, 4 * 48, 3), "the size whose shape is nearest"


@pytest.mark.parametrize(("text", "type"), [("demo", "Q4_K"), ("demo:Q8_0", "Q8_0")])
def test_the_built_in_model_is_converted_once(text, type):
    folder = whole_folder(wanted_name(text, "r2v", None))
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.*[fs]")}
    assert len(written) == 3
    assert whole_folder(wanted_name(text, "r2v", None)) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.*[fs]")} == written
    (transformer,) = folder.glob("SkyReels*")
    assert type in transformer.name
    next(folder.glob("umt5*")).unlink()
    assert set(written) == {path.name for path in whole_folder(wanted_name(text, "r2v", None)).glob("*.*[fs]")}


def test_a_model_of_another_checkpoint_is_converted_again():
    name = wanted_name("demo", "r2v", None)
    folder = whole_folder(name)
    (transformer,) = folder.glob("SkyReels*")
    written = transformer.read_bytes()
    manifest = Manifest.read(folder)
    manifest.commits = {"demo": "0" * 40}
    manifest.write(folder)
    transformer.write_bytes(b"of another checkpoint")
    assert not is_converted(name)
    assert whole_folder(name) == folder
    assert is_converted(name)
    assert transformer.read_bytes() == written


def test_a_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert wanted_name("demo", "r2v", None) is None
    assert model_path(tmp_path / "demo") == tmp_path / "demo"


def test_the_built_in_model_is_a_model_like_any_other(demo, capsys):
    def said(*arguments):
        capsys.readouterr()
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    run = ["run", "r2v", "--model", "demo", "-p", PROMPT, "--image", "a.reference-1.png"]
    plan = said(*run, "--dry-run")
    assert (plan["size"], plan["frames"]) == ([48, 80], 17)
    assert said("plan", "r2v", "--model", "demo")["frames"] == 17
    assert said("plan", "r2v", "--model", "demo", "--gpu", "RTX 3060")["frames"] == 17
    assert said("info", "demo")["metadata"]["skyrun.clip_sizes"] == "48x80 48x48 64x64"
    assert main([*run, "--frames", "37"]) == BAD_INPUT
    assert "37 frames, it makes 9 to 33" in capsys.readouterr().err
    assert main(["plan", "r2v", "--model", "demo", "--seconds", "5"]) == BAD_INPUT
    calibrate = ["calibrate", "--model", "demo:Q8_0", "-o", "i.gguf", "--image", "a.reference-1.png"]
    (demo / "p.txt").write_text(PROMPT)
    assert main([*calibrate, "--prompts", "p.txt", "--steps", "2"]) == 0
    assert main(["pull", "demo"]) == BAD_INPUT
    assert "nothing to fetch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "height", "width", "size", "frames"),
    [
        ({}, 100, 100, (64, 64), 17),
        ({}, 90, 160, (48, 80), 17),
        ({"size": "48x48"}, 90, 160, (48, 48), 17),
        ({"frames": 33}, 1, 1, (64, 64), 33),
        ({"seconds": 1}, 1, 1, (64, 64), 25),
    ],
)
def test_a_model_with_sizes_of_its_own_chooses_among_them(asked, height, width, size, frames):
    own = OwnClips(((64, 64), (48, 48), (48, 80)), 9, 33, 17, 4)
    request = own.fitted(Request("r2v", PROMPT, **asked), height, width)
    assert (request.size, request.frame_count) == (size, frames)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"size": "96x96"}, "no clips of 96x96, it makes 64x64, 48x80"),
        ({"frames": 5}, "no clips of 5 frames, it makes 9 to 33"),
        ({"seconds": 5}, "no clips of 121 frames"),
    ],
)
def test_other_sizes_than_those_of_the_model_are_refused(asked, said):
    with pytest.raises(SkyrunError, match=said):
        OwnClips(((64, 64), (48, 80)), 9, 33, 17, 4).fitted(Request("r2v", PROMPT, **asked), 1, 1)


@pytest.mark.parametrize(
    "values",
    [
        {"skyrun.clip_sizes": ""},
        {"skyrun.clip_sizes": "64"},
        {"skyrun.clip_sizes": "64x64 x"},
        {"skyrun.clip_sizes": 7},
        {"skyrun.least_frames": 0},
        {"skyrun.usual_frames": 8},
        {"skyrun.most_frames": "many"},
        {"skyrun.shown_scale": 1000},
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_refused(values):
    folder = whole_folder(wanted_name("demo", "r2v", None))
    file = open_gguf(next(folder.glob("SkyReels*")))
    assert read_own_clips(file).usual == 17
    file.metadata.update(values)
    with pytest.raises(Exception, match="states sizes and lengths of clips that cannot be"):
        read_own_clips(file)
