"""The stages of pipelines: each loads what it needs, reports its progress as events, and frees what it loaded."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from skyrun.events import Event, FramesReady, Preview, Progress, StageEnded, StageStarted, now
from skyrun.kernels.machine.device import uses_triton
from skyrun.media.pixels import Frames, to_uint8
from skyrun.models.clip import CLIPVision
from skyrun.models.dit import DiT
from skyrun.models.dit.sparse import Learned, SelfCheck
from skyrun.models.dit.tile_order import TileOrder
from skyrun.models.dit_header import block_layouts
from skyrun.models.folder import ModelFiles
from skyrun.models.vae import WanVAE
from skyrun.parallel.group import Group, here
from skyrun.pipelines.conditioning import Condition
from skyrun.pipelines.embedding_cache import CachedEmbedding
from skyrun.pipelines.finite import check_output, check_step
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.presets import Plan
from skyrun.presets.autoencoder import Autoencoder
from skyrun.presets.memory import CONTEXT_BYTES
from skyrun.streaming.device import (
    finish,
    out_of_memory_explained,
    peak_bytes,
    refuse_to_spill,
    reset_peak,
    vram_limited,
)
from skyrun.streaming.layout import with_adapters
from skyrun.streaming.reader import read_ahead
from skyrun.streaming.stream import BlockStream, ObserveBlock, StreamStats, spread


class Order(Protocol):
    """What rank 0 hands over. plan: by which it is done; None if it is no part of a clip that is divided."""

    @property
    def plan(self) -> Plan | None: ...
    def follow(self, group: Group) -> object:
        """Do the part of this rank. Raises OutOfMemory, with the stage, where memory runs out."""


@dataclass(frozen=True)
class Denoising:
    """The steps of a window: the arguments of `denoise`, with tensors on the host."""

    files: ModelFiles
    plan: Plan
    state: RunState
    condition: Condition

    def follow(self, group: Group) -> None:
        with _limited(group, self.plan, "denoise"):
            for _ in _steps(self.files, self.plan, self.state, self.condition, group.device):
                pass


@dataclass(frozen=True)
class Decoding:
    """The frames of a window."""

    path: Path
    plan: Plan
    latents: Tensor

    def follow(self, group: Group) -> None:
        with _limited(group, self.plan, "decode"):
            for _ in _open_vae(self.path, self.plan.decoding, group.device, group).decode(self.latents):
                pass


class Stage:
    """Makes the events of a stage and measures its time and peak memory.

    part: (number, count) of the window that the stage belongs to.
    """

    def __init__(
        self, name: str, total: int, unit: str, device: torch.device, part: tuple[int, int] | None = None
    ) -> None:
        self._name, self._total, self._unit, self._device, self._part = name, total, unit, device, part

    def started(self, before: int = 0) -> StageStarted:
        """Begin the stage. before: how many units an earlier run has done."""
        reset_peak(self._device)
        self._start = now()
        return StageStarted(self._name, self._total, self._unit, before, self._part)

    def done(self, count: int) -> Progress:
        return Progress(self._name, count)

    def ended(self, stats: StreamStats | None = None) -> StageEnded:
        stats = stats or StreamStats()
        finish(self._device)
        seconds, peak = now() - self._start, peak_bytes(self._device)
        return StageEnded(self._name, seconds, peak, stats.bytes_read, stats.read_seconds, stats.stall_seconds)


def encode_text(job: Job, prompt: str) -> Generator[Event, None, Tensor]:
    """The prompt's embedding, float32 [n, text_dim], which is read from disk if the prompt was encoded before.

    In the meantime the system reads ahead the transformer's first blocks, so that denoising need not wait for them.
    """
    encoder, device, file = job.encoder, job.device, job.files.transformer
    stage = Stage("text", 1, "pass", device)
    yield stage.started()
    read_ahead(file.path, [extent for block in block_layouts(file)[: job.plan.ring_slots] for extent in block.extents])
    ids, stats = encoder.token_ids(prompt), None
    cached = CachedEmbedding(encoder.file, ids, encoder.dim, device)
    embedding = cached.load()
    if embedding is None:
        with encoder.open_stream(device) as stream:
            embedding = yield from encoder.encode(ids, stream, device)
        check_output(embedding, encoder.file.path)
        stats = stream.stats
        cached.store(embedding)
    yield stage.ended(stats)
    return embedding.to(device)


def encode_prompts(job: Job, state: RunState) -> Generator[Event, None, None]:
    """Encode the prompt, and the negative one if there is guidance of either kind, as far as the state has not."""
    prompts = {"text": job.request.prompt}
    if job.request.is_guided:
        prompts["negative"] = job.request.negative_prompt or ""
    for name, prompt in prompts.items():
        if name not in state.encoded:
            state.encoded[name] = (yield from encode_text(job, prompt)).cpu()


def _open_vae(path: Path, how: Autoencoder, device: torch.device, group: Group | None = None) -> WanVAE:
    return WanVAE(path, device, getattr(torch, how.dtype), how.tile, how.room, group)


def encode_images(
    path: Path, pixels: list[Tensor], noise: list[Tensor], plan: Plan, device: torch.device
) -> Generator[Event, None, list[Tensor]]:
    """Encode images [3, 1, H, W] by the VAE, each sampled with its noise -> float32 [16, 1, H/8, W/8] each.

    Args:
        path: the VAE's file.
        pixels: the images.
        noise: for each image what its latent is sampled with.
        plan: how the VAE works.
        device: where the VAE runs.
    """
    stage = Stage("images", len(pixels), "images", device)
    yield stage.started()
    vae = _open_vae(path, plan.encoding, device)
    latents = []
    for index, (image, draw) in enumerate(zip(pixels, noise, strict=True)):
        latents.append(vae.sample(image, draw))
        check_output(latents[-1], path)
        yield stage.done(index + 1)
    del vae
    yield stage.ended()
    return latents


def encode_clip(
    path: Path, groups: Iterable[Tensor], plan: Plan, device: torch.device, part: tuple[int, int] | None = None
) -> Generator[Event, None, Tensor]:
    """Encode a video by the VAE -> float32 [16, F, H/8, W/8], the normalised mean of the posterior.

    Args:
        path: the VAE's file.
        groups: the video's frames in the groups that the VAE encodes at a time, [3, T, H, W] each.
        plan: how the VAE works.
        device: where the VAE runs.
        part: (number, count) of the window.
    """
    stage = Stage("images", 1, "clip", device, part)
    yield stage.started()
    vae = _open_vae(path, plan.encoding, device)
    latents = vae.normalise(vae.encode_groups(groups)[0])
    check_output(latents, path)
    del vae
    yield stage.done(1)
    yield stage.ended()
    return latents


def embed_image(vision: CLIPVision, image: Tensor, device: torch.device) -> Generator[Event, None, Tensor]:
    """Tokens [n, image_dim] of an image [3, H, W] in [-1, 1], made by CLIP."""
    stage = Stage("picture", 1, "pass", device)
    yield stage.started()
    with vision.open_stream(device) as stream:
        tokens = yield from vision.encode(image, stream, device)
    check_output(tokens, vision.file.path)
    yield stage.ended(stream.stats)
    return tokens


def load_transformer(files: ModelFiles, plan: Plan, device: torch.device) -> Generator[Event, None, DiT]:
    """Load the transformer's weights outside of its blocks, and what adapters add to them."""
    stage = Stage("load", 1, "file", device)
    yield stage.started()
    dtype = getattr(torch, plan.dtype)
    dit = DiT(
        files.transformer,
        device,
        dtype,
        rows=plan.token_rows,
        parked=plan.parked_tokens,
        adapters=files.adapters,
    )
    yield stage.done(1)
    yield stage.ended()
    return dit


def denoise(
    files: ModelFiles,
    plan: Plan,
    state: RunState,
    condition: Condition,
    device: torch.device,
    observe: ObserveBlock | None = None,
    part: tuple[int, int] | None = None,
) -> Generator[Event, None, None]:
    """Run the denoising steps that the state does not have yet, and store each in the state.

    On several devices, rank 0 calls this and hands over to the others what they need to do the same.

    Args:
        files: the transformer and its adapters.
        plan: dtype, precisions, ring slots, resident blocks and token rows.
        state: holds the latents, the sampler, and what attention has learned.
        condition: what the window is conditioned on.
        device: where the transformer runs.
        observe: called with the input of every linear layer in the blocks.
        part: (number, count) of the window.
    """
    if state.sampler is not None and state.steps == len(state.sampler.timesteps):
        return
    here().hand_over(Denoising(files, plan, replace(state, encoded={}, carried={}), condition.on_host()))
    yield from _steps(files, plan, state, condition, device, observe, part)


def _steps(
    files: ModelFiles,
    plan: Plan,
    state: RunState,
    condition: Condition,
    device: torch.device,
    observe: ObserveBlock | None = None,
    part: tuple[int, int] | None = None,
) -> Generator[Event, None, None]:
    assert state.sampler is not None and state.latents is not None
    total, finished = len(state.sampler.timesteps), state.steps
    blocks = with_adapters(block_layouts(files.transformer), "blocks.", files.adapters)
    with BlockStream(  # already reads blocks while the weights outside of them are loaded
        files.transformer.path,
        blocks,
        device,
        passes=total - finished,
        slots=plan.ring_slots,
        resident=spread(plan.resident_blocks, len(blocks)),
        observe=observe,
        fast=plan.precision == "fast",
        attention=plan.attention,
        adapters=[adapter.path for adapter in files.adapters],
        neighbours=here() if plan.weights == "shared" else None,
    ) as stream:
        dit = yield from load_transformer(files, plan, device)
        sampler, latents, condition = state.sampler.on(device), state.latents.to(device), condition.on(device)
        stage = Stage("denoise", total, "steps", device, part)
        yield stage.started(finished)
        contexts, noisy = condition.contexts(dit), condition.noisy(latents)
        times_of_steps = condition.times(dit, sampler.timesteps, latents)
        order = condition.order(dit, latents, times_of_steps)
        rope, check = condition.rope(dit, latents, order), _check(plan, dit, order, len(contexts), state.learned)
        for times in times_of_steps[finished:]:
            velocities = yield from dit.velocities(
                stream, condition.sequence(latents, sampler.index), times, contexts, rope, order, check
            )
            velocity = condition.guided(velocities)[:, noisy]
            x0, latents = sampler.clean(velocity, latents), sampler.step(velocity, latents)
            if condition.motion is not None:
                latents = condition.motion.held(latents, sampler.index, sampler.sigmas[sampler.index])
            learned, events = check.finish_step() if check else (state.learned, ())
            made = latents.to("cpu")
            check_step(made, sampler.index, total, files, plan)
            state.finish_step(made, sampler, learned)
            yield stage.done(state.steps)
            yield from events
            yield Preview(x0)
            refuse_to_spill(device)
    yield stage.ended(stream.stats)


def _check(plan: Plan, dit: DiT, order: TileOrder, contexts: int, learned: Learned) -> SelfCheck | None:
    """What decides how much self-attention skips; None if it skips nothing. The torch twin would be slow on a card."""
    if not plan.sparse or not (dit.device.type == "cpu" or uses_triton(dit.device)):
        return None
    return SelfCheck(plan.sparse, order, (contexts, dit.dims.layers, dit.dims.heads), learned)


def decode(
    path: Path,
    latents: Tensor,
    state: RunState,
    plan: Plan,
    device: torch.device,
    show: Callable[[Tensor, int], Frames] | None = None,
    part: tuple[int, int] | None = None,
) -> Iterator[Event]:
    """Decode latents by the VAE and yield their frames group by group. Several devices have some rows of them each.

    Groups that an earlier run has yielded are decoded again, because later groups depend on them, but not yielded.

    Args:
        path: the VAE's file.
        latents: [16, F, h, w].
        state: records how many groups were yielded.
        plan: how the VAE works.
        device: where the VAE runs.
        show: turns pixels [3, T, H, W] and the index of their first frame into the frames to yield.
        part: (number, count) of the window.
    """
    stage = Stage("decode", latents.shape[1], "latent frames", device, part)
    yield stage.started()
    group = here() if latents.shape[2] >= here().size else None  # each has a row at least
    if group is not None:
        group.hand_over(Decoding(path, plan, latents.cpu()))
    vae, first = _open_vae(path, plan.decoding, device, group), 0
    for index, pixels in enumerate(vae.decode(latents)):
        frames = show(pixels, first) if show is not None else to_uint8(pixels)
        check_output(pixels, path)
        first += pixels.shape[1]
        if index >= state.groups:
            state.groups = index + 1
            if len(frames):
                yield FramesReady(frames)
        yield stage.done(index + 1)
    del vae
    yield stage.ended()


def follow(group: Group) -> Iterator[Order]:
    """On a rank other than 0: do what rank 0 hands over, until it hands over nothing more. Yields each before it."""
    nothing: Order | None = None
    while (order := group.hand_over(nothing)) is not None:
        yield order
        order.follow(group)


@contextmanager
def _limited(group: Group, plan: Plan, stage: str) -> Iterator[None]:
    """As `run_job` and pipelines do it on rank 0."""
    limited = vram_limited(group.device, plan.limit_bytes - CONTEXT_BYTES)
    with torch.inference_mode(), limited, out_of_memory_explained(lambda: stage):
        yield
