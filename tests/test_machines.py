"""A clip on several machines: torchrun on each, here in two network namespaces that a virtual cable connects."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skyrun import run
from skyrun.planning.request import Request

LAUNCH = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture
def machines():
    """The commands that run something in each of two namespaces, the first of which is 10.77.0.1."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("there is no ip command: iproute2 has it")
    names = [f"skyrun-{os.getpid()}-{number}" for number in (1, 2)]

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield [["ip", "netns", "exec", name] for name in names]
    except subprocess.CalledProcessError as error:
        pytest.skip(f"namespaces cannot be made: {error.stderr.strip()}")
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)


def test_two_machines_make_one_clip(machines, converted, run_command, tmp_path):
    """Each starts a process; the first has the clip."""
    model, latents = str(converted("Q8_0")), tmp_path / "latents.safetensors"
    command = [*run_command, "--seed", "3", "--model", model, "--save-latents", str(latents)]
    started = []
    for rank, machine in enumerate(machines):
        meet = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1", "--master-addr", "10.77.0.1"]
        paths = os.pathsep.join(filter(None, sys.path))
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "cable", "PYTHONPATH": paths}
        arguments = [*machine, *LAUNCH, *meet, "--master-port", "29577", "-m", "skyrun", *command]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(arguments, env=environment, **output))
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    assert "2 devices, each CPU" in said[0]
    assert not re.search("denoise|error", said[1])
    picture = Path(run_command[run_command.index("--image") + 1])
    small = {"size": (32, 48), "frames": 5, "steps": 2, "device": "cpu", "model": model, "seed": 3}
    expected = run(Request("r2v", "a sea", (picture,), **small)).latents
    assert float((load_file(latents)["latents"] - expected).abs().max()) <= 1e-5
    assert torch.isfinite(expected).all()
