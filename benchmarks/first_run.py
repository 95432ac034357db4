"""A first run from an empty home, interrupted while it fetches and repeated: python benchmarks/first_run.py

The hub is the one of the tests, on this machine. It has the tiny reference checkpoint under the published name, and its
conversion to Q8_0 under the names of the community's repositories.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import Hub, serving  # noqa: E402

from skyrun.quant import convert  # noqa: E402
from skyrun.tasks.sources import SOURCES  # noqa: E402

DATA = ROOT / "tests" / "data"
TRANSFORMER = "r2v/SkyReels-v3-r2v-Q8_0.gguf"
COMMAND = "skyrun run r2v -p 'A woman walking by the sea.' --image her.png --size 64x96 --frames 9 --seed 1 -o clip.mp4"


def run(folder: Path, hub_url: str) -> subprocess.Popen[str]:
    """The command on an account that has nothing: its home is the folder, and no variable names another place."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("SKYRUN", "XDG", "HF_"))}
    environment = {**others, "HF_ENDPOINT": hub_url, "HOME": str(folder)}
    command = f"exec {sys.executable} -m {COMMAND}"
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, shell=True, cwd=folder, env=environment, text=True, **output)


def fill(hub: Hub, folder: Path) -> None:
    """Give the hub its repositories."""
    source = SOURCES["r2v"]
    checkpoint = DATA / "checkpoints" / "r2v-tiny"
    convert(checkpoint, folder / "converted")
    (folder / "skyreels" / "r2v").mkdir(parents=True)
    (folder / "umt5").mkdir()
    for file, place in (("SkyReels*", f"skyreels/{TRANSFORMER}"), ("umt5*", "umt5/umt5-xxl-encoder-Q8_0.gguf")):
        next((folder / "converted").glob(file)).rename(folder / place)
    hub.repos[source.checkpoint] = checkpoint
    hub.repos[source.gguf[0]], hub.repos[source.text_encoder[0]] = folder / "skyreels", folder / "umt5"


def finish(process: subprocess.Popen[str], home: Path) -> None:
    """Print what a command says, with its home as ~, and its exit code."""
    print(process.communicate()[0].replace(str(home), "~"), f"exit code {process.returncode}", sep="")


def main() -> None:
    with serving() as hub, tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copy(DATA / "goldens" / "e2e" / "r2v_1img" / "ref0.png", folder / "her.png")
        fill(hub, folder / "hub")
        hub.stall[TRANSFORMER] = 1_500_000  # bytes, and then nothing
        print(f"$ {COMMAND}")
        process = run(folder, hub.url)
        hub.stalled.wait(120)
        process.send_signal(signal.SIGINT)
        hub.stall.clear()
        hub.go_on.set()
        finish(process, folder)
        print(f"\n$ {COMMAND}")
        finish(run(folder, hub.url), folder)


if __name__ == "__main__":
    main()
