"""Compile the kernels of a run in threads while the text is encoded. A first run would wait for each in turn."""

import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product

import torch

from skyrun.events import Event, Progress, StageEnded, StageStarted, now
from skyrun.kernels.machine.device import uses_triton
from skyrun.kernels.machine.failures import is_device_lost, is_out_of_memory
from skyrun.kernels.rotated import GROUP
from skyrun.kernels.triton.warm_up import Blocks, launches
from skyrun.models.dit_header import block_layouts, read_dims
from skyrun.models.vae import vae_channels
from skyrun.planning.job import Job
from skyrun.streaming.device import use_device

_STAGE = "kernels"
_THREADS = min(8, os.cpu_count() or 1)  # the compiler lets go of the interpreter's lock


class WarmUp:
    """Launches what compiles the kernels of the job's transformer. Without Triton there is nothing to do."""

    def __init__(self, job: Job) -> None:
        self._device = job.device
        works = launches(blocks_of(job), job.device) if uses_triton(job.device) else []
        self._threads = ThreadPoolExecutor(_THREADS, "compile")
        self._launched = [self._threads.submit(self._launch, work) for work in works]

    def __enter__(self) -> "WarmUp":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def finish(self) -> Generator[Event, None, None]:
        """Wait until all kernels are compiled, as a stage. One that cannot be compiled fails where it is needed."""
        start, waiting = now(), [launched for launched in self._launched if not launched.done()]
        if waiting:
            done = len(self._launched) - len(waiting)
            yield StageStarted(_STAGE, len(self._launched), _STAGE, done)
            for number, _ in enumerate(as_completed(waiting), done + 1):
                yield Progress(_STAGE, number)
            yield StageEnded(_STAGE, now() - start)
        for launched in self._launched:
            error = launched.exception()
            if error is not None and (is_out_of_memory(error) or is_device_lost(error)):
                raise error

    @torch.inference_mode()
    def _launch(self, work: Callable[[], object]) -> None:
        use_device(self._device)
        work()


def blocks_of(job: Job) -> Blocks:
    """What decides which kernels the job's transformer and autoencoder need."""
    file, plan = job.files.transformer, job.plan
    dims, fast = read_dims(file), plan.precision == "fast"
    matrices = [info for block in block_layouts(file) for _, info, _ in block.tensors if len(info.shape) == 2]
    weights = {(info.format.name, info.shape[1]) for info in matrices if info.format.block_size > 1}
    if fast:
        weights = {(type, cols) for type, cols in weights if cols % GROUP == 0}
    dtypes = {getattr(torch, how.dtype) for how in (plan.encoding, plan.decoding)}
    frames = frozenset(product(vae_channels(job.workload.vae_base_dim), dtypes))
    sizes, dtype = (dims.dim, dims.ffn_dim), getattr(torch, plan.dtype)
    sparse_tokens = job.workload.tokens if plan.sparse else 0
    return Blocks(frozenset(weights), *sizes, dtype, fast, plan.attention, frames, sparse_tokens)
