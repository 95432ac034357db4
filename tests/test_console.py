"""What is printed: escaped, whatever the terminal, and never a reason for a run to end."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from skyrun.cli import console, main
from skyrun.cli.progress import _TerminalBar, progress
from skyrun.units import printable

ROOT = Path(__file__).parent.parent

TEXTS = [
    ("a sea", "a sea"),
    ("two\nlines", "two\nlines"),
    ("\x1b[2Jgone", "\\x1b[2Jgone"),
    ("back\rover", "back\\rover"),
    ("\x9b31m", "\\x9b31m"),
    ("\u202egnp.exe", "\\u202egnp.exe"),
    ("\u2028", "\\u2028"),
    ("bad\udcff", "bad\\udcff"),
    ("tab\t", "tab\\t"),
    ("café 海 👩‍🚀 \u3000", "café 海 👩‍🚀 \u3000"),
]


@pytest.mark.parametrize(("text", "shown"), TEXTS)
def test_what_comes_from_outside_is_escaped(text, shown, capsys):
    assert printable(text) == shown
    console.say(text)
    console.display(text)
    out = capsys.readouterr()
    assert out.err == out.out == shown.encode("utf-8", "backslashreplace").decode() + "\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_break_between_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stderr", Terminal())
    console.say("error: " + "word " * 20 + "\n  - " + "next " * 10 + "\nshort")
    lines = sys.stderr.getvalue().splitlines()
    assert all(len(line) <= 40 for line in lines) and lines[-1] == "short"
    assert all(word in ("error:", "word", "-", "next", "short") for line in lines for word in line.split())
    assert lines[1].startswith("  ") and lines[4].startswith("    ")


def test_a_bar_moves_before_anything_is_known(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress() as display:
        assert isinstance(display._bar, _TerminalBar)
        display.begin("denoise", 8, "steps")
        (task,) = display._bar._bars.tasks
        assert task.total is None and not task.finished
        display.resume(2)
        assert task.total == 1.0 and task.completed == 0.25


@pytest.mark.parametrize(
    ("arguments", "code"), [(["run"], 2), (["run", "--prompts", "\x1b[2J.txt", "r2v"], 4), (["info", "\x1b[2J"], 4)]
)
def test_names_are_escaped_in_errors(arguments, code, capsys):
    assert main(arguments) == code
    assert "\x1b" not in capsys.readouterr().err


def test_unknown_options_are_escaped(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--\x1b[2J"])
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="uses a shell's redirections")
@pytest.mark.parametrize(
    ("redirection", "stdout"),
    [
        ("2>/dev/full", True),
        ("2>&-", True),
        ("<&-", True),
        ("2>&- <&-", True),
        (">&-", False),
        ("PYTHONIOENCODING=ascii", True),
    ],
)
def test_streams_that_do_not_work_end_no_run(run_command, converted, tmp_path, redirection, stdout):
    command = [*run_command, "--model", str(converted("Q8_0")), "--json"]
    quoted = " ".join(f"'{part}'" for part in [sys.executable, "-m", "skyrun", *command])
    line = f"{redirection} {quoted}" if "=" in redirection else f"{quoted} {redirection}"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "clip.mp4").exists()
    events = done.stdout.splitlines()
    assert all(event.startswith("{") for event in events)
    assert bool(events) is stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_stdout_is_a_sentence(converted):
    path = next(converted("Q8_0").glob("*.safetensors"))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "skyrun", "info", str(path)],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert "No space left" in done.stderr and "Traceback" not in done.stderr and "ignored" not in done.stderr


def test_verbose_says_what_happens_inside(tmp_path, capsys):
    code = "from skyrun.cli import main; raise SystemExit(main(['info', '-v', 'nowhere']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4
    assert "skyrun: the error was raised here" in done.stderr and "describe" in done.stderr


FOREIGN = [
    (["run", "r2v", "--cfg-scale", "5"], "usage: skyrun run", "unknown --cfg-scale: use --guidance G"),
    (["run", "r2v", "--num_frames=81"], "usage: skyrun run", "use --frames N, 4 k + 1, or --seconds N"),
    (["run", "r2v", "--stepz", "3"], "usage: skyrun run", "did you mean --steps?"),
    (["plan", "r2v", "--low-vram"], "usage: skyrun plan", "weights are always streamed"),
    (["bench", "step", "--nothing"], "usage: skyrun bench step", "unknown --nothing"),
    (["run", "r2v", "--width", "832"], "usage: skyrun run", "--width and --height go together"),
    (["run", "r2v", "--width", "8", "--height", "8", "--size", "1x1"], "usage: skyrun run", "leave out --size"),
]


@pytest.mark.parametrize(("arguments", "usage", "message"), FOREIGN)
def test_options_of_other_programs(arguments, usage, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and usage in said and message in said
    assert said.count("unknown") <= 1
