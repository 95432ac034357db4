"""Ask the NVIDIA driver about the GPUs, without torch."""

import re
import shutil


def query(fields: str) -> str:
    """Fields of `nvidia-smi --query-gpu`, GPUs separated by semicolons; empty without a GPU."""
    return "; ".join(_answer(f"--query-gpu={fields}", "--format=csv,noheader").strip().splitlines())


def peer_access() -> bool | None:
    """Whether every GPU can read the memory of every other one; None where the driver does not say.

    `nvidia-smi topo -p2p r` prints a row for each GPU, with a state for each: X for itself, OK, or why not.
    """
    rows = re.findall(r"^[ \t]*GPU\d+((?:[ \t]+(?:X|[A-Z]{2,4}))+)[ \t]*$", _answer("topo", "-p2p", "r"), re.MULTILINE)
    states = [state for row in rows for state in row.split() if state != "X"]
    return all(state == "OK" for state in states) if states else None


def _answer(*arguments: str) -> str:
    """What nvidia-smi prints; empty where there is none, or it fails."""
    import subprocess

    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        answer = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout
