"""The autoencoder beside diffusers' AutoencoderKLWan with the same weights. python benchmarks/vae.py [options]

Both run on the CPU in float32, each in a process of its own, and take turns. Weights are random, in the published
shapes. Times are medians: of the wall clock, and of the processor, which programs beside this one disturb less.
Threads sleep where they wait, or waiting would count as work. Peak memory is that of the process while it decodes or
encodes, beyond what it holds between.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from environment import environment
from torch import Tensor

from skyrun.kernels.name_tables import WAN_VAE
from skyrun.models.vae import LATENT_CHANNELS, WanVAE
from skyrun.units import GIB

PROGRAMS, WAYS = ("skyrun", "diffusers"), ("decode", "encode")
CPU = torch.device("cpu")
ONE = [1.0] * LATENT_CHANNELS, [0.0] * LATENT_CHANNELS  # statistics of latents that change nothing
PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def write_weights(folder: Path, base: int) -> None:
    """The same weights for both programs."""
    from diffusers import AutoencoderKLWan
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=base, z_dim=LATENT_CHANNELS)
    model.save_pretrained(folder / "diffusers")
    names = {row.name(1): row.name() for row in WAN_VAE.expand()}
    metadata = {"skyrun": json.dumps({"latents_std": ONE[0], "latents_mean": ONE[1]})}
    save_file({names[name]: t.contiguous() for name, t in model.state_dict().items()}, folder / "vae", metadata)


def open_program(program: str, folder: Path) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions that decode latents [16, F, h, w] and encode pixels [3, T, H, W]."""
    if program == "skyrun":
        vae = WanVAE(folder / "vae", CPU)
        return {"decode": lambda x: torch.cat([*vae.decode(x)], 1), "encode": lambda x: vae.encode(x)[0]}
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan.from_pretrained(folder / "diffusers").eval()
    return {
        "decode": lambda x: model.decode(x.unsqueeze(0)).sample.squeeze(0),
        "encode": lambda x: model.encode(x.unsqueeze(0)).latent_dist.mean.squeeze(0),
    }


@torch.inference_mode()
def serve(program: str, folder: Path) -> None:
    """Measure whatever way is asked for on standard input."""
    ways = open_program(program, folder)
    for line in sys.stdin:
        way, result = line.split()
        x = torch.load(folder / way, weights_only=True)
        before = _reset_peak()
        start, work = time.perf_counter(), time.process_time()
        y = ways[way](x)
        seconds, cpu = time.perf_counter() - start, time.process_time() - work
        torch.save(y, folder / result)
        del y
        sys.stdout.write(json.dumps({"seconds": seconds, "cpu": cpu, "peak": _memory("VmHWM") - before}) + "\n")
        sys.stdout.flush()


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(kind))


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    height, width, frames = arguments.height, arguments.width, arguments.frames
    generator = torch.Generator().manual_seed(1)
    torch.save(torch.rand(3, frames, height, width, generator=generator) * 2 - 1, folder / "encode")
    latents = LATENT_CHANNELS, 1 + (frames - 1) // 4, height // 8, width // 8
    torch.save(torch.randn(latents, generator=generator), folder / "decode")
    servers = {program: _start(program, folder) for program in PROGRAMS}
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for turn in range(arguments.repeats + 1):
        for way in WAYS:
            for program in PROGRAMS if turn % 2 else PROGRAMS[::-1]:
                answer = _ask(servers[program], way, f"{program}-{way}")
                if turn:  # the first warms up
                    measured.setdefault((program, way), []).append(answer)
    for server in servers.values():
        server.communicate()
    print(f"{environment()}, {torch.get_num_threads()} threads")
    print(f"{height}x{width}, {frames} frames, {arguments.base} channels, {arguments.repeats} times in turn")
    for way in WAYS:
        _report(folder, way, {program: measured[program, way] for program in PROGRAMS})


def _start(program: str, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--serve", program, "--folder", str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | PASSIVE)


def _ask(server: "subprocess.Popen[str]", way: str, result: str) -> dict[str, Any]:
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(f"{way} {result}\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())  # type: ignore[no-any-return]


def _report(folder: Path, way: str, answers: dict[str, list[dict[str, Any]]]) -> None:
    of = {name: {key: median(a[key] for a in found) for key in found[0]} for name, found in answers.items()}
    ours, theirs = (of[program] for program in PROGRAMS)
    results = [torch.load(folder / f"{program}-{way}", weights_only=True) for program in PROGRAMS]
    for key, unit, scale in (("seconds", "s", 1), ("cpu", "s of the processor", 1), ("peak", "GiB at most", GIB)):
        values = f"{ours[key] / scale:.2f} beside {theirs[key] / scale:.2f} {unit}"
        print(f"{way}: {values}, ratio {ours[key] / theirs[key]:.2f}")
    pairs = [a["cpu"] / b["cpu"] for a, b in zip(*answers.values(), strict=True)]
    print(f"{way}: ratios of neighbours from {min(pairs):.2f} to {max(pairs):.2f}")
    print(f"{way}: results differ by {float((results[0] - results[1]).abs().max()):.1e} at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=160)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--base", type=int, default=96, help="channels at full resolution")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder), arguments.base)
        compare(Path(folder), arguments)


if __name__ == "__main__":
    main()
