"""What `skyrun convert` and `info` do with each option, over whole files."""

import json
import re
import shutil
from collections import namedtuple

import pytest
import torch
from PIL import Image

from skyrun.cli import main
from skyrun.errors import FAILED, SkyrunError
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.quant import convert
from skyrun.quant.choose.importance import Importance, write_importance
from skyrun.quant.choose.sampled_error import noise_power
from skyrun.quant.choose.target_size import parse_size
from skyrun.quant.compare import compare
from skyrun.quant.conversion import check_space
from skyrun.quant.error_map import error_map
from skyrun.quant.plan import Settings
from skyrun.quant.planner import plan_conversion


def transformer(folder):
    (path,) = folder.glob("SkyReels*.gguf")
    return path


def errors_of(path, checkpoint, importance=lambda name: None):
    return {error.name: error for error in compare(path, checkpoint, importance)}


def mean_square(errors):
    matrices = [error for error in errors.values() if error.error]
    return sum(e.weights * e.error**2 for e in matrices) / sum(e.weights for e in matrices)


@pytest.mark.parametrize("size", ["1.93MB", "2MB", "2.1MB", "2.2MB", "2.5MB", "3MB", "9MB"])
def test_a_target_size_is_met_and_nearly_used(checkpoint, tmp_path, size):
    convert(checkpoint, tmp_path, target_size=size)
    nbytes = transformer(tmp_path).stat().st_size
    assert nbytes <= parse_size(size)
    assert nbytes > 0.985 * min(parse_size(size), 4_600_000)  # above, everything has 16 bits


@pytest.mark.parametrize("quant", ["Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M"])
def test_no_recipe_of_the_same_size_loses_less(checkpoint, converted, tmp_path, quant):
    nbytes = transformer(converted(quant)).stat().st_size
    convert(checkpoint, tmp_path, target_size=nbytes + 64)  # the name of the target is longer than the recipe's
    fitted, mixed = (errors_of(transformer(folder), checkpoint) for folder in (tmp_path, converted(quant)))
    assert what_matters(fitted) <= 1.001 * what_matters(mixed)


def what_matters(errors):
    """The squared errors, each counting as much as clips depend on it."""
    shares = {"cross_attn": 1 / 16, "self_attn.q": 1 / 8, "self_attn.k": 1 / 8}
    return sum(
        e.weights * e.error**2 * next((share for part, share in shares.items() if part in e.name), 1)
        for e in errors.values()
    )


def test_the_smallest_target_is_said(checkpoint, tmp_path):
    with pytest.raises(SkyrunError, match="1MB is too small for this model: the smallest") as error:
        convert(checkpoint, tmp_path, target_size="1MB")
    said = re.search(r"--target-size (\S+) or more", error.value.hint)[1]
    convert(checkpoint, tmp_path, target_size=said)


def test_rules_are_kept_within_a_target(checkpoint, tmp_path):
    convert(checkpoint, tmp_path, target_size="2.3MB", type_rules=[r"ffn\.2=Q8_0"])
    types = {info.name: info.format.name for info in open_gguf(transformer(tmp_path)).tensors.values()}
    assert {types[f"blocks.{n}.ffn.2.weight"] for n in range(2)} == {"Q8_0"}
    assert transformer(tmp_path).stat().st_size <= 2_300_000


@pytest.fixture
def importance(checkpoint, tmp_path):
    """A file that calls every fourth channel of every matrix a hundred times as important as the others."""
    tensors = plan_conversion(checkpoint, tmp_path, Settings()).files[0].tensors
    sums = {t.name: torch.ones(t.shape[1], dtype=torch.float64) for t in tensors if len(t.shape) == 2}
    for values in sums.values():
        values[::4] = 100
    path = tmp_path / "importance.gguf"
    write_importance(path, Importance(sums, dict.fromkeys(sums, 1), "test", (), 1))
    return path


def test_importance_lowers_the_error_that_counts(checkpoint, converted, importance, tmp_path):
    convert(checkpoint, tmp_path / "weighted", "Q4_K", imatrix=importance)
    path = transformer(tmp_path / "weighted")

    def weights(name):
        width = open_gguf(path).tensors[name].shape[-1]
        return torch.where(torch.arange(width) % 4 == 0, 100.0, 1.0) if name.endswith(".weight") else None

    ours, plain = (mean_square(errors_of(p, checkpoint, weights)) for p in (path, transformer(converted("Q4_K"))))
    assert ours < 0.8 * plain
    metadata = open_gguf(path).metadata
    assert (metadata["quantize.imatrix.file"], metadata["quantize.imatrix.chunks_count"]) == ("importance.gguf", 1)


def test_importance_of_another_model_is_refused(checkpoint, tmp_path):
    path = tmp_path / "other.gguf"
    for name, width, message in [
        ("blocks.0.ffn.0.weight", 512, "has 512 columns for blocks.0.ffn.0.weight, which has 256"),
        ("layers.0.weight", 256, "says nothing about any matrix"),
    ]:
        write_importance(path, Importance({name: torch.ones(width).double()}, {name: 1}))
        with pytest.raises(SkyrunError, match=message):
            convert(checkpoint, tmp_path / "out", "Q4_K", imatrix=path)


def test_rules_are_about_the_transformer(checkpoint, tmp_path):
    """The text encoder has feed-forward layers too, of rows that Q6_K cannot hold."""
    convert(checkpoint, tmp_path, "Q4_K", type_rules=["ffn=Q6_K", r"head\.head=Q8_0"])
    file = open_gguf(transformer(tmp_path))
    assert file.tensors["blocks.1.ffn.0.weight"].format.name == "Q6_K"
    assert file.tensors["head.head.weight"].format.name == "Q8_0"
    assert json.loads(file.metadata["skyrun.type_rules"]) == ["ffn=Q6_K", r"head\.head=Q8_0"]
    for rules in (["norm=Q8_0"], ["enc=Q8_0"]):
        with pytest.raises(SkyrunError, match="matches no matrix of a transformer"):
            convert(checkpoint, tmp_path / "no", type_rules=rules)


def test_expected_errors_are_those_that_come_true(checkpoint, tmp_path):
    settings = Settings("Q3_K_M", type_rules=("embedding=Q4_0",))
    file = plan_conversion(checkpoint, tmp_path, settings).files[0]
    convert(checkpoint, tmp_path, "Q3_K_M", type_rules=settings.type_rules)
    true = errors_of(file.path, checkpoint)
    assert {name for name, error in true.items() if error.error} == {
        name for name, power in file.errors.items() if power
    }
    for name, power in file.errors.items():
        assert power**0.5 == pytest.approx(true[name].error, rel=0.05)
    assert file.error**2 == pytest.approx(mean_square(true), rel=0.05)


def test_a_dry_run_writes_nothing_and_says_everything(checkpoint, tmp_path, capsys):
    command = ["convert", str(checkpoint), "-o", str(tmp_path / "out"), "--target-size", "2.2MB", "--dry-run", "--json"]
    assert main(command) == 0
    output = capsys.readouterr()
    plan = json.loads(output.out)
    assert plan["event"] == "plan"
    assert [file["role"] for file in plan["files"]] == ["transformer", "text_encoder", "vae"]
    assert plan["files"][0]["bytes"] <= 2_200_000 and 0.01 < plan["files"][0]["expected_error"] < 0.3
    assert "r2v transformer" in output.err
    assert all(f"{count} {type}" in output.err for type, count in plan["files"][0]["types"].items())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_a_report_shows_every_matrix_and_names_the_worst(checkpoint, tmp_path, suffix):
    report = tmp_path / f"errors{suffix}"
    command = ["convert", str(checkpoint), "-o", str(tmp_path / "out"), "--quant", "Q3_K_M", "--report", str(report)]
    assert main(command) == 0
    shown = error_map("title", list(errors_of(transformer(tmp_path / "out"), checkpoint).values()))
    assert set(shown.kinds) == {f"{a}_attn.{m}" for a in ("self", "cross") for m in "qkvo"} | {"ffn.0", "ffn.2"}
    assert shown.worst[0].error == max(e.error for row in shown.kinds.values() for e in row.values()) == shown.high
    if suffix == ".html":
        text = report.read_text()
        assert text.count('class="cell"') == 20
        assert shown.worst[0].name in text and f"{shown.worst[0].error:.2%}" in text
    else:
        colours = {pixel for _, pixel in Image.open(report).getcolors(1 << 20)}
        assert {shown.colour(e.error) for row in shown.kinds.values() for e in row.values()} <= colours


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_done(checkpoint, tmp_path, capsys):
    for report, more, message in [
        ("r.pdf", [], "name it .html or .png"),
        ("r.png", ["--dry-run"], "leave out one of them"),
        ("file/r.png", [], "choose another place"),
    ]:
        (tmp_path / "file").touch()
        command = ["convert", str(checkpoint), "-o", str(tmp_path / "out"), "--report", str(tmp_path / report), *more]
        assert main(command) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_info_against_the_source(checkpoint, converted, capsys):
    path = transformer(converted("Q4_K"))
    assert main(["info", str(path), "--against", str(checkpoint), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    errors = {error["name"]: error for error in described["errors"]}
    assert errors["blocks.0.ffn.0.weight"]["error"] == pytest.approx(0.0701, rel=0.02)
    assert errors["blocks.0.ffn.0.bias"]["error"] == 0
    assert described["roles"]["feed-forward"]["tensors"] == 4
    assert sum(role["bytes"] for role in described["roles"].values()) == sum(
        t["bytes"] for t in described["types"].values()
    )
    assert main(["info", str(path), "--against", str(checkpoint)]) == 0
    assert re.search(r"blocks\.\d\.\S+ +Q4_K +\d\.\d+%", capsys.readouterr().out)
    assert main(["info", str(path), "--against", str(checkpoint / "vae")]) == 2
    assert "has no transformer r2v of the same shapes, it has vae" in capsys.readouterr().err


def test_noise_is_that_of_the_output():
    """Against multiplying with inputs of the given mean squares."""
    generator = torch.Generator().manual_seed(1)
    x, decoded, spread = (torch.randn(shape, generator=generator) for shape in ((6, 8), (6, 8), (8,)))
    inputs = torch.randn(400_000, 8, generator=generator) * spread
    noise, signal = noise_power(x, decoded, spread.square())
    assert noise == pytest.approx(float((inputs @ (x - decoded).T).square().mean(0).sum()), rel=0.02)
    assert signal == pytest.approx(float((inputs @ x.T).square().mean(0).sum()), rel=0.02)


def test_a_folder_is_not_filled_with_what_was_made_from_it(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    for out in (copy, copy / "gguf"):
        with pytest.raises(SkyrunError, match="lies in the checkpoint"):
            convert(copy, out)


def test_a_file_alone_gets_the_type_that_was_asked_for(checkpoint, converted, tmp_path):
    summary = convert(checkpoint / "text_encoder" / "model.safetensors", tmp_path, "Q4_0")
    assert summary["files"][0]["types"] == {"Q4_0": 13, "Q4_1": 2, "F32": 7}
    with pytest.raises(SkyrunError, match="--target-size is about a transformer, the source has none"):
        convert(checkpoint / "text_encoder", tmp_path, target_size="1MB")


def test_people_are_told_what_would_surprise_them(checkpoint, converted, tmp_path):
    (tmp_path / "other.gguf.partial").touch()
    source = transformer(converted("Q4_K"))
    notes = plan_conversion(source, tmp_path, Settings("Q8_0")).notes
    assert any("is itself Q4_K: errors are counted from there" in note for note in notes)
    assert any("other.gguf.partial is left from another conversion" in note for note in notes)
    convert(source, tmp_path, "Q8_0")
    notes = plan_conversion(source, tmp_path, Settings("Q8_0")).notes
    assert any("is there already and will be replaced" in note for note in notes)


def test_a_type_that_is_there_already_is_copied(converted, tmp_path):
    """Encoding it again could only lose."""
    source = transformer(converted("Q4_K"))
    convert(source, tmp_path, "Q4_K")
    before, after = open_gguf(source), open_gguf(transformer(tmp_path))
    for name, info in before.tensors.items():
        assert after.read(after.tensors[name]) == before.read(info)


def test_a_full_disk_is_known_before(checkpoint, tmp_path, monkeypatch):
    conversion = plan_conversion(checkpoint, tmp_path, Settings())
    needed = sum(file.nbytes for file in conversion.files)
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, needed))
    check_space(conversion)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, needed - 1))
    with pytest.raises(SkyrunError, match="need .* MB and .* has .* MB free") as error:
        check_space(conversion)
    assert error.value.code == FAILED


def test_a_device_that_is_not_there(checkpoint, tmp_path):
    with pytest.raises(SkyrunError, match="cannot encode on 'tpu'"):
        convert(checkpoint, tmp_path / "out", device="tpu")
    assert not (tmp_path / "out").exists()


def test_matrices_of_another_type_are_said_with_why(checkpoint, tmp_path, capsys):
    command = ["convert", str(checkpoint), "-o", str(tmp_path), "--text-encoder-quant", "Q4_K", "--dry-run"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "matrices have another type: rows of 128 are not a multiple of Q4_K's 256" in said.out + said.err
