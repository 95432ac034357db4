"""The Wan transformer for training, of whole batches. Matrix products are in bfloat16, everything else in float32."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels.name_tables import WAN_TRANSFORMER
from skyrun.models.dit_header import HEAD_DIM
from skyrun.models.rope import rope_table, sinusoid
from training import text
from training.stage import Weights

DIM, LAYERS, FFN, FREQUENCIES, CHANNELS = 256, 4, 256, 256, 16
_HEADS = DIM // HEAD_DIM
_PATCH = 4 * CHANNELS
_EPS = 1e-6
_SHARPNESS = 1.5  # of the norms of queries and keys at the start, so that attention tells neighbours apart sooner


def new_transformer(seed: int) -> Weights:
    """Weights with names of diffusers. At the start the model returns about the noisy latents themselves.

    For that the patches are embedded by an orthogonal matrix, and its inverse is the last layer.
    """
    dims = {
        "dim": DIM,
        "layers": LAYERS,
        "ffn": FFN,
        "text": text.DIM,
        "in": CHANNELS,
        "out": CHANNELS,
        "freq": FREQUENCIES,
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in WAN_TRANSFORMER.shapes("diffusers", dims).items():
        weight = torch.zeros(shape)
        if len(shape) == 2:
            weight.normal_(std=shape[1] ** -0.5, generator=generator)
        elif name.endswith("weight") and len(shape) == 1:
            weight.fill_(_SHARPNESS if "attn1" in name else 1)
        if name.endswith(("to_out.0.weight", "ffn.net.2.weight")):
            weight *= 0.3
        if name.startswith("blocks") and name.endswith("scale_shift_table"):
            weight[:, (2, 5)] = 1  # the gates
        weights[name] = weight
    weights["condition_embedder.time_proj.weight"] *= 0.2
    for layer in range(LAYERS):
        # The 500 rows after a prompt are equal. Queries turn away from them at the start, so that its words are heard:
        # the norm makes their keys, which are the bias alone, as long as any other.
        away = torch.randn(DIM, generator=generator).sign()
        weights[f"blocks.{layer}.attn2.to_q.bias"] += away
        weights[f"blocks.{layer}.attn2.to_k.bias"] -= 0.01 * away
    turn = torch.linalg.qr(torch.randn(DIM, _PATCH, generator=generator)).Q
    size = math.sqrt(DIM / _PATCH)  # so that embedded values have a deviation of 1
    weights["patch_embedding.weight"] = (size * turn).view(DIM, CHANNELS, 1, 2, 2)
    # The last layer has the channel last, the patch embedding has it first.
    weights["proj_out.weight"] = (turn.T / size).view(CHANNELS, 4, DIM).transpose(0, 1).reshape(_PATCH, DIM)
    return {name: weight.contiguous().requires_grad_() for name, weight in weights.items()}


def velocity(w: Weights, x: Tensor, timesteps: Tensor, context: Tensor, scores: Tensor, frames: int) -> Tensor:
    """Predict the velocity of the first frames.

    Args:
        w: the weights.
        x: noisy latents, followed by those of four references, [B, 16, frames + 4, h, w].
        timesteps: [B], whole numbers.
        context: embeddings of the prompts [B, n, 128].
        scores: what is added to the scores of the context's rows, [n].
        frames: how many frames are noisy.

    Returns: [B, 16, frames, h, w].
    """
    time = F.silu(_linear(sinusoid(timesteps, FREQUENCIES), w, "condition_embedder.time_embedder.linear_1"))
    time = _linear(time, w, "condition_embedder.time_embedder.linear_2")
    with torch.autocast("cpu", torch.bfloat16):
        return _velocity(w, x, time, context, scores, frames).float()


def _velocity(w: Weights, x: Tensor, time: Tensor, context: Tensor, scores: Tensor, frames: int) -> Tensor:
    batch, _, total, height, width = x.shape
    rows, columns = height // 2, width // 2
    patches = x.view(batch, CHANNELS, total, rows, 2, columns, 2).permute(0, 2, 3, 5, 1, 4, 6)
    patches = patches.reshape(batch, -1, _PATCH)
    hidden = F.linear(patches, w["patch_embedding.weight"].flatten(1), w["patch_embedding.bias"]).float()
    times = _linear(F.silu(time), w, "condition_embedder.time_proj").unflatten(1, (6, -1)).float()
    context = F.gelu(_linear(context, w, "condition_embedder.text_embedder.linear_1"), approximate="tanh")
    context = _linear(context, w, "condition_embedder.text_embedder.linear_2")
    table = rope_table(range(total), rows, columns, HEAD_DIM, x.device)
    cosines, sines = (part.repeat_interleave(2, 1) for part in table)
    sines[:, 0::2] *= -1
    for layer in range(LAYERS):
        hidden = block(hidden, _part(w, f"blocks.{layer}."), times, context, scores, (cosines, sines))
    hidden = hidden[:, : frames * rows * columns]
    shift, scale = (w["scale_shift_table"] + time[:, None]).chunk(2, 1)
    out = _linear(F.layer_norm(hidden, (DIM,), eps=_EPS) * (1 + scale) + shift, w, "proj_out")
    out = out.view(batch, frames, rows, columns, 2, 2, CHANNELS).permute(0, 6, 1, 2, 4, 3, 5)
    return out.reshape(batch, CHANNELS, frames, height, width)


def block(x: Tensor, w: Weights, times: Tensor, context: Tensor, scores: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """One block on tokens [B, L, 256], as `dit_block` of the runtime. times: [B, 6, 256]. context: [B, n, 256]."""
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (w["scale_shift_table"] + times).chunk(6, 1)
    normed = F.layer_norm(x, (DIM,), eps=_EPS) * (1 + scale) + shift
    q, k, v = _projections(normed, w, "attn1", "qkv")
    q, k = (_rotated(_heads(_rms(part, w[f"attn1.norm_{which}.weight"])), rope) for part, which in ((q, "q"), (k, "k")))
    mixed = F.scaled_dot_product_attention(q, k, _heads(v)).transpose(1, 2).flatten(2)
    x = x + _linear(mixed, w, "attn1.to_out.0") * gate
    normed = F.layer_norm(x, (DIM,), w["norm2.weight"], w["norm2.bias"], _EPS)
    (q,) = _projections(normed, w, "attn2", "q")
    k, v = _projections(context, w, "attn2", "kv")
    q, k = (_heads(_rms(part, w[f"attn2.norm_{which}.weight"])) for part, which in ((q, "q"), (k, "k")))
    shares = (q @ k.transpose(-1, -2) * HEAD_DIM**-0.5 + scores).softmax(-1)
    x = x + _linear((shares @ _heads(v)).transpose(1, 2).flatten(2), w, "attn2.to_out.0")
    normed = F.layer_norm(x, (DIM,), eps=_EPS) * (1 + ffn_scale) + ffn_shift
    inner = F.gelu(_linear(normed, w, "ffn.net.0.proj"), approximate="tanh")
    return x + _linear(inner, w, "ffn.net.2") * ffn_gate


def _part(w: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): weight for name, weight in w.items() if name.startswith(prefix)}


def _linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _projections(x: Tensor, w: Weights, name: str, which: str) -> tuple[Tensor, ...]:
    """Several projections as one product."""
    weight = torch.cat([w[f"{name}.to_{part}.weight"] for part in which])
    bias = torch.cat([w[f"{name}.to_{part}.bias"] for part in which])
    return F.linear(x, weight, bias).chunk(len(which), -1)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (_HEADS, HEAD_DIM)).transpose(1, 2)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS) * weight


def _rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    return (x * rope[0] + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * rope[1]).bfloat16()
