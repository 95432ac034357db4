"""Time and memory of converting a synthetic checkpoint: python benchmarks/conversion.py [--gigabytes 3] [--quant Q8_0]

The checkpoint has the published layout and random weights, is written to a temporary folder and deleted. The peak is
the resident set of a process of its own, above that of the same process when it has only imported torch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import environment

from skyrun.demo_checkpoint import CheckpointDims, write_checkpoint

CHILD = """
import json, re, sys, time
import skyrun.quant.conversion as conversion
# not getrusage: its maximum is inherited from the process that started this one
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before, start = peak(), time.perf_counter()
summary = conversion.convert(*sys.argv[1:4])
seconds = time.perf_counter() - start
written = sum(file["bytes"] for file in summary["files"])
print(json.dumps({"seconds": seconds, "written": written, "peak": peak() - before, "base": before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--quant", nargs="+", default=["Q8_0"])
    arguments = parser.parse_args()
    dim, ffn = 2048, 8192
    block = 2 * (8 * dim * dim + 2 * dim * ffn)
    outer = 2 * (6 * dim * dim + 2 * dim * dim)
    layers = max(1, round((arguments.gigabytes * 1e9 - outer) / block))
    print(environment())
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "checkpoint"
        write_checkpoint(source, CheckpointDims(dim=dim, layers=layers, ffn=ffn, shard_bytes=512 << 20))
        read = sum(path.stat().st_size for path in source.rglob("*.safetensors"))
        print(f"checkpoint of {read / 1e9:.2f} GB: {layers} blocks of width {dim}")
        print("| type | written GB | seconds | MB/s read | peak MiB above the interpreter with torch |")
        print("| --- | --- | --- | --- | --- |")
        for quant in arguments.quant:
            out = Path(folder) / quant
            start = time.perf_counter()
            command = [sys.executable, "-c", CHILD, str(source), str(out), quant]
            done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            assert done["seconds"] <= time.perf_counter() - start
            rate = read / 1e6 / done["seconds"]
            print(
                f"| {quant} | {done['written'] / 1e9:.2f} | {done['seconds']:.0f} | {rate:.0f} | {done['peak'] >> 20} |"
            )


if __name__ == "__main__":
    main()
