"""All steps, in the order in which they run. Their numbers are their places here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from acceptance.step import Figure, Scale, Step


@dataclass(frozen=True)
class _Lazy:
    """A function of a module that is imported in the process of its step: torch and Triton read variables then."""

    place: str

    def __call__(self, scale: Scale) -> Iterator[Figure]:
        module, _, name = self.place.partition(":")
        run: Callable[[Scale], Iterator[Figure]] = getattr(import_module(f"acceptance.{module}"), name)
        yield from run(scale)


_KERNELS = "kernels.md"
_INTERPRETED = {"TRITON_INTERPRET": "1"}
_FIXED = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}

STEPS = (
    Step("toolchain", "what doctor says; 3-D convolutions in every layout", _Lazy("toolchain:toolchain")),
    Step("cold start", "compile what a first run needs", _Lazy("toolchain:cold_start"), _KERNELS, on_cpu=_INTERPRETED),
    Step("kernels", "every type against its twin and float64", _Lazy("products:kernels"), _KERNELS),
    Step("attention", "error and rate of every backend", _Lazy("products:attention"), _KERNELS),
    Step("rates", "products and decoding beside cuBLAS and a copy", _Lazy("products:rates"), _KERNELS),
    Step("ring", "the order of copies and kernels, delayed at random", _Lazy("ring:ring")),
    Step("memory", "a block's peak against the plan", _Lazy("memory:block_memory")),
    Step("fixed segments", "the same as on Windows", _Lazy("memory:block_memory"), environment=_FIXED),
    Step("limited runs", "whole runs of the published shapes in 24 to 6 GiB", _Lazy("runs:limited_runs")),
    Step("autoencoder", "dtypes, whole frames and slabs", _Lazy("autoencoder:autoencoder")),
    Step("recovery", "too little memory in denoise and in decode", _Lazy("runs:recovery")),
    Step("resume", "killed after a step, and gone on with", _Lazy("runs:resumed")),
    Step("streaming", "a step from disk against one from memory", _Lazy("runs:streamed")),
    Step("built-in model", "on the device against the CPU", _Lazy("runs:built_in")),
    Step("sparse attention", "its twin, its bound, its time by density", _Lazy("sparse:sparse"), _KERNELS),
    Step("several devices", "what they send each other, and attention", _Lazy("several:several_devices")),
)
