"""Conversions that are interrupted, several at a time, or that the disk fails: nothing lost, and the same bytes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from skyrun.errors import FAILED, SkyrunError
from skyrun.quant.conversion import write_file
from skyrun.quant.partial import partial_path
from skyrun.quant.plan import Settings
from skyrun.quant.planner import plan_conversion
from skyrun.tools.tiny_checkpoint import CheckpointDims, write_checkpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


def planned(source, out, quant="Q4_K"):
    return plan_conversion(source, out, Settings(quant)).files[0]


def whole(source, out, quant="Q4_K"):
    file = planned(source, out, quant)
    assert sum(write_file(file)) > 0
    return file.path.read_bytes()


def interrupt(file, after):
    """Begin to write a file and stop after some pieces, as Ctrl-C does."""
    writing = write_file(file)
    resumed = next(writing)
    for _ in range(after):
        next(writing)
    writing.close()
    return resumed


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("after", [1, 7, 30])
def test_an_interrupted_conversion_goes_on_and_gives_the_same_bytes(checkpoint, tmp_path, after):
    expected = whole(checkpoint, tmp_path / "undisturbed")
    file = planned(checkpoint, tmp_path / "out")
    assert interrupt(file, after) == 0
    assert names(tmp_path / "out") == [f"{file.path.name}.partial", f"{file.path.name}.partial.journal"]
    finished = sum(tensor.nbytes for tensor in file.tensors[:after])
    assert interrupt(planned(checkpoint, tmp_path / "out"), 1) == finished
    rest = list(write_file(planned(checkpoint, tmp_path / "out")))
    assert rest[0] >= finished
    assert sum(rest) == sum(tensor.nbytes for tensor in file.tensors)
    assert file.path.read_bytes() == expected
    assert names(tmp_path / "out") == [file.path.name]


def test_another_conversion_does_not_go_on_from_it(copy, tmp_path):
    file = planned(copy, tmp_path / "out")
    interrupt(file, 20)
    os.utime(next((copy / "transformer").glob("*.safetensors")))  # a source that was written again
    assert next(write_file(planned(copy, tmp_path / "out"))) == 0
    interrupt(planned(copy, tmp_path / "out"), 20)
    partial_path(file.path).write_bytes(b"GGUF")
    assert next(write_file(planned(copy, tmp_path / "out"))) == 0


def test_a_journal_that_was_cut_counts_as_far_as_it_goes(checkpoint, tmp_path):
    expected = whole(checkpoint, tmp_path / "undisturbed")
    file = planned(checkpoint, tmp_path / "out")
    interrupt(file, 20)
    journal = file.path.with_name(f"{file.path.name}.partial.journal")
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines[:10]) + "\n" + lines[10][:9])
    assert next(rest := write_file(file)) == sum(tensor.nbytes for tensor in file.tensors[:9])
    list(rest)
    assert file.path.read_bytes() == expected


@pytest.mark.parametrize("first", ["{}", "[]", "5", "null", '{"fingerprint": "0"}', "", "\xff"])
def test_a_journal_of_nonsense_counts_for_nothing(checkpoint, tmp_path, first):
    file = planned(checkpoint, tmp_path / "out")
    interrupt(file, 5)
    journal = file.path.with_name(f"{file.path.name}.partial.journal")
    rest = journal.read_text().split("\n", 1)[1]
    journal.write_text(f"{first}\n{rest}", encoding="latin1")
    assert next(write_file(file)) == 0


def test_a_journal_never_vouches_for_a_file_that_is_gone(checkpoint, tmp_path):
    """Someone removes the large partial file and leaves the journal; the next conversion is killed at once."""
    expected = whole(checkpoint, tmp_path / "undisturbed")
    file = planned(checkpoint, tmp_path / "out")
    interrupt(file, 20)
    partial_path(file.path).unlink()
    assert interrupt(file, 0) == 0
    list(write_file(file))
    assert file.path.read_bytes() == expected


def test_two_conversions_do_not_write_one_file(checkpoint, tmp_path):
    file = planned(checkpoint, tmp_path / "out")
    writing = write_file(file)
    next(writing), next(writing)
    with pytest.raises(SkyrunError, match=f"another conversion is writing {re.escape(file.path.name)}"):
        list(write_file(file))
    command = [sys.executable, "-m", "skyrun", "convert", str(checkpoint), "-o", str(tmp_path / "out")]
    done = subprocess.run([*command, "--quant", "Q4_K"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "another conversion is writing" in done.stderr
    assert sum(writing) > 0
    assert file.path.read_bytes() == whole(checkpoint, tmp_path / "undisturbed")


def test_a_source_that_changes_while_it_is_read_is_reported_by_tensor(copy, tmp_path):
    file = planned(copy, tmp_path / "out")
    writing = write_file(file)
    next(writing), next(writing)
    for shard in (copy / "transformer").glob("*.safetensors"):
        with open(shard, "rb+") as changing:
            changing.seek(-1000, os.SEEK_END)
            changing.write(bytes(1000))
    with pytest.raises(SkyrunError, match="changed while .* was read from it"):
        list(writing)
    assert names(tmp_path / "out") == []


def test_what_is_finished_survives_the_last_step(checkpoint, tmp_path, monkeypatch):
    """On some systems a file that is in use cannot be replaced."""
    expected = whole(checkpoint, tmp_path / "undisturbed")
    file = planned(checkpoint, tmp_path / "out")

    def refuse(source, target):
        raise PermissionError(13, "in use", str(target))

    with monkeypatch.context() as patch:
        patch.setattr("skyrun.quant.partial.os.replace", refuse)
        with pytest.raises(SkyrunError, match="in use") as error:
            list(write_file(file))
    assert error.value.hint.endswith("to go on")
    resumed, *rest = write_file(file)
    assert resumed == sum(tensor.nbytes for tensor in file.tensors) and not rest
    assert file.path.read_bytes() == expected


def test_worker_processes_give_the_same_bytes(checkpoint, tmp_path):
    expected = whole(checkpoint, tmp_path / "alone")
    file = planned(checkpoint, tmp_path / "workers")
    assert sum(write_file(file, workers=2)) == sum(tensor.nbytes for tensor in file.tensors)
    assert file.path.read_bytes() == expected


def test_a_worker_that_dies_is_reported_and_its_work_done_again(checkpoint, tmp_path):
    expected = whole(checkpoint, tmp_path / "alone")
    file = planned(checkpoint, tmp_path / "workers")
    writing = write_file(file, workers=1)
    next(writing)
    next(writing)
    for child in psutil.Process().children():
        if "skyrun.quant.worker" in child.cmdline():
            child.kill()
    with pytest.raises(SkyrunError, match="an encoding process ended with code -9") as error:
        list(writing)
    assert error.value.code == FAILED
    assert sum(write_file(planned(checkpoint, tmp_path / "workers"))) > 0
    assert file.path.read_bytes() == expected


_LIMITED = """
import resource, sys
from skyrun.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(["convert", *sys.argv[2:]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
def test_a_disk_that_takes_no_more_is_said_and_leaves_what_was_there(checkpoint, tmp_path):
    out = tmp_path / "out"
    whole(checkpoint, out, "Q8_0")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    command = [sys.executable, "-c", _LIMITED, "100000", str(checkpoint), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == FAILED
    assert "File too large" in done.stderr and "run the same command again" in done.stderr
    assert {name: (out / name).read_bytes() for name in before} == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_what_the_next_one_takes_up(tmp_path, number):
    source, out = tmp_path / "checkpoint", tmp_path / "out"
    write_checkpoint(source, CheckpointDims(dim=512, layers=12, ffn=2048))
    expected = whole(source, tmp_path / "undisturbed", "Q4_K")
    command = [sys.executable, "-m", "skyrun", "convert", str(source), "-o", str(out), "--quant", "Q4_K"]
    file = planned(source, out, "Q4_K")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (partial := partial_path(file.path)).exists() or partial.stat().st_blocks * 512 < file.nbytes // 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate()[1]
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    assert number == signal.SIGKILL or "run the same command again" in said
    assert not file.path.exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert file.path.read_bytes() == expected, done.stderr
    assert not [name for name in names(out) if "partial" in name]
