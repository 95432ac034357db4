"""The Wan diffusion transformer: predicts the velocity from noisy latents, timesteps and context.

Weights have original Wan names. A block is a function of activations and of streamed weights.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.events import Event
from skyrun.kernels.adapter import Fitted
from skyrun.kernels.attention import Keys, attend
from skyrun.kernels.elementwise import gelu, layer_norm, rms_norm
from skyrun.kernels.float16_sums import within_range
from skyrun.kernels.gguf_file import GGUFFile
from skyrun.kernels.rotated import RotatedInt8
from skyrun.kernels.selection import TiledKeys
from skyrun.models.audio_projection import project_audio
from skyrun.models.dit_header import HEAD_DIM, DiTDims, canonical_tensors, read_dims
from skyrun.models.rope import rope_table, sinusoid
from skyrun.models.sparse import BlockCheck, SelfCheck
from skyrun.models.tile_order import TileOrder
from skyrun.models.umt5 import TEXT_LENGTH
from skyrun.streaming.stream import BlockStream
from skyrun.streaming.tokens import HeldTokens, ParkedTokens, Tokens
from skyrun.streaming.weights import Weights, load_additions, load_weights

_SLOW = 16  # frames per second that the first of two embeddings of frame rates stands for; the other: 24
_IMAGE_EPS = 1e-5  # of the norms around the image projection

Rope = tuple[Tensor, Tensor]  # cosines and sines, [L, head_dim / 2] each
TimeEmbedding = tuple[Tensor, Tensor]  # float32: [D] for the head, and its projection [6, D] for the blocks


@dataclass(frozen=True)
class Context:
    """What the tokens of a clip attend to by cross-attention, on the device.

    text: [512, D]. image: tokens of an image [257, D]. audio: tokens of speech [F, n, audio_dim]; each latent frame
    attends to its own only.
    """

    text: Tensor
    image: Tensor | None = None
    audio: Tensor | None = None


@dataclass(frozen=True)
class Span:
    """A range of tokens that pass through a block together and share a timestep.

    frames: for a model that hears, the frames that they are of, each with where its tokens are in the range.
    """

    rows: slice
    time: TimeEmbedding
    frames: tuple[tuple[int, Tensor | slice], ...] = ()


class DiT:
    """The part of a transformer that stays in memory: all weights outside of its blocks.

    rows: how many tokens pass through a block at a time; None stands for all. parked: whether tokens wait on the host
    between blocks. adapters: what they add to these weights is loaded too.
    """

    def __init__(
        self,
        file: GGUFFile,
        device: torch.device,
        dtype: torch.dtype,
        *,
        rows: int | None = None,
        parked: bool = False,
        adapters: Sequence[Fitted] = (),
    ) -> None:
        self.dims = read_dims(file)
        self.device, self.dtype = device, dtype
        self._rows, self._parked = rows, parked
        tensors = canonical_tensors(file)
        outer = {name: info for name, info in tensors.items() if not name.startswith("blocks.")}
        self._outer = load_weights(file, outer, device, load_additions(adapters, "blocks.", device))

    def embed_text(self, text: Tensor) -> Tensor:
        """Project a text embedding float32 [n, text_dim], n <= 512 -> context [512, D].

        It is padded by zeros, which are not masked: the model was trained to attend to their projections.
        """
        text = F.pad(text.to(self.device, self.dtype), (0, 0, 0, TEXT_LENGTH - len(text)))
        hidden = F.gelu(self._outer.linear("text_embedding.0", text), approximate="tanh")
        return self._outer.linear("text_embedding.2", hidden)

    def embed_image(self, tokens: Tensor) -> Tensor:
        """Project tokens of an image [n, image_dim] -> context [n, D]."""

        def norm(name: str, x: Tensor) -> Tensor:
            weight, bias = self._outer.dense(f"{name}.weight"), self._outer.dense(f"{name}.bias")
            normed = layer_norm(x, weight, bias, _IMAGE_EPS)
            assert isinstance(normed, Tensor)
            return normed

        hidden = norm("img_emb.proj.0", tokens.to(self.device, self.dtype))
        hidden = F.gelu(self._outer.linear("img_emb.proj.1", hidden))
        return norm("img_emb.proj.4", self._outer.linear("img_emb.proj.3", hidden))

    def embed_audio(self, windows: Tensor) -> Tensor:
        """Project windows of speech features [1 + 4 (F - 1), window, layers, channels] -> [F, n, audio_dim]."""
        return project_audio(self._outer, windows.to(self.device, self.dtype), self.dims.context_tokens)

    def embed_times(self, timesteps: Sequence[float], fps: int | None = None) -> list[TimeEmbedding]:
        """One embedding per timestep, all in one call: the projection is the largest matrix outside of the blocks.

        fps: the frame rate of the clip, for a transformer that is told.
        """
        waves = sinusoid(torch.tensor(timesteps, dtype=torch.float32, device=self.device), self.dims.freq_dim)
        times = self._outer.linear("time_embedding.2", F.silu(self._outer.linear("time_embedding.0", waves)))
        projections = self._outer.linear("time_projection.1", F.silu(times))
        if self.dims.rates and fps is not None:
            rate = self._outer.dense("fps_embedding.weight")[0 if fps == _SLOW else 1]
            hidden = F.silu(self._outer.linear("fps_projection.0", rate))
            projections = projections + self._outer.linear("fps_projection.2", hidden)
        return list(zip(times, projections.view(-1, 6, self.dims.dim), strict=True))

    def rope(self, latents: Tensor, positions: Sequence[int] | None = None) -> Rope:
        """The rotary table of latents [C, F, h, w]. positions: of the frames in time, by default 0 to F - 1."""
        _, frames, height, width = latents.shape
        return rope_table(positions or range(frames), height // 2, width // 2, HEAD_DIM, self.device)

    def forward(
        self,
        stream: BlockStream,
        latents: Tensor,
        times: Sequence[TimeEmbedding],
        context: Context,
        rope: Rope,
        order: TileOrder | None = None,
    ) -> Generator[Event, None, Tensor]:
        """Predict the velocity, float32 [out, F, h, w]. Yields an event after every block.

        Args:
            stream: the transformer's blocks.
            latents: [C, F, h, w].
            times: a time embedding for each of the F frames.
            context: what the tokens attend to by cross-attention.
            rope: the rotary table of the latents, in the order of the tokens.
            order: of the tokens; None leaves them in frame, row, column order.
        """
        (velocity,) = yield from self.velocities(stream, latents, times, [context], rope, order)
        return velocity

    def velocities(
        self,
        stream: BlockStream,
        latents: Tensor,
        times: Sequence[TimeEmbedding],
        contexts: list[Context],
        rope: Rope,
        order: TileOrder | None = None,
        check: SelfCheck | None = None,
    ) -> Generator[Event, None, list[Tensor]]:
        """As `forward`, for several contexts: the velocity with each. Every block is read once for all of them.

        check: decides what self-attention skips; None skips nothing.
        """
        _, frames, height, width = latents.shape
        shape = frames * (height // 2) * (width // 2), self.dims.dim
        tokens = ParkedTokens if self._parked else HeldTokens
        with ExitStack() as stack:
            held = [stack.enter_context(closing(tokens(shape, self.dtype, self.device))) for _ in contexts]
            for x in held:
                self._patchify(latents, x, order)
            rows = check.whole_tiles(self._rows) if check else self._rows
            spans = list(divide(times, shape[0] // frames, rows))
            if contexts[0].audio is not None:
                spans = [_hearing(span, shape[0] // frames, order, self.device) for span in spans]
            for weights, clock in stream.blocks():
                for number, (x, context) in enumerate(zip(held, contexts, strict=True)):
                    block_check = None if check is None else check.block(number, clock.index)
                    dit_block(x, weights, spans, context, rope, self.dims, block_check)
                yield clock.done()
            patches = [self._head(x, spans, order).view(frames, height // 2, width // 2, 2, 2, -1) for x in held]
        return [part.permute(5, 0, 1, 3, 2, 4).reshape(-1, frames, height, width) for part in patches]

    def _patchify(self, latents: Tensor, x: Tokens, order: TileOrder | None) -> None:
        """Latents [C, F, h, w] -> tokens [F * h/2 * w/2, D]. The patch convolution is computed as one matmul."""
        channels, frames, height, width = latents.shape
        patches = latents.view(channels, frames, height // 2, 2, width // 2, 2).permute(1, 2, 4, 0, 3, 5)
        patches = patches.reshape(-1, channels * 4).to(self.device, self.dtype)
        patches = patches if order is None else order.arranged(patches)
        weight = self._outer.dense("patch_embedding.weight", self.dtype).flatten(1)
        bias = self._outer.dense("patch_embedding.bias", self.dtype)
        for part in chunks(0, len(patches), self._rows):
            x.store(part, F.linear(patches[part], weight, bias))

    def _head(self, x: Tokens, spans: Sequence[Span], order: TileOrder | None) -> Tensor:
        """Tokens [L, D] -> patches, float32 [L, 4 * out_channels], in frame, row, column order."""
        modulation = self._outer.dense("head.modulation").view(2, -1)
        patches = []
        for span in spans:
            shift, scale = modulation + span.time[0]
            normed = layer_norm(x.fetch(span.rows), 1 + scale, shift, self.dims.eps)
            patches.append(self._outer.linear("head.head", normed).float())
        joined = torch.cat(patches)
        return joined if order is None else order.restored(joined)


def divide(times: Sequence[TimeEmbedding], tokens: int, rows: int | None) -> Iterator[Span]:
    """Spans of at most `rows` tokens that cover frames of `tokens` each. Neighbours that share a time are joined."""
    start = 0
    for frame, time in enumerate(times):
        if frame + 1 == len(times) or times[frame + 1] is not time:
            for part in chunks(start, (frame + 1) * tokens, rows):
                yield Span(part, time)
            start = (frame + 1) * tokens


def _hearing(span: Span, tokens: int, order: TileOrder | None, device: torch.device) -> Span:
    """The span with the frames of `tokens` tokens that it has tokens of."""
    rows = span.rows
    if order is not None:
        return replace(span, frames=tuple(order.by_frame(rows, device)))
    frames = range(rows.start // tokens, -(-rows.stop // tokens))
    parts = (slice(max(0, n * tokens - rows.start), (n + 1) * tokens - rows.start) for n in frames)
    return replace(span, frames=tuple(zip(frames, parts, strict=True)))


def chunks(start: int, end: int, rows: int | None) -> list[slice]:
    """Slices that cover `start` to `end`, of at most `rows` each."""
    rows = rows or max(1, end - start)
    return [slice(first, min(first + rows, end)) for first in range(start, end, rows)]


def dit_block(
    x: Tokens,
    w: Weights,
    spans: Sequence[Span],
    context: Context,
    rope: Rope,
    dims: DiTDims,
    check: BlockCheck | None = None,
) -> None:
    """One block: self-attention, cross-attention to text, image and speech, feed-forward. Changes x [L, D] in place.

    Only keys and values of all tokens are in memory at once; everything else is computed span by span. Times and
    context are on the device. check: decides what self-attention skips; None skips nothing.
    """
    modulation = w.dense("modulation").view(6, -1)

    def all_keys() -> tuple[Keys | TiledKeys, Keys, Keys | None, list[Keys] | None]:
        return (
            _keys(x, modulation, w, spans, rope, dims, check),
            _text_keys(context.text, w, dims),
            None if context.image is None else _text_keys(context.image, w, dims, "_img"),
            None if context.audio is None else _audio_keys(context.audio, w, dims),
        )

    keys, text_keys, image_keys, audio_keys = within_range(all_keys)
    if check is not None and isinstance(keys, TiledKeys):
        within_range(_look, check, keys, x, modulation, w, spans, rope, dims)

    def span_through_block(span: Span) -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation + span.time[1]
        h = x.fetch(span.rows)
        # Arguments, not names: what a layer has read is let go when it returns.
        h = w.linear(
            "self_attn.o", _self_attention(h, 1 + scale, shift, keys, w, rope, dims, span.rows, check), gate, h
        )
        h = w.linear("cross_attn.o", _cross_attention(h, text_keys, image_keys, w, dims), residual=h)
        if audio_keys is not None:
            spoken = _audio_attention(h, span, audio_keys, w, dims)
            h = w.linear("audio_cross_attn.proj", spoken, residual=h)
            del spoken
        return w.linear("ffn.2", _hidden(h, 1 + ffn_scale, ffn_shift, w, dims), ffn_gate, h)

    for span in spans:
        x.store(span.rows, within_range(span_through_block, span))


def _self_attention(
    h: Tensor,
    gain: Tensor,
    shift: Tensor,
    keys: Keys | TiledKeys,
    w: Weights,
    rope: Rope,
    dims: DiTDims,
    rows: slice,
    check: BlockCheck | None,
) -> Tensor:
    q = w.linear("self_attn.q", layer_norm(h, gain, shift, dims.eps, w.rotated("self_attn.q")))
    normed = partial(rms_norm, q, w.dense("self_attn.norm_q.weight"), dims.eps, _rows(rope, rows))
    if isinstance(keys, TiledKeys):
        assert check is not None
        return check.attend(normed(), keys, rows)
    return attend(normed(), keys)


def _queries(h: Tensor, gain: Tensor, shift: Tensor, w: Weights, rope: Rope, dims: DiTDims) -> Tensor:
    q = w.linear("self_attn.q", layer_norm(h, gain, shift, dims.eps, w.rotated("self_attn.q")))
    return rms_norm(q, w.dense("self_attn.norm_q.weight"), dims.eps, rope)


def _look(
    check: BlockCheck,
    keys: TiledKeys,
    x: Tokens,
    modulation: Tensor,
    w: Weights,
    spans: Sequence[Span],
    rope: Rope,
    dims: DiTDims,
) -> None:
    """Let the check look at queries, whatever spans they are in."""
    runs = [list(run) for _, run in groupby(spans, key=lambda span: id(span.time))]
    times = [(slice(run[0].rows.start, run[-1].rows.stop), run[0].time) for run in runs]

    def queries(rows: slice) -> Tensor:
        time = next(time for run, time in times if run.start <= rows.start < run.stop)
        shift, scale = modulation[:2] + time[1][:2]
        return _queries(x.fetch(rows), 1 + scale, shift, w, _rows(rope, rows), dims)

    check.look(keys, queries, [run for run, _ in times])


def _cross_attention(h: Tensor, text: Keys, image: Keys | None, w: Weights, dims: DiTDims) -> Tensor:
    """Cross-attention to text and image, with a softmax for each."""
    norm, bias = w.dense("norm3.weight"), w.dense("norm3.bias")
    q = w.linear("cross_attn.q", layer_norm(h, norm, bias, dims.eps, w.rotated("cross_attn.q")))
    q = rms_norm(q, w.dense("cross_attn.norm_q.weight"), dims.eps)
    mixed = attend(q, text)
    return mixed if image is None else mixed.add_(attend(q, image))


def _audio_attention(h: Tensor, span: Span, keys: Sequence[Keys], w: Weights, dims: DiTDims) -> Tensor:
    """Cross-attention of each frame to its own audio. h: the tokens of the span."""
    norm, bias = w.dense("norm_x.weight"), w.dense("norm_x.bias")
    q = w.linear(
        "audio_cross_attn.q_linear", layer_norm(h, norm, bias, dims.eps, w.rotated("audio_cross_attn.q_linear"))
    )
    for frame, part in span.frames:
        q[part] = attend(q[part], keys[frame])
    return q


def _hidden(h: Tensor, gain: Tensor, shift: Tensor, w: Weights, dims: DiTDims) -> Tensor | RotatedInt8:
    wide = w.linear("ffn.0", layer_norm(h, gain, shift, dims.eps, w.rotated("ffn.0")))
    return gelu(wide, w.rotated("ffn.2"))


def _text_keys(context: Tensor, w: Weights, dims: DiTDims, kind: str = "") -> Keys:
    """Keys and values of the text, or of the image if `kind` is "_img"."""
    k = rms_norm(w.linear(f"cross_attn.k{kind}", context), w.dense(f"cross_attn.norm_k{kind}.weight"), dims.eps)
    return Keys(k, w.linear(f"cross_attn.v{kind}", context), dims.heads, w.attention)


def _audio_keys(audio: Tensor, w: Weights, dims: DiTDims) -> list[Keys]:
    """Keys and values of each latent frame's audio. They are too few to gain from int8."""
    pairs = w.linear("audio_cross_attn.kv_linear", audio).unflatten(2, (2, -1))
    return [Keys(k, v, dims.heads) for k, v in zip(pairs[:, :, 0], pairs[:, :, 1], strict=True)]


def _keys(
    x: Tokens,
    modulation: Tensor,
    w: Weights,
    spans: Sequence[Span],
    rope: Rope,
    dims: DiTDims,
    check: BlockCheck | None,
) -> Keys | TiledKeys:
    """Keys and values of all tokens. The keys' norm runs over the full width, before the split into heads."""
    k, v = (torch.empty(x.shape, dtype=x.dtype, device=modulation.device) for _ in range(2))
    for span in spans:
        shift, scale = modulation[:2] + span.time[1][:2]
        h, rotated = x.fetch(span.rows), w.rotated("self_attn.k", "self_attn.v")
        normed = layer_norm(h, 1 + scale, shift, dims.eps, rotated)
        v[span.rows] = w.linear("self_attn.v", normed)
        projected = w.linear("self_attn.k", normed)
        del normed
        k[span.rows] = rms_norm(projected, w.dense("self_attn.norm_k.weight"), dims.eps, _rows(rope, span.rows))
    return (check.keys if check is not None else Keys)(k, v, dims.heads, w.attention)


def _rows(rope: Rope, part: slice) -> Rope:
    return rope[0][part], rope[1][part]
