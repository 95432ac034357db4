"""A command's parser: it answers options of similar programs with ours. Nothing here imports torch."""

import argparse
from difflib import get_close_matches
from typing import Any, NoReturn

_STREAMED = "weights are always streamed: leave it out; --max-vram GiB sets a limit"
# Options of similar programs, and what to use instead.
_ELSEWHERE = {
    **dict.fromkeys(("cfg", "cfg-scale", "guidance-scale", "guide-scale", "text-cfg"), "use --guidance G"),
    **dict.fromkeys(("neg-prompt", "n-prompt"), "use --negative-prompt P"),
    **dict.fromkeys(("flow-shift", "sample-shift"), "use --shift S"),
    **dict.fromkeys(("num-frames", "frame-num", "video-length", "length"), "use --frames N, 4 k + 1, or --seconds N"),
    **dict.fromkeys(("duration", "video-seconds"), "use --seconds N"),
    **dict.fromkeys(("num-inference-steps", "infer-steps", "sample-steps", "sampling-steps"), "use --steps N"),
    **dict.fromkeys(("ref-imgs", "ref-images", "reference-image", "input-image", "image-path", "img"), "use --image F"),
    **dict.fromkeys(("input-video", "video-path"), "use --video F"),
    **dict.fromkeys(("input-audio", "audio-path"), "use --audio F"),
    **dict.fromkeys(("output-path", "save-path", "save-file", "out"), "use -o OUT.mp4"),
    **dict.fromkeys(("model-id", "model-path", "ckpt-dir", "ckpt", "dit"), "use --model DIR|FILE|NAME"),
    **dict.fromkeys(("base-seed", "sample-seed"), "use --seed N"),
    **dict.fromkeys(("video-size", "res"), "use --size HxW, height first, or --width W --height H"),
    **dict.fromkeys(("torch-dtype", "precision"), "use --dtype TYPE, or --exact or --fast"),
    **dict.fromkeys(("offload", "offload-model", "blocks-to-swap", "low-vram", "lowvram", "medvram"), _STREAMED),
    **dict.fromkeys(("task", "task-type"), "say the task as a word, such as skyrun run r2v"),
    **dict.fromkeys(("force", "yes", "y"), "use --overwrite"),
}


class Command(argparse.ArgumentParser):
    """A parser of a command that reports unknown options itself, with the usage of the command."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments, and reject unknown ones."""
        known, unknown = super().parse_known_args(args, namespace)
        pairs = zip(["", *unknown], unknown, strict=False)  # the value of an unknown option is not unknown itself
        unknown = [name for before, name in pairs if name.startswith("-") or not before.startswith("-")]
        if unknown:
            self.error("\n".join(f"unknown {argument}{self._instead(argument)}" for argument in unknown))
        if problem := _join_sides(known):
            self.error(problem)
        return known, unknown

    def _instead(self, argument: str) -> str:
        if not argument.startswith("-"):
            return ""
        name = argument.partition("=")[0]
        if found := _ELSEWHERE.get(name.lstrip("-").replace("_", "-").lower()):
            return f": {found}"
        near = get_close_matches(name.replace("_", "-"), self._option_string_actions, 1, 0.7)
        return f": did you mean {near[0]}?" if near else ""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, escaped, and exit with code 2."""
        from skyrun.units import printable

        self.print_usage()
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")

    def print_usage(self, file: Any = None) -> None:
        """Print the usage on stderr, because it is only printed for errors."""
        import sys

        super().print_usage(file or sys.stderr)


def _join_sides(arguments: argparse.Namespace) -> str:
    """Turn --width and --height into the size. Returns what is wrong with them, or ""."""
    sides = {name: arguments.__dict__.pop(name, None) for name in ("height", "width")}
    if all(side is None for side in sides.values()):
        return ""
    if None in sides.values():
        return "--width and --height go together"
    if arguments.size is not None or arguments.resolution is not None:
        return "--width and --height set the size: leave out --size and --resolution"
    arguments.size = "x".join(str(side) for side in sides.values())
    return ""
