"""The Wan diffusion transformer: noisy latents, a timestep and a text in, the velocity out.

Weights have original Wan names. A block is a function of activations and of the weights that pass by.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.errors import SkyrunError
from skyrun.events import Event
from skyrun.kernels.attention import Keys, attend
from skyrun.kernels.elementwise import gelu, layer_norm, rms_norm
from skyrun.kernels.gguf_file import GGUFFile, TensorInfo
from skyrun.kernels.name_tables import WAN_AUDIO_TRANSFORMER, WAN_TRANSFORMER
from skyrun.kernels.names import Match, fits, recognise, strays
from skyrun.kernels.rotated import RotatedInt8
from skyrun.layers import rope_table, sinusoid
from skyrun.request import TEXT_LENGTH
from skyrun.stream import Block, BlockStream, lay_out_blocks
from skyrun.weights import Weights, load_weights

_HEAD_DIM = 128
_AUDIO_WINDOW = 5  # frames of audio around a video frame, where a file does not say

Rope = tuple[Tensor, Tensor]  # cosines and sines, [L, head_dim / 2] each
TimeEmbedding = tuple[Tensor, Tensor]  # float32: [D] for the head, its projection [6, D] for the blocks


@dataclass(frozen=True)
class DiTDims:
    """Sizes of a transformer. All follow from its tensors; metadata that disagrees is an error."""

    dim: int
    heads: int
    layers: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    eps: float = 1e-6


def canonical_tensors(file: GGUFFile) -> dict[str, TensorInfo]:
    """Tensors by original Wan name and in torch's shapes, whatever naming, prefix and axes the file has.

    Tensors that the model does not know keep the names they have.
    """
    match = _recognised(file)
    dims, _ = _check(match, file)
    rows = {row.name(): row.sizes(dims) for row in match.table.expand(match.layers)}
    tensors = {}
    for name, in_file in match.names.items():
        info, expected = file.tensors[in_file], rows.get(name)
        restored = expected if expected and fits(info.shape, expected) else info.shape
        tensors[name] = replace(info, shape=restored)
    unknown, _ = strays(file.tensors, [match])
    return tensors | {name.removeprefix(match.prefix): file.tensors[name] for name in unknown}


def _recognised(file: GGUFFile) -> Match:
    matches = recognise(file.tensors, (WAN_TRANSFORMER, WAN_AUDIO_TRANSFORMER))
    if not matches:
        raise SkyrunError(
            f"{file.path} is not a Wan transformer: it has no tensors such as patch_embedding.weight",
            "convert the published checkpoint: skyrun convert CHECKPOINT -o DIR",
        )
    return matches[0]


def _check(match: Match, file: GGUFFile) -> tuple[dict[str, int], list[str]]:
    """The sizes that the tensors imply, and what is missing or misshapen."""
    window = file.metadata.get("skyrun.audio_window")
    known = {"audio_window": window if isinstance(window, int) and window > 0 else _AUDIO_WINDOW}
    return match.check({name: info.shape for name, info in file.tensors.items()}, known)


def read_dims(file: GGUFFile) -> DiTDims:
    """The dims that a file's tensors imply. SkyrunError if any is missing, misshapen or contradicts the metadata."""
    match = _recognised(file)
    layers = len(block_layouts(file))
    sizes, problems = _check(match, file)
    problems += [f"{name} is not a tensor of this model" for name in strays(file.tensors, [match])[0]]
    if problems:
        raise SkyrunError.listing(f"{file.path} is not a whole transformer", problems, "convert or download it again")
    dims = DiTDims(
        dim=sizes["dim"],
        heads=sizes["dim"] // _HEAD_DIM,
        layers=layers,
        ffn_dim=sizes["ffn"],
        in_channels=sizes["in"],
        out_channels=sizes["out"],
        text_dim=sizes["text"],
        freq_dim=sizes["freq"],
        eps=file.number("skyrun.eps", 1e-6),
    )
    if dims.dim % _HEAD_DIM:
        problems.append(f"its width {dims.dim} is not a multiple of the {_HEAD_DIM} of a head")
    for field in fields(dims):
        said = file.metadata.get(f"skyrun.{field.name}")
        if said is not None and said != getattr(dims, field.name):
            problems.append(f"its metadata says {field.name} = {said}, its tensors {getattr(dims, field.name)}")
    if problems:
        raise SkyrunError.listing(f"{file.path} contradicts itself", problems, "convert or download it again")
    return dims


def block_layouts(file: GGUFFile) -> list[Block]:
    """Where each block lies, in execution order."""
    return lay_out_blocks(file.path, canonical_tensors(file), "blocks.")


class DiT:
    """What of a transformer stays in memory: everything but the blocks.

    rows: tokens that go through a block at a time; None takes all at once. parked: between blocks, tokens are on the
    host.
    """

    def __init__(
        self,
        file: GGUFFile,
        device: torch.device,
        dtype: torch.dtype,
        *,
        rows: int | None = None,
        parked: bool = False,
    ) -> None:
        self.dims = read_dims(file)
        self.device, self.dtype = device, dtype
        self._rows, self._parked = rows, parked
        tensors = canonical_tensors(file)
        outer = {name: info for name, info in tensors.items() if not name.startswith("blocks.")}
        self._outer = load_weights(file, outer, device)

    def embed_text(self, text: Tensor) -> Tensor:
        """Text embedding float32 [n, text_dim], n <= 512 -> context [512, D].

        Rows after the text are zeros, not masked: the model was trained to attend to what the layers make of them.
        """
        text = F.pad(text.to(self.device, self.dtype), (0, 0, 0, TEXT_LENGTH - len(text)))
        hidden = F.gelu(self._outer.linear("text_embedding.0", text), approximate="tanh")
        return self._outer.linear("text_embedding.2", hidden)

    def embed_times(self, timesteps: Sequence[float]) -> list[TimeEmbedding]:
        """An embedding per timestep, all at once: the projection is the largest matrix outside the blocks."""
        waves = sinusoid(torch.tensor(timesteps, dtype=torch.float32, device=self.device), self.dims.freq_dim)
        times = self._outer.linear("time_embedding.2", F.silu(self._outer.linear("time_embedding.0", waves)))
        projections = self._outer.linear("time_projection.1", F.silu(times))
        return list(zip(times, projections.view(-1, 6, self.dims.dim), strict=True))

    def rope(self, latents: Tensor) -> Rope:
        """The rotary table of latents [C, F, h, w]."""
        _, frames, height, width = latents.shape
        return rope_table(frames, height // 2, width // 2, _HEAD_DIM, self.device)

    def forward(
        self, stream: BlockStream, latents: Tensor, time: TimeEmbedding, context: Tensor, rope: Rope
    ) -> Generator[Event, None, Tensor]:
        """latents [C, F, h, w] -> velocity float32 [C, F, h, w]. Yields an event after every block."""
        _, frames, height, width = latents.shape
        embedding, projection = time
        x = self._patchify(latents)
        parts = chunks(len(x), self._rows)
        for weights, clock in stream.blocks():
            dit_block(x, weights, projection, context, rope, self.dims, parts)
            yield clock.done()
        patches = self._head(x, embedding, parts).view(frames, height // 2, width // 2, 2, 2, -1)
        return patches.permute(5, 0, 1, 3, 2, 4).reshape(-1, frames, height, width)

    def _patchify(self, latents: Tensor) -> Tensor:
        """[C, F, h, w] -> tokens [F * h/2 * w/2, D]; the convolution of the patches as one matrix product."""
        channels, frames, height, width = latents.shape
        patches = latents.view(channels, frames, height // 2, 2, width // 2, 2).permute(1, 2, 4, 0, 3, 5)
        patches = patches.reshape(-1, channels * 4).to(self.device, self.dtype)
        weight = self._outer.dense("patch_embedding.weight", self.dtype).flatten(1)
        bias = self._outer.dense("patch_embedding.bias", self.dtype)
        if not self._parked:
            return F.linear(patches, weight, bias)
        x = torch.empty(len(patches), self.dims.dim, dtype=self.dtype, pin_memory=self.device.type == "cuda")
        for part in chunks(len(x), self._rows):
            x[part] = F.linear(patches[part], weight, bias)
        return x

    def _head(self, x: Tensor, embedding: Tensor, parts: Sequence[slice]) -> Tensor:
        """Tokens [L, D] -> patches, float32 [L, 4 * out_channels]."""
        shift, scale = self._outer.dense("head.modulation").view(2, -1) + embedding
        patches = []
        for part in parts:
            normed = layer_norm(x[part].to(self.device), 1 + scale, shift, self.dims.eps)
            patches.append(self._outer.linear("head.head", normed).float())
        return torch.cat(patches)


def chunks(tokens: int, rows: int | None) -> list[slice]:
    """Slices that cover `tokens`, of at most `rows` each."""
    rows = rows or max(1, tokens)
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def dit_block(
    x: Tensor, w: Weights, time: Tensor, context: Tensor, rope: Rope, dims: DiTDims, parts: Sequence[slice]
) -> None:
    """One block: self-attention, cross-attention to the text, feed-forward. Changes x [L, D] in place.

    time [6, D], context [M, D]. Only keys and values of all tokens are in memory at once; everything else passes in
    `parts`, slices of the tokens. x may lie on the host, where time and context do not.
    """
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = w.dense("modulation").view(6, -1) + time
    keys = _keys(x, 1 + scale, shift, w, rope, dims, parts)
    text_keys = _text_keys(context, w, dims)
    for part in parts:
        h = x[part].to(context.device)
        h = w.linear("self_attn.o", _self_attention(h, 1 + scale, shift, keys, w, _rows(rope, part), dims), gate, h)
        h = w.linear("cross_attn.o", _cross_attention(h, text_keys, w, dims), residual=h)
        x[part] = w.linear("ffn.2", _hidden(h, 1 + ffn_scale, ffn_shift, w, dims), ffn_gate, h)


def _self_attention(
    h: Tensor, gain: Tensor, shift: Tensor, keys: Keys, w: Weights, rope: Rope, dims: DiTDims
) -> Tensor:
    q = w.linear("self_attn.q", layer_norm(h, gain, shift, dims.eps, w.rotated("self_attn.q")))
    return attend(rms_norm(q, w.dense("self_attn.norm_q.weight"), dims.eps, rope), keys)


def _cross_attention(h: Tensor, keys: Keys, w: Weights, dims: DiTDims) -> Tensor:
    norm, bias = w.dense("norm3.weight"), w.dense("norm3.bias")
    q = w.linear("cross_attn.q", layer_norm(h, norm, bias, dims.eps, w.rotated("cross_attn.q")))
    return attend(rms_norm(q, w.dense("cross_attn.norm_q.weight"), dims.eps), keys)


def _hidden(h: Tensor, gain: Tensor, shift: Tensor, w: Weights, dims: DiTDims) -> Tensor | RotatedInt8:
    wide = w.linear("ffn.0", layer_norm(h, gain, shift, dims.eps, w.rotated("ffn.0")))
    return gelu(wide, w.rotated("ffn.2"))


def _text_keys(context: Tensor, w: Weights, dims: DiTDims) -> Keys:
    k = rms_norm(w.linear("cross_attn.k", context), w.dense("cross_attn.norm_k.weight"), dims.eps)
    return Keys(k, w.linear("cross_attn.v", context), dims.heads, w.fast)


def _keys(
    x: Tensor, gain: Tensor, shift: Tensor, w: Weights, rope: Rope, dims: DiTDims, parts: Sequence[slice]
) -> Keys:
    """Keys and values of all tokens. Their norm runs over the full width, before the split into heads."""
    k, v = (torch.empty(x.shape, dtype=x.dtype, device=gain.device) for _ in range(2))
    for part in parts:
        normed = layer_norm(x[part].to(gain.device), gain, shift, dims.eps, w.rotated("self_attn.k", "self_attn.v"))
        v[part] = w.linear("self_attn.v", normed)
        projected = w.linear("self_attn.k", normed)
        del normed
        k[part] = rms_norm(projected, w.dense("self_attn.norm_k.weight"), dims.eps, _rows(rope, part))
    return Keys(k, v, dims.heads, w.fast)


def _rows(rope: Rope, part: slice) -> Rope:
    return rope[0][part], rope[1][part]
