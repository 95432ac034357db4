"""The text encoder for training: UMT5 with one block, and a tokenizer of the words that the model knows."""

import math
import re
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from skyrun.demo.words import ARTICLES, known_words
from skyrun.kernels.files.ggml_tokenizer import Unigram
from skyrun.kernels.name_tables import UMT5_ENCODER
from skyrun.models.umt5 import TEXT_LENGTH, relative_buckets
from training.stage import Weights

DIM = 128
VOCABULARY = 256
HEADS, BUCKETS = 4, 32
EPS = 1e-6
_SPECIAL = (("<pad>", 3), ("</s>", 3), ("<s>", 3), ("<unk>", 2))  # and their types in a SentencePiece model
_BLOCK = "encoder.block.0.layer"


def unigram() -> Unigram:
    """Whole words, printable ASCII for all other words, and nothing else."""
    words = sorted({*known_words(), *(article.capitalize() for article in ARTICLES)})
    pieces = [(piece, 0.0) for piece, _ in _SPECIAL] + [("\u2581", -3.0)]
    pieces += [(chr(code), -6.0) for code in range(33, 127)] + [(f"\u2581{word}", -5.0) for word in words]
    types = [type for _, type in _SPECIAL] + [1] * (len(pieces) - len(_SPECIAL))
    return Unigram(pieces, types, b"", end=1, prefix_space=True, squeeze_spaces=True)


def new_text_encoder(seed: int) -> Weights:
    """Weights with names of transformers."""
    dims = {
        "dim": DIM,
        "inner": DIM,
        "ffn": 2 * DIM,
        "layers": 1,
        "vocab": VOCABULARY,
        "buckets": BUCKETS,
        "heads": HEADS,
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in UMT5_ENCODER.shapes("transformers", dims).items():
        if len(shape) == 1:
            weight = torch.ones(shape)
        elif "relative_attention_bias" in name:
            weight = torch.zeros(shape)
        else:
            scale = 1 if name == "shared.weight" else shape[1] ** (-1 if name.endswith("q.weight") else -0.5)
            weight = scale * torch.randn(shape, generator=generator)
        weights[name] = weight.requires_grad_()
    return weights


def token_ids(tokenizer: Tokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids [N, n], the shorter prompts filled up with -1."""
    ids = [tokenizer.encode(re.sub(r"\s+", " ", prompt).strip()).ids for prompt in prompts]
    longest = max(map(len, ids))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in ids])


def encode_text(weights: Weights, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [N, n] -> embeddings [N, n + 1, 128], and what to add to the scores of these rows, [n + 1].

    The last row is zero and stands for all rows after the prompt up to 512, which the transformer attends to as well.
    """
    w, count = weights, ids.shape[1]
    there = (ids >= 0).float()
    x = F.embedding(ids.clamp_min(0), w["shared.weight"])
    normed = _rms(x, w[f"{_BLOCK}.0.layer_norm.weight"])
    q, k, v = (
        F.linear(normed, w[f"{_BLOCK}.0.SelfAttention.{name}.weight"]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for name in "qkv"
    )
    buckets = relative_buckets(count, BUCKETS, ids.device)
    bias = w[f"{_BLOCK}.0.SelfAttention.relative_attention_bias.weight"][buckets].permute(2, 0, 1)
    mask = bias + (there - 1)[:, None, None] * 1e9
    mixed = ((q @ k.transpose(-1, -2) + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + F.linear(mixed, w[f"{_BLOCK}.0.SelfAttention.o.weight"])
    normed = _rms(x, w[f"{_BLOCK}.1.layer_norm.weight"])
    gate, up = (F.linear(normed, w[f"{_BLOCK}.1.DenseReluDense.wi_{part}.weight"]) for part in (0, 1))
    x = x + F.linear(F.gelu(gate, approximate="tanh") * up, w[f"{_BLOCK}.1.DenseReluDense.wo.weight"])
    x = _rms(x, w["encoder.final_layer_norm.weight"]) * there[..., None]
    scores = torch.zeros(count + 1)
    scores[count] = math.log(TEXT_LENGTH - count)
    return F.pad(x, (0, 0, 0, 1)), scores


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
