"""Ask the NVIDIA driver about the GPUs, without torch."""

import shutil
import subprocess


def query(fields: str) -> str:
    """The answer of `nvidia-smi --query-gpu` for these fields, GPUs separated by semicolons; empty without a GPU."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    arguments = [command, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(arguments, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(answer.stdout.strip().splitlines())
