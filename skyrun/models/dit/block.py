"""A block of the Wan diffusion transformer: a function of activations and of streamed weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from skyrun.kernels.attention import Keys, PassingValues, attend, quantizes
from skyrun.kernels.elementwise import gelu, layer_norm, rms_norm
from skyrun.kernels.float16_sums import within_range
from skyrun.kernels.quantized_keys import KeyRoom, for_few_keys, largest_values
from skyrun.kernels.rotated import RotatedInt8
from skyrun.kernels.selection import TiledKeys
from skyrun.models.dit.spans import Span
from skyrun.models.dit.sparse import AllToAll
from skyrun.models.dit_header import DiTDims
from skyrun.parallel.attention import SharedAttention
from skyrun.streaming.tokens import Tokens
from skyrun.streaming.weights import Weights

_ALL_TO_ALL = AllToAll()
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


def dit_block(
    x: Tokens,
    w: Weights,
    spans: Sequence[Span],
    context: Context,
    rope: Rope,
    dims: DiTDims,
    attention: AllToAll = _ALL_TO_ALL,
    shared: SharedAttention[Span] | None = None,
) -> None:
    """One block: self-attention, cross-attention to text, image and speech, feed-forward. Changes x [L, D] in place.

    Only keys and values of all tokens are in memory at once; everything else is computed span by span. Times and
    context are on the device. attention: of all tokens to each other. shared: exchanges those that are divided.
    """
    modulation = w.dense("modulation").view(6, -1)
    # What travels between devices has one dtype, whatever each of them computes in.
    like = torch.empty(0, dtype=x.dtype, device=modulation.device)

    def project(span: Span, k: Tensor, v: Tensor) -> None:
        compute = partial(_project, x.fetch(span.rows), span, modulation, w, rope, dims, k, v)
        within_range(w.owner, compute, lambda _: (k, v))

    def query(span: Span) -> Tensor:
        compute = partial(_query, x.fetch(span.rows), span, modulation, w, rope, dims)
        return within_range(w.owner, compute, lambda q: [q])

    def sampled(tiles: Sequence[slice]) -> Tensor:
        def of_tile(rows: slice) -> Tensor:
            return query(Span(rows, next(span.time for span in reversed(spans) if span.rows.start <= rows.start)))

        return shared.queries(tiles, of_tile, like) if shared else torch.cat([of_tile(rows) for rows in tiles])

    def span_through_block(span: Span, mixed: Tensor | None = None) -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation + span.time[1]
        h = x.fetch(span.rows)
        # Arguments, not names: what a layer has read is let go when it returns.
        h = w.linear(
            "self_attn.o",
            attention.attend(keys, _query(h, span, modulation, w, rope, dims), [span.rows]) if mixed is None else mixed,
            gate,
            h,
        )
        h = w.linear("cross_attn.o", _cross_attention(h, crossed, w, dims), residual=h)
        if audio_keys is not None:
            h = w.linear("audio_cross_attn.proj", _audio_attention(h, span, audio_keys, w, dims), residual=h)
        return w.linear("ffn.2", _hidden(h, 1 + ffn_scale, ffn_shift, w, dims), ffn_gate, h)

    mixing: Iterable[tuple[Span, Tensor | None]] = ((span, None) for span in spans)
    if shared is None:
        compute = partial(_all_keys, x, project, modulation, attention, context, w, spans, dims)
        keys, (crossed, audio_keys) = within_range(w.owner, compute, lambda both: (*both[0].checked, *_plain(both[1])))
    else:
        keys = _shared_keys(shared, project, like, attention, w, dims)
        crossed, audio_keys = within_range(w.owner, partial(_context_keys, context, w, dims), _plain)
        mixing = shared.attended(query, partial(attention.attend, keys), like)
    attention.look(keys, sampled)
    for span, mixed in mixing:
        x.store(span.rows, within_range(w.owner, partial(span_through_block, span, mixed), lambda h: [h]))


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


def _audio_attention(h: Tensor, span: Span, keys: Sequence[Keys], w: Weights, dims: DiTDims) -> Tensor:
    """Cross-attention of each frame to its own audio. h: the tokens of the span."""
    norm, bias = w.dense("norm_x.weight"), w.dense("norm_x.bias")
    q = w.linear("audio_cross_attn.q_linear", _norm(h, norm, bias, w, dims, "audio_cross_attn.q_linear"))
    for frame, part in span.frames:
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


def _all_keys(
    x: Tokens,
    project: Callable[[Span, Tensor, Tensor], None],
    modulation: Tensor,
    attention: AllToAll,
    context: Context,
    w: Weights,
    spans: Sequence[Span],
    dims: DiTDims,
) -> tuple[Keys | TiledKeys, tuple[_Crossed, list[Keys] | None]]:
    """Keys and values of all tokens, and of their context.

    Where tokens wait on the host and both are quantized, values are computed twice: to find their scales, and to
    quantize them. So they take no memory besides the keys.
    """
    (count, width), device = x.shape, modulation.device
    dtype = w.handed_on(x.dtype, device)
    passes = x.parked and quantizes(w.attention, width, dims.heads, device)

    def values(span: Span) -> Tensor:
        return w.linear("self_attn.v", _normed(x.fetch(span.rows), span, modulation, w, dims)).to(dtype)

    def projected() -> tuple[KeyRoom, Tensor | PassingValues]:
        room, largest = KeyRoom(count, width, dtype, device), []
        v = None if passes else torch.empty(x.shape, dtype=dtype, device=device)
        for span in spans:
            k = room.keys[span.rows]
            part = torch.empty_like(k) if v is None else v[span.rows]
            project(span, k, part)
            largest += [largest_values(part)] if v is None else []
        if v is not None:
            return room, v
        return room, PassingValues(torch.stack(largest).amax(0), lambda: map(values, spans))

    keys = attention.keys(*projected(), dims.heads, w.attention)
    if passes:
        keys.prepare()
    return keys, _context_keys(context, w, dims)


def _shared_keys(
    shared: SharedAttention[Span],
    project: Callable[[Span, Tensor, Tensor], None],
    like: Tensor,
    attention: AllToAll,
    w: Weights,
    dims: DiTDims,
) -> Keys | TiledKeys:
    """Keys and values of all tokens with the heads of this device, quantized before queries travel."""
    keys = attention.keys(*shared.keys(project, like), shared.heads, w.attention)
    if quantizes(w.attention, dims.dim, dims.heads, like.device):
        keys.prepare()
    return keys


def _project(
    h: Tensor, span: Span, modulation: Tensor, w: Weights, rope: Rope, dims: DiTDims, k: Tensor, v: Tensor
) -> None:
    """Write keys and values of a span. The keys' norm runs over the full width, before the split into heads."""
    normed = _normed(h, span, modulation, w, dims)
    v.copy_(w.linear("self_attn.v", normed))
    projected = w.linear("self_attn.k", normed)
    del normed
    gain, rope = w.dense("self_attn.norm_k.weight"), _rows(rope, span.rows)
    if k.dtype == projected.dtype:
        rms_norm(projected, gain, dims.eps, rope, out=k)
    else:
        k.copy_(rms_norm(projected, gain, dims.eps, rope))


def _normed(h: Tensor, span: Span, modulation: Tensor, w: Weights, dims: DiTDims) -> Tensor | RotatedInt8:
    """Tokens of a span as the projections to keys and values take them."""
    shift, scale = modulation[:2] + span.time[1][:2]
    return _norm(h, 1 + scale, shift, w, dims, "self_attn.k", "self_attn.v")


def _rows(rope: Rope, part: slice) -> Rope:
    return rope[0][part], rope[1][part]
