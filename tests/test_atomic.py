"""Files appear whole or not at all, also where several machines write to one folder."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from skyrun.kernels.files.atomic import replacing


def killed_while_writing(path):
    """What a process leaves that is killed in the middle of writing a file."""
    code = "import os, sys; from pathlib import Path; from skyrun.kernels.files.atomic import replacing\n"
    code += "with replacing(Path(sys.argv[1])) as partial:\n"
    code += "    partial.write_bytes(b'half'); print(partial, flush=True); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    left = Path(done.stdout.strip())
    assert left.read_bytes() == b"half"
    return left


def write(path):
    with replacing(path) as partial:
        partial.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = killed_while_writing(tmp_path / "clip.mp4")
    write(tmp_path / "other.mp4")
    assert left.exists()
    write(tmp_path / "clip.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "other.mp4"]


@pytest.mark.parametrize("what", ["host", "system", "container"])
def test_what_another_machine_writes_is_left_alone(tmp_path, monkeypatch, what):
    """Process ids of one machine mean nothing on another: there the file may be growing."""
    left = killed_while_writing(tmp_path / "clip.mp4")
    if what == "host":
        monkeypatch.setattr(platform, "node", lambda: "another")
    elif what == "system":
        monkeypatch.setattr(sys, "platform", "win32")
    else:
        monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    write(tmp_path / "clip.mp4")
    assert left.exists()


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    with replacing(tmp_path / "clip.mp4") as partial:
        partial.write_bytes(b"ours")
        pid = os.fork() if hasattr(os, "fork") else pytest.skip("needs fork")
        if pid == 0:
            write(tmp_path / "clip.mp4")
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert partial.read_bytes() == b"ours"
    assert (tmp_path / "clip.mp4").read_bytes() == b"ours"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failure_leaves_what_was_there(tmp_path):
    write(tmp_path / "clip.mp4")
    with pytest.raises(KeyError), replacing(tmp_path / "clip.mp4") as partial:
        partial.write_bytes(b"half")
        raise KeyError
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]
