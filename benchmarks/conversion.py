"""Time and memory of converting a synthetic checkpoint: python benchmarks/conversion.py [--shape 14B] [--quant Q4_K]

The checkpoint has the published layout, the shape of Wan 1.3B (2.9 GB) or 14B (29 GB) in bfloat16 and random weights;
it is written to a temporary folder and deleted. The peak is the resident set of the converting process and its workers
together, sampled, above that of one interpreter that has only imported torch.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from environment import environment

from skyrun.planning.published import LAYERS, WAN_14B
from skyrun.tools.tiny_checkpoint import CheckpointDims, write_checkpoint
from skyrun.units import GIB

SHAPES = {
    "1.3B": CheckpointDims(dim=1536, layers=30, ffn=8960, text=1024, shard_bytes=GIB),
    "14B": CheckpointDims(WAN_14B["dim"], LAYERS, WAN_14B["ffn"], text=1024, shard_bytes=4 * GIB),
}
CONVERT = "import sys; from skyrun.quant import convert; convert(*sys.argv[1:4])"
ONLY_TORCH = "import time, torch; print(flush=True); time.sleep(60)"


def resident(process: psutil.Process) -> int:
    """Bytes of a process and its children. Pages that they share count in each."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
    return total


def interpreter_with_torch() -> int:
    with subprocess.Popen([sys.executable, "-c", ONLY_TORCH], stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        base = resident(psutil.Process(child.pid))
        child.kill()
    return base


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of a command."""
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command) as child:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            peak = max(peak, resident(process))
            time.sleep(0.02)
    assert child.returncode == 0
    return time.perf_counter() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1.3B", choices=SHAPES)
    parser.add_argument("--quant", nargs="+", default=["Q8_0", "Q4_K"])
    arguments = parser.parse_args()
    print(environment())
    base = interpreter_with_torch()
    print(f"an interpreter with torch: {base >> 20} MiB")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "checkpoint"
        write_checkpoint(source, SHAPES[arguments.shape])
        read = sum(path.stat().st_size for path in source.rglob("*.safetensors"))
        print(f"checkpoint of {read / 1e9:.2f} GB")
        print("| type | written GB | seconds | MB/s read | peak MiB above the interpreter with torch |")
        print("| --- | --- | --- | --- | --- |")
        for quant in arguments.quant:
            out = Path(folder) / quant
            seconds, peak = timed([sys.executable, "-c", CONVERT, str(source), str(out), quant])
            written = sum(path.stat().st_size for path in out.iterdir())
            rate = read / 1e6 / seconds
            print(f"| {quant} | {written / 1e9:.2f} | {seconds:.0f} | {rate:.0f} | {(peak - base) >> 20} |", flush=True)


if __name__ == "__main__":
    main()
