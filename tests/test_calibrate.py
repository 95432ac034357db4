"""Calibration: what is collected is what the layers see, however it is run, interrupted, resumed or merged."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import skyrun.models.dit.transformer as dit
import skyrun.tools.calibrate as calibration
from skyrun.cli import main
from skyrun.errors import BAD_INPUT, FAILED, INTERRUPTED, MODEL_MISSING, WILL_NOT_FIT, SkyrunError
from skyrun.kernels import dequantize
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.models.folder import open_folder
from skyrun.quant import quantize
from skyrun.quant.choose.importance import read_importance
from skyrun.tools.calibration_prompts import PROMPTS, draw_images

SMALL = ["--size", "32x48", "--frames", "5", "--steps", "2", "--device", "cpu"]
LAYERS = [f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"] + ["ffn.0", "ffn.2"]
LINES = ["a sea", "two dogs run on a beach at noon", "a red city", "snow"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, converted):
    """What arguments can name."""
    folder = tmp_path_factory.mktemp("inputs")
    Image.new("RGB", (60, 40), "teal").save(folder / "picture.png")
    (folder / "prompts.txt").write_text("\n\n".join(LINES) + "\n")
    for name, lines in (("first", LINES[:2]), ("second", LINES[2:])):
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return {path.stem: str(path) for path in folder.iterdir()} | {"model": str(converted("BF16"))}


@pytest.fixture
def places(inputs, tmp_path):
    """With a place to write to."""
    return inputs | {"out": str(tmp_path / "out.gguf")}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """What all four clips give in one go."""
    output = tmp_path_factory.mktemp("whole") / "whole.gguf"
    assert calibrate(inputs | {"out": str(output)}, output="whole") == 0
    return output


def calibrate(places, *more, prompts="prompts", output="out"):
    arguments = ["calibrate", "--model", "{model}", "--image", "{picture}", *SMALL, *more]
    arguments += ["--prompts", f"{{{prompts}}}", "-o", str(Path(places["out"]).with_stem(output))]
    return main([argument.format(**places) for argument in arguments])


class Recorder:
    """Stands in for a block's weights and notes the input of every layer."""

    def __init__(self, weights, seen):
        self._weights, self._seen = weights, seen
        self.owner, self.dense, self.attention = weights.owner, weights.dense, weights.attention
        self.rotated, self.handed_on = weights.rotated, weights.handed_on

    def linear(self, name, x, *rest, **sum_up):
        self._seen.setdefault(name, []).append(x.clone())
        return self._weights.linear(name, x, *rest, **sum_up)


def test_sums_are_those_of_the_inputs(places, monkeypatch):
    seen, block = [], dit.dit_block

    def recording(x, weights, *rest):
        seen.append({})
        return block(x, Recorder(weights, seen[-1]), *rest)

    monkeypatch.setattr(dit, "dit_block", recording)
    assert calibrate(places) == 0
    importance = read_importance(Path(places["out"]))
    assert len(seen) == 2 * len(LINES) * 2  # blocks, clips, steps
    assert sorted(importance.sums) == sorted(f"blocks.{n}.{layer}.weight" for n in range(2) for layer in LAYERS)
    for name in importance.sums:
        _, index, layer = name.removesuffix(".weight").split(".", 2)
        inputs = torch.cat([x for block in seen[int(index) :: 2] for x in block[layer]]).double()
        assert importance.counts[name] == len(inputs)
        torch.testing.assert_close(importance.sums[name], inputs.square().sum(0), rtol=1e-6, atol=0)
    tokens = (2 + 4) * 2 * 3  # two latent frames and four references of 4 x 6 latents
    assert importance.counts["blocks.0.ffn.0.weight"] == tokens * 2 * len(LINES)
    assert importance.counts["blocks.0.cross_attn.k.weight"] == 512 * 2 * len(LINES)


def test_it_does_not_matter_what_stays_in_memory_or_how_rows_are_divided(places, whole, monkeypatch):
    prepare = calibration.prepare

    def keeping(request):
        job = prepare(request)
        return dataclasses.replace(job, plan=dataclasses.replace(job.plan, resident_blocks=2))

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "prepare", keeping)
        assert calibrate(places) == 0
    assert Path(places["out"]).read_bytes() == whole.read_bytes()
    monkeypatch.setattr(calibration, "_ROWS", 7)
    assert calibrate(places, output="parts") == 0
    first, parts = read_importance(whole), read_importance(Path(places["out"]).with_stem("parts"))
    assert first.counts == parts.counts
    for name, sums in first.sums.items():
        torch.testing.assert_close(parts.sums[name], sums, rtol=1e-6, atol=0)


def test_rows_of_any_shape_are_added_up():
    squares, x = calibration.SumsOfSquares(), torch.randn(3, 5, 8, dtype=torch.bfloat16)
    for part in (x[:1], x[1], x[2, 3], x[2, :3], x[2, 4:]):
        squares(4, "ffn.0", part.view(-1, 8))
    squares(4, "ffn.0", x)
    (sums,) = squares.sums().values()
    torch.testing.assert_close(sums, 2 * x.double().square().sum((0, 1)))
    assert squares.counts == {"blocks.4.ffn.0.weight": 30}
    squares(4, "ffn.2", torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(SkyrunError, match="the input of blocks.4.ffn.2.weight and 0 others became infinite"):
        squares.sums()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SkyrunError("the disk went away", "plug it in", FAILED)])
def test_an_interrupted_run_goes_on_where_it_was(places, whole, monkeypatch, capsys, error):
    prepare, calls = calibration.prepare, []

    def failing(request):
        calls.append(request.prompt)
        if len(calls) == 3:
            raise error
        return prepare(request)

    monkeypatch.setattr(calibration, "prepare", failing)
    capsys.readouterr()
    assert calibrate(places) == (FAILED if isinstance(error, SkyrunError) else INTERRUPTED)
    assert "2 of 4 clips are in" in capsys.readouterr().err
    assert len(read_importance(Path(places["out"])).samples) == 2
    assert not list(Path(places["out"]).parent.glob(".*partial"))
    assert calibrate(places) == 0
    assert "2 of 4 clips are in" in capsys.readouterr().err
    assert calls == [*LINES[:3], *LINES[2:]]
    assert Path(places["out"]).read_bytes() == whole.read_bytes()
    assert calibrate(places) == 0
    assert len(calls) == 5
    assert Path(places["out"]).read_bytes() == whole.read_bytes()


def test_more_prompts_are_added_to_a_file(places, whole):
    assert calibrate(places, prompts="first") == 0
    assert calibrate(places) == 0
    assert Path(places["out"]).read_bytes() == whole.read_bytes()


def test_two_halves_are_the_whole(places, whole, capsys):
    assert calibrate(places, prompts="first", output="a") == 0
    assert calibrate(places, "--seed", "2", prompts="second", output="b") == 0
    out = Path(places["out"])
    halves = [str(out.with_stem(name)) for name in "ab"]
    capsys.readouterr()
    assert main(["calibrate", "--merge", *halves, "-o", str(out.with_stem("both")), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["weights"], result["clips"]) == (20, 4)
    both, expected = read_importance(out.with_stem("both")), read_importance(whole)
    assert (both.samples, both.origin, both.counts) == (expected.samples, expected.origin, expected.counts)
    assert main(["calibrate", "--merge", str(whole), "-o", str(out.with_suffix(".dat"))]) == 0
    other_format = read_importance(out.with_suffix(".dat"))
    for name in expected.sums:
        torch.testing.assert_close(both.mean(name), expected.mean(name))
        torch.testing.assert_close(other_format.mean(name), expected.mean(name))


def test_it_lowers_the_error_that_counts(whole, converted):
    importance = read_importance(whole)
    file = open_gguf(next(converted("F32").glob("SkyReels*.gguf")))
    name = "blocks.1.ffn.2.weight"
    x = torch.frombuffer(file.read(file.tensors[name]), dtype=torch.float32).view(file.tensors[name].shape)
    weight = importance.mean(name)
    plain, weighted = (
        float((weight * (dequantize(quantize(x, "Q4_K", used), "Q4_K") - x) ** 2).sum()) for used in (None, weight)
    )
    assert weighted < 0.95 * plain


def test_progress_for_machines(places, capsys):
    assert calibrate(places, "--json") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["stage_started", *["progress"] * 8, "stage_ended", "result"]
    assert [event["done"] for event in events[1:9]] == [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]
    assert events[-1] == {"event": "result", "output": places["out"], "weights": 20, "clips": 4}


def test_without_prompts_and_pictures_there_are_built_in_ones(tmp_path, converted, capsys):
    output = str(tmp_path / "default.gguf")
    arguments = ["calibrate", "--model", str(converted("Q4_K")), "--size", "32x48", "--steps", "1", "--device", "cpu"]
    assert main([*arguments, "-o", output]) == 0
    importance = read_importance(Path(output))
    assert [sample.split(" ", 1)[1] for sample in importance.samples] == [prompt[:60] for prompt in PROMPTS]
    assert "17 frames" in importance.origin
    assert "the model is Q4_K: its errors are measured too" in capsys.readouterr().err
    assert len({Image.open(path).size for path in draw_images(tmp_path)}) == 4


def test_clips_have_one_to_four_pictures(converted, tmp_path):
    pictures = draw_images(tmp_path)
    plan = calibration.plan_calibration(converted("BF16"), tmp_path / "x.gguf", ["a", "b"], pictures, size="32x48")
    assert [len(clip.request.images) for clip in plan.clips] == [1, 2, 3, 4]
    assert [clip.request.prompt for clip in plan.clips] == ["a", "b", "a", "b"]
    assert [clip.request.seed for clip in plan.clips] == [0, 1, 2, 3]
    assert len({clip.label for clip in plan.clips}) == 4
    with pytest.raises(SkyrunError, match="no prompt was given"):
        calibration.plan_calibration(converted("BF16"), tmp_path / "x.gguf", [], pictures)


def test_in_the_models_folder_it_is_not_taken_for_a_model(whole, converted, tmp_path):
    shutil.copytree(converted("BF16"), tmp_path / "model")
    shutil.copy(whole, tmp_path / "model" / "importance.gguf")
    (transformer,) = open_folder(tmp_path / "model").transformers
    assert transformer.path.name.startswith("SkyReels")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(places, whole):
    assert calibrate(places, "--device", "cuda", "--dtype", "float32") == 0
    on_gpu, expected = read_importance(Path(places["out"])), read_importance(whole)
    assert on_gpu.counts == expected.counts
    for name in expected.sums:
        torch.testing.assert_close(on_gpu.mean(name), expected.mean(name), rtol=1e-2, atol=1e-5)


def test_help_does_not_import_torch():
    code = "import sys\nfrom skyrun.cli import main\ntry: main(['calibrate', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parent.parent)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, converted):
    """Good and bad files that arguments can name."""
    folder = tmp_path_factory.mktemp("shelf")
    Image.new("RGB", (60, 40), "teal").save(folder / "picture.png")
    (folder / "prompts.txt").write_text("a sea\n")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "text.png").write_text("not a picture")
    (folder / "cut.gguf").write_bytes(b"GGUF")
    shutil.copytree(converted("BF16"), folder / "foreign")
    (model,) = (folder / "foreign").glob("SkyReels*")
    model.write_bytes(model.read_bytes().replace(b"r2v", b"a2v", 1))
    names = {"model": str(converted("BF16")), "quantized": str(converted("Q8_0"))}
    names |= {path.name.split(".")[0]: str(path) for path in folder.iterdir()}
    names |= {"out": str(folder / "good.gguf"), "folder": str(folder)}
    arguments = ["calibrate", "--model", "{model}", "--prompts", "{prompts}", "--image", "{picture}", *SMALL]
    assert main([argument.format(**names) for argument in [*arguments, "-o", "{out}"]]) == 0
    return names


BASE = ["calibrate", "--model", "{model}", "--device", "cpu"]
GOOD = [*BASE, "--prompts", "{prompts}", "--image", "{picture}"]
AGAIN = [*GOOD, *SMALL, "-o", "{out}"]
MERGE = ["calibrate", "--merge"]

# fmt: off
MISTAKES = [
    # models
    (["calibrate", "--model", "nowhere"], MODEL_MISSING, "the model nowhere does not exist", "skyrun convert"),
    (["calibrate", "--model", "{foreign}"], BAD_INPUT, "is a model for a2v, calibrate runs r2v", "a model for r2v"),
    # prompts and pictures
    ([*BASE, "--prompts", "none.txt"], MODEL_MISSING, "none.txt does not exist", "one prompt per line"),
    ([*BASE, "--prompts", "{blank}"], BAD_INPUT, "blank.txt has no prompt in it", "one prompt per line"),
    ([*BASE, "--prompts", "{latin}"], BAD_INPUT, "latin.txt is not a list of prompts: .*utf-8", "UTF-8"),
    ([*BASE, "--prompts", "{folder}"], BAD_INPUT, "is not a list of prompts", "text file"),
    ([*BASE, "--image", "none.png", "{text}"], BAD_INPUT, "(?s)none.png does not exist.*text.png is not", "PNG"),
    # settings
    ([*GOOD, "--size", "100x200"], BAD_INPUT, "size 100x200 is not on the grid", ""),
    ([*GOOD, "--frames", "6", "--steps", "0"], BAD_INPUT, "(?s)6 frames.*0 steps", ""),
    ([*GOOD, *SMALL, "--max-ram", "0.1"], WILL_NOT_FIT, "will not fit", ""),
    # places
    ([*GOOD, "-o", "x.dat"], BAD_INPUT, "x.dat does not end in .gguf; .* --merge F.gguf -o F.dat", "another -o"),
    ([*GOOD, "-o", "{folder}"], BAD_INPUT, "is a folder, expected the name of a file", "another -o"),
    ([*GOOD, "-o", "{picture}/x.gguf"], BAD_INPUT, "x.gguf cannot be written: .* is a file", "another -o"),
    ([*GOOD, "-o", "{cut}"], BAD_INPUT, "cut.gguf is not a usable GGUF file", ""),
    # going on with a file
    ([*AGAIN, "--steps", "3"], BAD_INPUT, "was collected from .* 2 steps; this is .* 3 steps", "--merge"),
    ([*AGAIN, "--size", "48x48"], BAD_INPUT, "was collected from .* 32x48, .*; this is .* 48x48", "another -o"),
    ([*AGAIN, "--model", "{quantized}"], BAD_INPUT, "was collected from .* BF16 .*; this is .* Q8_0", "another -o"),
    # merging
    ([*MERGE, "{out}", "none.gguf", "-o", "x.gguf"], MODEL_MISSING, "none.gguf does not exist", ""),
    ([*MERGE, "{picture}", "-o", "x.gguf"], BAD_INPUT, "picture.png is not a usable importance file", "calibrate"),
    ([*MERGE, "{out}", "{out}", "-o", "x.gguf"], BAD_INPUT, "good.gguf cannot be merged .* in both, such as", "once"),
    ([*MERGE, "{out}", "-o", "x.txt"], BAD_INPUT, "x.txt ends in neither .gguf nor .dat", "importance.gguf"),
]
# fmt: on


@pytest.mark.parametrize(("arguments", "code", "message", "hint"), MISTAKES)
def test_a_mistake_gets_a_sentence_and_a_code(shelf, capsys, arguments, code, message, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {path: path.read_bytes() for path in Path(shelf["folder"]).rglob("*") if path.is_file()}
    assert main([argument.format(**shelf) for argument in arguments]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(message, output.err), output.err
    assert hint in output.err.split("hint: ")[-1]
    assert "Traceback" not in output.err
    assert {path: path.read_bytes() for path in Path(shelf["folder"]).rglob("*") if path.is_file()} == content
    assert not list(tmp_path.iterdir())


def test_either_a_model_or_files(capsys):
    for arguments in ([], ["--model", "x", "--merge", "y"]):
        with pytest.raises(SystemExit) as stop:
            main(["calibrate", *arguments])
        assert stop.value.code == 2
