"""All commands and their options. Nothing here imports torch."""

import argparse
from pathlib import Path
from typing import TypeAlias

from skyrun.cli.command import Command
from skyrun.demo.words import PROMPT, words_text
from skyrun.presets.machine.named import PRESETS
from skyrun.presets.plan import PREFERENCES
from skyrun.tasks import TASKS
from skyrun.tasks.skyreels_v3 import TRANSITIONS
from skyrun.tasks.spec import NAG
from skyrun.version import __version__

Commands: TypeAlias = "argparse._SubParsersAction[Command]"


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = Command(prog="skyrun", description="SkyReels-V3 videos on the graphics card you own.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"skyrun {__version__}")
    parser.set_defaults(json=False, verbose=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_run(commands)
    _add_resume(commands)
    _add_plan(commands)
    _add_tune(commands)
    _add_demo(commands)
    _add_pull(commands)
    _add(commands, "list", "list the models that were fetched")
    _add(commands, "remove", "delete a model that was fetched").add_argument("name", metavar="NAME", help="as in list")
    _add_convert(commands)
    _add_calibrate(commands)
    _add_info(commands)
    _add_doctor(commands)
    _add_bench(commands)
    _add_web(commands)
    _add_completion(commands)
    return parser


def _add(commands: Commands, name: str, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="machine-readable output on stdout")
    parser.add_argument("-v", "--verbose", action="store_true", help="also log details on stderr")
    return parser


def _add_run(commands: Commands) -> None:
    parser = _add(commands, "run", "make a clip")
    tasks = "; ".join(f"{name}: {task.does}" for name, task in TASKS.items())
    parser.add_argument("task", nargs="?", choices=list(TASKS), help=tasks)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", help="what the clip shows; - reads it from stdin")
    prompt.add_argument("--prompts", type=Path, metavar="F.txt", help="a clip for every line")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="CLIP.mp4",
        help="as this clip was made, except for other options; for another task, what means the same there",
    )
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="F",
        help="r2v: images; a2v: a portrait; i2v: the first frame",
    )
    parser.add_argument("--video", type=Path, metavar="F", help="v2v, shot: what the clip goes on from")
    parser.add_argument("--audio", type=Path, metavar="F", help="a2v: speech, or any file with speech in it")
    parser.add_argument("--transition", metavar="NAME", help=f"shot: {', '.join(TRANSITIONS)}, or a tag in the prompt")
    parser.add_argument("--join", action="store_true", help="v2v, shot: begin with the video, and keep its audio")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.mp4", help="the clip (default: TASK-SEED.mp4)")
    parser.add_argument("--model", metavar="DIR|FILE|NAME", help="converted files, or a model as for pull (TASK)")
    parser.add_argument("--quant", metavar="TYPE", help="which transformer, where there are several (default: by plan)")
    _add_lora(parser)
    parser.add_argument(
        "--seed",
        type=int,
        nargs="+",
        metavar="N",
        help="start of the noise, a clip for each (default: drawn and shown)",
    )
    _add_clip(parser, "5 s; a2v: the speech; t2v, i2v: by model")
    _add_devices(parser)
    _add_guidance(parser)
    parser.add_argument(
        "--negative-prompt", metavar="P", help="what the clip shall not show (t2v, i2v: by model; others: with --nag)"
    )
    parser.add_argument("--shift", type=float, metavar="S", help="t2v, i2v: shift of the noise levels (by model)")
    parser.add_argument(
        "--ar-step", type=int, metavar="N", help="df models: steps that blocks of frames lag behind (0)"
    )
    parser.add_argument("--fps", type=int, metavar="N", help="frames per second, where a model has several")
    _add_precision(parser)
    parser.add_argument("--prefer", choices=PREFERENCES, help="what to optimize types and plans for (balanced)")
    parser.add_argument("--preset", choices=PRESETS, help="use no more than such a machine has free")
    parser.add_argument("--save-latents", type=Path, metavar="F", help="also keep the latents, as safetensors")
    _add_pictures(parser)
    _add_overwrite(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and stop")


def _add_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora",
        nargs="+",
        action="extend",
        default=[],
        metavar="F[:N]",
        help="adapters for Wan 2.1, and how much of each (1); OWNER/NAME/FILE is fetched",
    )


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preview", type=Path, metavar="F.png", help="draw after every step what the clip will be")
    parser.add_argument("--sheet", action="store_true", help="also draw the clip at a glance, as OUT.png")


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist, and make the clip again")


def _add_size(parser: argparse.ArgumentParser, resolution: str) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", metavar="HxW", help="height and width in pixels, height first, multiples of 16")
    size.add_argument("--resolution", help=resolution)
    parser.add_argument("--width", type=int, metavar="W", help="with --height, in place of --size")
    parser.add_argument("--height", type=int, metavar="H", help="with --width, in place of --size")


def _add_precision(parser: argparse.ArgumentParser) -> None:
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--exact",
        dest="precision",
        action="store_const",
        const="exact",
        help="compute in the activations' type (default: for Q8_0 and larger types, and where int8 is not faster)",
    )
    precision.add_argument(
        "--fast",
        dest="precision",
        action="store_const",
        const="fast",
        help="multiply in int8, about 1.4%% off (default: for smaller types, on cards where that is faster)",
    )
    parser.add_argument(
        "--attention",
        metavar="HOW",
        help="exact; int8: scores, up to 1.9%% off; full-int8: values too, 2.2%%; fp8: values in float8, 3.4%%, from "
        "RTX 4000 on (default: the quickest that is at most 2.5%% off, 2%% with --prefer quality). sparse, sparse:P or "
        "int8,sparse:P skips what costs at most P percent, 1 if left out, as the run measures (default: where a plan "
        "saves 15%% by it; never with --exact)",
    )


def _add_clip(parser: argparse.ArgumentParser, length_default: str) -> None:
    """Add the options for size, length, steps and dtype of a clip, and the limits."""
    _add_size(parser, "480P, 540P or 720P, shaped like the image or video (480P; t2v, i2v: by model)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, metavar="N", help=f"length ({length_default})")
    length.add_argument("--frames", type=int, metavar="N", help="length in frames, 4 k + 1 (not v2v, a2v)")
    _add_steps(parser)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="dtype of activations (default: by device)"
    )
    _add_limits(parser)


def _add_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=int, metavar="N", help="denoising steps (8; a2v: 4; t2v, i2v: by model, 30 to 50)"
    )


def _add_guidance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance", type=float, metavar="G", help="t2v, i2v: scale of classifier-free guidance (by model); 1: none"
    )
    parser.add_argument(
        "--nag",
        type=float,
        nargs="?",
        const=NAG,
        metavar="S",
        help=f"guide attention away from the negative prompt, by this scale ({NAG:g}); for models without guidance",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="cuda[:N]|cpu", help="default: cuda where there is a GPU")
    parser.add_argument("--max-vram", type=float, metavar="GiB", help="use at most this much GPU memory")
    parser.add_argument("--max-ram", type=float, metavar="GiB", help="use at most this much memory")


def _add_devices(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--devices", type=int, metavar="N", help="GPUs, or processes of a CPU, that make a clip together (1)"
    )


def _add_plan(commands: Commands) -> None:
    parser = _add(commands, "plan", "predict the memory and time of a clip: exit code 3 if it will not fit")
    parser.add_argument("task", nargs="?", choices=list(TASKS), help="as for `skyrun run`")
    machine = parser.add_argument_group("for another machine than this one")
    machine.add_argument("--preset", choices=PRESETS, help="a typical machine with such a card")
    machine.add_argument("--gpu", metavar="NAME", help='such as "RTX 3060"; "list" lists those that skyrun knows')
    machine.add_argument("--like", metavar="NAME", help="a card as quick as that one, with --vram")
    machine.add_argument("--vram", type=float, metavar="GiB", help="memory of that card, if it is sold with several")
    machine.add_argument("--ram", type=float, metavar="GiB", help="RAM in all (with --gpu: 16)")
    _add_devices(machine)
    machine.add_argument("--disk", type=float, metavar="GB/s", help="read rate of the model's disk (with --gpu: 0.5)")
    _add_size(parser, "480P, 540P or 720P (480P)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, metavar="N", help="length of the clip (5)")
    length.add_argument("--frames", type=int, metavar="N", help="length in frames, 4 k + 1 (not v2v, a2v)")
    _add_steps(parser)
    _add_guidance(parser)
    parser.add_argument("--model", type=Path, metavar="DIR|FILE|NAME", help="as for run (default: as published)")
    parser.add_argument("--quant", metavar="TYPE", help="of the transformer (default: the best that suits)")
    _add_lora(parser)
    _add_precision(parser)
    parser.add_argument("--prefer", choices=PREFERENCES, help="what to optimize types and plans for (balanced)")
    parser.add_argument("--plot", type=Path, metavar="F.png", help="draw memory over the run, and time against tokens")


def _add_tune(commands: Commands) -> None:
    parser = _add(commands, "tune", "measure this machine once, in less than two minutes, for better plans")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is a GPU")
    parser.add_argument("--model", type=Path, metavar="DIR|FILE", help="whose disk to measure (default: this folder's)")


def _add_resume(commands: Commands) -> None:
    parser = _add(commands, "resume", "go on with a clip whose run ended early")
    parser.add_argument("file", type=Path, metavar="FILE", help="the unfinished clip, or its .skyrun.safetensors")
    _add_pictures(parser)
    _add_overwrite(parser)
    _add_limits(parser)
    _add_devices(parser)


def _add_demo(commands: Commands) -> None:
    parser = _add(commands, "demo", "the whole chain on a small trained model that is built in: no download, no GPU")
    parser.epilog = words_text()
    parser.add_argument("-p", "--prompt", default=PROMPT, help=f"what the clip shows ({PROMPT})")
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="F",
        help="a sprite on white, and a scene (default: drawn as the prompt says)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="start of the noise (0)")
    parser.add_argument(
        "--size",
        metavar="HxW",
        help="height and width in pixels: 48x80, 48x48 or 64x64 (48x80, or the shape of the first image)",
    )
    output = parser.add_argument("-o", "--output", type=Path, default=Path("skyrun-demo.mp4"), metavar="OUT.mp4")
    output.help = "the clip (skyrun-demo.mp4); its contact sheet and drawn images are put beside it"
    _add_overwrite(parser)
    parser.set_defaults(sheet=True, preview=None, dry_run=False)  # it is a run


def _add_pull(commands: Commands) -> None:
    parser = _add(commands, "pull", "fetch a model, and convert it while it arrives if needed")
    parser.add_argument(
        "model",
        metavar="NAME",
        help="a task, or a model such as wan2.1-t2v-1.3b (all: docs/pull.md); or OWNER/NAME:TYPE on Hugging Face",
    )
    parser.add_argument("--quant", metavar="TYPE", help="Q2_K ... Q4_K_M ... Q8_0 (default: by plan)")
    parser.add_argument("--task", choices=list(TASKS), help="if a repository has transformers for several tasks")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder (default: one in the models folder)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be fetched and how large it is")


def _add_convert(commands: Commands) -> None:
    parser = _add(commands, "convert", "turn a checkpoint into GGUF files, or one GGUF file into another")
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of a checkpoint, or one file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the files")
    types = parser.add_mutually_exclusive_group()
    types.add_argument(
        "--quant", default="Q8_0", metavar="TYPE", help="Q2_K ... Q4_K_M ... Q8_0, BF16, F16 or F32 (Q8_0)"
    )
    types.add_argument(
        "--target-size",
        metavar="SIZE",
        help="such as 9GB: choose types so that a transformer's file is at most this large and loses least",
    )
    parser.add_argument(
        "--text-encoder-quant", metavar="TYPE", help="default: as --quant, but not below Q8_0; Q8_0 with --target-size"
    )
    parser.add_argument(
        "--type-rule",
        action="append",
        default=[],
        metavar="REGEX=TYPE",
        help="the type of a transformer's matrices with a matching name; the first rule that matches wins",
    )
    parser.add_argument("--imatrix", type=Path, metavar="F", help="importance of input channels, to weight errors")
    _add_lora(parser)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu", help="device that encodes weights (cpu)")
    parser.add_argument("--report", type=Path, metavar="R.html|R.png", help="draw the error of each tensor by block")
    parser.add_argument(
        "--dry-run", action="store_true", help="print files, types, sizes and expected errors, and stop"
    )


def _add_calibrate(commands: Commands) -> None:
    parser = _add(commands, "calibrate", "collect importance (an imatrix) of an r2v model, for better small types")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, metavar="DIR|FILE|NAME", help="converted files, best BF16 or Q8_0")
    source.add_argument("--merge", type=Path, nargs="+", metavar="F", help="add up importance files, without a model")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("importance.gguf"), metavar="F", help="file (importance.gguf)"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE.txt", help="one prompt per line (default: built in)")
    parser.add_argument(
        "--image", nargs="+", action="extend", type=Path, default=[], metavar="F", help="images (default: drawn)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="start of the first clip's noise (0)")
    _add_clip(parser, "17 frames")


def _add_info(commands: Commands) -> None:
    parser = _add(commands, "info", "what a GGUF, safetensors or mp4 file holds")
    parser.add_argument("file", type=Path, metavar="FILE|NAME", help="a file, or the name of a model: its transformer")
    parser.add_argument("--against", type=Path, metavar="SRC", help="its source: also print the error of every tensor")


def _add_doctor(commands: Commands) -> None:
    _add(commands, "doctor", "check what decides speed or failure on this machine")


def _add_bench(commands: Commands) -> None:
    whats = commands.add_parser("bench", help="measure this machine", description="measure this machine")
    parts = whats.add_subparsers(dest="what", required=True, metavar="WHAT")
    parser = _add(parts, "kernels", "check the kernels and time each of them")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is a GPU")
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="Q2_K ... Q8_0 (default: all, on a CPU three)")
    parser.add_argument(
        "--rows", nargs="+", type=int, metavar="N", help="tokens (default: 1 ... 75600, on a CPU 1 and 64)"
    )
    parser = _add(parts, "step", "time denoising steps, streamed from this disk and from memory")
    parser.add_argument("--model", choices=["r2v-14b"], default="r2v-14b", help="model whose shapes are used (r2v-14b)")
    parser.add_argument("--quant", default="Q8_0", metavar="TYPE", help="type of the transformer (Q8_0)")
    parser.add_argument("--blocks", type=int, default=4, metavar="N", help="blocks of the transformer (4)")
    _add_precision(parser)
    _add_clip(parser, "5 s")
    _add_devices(parser)
    parser.set_defaults(steps=4)


def _add_web(commands: Commands) -> None:
    parser = commands.add_parser(
        "web", help="a page to make clips with, and a queue", description="a page to make clips with, and a queue"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen at (127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="port to listen at (7860)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where clips and the queue are (~/skyrun-clips)")
    parser.add_argument("--token", metavar="T", help="that every client must know; needed where --host is not loopback")


def _add_completion(commands: Commands) -> None:
    parser = _add(commands, "completion", "print a script that completes commands and options in a shell")
    parser.add_argument("shell", choices=["bash", "zsh"], help="put the script where that shell looks for it")
