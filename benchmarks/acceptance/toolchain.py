"""What is installed, whether Triton builds kernels and how long that takes, and 3-D convolutions in every layout."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from acceptance.step import Figure, Scale
from skyrun.kernels.machine.device import median_seconds, triton_problem
from skyrun.kernels.triton.warm_up import Blocks, launches
from skyrun.streaming.device import use_device
from skyrun.tasks.skyreels_v3 import WAN_14B
from skyrun.tools.bench.checks import relative_error
from skyrun.tools.doctor import examine

_FRAMES = 4  # that the autoencoder decodes at a time; its convolutions see two more
_ERROR = {torch.bfloat16: 8e-3, torch.float32: 2e-3}  # in float32 products may be TF32
_TYPES = ("Q8_0", "Q6_K", "Q4_K")


@torch.inference_mode()
def toolchain(scale: Scale) -> Iterator[Figure]:
    """What doctor says, whether a kernel runs, and a convolution as the autoencoder's widest ones."""
    for finding in examine():
        yield Figure(finding.subject, f"{finding.verdict}: {finding.found}")
    if not scale.small:
        problem = triton_problem(scale.device)
        yield Figure("Triton's kernels run", problem or "yes")
        yield Figure("Triton", 0.0 if problem else 1.0, least=1)
    channels, height, width = scale.of((96, 720, 1280), (16, 24, 40))
    x = torch.randn(1, channels, _FRAMES + 2, height, width, device=scale.device)
    weight = torch.randn(channels, channels, 3, 3, 3, device=scale.device) / (27 * channels) ** 0.5
    expected = _shifted_products(x, weight)
    for dtype, allowed in _ERROR.items():
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            given = [tensor.to(dtype).contiguous(memory_format=layout) for tensor in (x, weight)]
            name = f"conv3d {_name(dtype)}, {_name(layout)}"
            yield from _convolution(scale, name, given, expected, allowed)


def _convolution(scale: Scale, name: str, given: list[Tensor], expected: Tensor, allowed: float) -> Iterator[Figure]:
    x, weight = given
    before = _allocated(scale)
    out = F.conv3d(x, weight, padding=(0, 1, 1))
    taken = _peak(scale) - before
    yield Figure(name, relative_error(out, expected), "relative error", most=allowed)
    if not scale.small:
        # A library that has no kernel for the layout fills a buffer with a copy of x for each of 27 weights.
        yield Figure(name, taken / (x.nbytes + out.nbytes), "memory / (input and output)", most=2.5)
    del out
    seconds = median_seconds(scale.device, lambda: F.conv3d(x, weight, padding=(0, 1, 1)), 3)
    yield Figure(name, 2 * weight.numel() * expected[0, 0].numel() / seconds / 1e12, "TFLOP/s")


def _shifted_products(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution as 27 products of shifted frames, in float32."""
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    padded, (height, width) = F.pad(x, (1, 1, 1, 1)), x.shape[3:]
    out = torch.zeros(weight.shape[0], _FRAMES * height * width, device=x.device)
    for t in range(3):
        for row in range(3):
            for col in range(3):
                part = padded[0, :, t : t + _FRAMES, row : row + height, col : col + width]
                out.addmm_(weight[:, :, t, row, col], part.reshape(part.shape[0], -1))
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return out.view(1, -1, _FRAMES, height, width)


def _name(value: object) -> str:
    return str(value).removeprefix("torch.").replace("_format", "")


def _allocated(scale: Scale) -> int:
    if scale.small:
        return 0
    torch.cuda.reset_peak_memory_stats(scale.device)
    return torch.cuda.memory_allocated(scale.device)


def _peak(scale: Scale) -> int:
    return 0 if scale.small else torch.cuda.max_memory_allocated(scale.device)


@torch.inference_mode()
def cold_start(scale: Scale) -> Iterator[Figure]:
    """Compile what the first run of a model needs, with nothing kept from earlier. On a CPU kernels are interpreted."""
    import triton  # noqa: F401  a machine without it skips the step

    dim, ffn = scale.of((WAN_14B["dim"], WAN_14B["ffn"]), (256, 256))
    weights = frozenset((type, cols) for type in scale.of(_TYPES, _TYPES[-1:]) for cols in (dim, ffn))
    works = [
        work
        for fast in scale.of((False, True), (True,))
        for work in launches(Blocks(weights, dim, ffn, scale.dtype, fast, "int8" if fast else "exact"), scale.device)
    ]

    def launch(work: object) -> None:
        use_device(scale.device)
        with torch.inference_mode():
            work()  # type: ignore[operator]

    start = time.perf_counter()
    with ThreadPoolExecutor(scale.of(min(8, os.cpu_count() or 1), 1)) as threads:
        for done in [threads.submit(launch, work) for work in works]:
            done.result()
    if not scale.small:
        torch.cuda.synchronize(scale.device)
    yield Figure("launches", len(works))
    yield Figure("compiled and launched in", time.perf_counter() - start, "s", most=scale.on_card(60))
    if cache := os.environ.get("TRITON_CACHE_DIR"):
        yield Figure("kernels compiled", len(list(Path(cache).rglob("*.cubin"))))
