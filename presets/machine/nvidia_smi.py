"""Ask the NVIDIA driver about the GPUs, without torch."""

import shutil


def query(fields: str) -> str:
    """Fields of `nvidia-smi --query-gpu`, GPUs separated by semicolons; empty without a GPU."""
    import subprocess

    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    arguments = [command, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(arguments, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(answer.stdout.strip().splitlines())
