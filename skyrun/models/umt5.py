"""UMT5: encodes a prompt to one embedding per token. Blocks are streamed, and of the vocabulary only needed rows read.

Weights have the names of GGUF's t5encoder architecture.
"""

import html
import math
import re
from collections.abc import Generator

import ftfy
import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.errors import SkyrunError
from skyrun.events import Event
from skyrun.kernels.elementwise import rms_norm
from skyrun.kernels.files.fitting import check_tensors
from skyrun.kernels.files.ggml_tokenizer import read_tokenizer
from skyrun.kernels.files.gguf_file import GGUFFile, TensorInfo
from skyrun.kernels.name_tables import UMT5_ENCODER
from skyrun.streaming.layout import lay_out_blocks
from skyrun.streaming.stream import BlockStream
from skyrun.streaming.weights import Weights, load_weights, read_rows

TEXT_LENGTH = 512  # tokens of a prompt that the models read
_BLOCK = "enc.blk."
_MAX_DISTANCE = 128
_CONVERT = "convert the published checkpoint: skyrun convert CHECKPOINT -o DIR"


def clean_prompt(prompt: str) -> str:
    """Repair broken encodings, undo HTML escapes (also doubled ones) and collapse white space, as upstream does."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()).strip()


class UMT5:
    """A text encoder: the tokenizer and the block layout of its file."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self._eps = file.number("t5encoder.attention.layer_norm_rms_epsilon", 1e-6)
        self._buckets, self.heads = self._tensor(f"{_BLOCK}0.attn_rel_b.weight").shape
        rows, self.dim = self._tensor("token_embd.weight").shape
        self._blocks = lay_out_blocks(file.path, file.tensors, _BLOCK)
        if len(self._blocks) != (count := file.number("t5encoder.block_count", len(self._blocks))):
            raise SkyrunError(f"{file.path} has {len(self._blocks)} blocks, its header says {count}", _CONVERT)
        self._tokenizer = read_tokenizer(file, rows)

    @property
    def layers(self) -> int:
        return len(self._blocks)

    @property
    def block_bytes(self) -> int:
        """Bytes of the largest block."""
        return max(block.nbytes for block in self._blocks)

    def token_ids(self, prompt: str, max_length: int = TEXT_LENGTH) -> list[int]:
        """Token ids of the cleaned prompt, followed by </s>. A longer prompt is truncated so that </s> is the last."""
        self._tokenizer.enable_truncation(max_length)
        ids: list[int] = self._tokenizer.encode(clean_prompt(prompt)).ids
        return ids

    def token_count(self, prompt: str) -> int:
        """How many tokens the whole prompt has, </s> included."""
        self._tokenizer.no_truncation()
        return len(self._tokenizer.encode(clean_prompt(prompt)).ids)

    def check(self) -> None:
        """Raise SkyrunError if a tensor is missing or does not fit the others."""
        shapes = {name: info.shape for name, info in self.file.tensors.items()}
        hint = "convert or download the text encoder again"
        inner = check_tensors(self.file.path, UMT5_ENCODER, shapes, hint, self.layers, heads=self.heads)["inner"]
        if inner % self.heads:
            raise SkyrunError(f"{self.file.path} cannot divide {inner} channels among {self.heads} heads", hint)

    def open_stream(self, device: torch.device) -> BlockStream:
        """A stream for one pass over the blocks."""
        return BlockStream(self.file.path, self._blocks, device)

    def encode(self, ids: list[int], stream: BlockStream, device: torch.device) -> Generator[Event, None, Tensor]:
        """Encode token ids -> float32 [len(ids), dim] on the device. Yields an event after every block.

        There is no padding: it would be masked, so it cannot change the result. Computes in float32: the encoder runs
        only once, and its activations overflow float16.
        """
        x = read_rows(self.file, self._tensor("token_embd.weight"), ids).to(device)
        buckets = relative_buckets(len(ids), self._buckets, device)
        for weights, clock in stream.blocks():
            x = umt5_block(x, weights, buckets, self.heads, self._eps)
            yield clock.done()
        name = "enc.output_norm.weight"
        norm = load_weights(self.file, {name: self._tensor(name, 1)}, device)
        return rms_norm(x, norm.dense(name), self._eps)

    def _tensor(self, name: str, dims: int = 2) -> TensorInfo:
        info = self.file.tensors.get(name)
        if info is None:
            raise SkyrunError(f"{self.file.path} has no tensor {name}: it is not a UMT5 encoder", _CONVERT)
        if len(info.shape) != dims:
            raise SkyrunError(
                f"{self.file.path} has {name} of shape {list(info.shape)}, expected {dims} axes", _CONVERT
            )
        return info


def relative_buckets(length: int, count: int, device: torch.device) -> Tensor:
    """The relative position buckets of T5 (Raffel et al. 2020, arXiv:1910.10683): int64 [length, length] by query, key.

    Half of the `count` buckets are for keys after the query. Distances below count / 4 have a bucket each; larger ones,
    up to 128, share buckets on a logarithmic scale.
    """
    positions = torch.arange(length, device=device)
    relative = positions[None, :] - positions[:, None]
    half = count // 2
    exact = half // 2
    distance = relative.abs()
    ratio = torch.log(distance.clamp_min(1).float() / exact) / math.log(_MAX_DISTANCE / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp_max(half - 1)
    return half * (relative > 0) + torch.where(distance < exact, distance, far)


def umt5_block(x: Tensor, w: Weights, buckets: Tensor, heads: int, eps: float) -> Tensor:
    """One block on x [L, D]: attention with a learned bias per bucket and without scaling, then a gated GELU."""
    h = rms_norm(x, w.dense("attn_norm.weight"), eps)
    q, k, v = (
        w.linear(name, h).unflatten(1, (heads, -1)).transpose(0, 1).unsqueeze(0)
        for name in ("attn_q", "attn_k", "attn_v")
    )
    bias = w.dense("attn_rel_b.weight")[buckets].permute(2, 0, 1).unsqueeze(0)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    x = x + w.linear("attn_o", mixed.squeeze(0).transpose(0, 1).flatten(1))
    h = rms_norm(x, w.dense("ffn_norm.weight"), eps)
    return x + w.linear("ffn_down", F.gelu(w.linear("ffn_gate", h), approximate="tanh") * w.linear("ffn_up", h))
