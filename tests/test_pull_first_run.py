"""A first run on an account that has nothing: no folder of skyrun's, and no variable that names one."""

import os
import subprocess
import sys

import pytest
from PIL import Image

SMALL = ["--size", "32x48", "--frames", "5", "--steps", "2", "--device", "cpu"]
NAMED = ("SKYRUN", "XDG", "HF_", "HUGGING")


@pytest.fixture
def skyrun(hub, tmp_path):
    """skyrun("pull", "r2v") runs a command with an empty HOME; home=False leaves HOME out, for an unknown user."""
    Image.new("RGB", (48, 32), "teal").save(tmp_path / "her.png")
    (tmp_path / "home").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NAMED)}

    def run(*words, home=True):
        environment = kept | {"HF_ENDPOINT": hub.url, "HOME": str(tmp_path / "home")}
        program = "from skyrun.cli import main; raise SystemExit(main())"
        if not home:
            del environment["HOME"]
            program = f"import os, pwd; pwd.getpwuid = {{}}.__getitem__; {program}"
        command = [sys.executable, "-c", program, *words]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    "command",
    [
        ["pull", "r2v", "--dry-run"],
        ["pull", "r2v"],
        ["run", "r2v", "-p", "a sea", "--image", "her.png", "-o", "clip.mp4", *SMALL],
    ],
    ids=" ".join,
)
def test_an_empty_home(skyrun, tmp_path, command):
    done = skyrun(*command)
    assert done.returncode == 0, done.stderr
    kept = {path.name for path in (tmp_path / "home" / ".local" / "share" / "skyrun" / "models").glob("*")}
    assert kept == (set() if "--dry-run" in command else {"r2v-Q8_0"})
    assert (tmp_path / "clip.mp4").exists() is (command[0] == "run")


@pytest.mark.parametrize("command", [["pull", "r2v"], ["run", "r2v", "-p", "a sea", "--image", "her.png", *SMALL]])
def test_no_home_at_all(skyrun, command):
    done = skyrun(*command, home=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: the user's home folder is not known")
    assert "SKYRUN_MODELS" in done.stderr or "SKYRUN_CACHE" in done.stderr
