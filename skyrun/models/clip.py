"""The vision tower of CLIP: encodes an image to one token for each of its patches and one for the whole image.

Blocks are streamed. Weights have the names of GGUF's clip architecture.
"""

from collections.abc import Generator
from dataclasses import replace
from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.errors import SkyrunError
from skyrun.events import Event
from skyrun.kernels.files.fitting import check_tensors
from skyrun.kernels.files.gguf_file import GGUFFile
from skyrun.kernels.name_tables import CLIP_VISION
from skyrun.streaming.layout import lay_out_blocks
from skyrun.streaming.stream import BlockStream
from skyrun.streaming.weights import Weights, load_weights

_BLOCK = "v.blk."
_OUTER = ("v.class_embd", "v.patch_embd.weight", "v.position_embd.weight", "v.pre_ln.weight", "v.pre_ln.bias")
_USED = replace(
    CLIP_VISION, rows=tuple(row for row in CLIP_VISION.rows if row.name() in _OUTER or row.name().startswith(_BLOCK))
)
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the images that CLIP was trained on
_STD = (0.26862954, 0.26130258, 0.27577711)
_CONVERT = "convert the published checkpoint: skyrun convert CHECKPOINT -o DIR"


class CLIPVision:
    """An image encoder: the sizes and the block layout of its file."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        missing = [f"{file.path} has no tensor {name}" for name in _OUTER if name not in file.tensors]
        if missing:
            raise SkyrunError.listing("this is not the vision tower of CLIP", missing, _CONVERT)
        self._eps = file.number("clip.vision.attention.layer_norm_epsilon", 1e-5)
        self._heads = int(file.number("clip.vision.attention.head_count", 16))
        self.dim, _, self._patch, _ = file.tensors["v.patch_embd.weight"].shape
        positions = file.tensors["v.position_embd.weight"].shape[0]
        self._side: int = isqrt(positions - 1) * self._patch
        if not self._heads or self.dim % self._heads:
            raise SkyrunError(f"{file.path} is {self.dim} wide with {self._heads} heads", _CONVERT)
        # The last block is not used: the transformer was trained with the output of the block before it.
        self._blocks = lay_out_blocks(file.path, file.tensors, _BLOCK)[:-1]

    @property
    def layers(self) -> int:
        """How many blocks are run."""
        return len(self._blocks)

    @property
    def tokens(self) -> int:
        """How many tokens an image has."""
        return 1 + (self._side // self._patch) ** 2

    @property
    def block_bytes(self) -> int:
        """Bytes of the largest block."""
        return max(block.nbytes for block in self._blocks)

    def check(self) -> None:
        """Raise SkyrunError if a tensor that is used is missing or does not fit the others."""
        shapes = {name: info.shape for name, info in self.file.tensors.items()}
        hint = "convert or download the image encoder again"
        check_tensors(self.file.path, _USED, shapes, hint, self.layers, dim=self.dim)

    def open_stream(self, device: torch.device) -> BlockStream:
        """A stream for one pass over the blocks that are used."""
        return BlockStream(self.file.path, self._blocks, device)

    def encode(self, image: Tensor, stream: BlockStream, device: torch.device) -> Generator[Event, None, Tensor]:
        """Encode an image [3, H, W] in [-1, 1] -> float32 [1 + patches, dim]. Yields an event after every block.

        Computes in float32: it runs only once per window.
        """
        outer = load_weights(self.file, {name: self.file.tensors[name] for name in _OUTER}, device)
        patches = self._pixels(image.to(device)).unfold(1, self._patch, self._patch).unfold(2, self._patch, self._patch)
        patches = patches.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)
        x = F.linear(patches, outer.dense("v.patch_embd.weight").flatten(1))
        x = torch.cat((outer.dense("v.class_embd").view(1, -1), x)) + outer.dense("v.position_embd.weight")
        x = _norm(x, "v.pre_ln", outer, self._eps)
        for weights, clock in stream.blocks():
            x = clip_block(x, weights, self._heads, self._eps)
            yield clock.done()
        return x

    def _pixels(self, image: Tensor) -> Tensor:
        """The image resized to the tower's resolution, with CLIP's normalisation: [3, side, side]."""
        size = (self._side, self._side)
        scaled = F.interpolate(image.float().unsqueeze(0), size, mode="bicubic", align_corners=False).squeeze(0)
        mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in (_MEAN, _STD))
        return (scaled * 0.5 + 0.5 - mean) / std


def _norm(x: Tensor, name: str, w: Weights, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), w.dense(f"{name}.weight"), w.dense(f"{name}.bias"), eps)


def clip_block(x: Tensor, w: Weights, heads: int, eps: float) -> Tensor:
    """One block on x [L, D]: attention, then a feed-forward with GELU."""
    qkv = w.linear("attn_qkv", _norm(x, "ln1", w, eps)).unflatten(1, (3, heads, -1))
    q, k, v = qkv.permute(1, 2, 0, 3).unsqueeze(1)
    mixed = F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1).flatten(1)
    x = x + w.linear("attn_out", mixed)
    return x + w.linear("ffn_down", F.gelu(w.linear("ffn_up", _norm(x, "ln2", w, eps))))
