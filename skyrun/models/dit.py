"""The Wan diffusion transformer: predicts the velocity from noisy latents, timesteps and context.

Weights have original Wan names. A block is a function of activations and of streamed weights.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.events import Event
from skyrun.kernels.adapter import Fitted
from skyrun.kernels.attention import Keys, attend
from skyrun.kernels.elementwise import gelu, layer_norm, rms_norm
from skyrun.kernels.float16_sums import within_range
from skyrun.kernels.gguf_file import GGUFFile
from skyrun.kernels.quantized_keys import for_few_keys
from skyrun.kernels.rotated import RotatedInt8
from skyrun.models.audio_projection import project_audio
from skyrun.models.dit_header import HEAD_DIM, DiTDims, canonical_tensors, read_dims
from skyrun.models.rope import rope_table, sinusoid
from skyrun.models.spans import Span, TimeEmbedding, chunks, divide
from skyrun.models.umt5 import TEXT_LENGTH
from skyrun.parallel.attention import SharedAttention
from skyrun.parallel.group import here
from skyrun.streaming.stream import BlockStream
from skyrun.streaming.tokens import HeldTokens, ParkedTokens, Tokens
from skyrun.streaming.weights import Weights, load_additions, load_weights

_SLOW = 16  # frames per second that the first of two embeddings of frame rates stands for; the other: 24
_IMAGE_EPS = 1e-5  # of the norms around the image projection
_MOST_GROWTH, _GUIDED_SHARE = 2.5, 0.25  # of normalized attention guidance: the values published for Wan

Rope = tuple[Tensor, Tensor]  # cosines and sines, [L, head_dim / 2] each


@dataclass(frozen=True)
class Context:
    """What the tokens of a clip attend to by cross-attention, on the device.

    text: [512, D]. image: tokens of an image [257, D]. audio: tokens of speech [F, n, audio_dim]; each latent frame
    attends to its own only. avoided: text [512, D] that attention is guided away from, by `nag` times the difference.
    """

    text: Tensor
    image: Tensor | None = None
    audio: Tensor | None = None
    avoided: Tensor | None = None
    nag: float = 1.0


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
        self, stream: BlockStream, latents: Tensor, times: Sequence[TimeEmbedding], context: Context, rope: Rope
    ) -> Generator[Event, None, Tensor]:
        """Predict the velocity, float32 [out, F, h, w]. Yields an event after every block.

        Args:
            stream: the transformer's blocks.
            latents: [C, F, h, w].
            times: a time embedding for each of the F frames.
            context: what the tokens attend to by cross-attention.
            rope: the rotary table of the latents.
        """
        (velocity,) = yield from self.velocities(stream, latents, times, [context], rope)
        return velocity

    def velocities(
        self, stream: BlockStream, latents: Tensor, times: Sequence[TimeEmbedding], contexts: list[Context], rope: Rope
    ) -> Generator[Event, None, list[Tensor]]:
        """As `forward`, for several contexts: the velocity with each. Every block is read once for all of them."""
        _, frames, height, width = latents.shape
        shape = frames * (height // 2) * (width // 2), self.dims.dim
        tokens, group = ParkedTokens if self._parked else HeldTokens, here()
        shares = group.shares(shape[0])
        own = shares[group.rank]
        spans_of = [list(divide(times, shape[0] // frames, self._rows, share)) for share in shares]
        spans = spans_of[group.rank]
        shared = SharedAttention(group, spans_of, self.dims.dim, self.dims.heads) if group.size > 1 else None
        with ExitStack() as stack:
            held = [stack.enter_context(closing(tokens(shape, self.dtype, self.device, own))) for _ in contexts]
            for x in held:
                self._patchify(latents, x, own)
            for weights, clock in stream.blocks():
                for x, context in zip(held, contexts, strict=True):
                    dit_block(x, weights, spans, context, rope, self.dims, shared)
                yield clock.done()
            counts = [share.stop - share.start for share in shares]
            patches = [group.gathered(self._head(x, spans), counts) for x in held]
        whole = [part.view(frames, height // 2, width // 2, 2, 2, -1) for part in patches]
        return [part.permute(5, 0, 1, 3, 2, 4).reshape(-1, frames, height, width) for part in whole]

    def _patchify(self, latents: Tensor, x: Tokens, own: slice) -> None:
        """Latents [C, F, h, w] -> tokens [F * h/2 * w/2, D], of which only the own ones are computed.

        The patch convolution is computed as one matmul.
        """
        channels, frames, height, width = latents.shape
        patches = latents.view(channels, frames, height // 2, 2, width // 2, 2).permute(1, 2, 4, 0, 3, 5)
        patches = patches.reshape(-1, channels * 4).to(self.device, self.dtype)
        weight = self._outer.dense("patch_embedding.weight", self.dtype).flatten(1)
        bias = self._outer.dense("patch_embedding.bias", self.dtype)
        for part in chunks(own.start, own.stop, self._rows):
            x.store(part, F.linear(patches[part], weight, bias))

    def _head(self, x: Tokens, spans: Sequence[Span]) -> Tensor:
        """Tokens of the spans -> patches, float32 [n, 4 * out_channels]."""
        modulation = self._outer.dense("head.modulation").view(2, -1)
        patches = [torch.empty(0, 4 * self.dims.out_channels, device=self.device)]
        for span in spans:
            shift, scale = modulation + span.time[0]
            normed = layer_norm(x.fetch(span.rows), 1 + scale, shift, self.dims.eps)
            patches.append(self._outer.linear("head.head", normed).float())
        return torch.cat(patches)


def dit_block(
    x: Tokens,
    w: Weights,
    spans: Sequence[Span],
    context: Context,
    rope: Rope,
    dims: DiTDims,
    shared: SharedAttention[Span] | None = None,
) -> None:
    """One block: self-attention, cross-attention to text, image and speech, feed-forward. Changes x [L, D] in place.

    Only keys and values of all tokens are in memory at once; everything else is computed span by span. Times and
    context are on the device. shared: the self-attention of tokens that are divided among devices.
    """
    modulation = w.dense("modulation").view(6, -1)

    def project(span: Span, k: Tensor, v: Tensor) -> None:
        compute = partial(_project, x.fetch(span.rows), span, modulation, w, rope, dims, k, v)
        within_range(w.owner, compute, lambda _: (k, v))

    def query(span: Span) -> Tensor:
        compute = partial(_query, x.fetch(span.rows), span, modulation, w, rope, dims)
        return within_range(w.owner, compute, lambda q: [q])

    def all_keys() -> tuple[Keys, tuple["_Crossed", list[Keys] | None]]:
        return _keys(x, project, w, spans, modulation.device, dims), _context_keys(context, w, dims)

    # What travels between devices has one dtype, whatever each of them computes in.
    like = torch.empty(0, dtype=x.dtype, device=modulation.device)
    if shared is None:
        keys, (crossed, audio_keys) = within_range(
            w.owner, all_keys, lambda found: (*found[0].plain, *_plain(found[1]))
        )
    else:
        keys = shared.keys(project, like, w.attention)
        crossed, audio_keys = within_range(w.owner, partial(_context_keys, context, w, dims), _plain)

    def span_through_block(span: Span, mixed: Tensor | None = None) -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation + span.time[1]
        h = x.fetch(span.rows)
        # Arguments, not names: what a layer has read is let go when it returns.
        h = w.linear(
            "self_attn.o",
            _self_attention(h, 1 + scale, shift, keys, w, _rows(rope, span.rows), dims) if mixed is None else mixed,
            gate,
            h,
        )
        h = w.linear("cross_attn.o", _cross_attention(h, crossed, w, dims), residual=h)
        if audio_keys is not None:
            tokens = x.shape[0] // len(audio_keys)
            spoken = _audio_attention(h, span.rows, tokens, audio_keys, w, dims)
            h = w.linear("audio_cross_attn.proj", spoken, residual=h)
            del spoken
        return w.linear("ffn.2", _hidden(h, 1 + ffn_scale, ffn_shift, w, dims), ffn_gate, h)

    mixing: Iterable[tuple[Span, Tensor | None]] = ((span, None) for span in spans)
    for span, mixed in mixing if shared is None else shared.attended(query, keys, like):
        x.store(span.rows, within_range(w.owner, partial(span_through_block, span, mixed), lambda h: [h]))


def _self_attention(
    h: Tensor, gain: Tensor, shift: Tensor, keys: Keys, w: Weights, rope: Rope, dims: DiTDims
) -> Tensor:
    q = w.linear("self_attn.q", _norm(h, gain, shift, w, dims, "self_attn.q"))
    return attend(rms_norm(q, w.dense("self_attn.norm_q.weight"), dims.eps, rope), keys)


def _query(h: Tensor, span: Span, modulation: Tensor, w: Weights, rope: Rope, dims: DiTDims) -> Tensor:
    """The queries of a span."""
    shift, scale = modulation[:2] + span.time[1][:2]
    q = w.linear("self_attn.q", _norm(h, 1 + scale, shift, w, dims, "self_attn.q"))
    return rms_norm(q, w.dense("self_attn.norm_q.weight"), dims.eps, _rows(rope, span.rows))


@dataclass(frozen=True)
class _Crossed:
    """Keys and values of text, image and the text to avoid, with the scale of guidance away from it."""

    text: Keys
    image: Keys | None
    avoided: Keys | None
    nag: float


def _cross_attention(h: Tensor, keys: _Crossed, w: Weights, dims: DiTDims) -> Tensor:
    """Cross-attention to text and image, with a softmax for each. Only that to the text is guided."""
    norm, bias = w.dense("norm3.weight"), w.dense("norm3.bias")
    q = w.linear("cross_attn.q", _norm(h, norm, bias, w, dims, "cross_attn.q"))
    q = rms_norm(q, w.dense("cross_attn.norm_q.weight"), dims.eps)
    mixed = attend(q, keys.text)
    if keys.avoided is not None:
        mixed = guided_away(mixed, attend(q, keys.avoided), keys.nag)
    return mixed if keys.image is None else mixed.add_(attend(q, keys.image))


def guided_away(wanted: Tensor, avoided: Tensor, scale: float) -> Tensor:
    """Normalized attention guidance (Chen et al. 2025, arXiv:2505.21179) of what tokens [L, D] read from two texts.

    The difference is stretched by the scale, each token's sum of magnitudes held below 2.5 times that of `wanted`, and
    a quarter of the result blended in. Both arguments are written over; the first one is returned.
    """
    guided = avoided.lerp_(wanted, scale)
    before, after = (torch.linalg.vector_norm(x, 1, -1, True, dtype=torch.float32) for x in (wanted, guided))
    guided.mul_((_MOST_GROWTH * before / after.clamp_min(1e-7)).clamp_max(1))
    return wanted.lerp_(guided, _GUIDED_SHARE)


def _audio_attention(h: Tensor, rows: slice, tokens: int, keys: Sequence[Keys], w: Weights, dims: DiTDims) -> Tensor:
    """Cross-attention of each frame of `tokens` tokens to its own audio. h: the tokens in `rows`."""
    norm, bias = w.dense("norm_x.weight"), w.dense("norm_x.bias")
    q = w.linear("audio_cross_attn.q_linear", _norm(h, norm, bias, w, dims, "audio_cross_attn.q_linear"))
    for frame in range(rows.start // tokens, -(-rows.stop // tokens)):
        part = slice(max(0, frame * tokens - rows.start), (frame + 1) * tokens - rows.start)
        q[part] = attend(q[part], keys[frame])
    return q


def _hidden(h: Tensor, gain: Tensor, shift: Tensor, w: Weights, dims: DiTDims) -> Tensor | RotatedInt8:
    wide = w.linear("ffn.0", _norm(h, gain, shift, w, dims, "ffn.0"))
    rotated = w.rotated("ffn.2")
    return gelu(wide, rotated, out=None if rotated else wide)


def _norm(h: Tensor, gain: Tensor, shift: Tensor, w: Weights, dims: DiTDims, *layers: str) -> Tensor | RotatedInt8:
    """Tokens as the layers take them."""
    return layer_norm(h, gain, shift, dims.eps, w.rotated(*layers), w.handed_on(h.dtype, h.device))


def _context_keys(context: Context, w: Weights, dims: DiTDims) -> tuple[_Crossed, list[Keys] | None]:
    crossed = _Crossed(
        _text_keys(context.text, w, dims),
        None if context.image is None else _text_keys(context.image, w, dims, "_img"),
        None if context.avoided is None else _text_keys(context.avoided, w, dims),
        context.nag,
    )
    return crossed, None if context.audio is None else _audio_keys(context.audio, w, dims)


def _plain(found: tuple[_Crossed, list[Keys] | None]) -> Iterator[Tensor]:
    """The keys and values of a context, before they are quantized."""
    crossed, audio = found
    for one in (crossed.text, *filter(None, (crossed.image, crossed.avoided, *(audio or ())))):
        yield from one.plain


def _text_keys(context: Tensor, w: Weights, dims: DiTDims, kind: str = "") -> Keys:
    """Keys and values of the text, or of the image if `kind` is "_img"."""
    context = context.to(w.handed_on(context.dtype, context.device))
    k = rms_norm(w.linear(f"cross_attn.k{kind}", context), w.dense(f"cross_attn.norm_k{kind}.weight"), dims.eps)
    return Keys(k, w.linear(f"cross_attn.v{kind}", context), dims.heads, for_few_keys(w.attention))


def _audio_keys(audio: Tensor, w: Weights, dims: DiTDims) -> list[Keys]:
    """Keys and values of each latent frame's audio. They are too few to gain from int8."""
    audio = audio.to(w.handed_on(audio.dtype, audio.device))
    pairs = w.linear("audio_cross_attn.kv_linear", audio).unflatten(2, (2, -1))
    return [Keys(k, v, dims.heads) for k, v in zip(pairs[:, :, 0], pairs[:, :, 1], strict=True)]


def _keys(
    x: Tokens,
    project: Callable[[Span, Tensor, Tensor], None],
    w: Weights,
    spans: Sequence[Span],
    device: torch.device,
    dims: DiTDims,
) -> Keys:
    """Keys and values of all tokens."""
    k, v = (torch.empty(x.shape, dtype=w.handed_on(x.dtype, device), device=device) for _ in range(2))
    for span in spans:
        project(span, k[span.rows], v[span.rows])
    return Keys(k, v, dims.heads, w.attention)


def _project(
    h: Tensor, span: Span, modulation: Tensor, w: Weights, rope: Rope, dims: DiTDims, k: Tensor, v: Tensor
) -> None:
    """Write keys and values of a span. The keys' norm runs over the full width, before the split into heads."""
    shift, scale = modulation[:2] + span.time[1][:2]
    normed = _norm(h, 1 + scale, shift, w, dims, "self_attn.k", "self_attn.v")
    v.copy_(w.linear("self_attn.v", normed))
    projected = w.linear("self_attn.k", normed)
    del normed
    gain, rope = w.dense("self_attn.norm_k.weight"), _rows(rope, span.rows)
    if k.dtype == projected.dtype:
        rms_norm(projected, gain, dims.eps, rope, out=k)
    else:
        k.copy_(rms_norm(projected, gain, dims.eps, rope))


def _rows(rope: Rope, part: slice) -> Rope:
    return rope[0][part], rope[1][part]
