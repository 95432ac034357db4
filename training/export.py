"""Writes what was trained as a checkpoint in the published layout, in bfloat16."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from skyrun.kernels.files.atomic import replacing
from skyrun.models.dit_header import HEAD_DIM
from skyrun.tasks import TASKS
from training import autoencoder, text, transformer
from training.clips import LEAST, MOST, SIZES, USUAL, USUAL_SIZE
from training.latents import Latents
from training.stage import Weights

_FLOAT32 = ("scale_shift_table", "norm2.weight", "norm2.bias")  # of the transformer, as published


def write_checkpoint(folder: Path, dit: Weights, encoder: Weights, vae: Weights, latents: Latents) -> None:
    """Write transformer/, text_encoder/, tokenizer/, vae/, scheduler/ and model_index.json."""
    _write(folder / "transformer", "diffusion_pytorch_model", dit, _TRANSFORMER)
    _write(folder / "text_encoder", "model", encoder, _TEXT_ENCODER)
    statistics = {
        f"latents_{name}": [round(value, 5) for value in values.tolist()]
        for name, values in (("mean", latents.mean), ("std", latents.std))
    }
    _write(folder / "vae", "diffusion_pytorch_model", vae, _VAE | statistics)
    _write_text(folder / "tokenizer" / "tokenizer.json", text.unigram().tokenizer_json())
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER)
    _write_json(folder / "model_index.json", {"_class_name": "WanPipeline"})


_TRANSFORMER = {
    "_class_name": "SkyReelsA2WanI2v3DModel",
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": transformer.DIM // HEAD_DIM,
    "num_layers": transformer.LAYERS,
    "ffn_dim": transformer.FFN,
    "text_dim": text.DIM,
    "in_channels": transformer.CHANNELS,
    "out_channels": transformer.CHANNELS,
    "freq_dim": transformer.FREQUENCIES,
    "eps": 1e-6,
    "patch_size": [1, 2, 2],
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "clip_sizes": ["{}x{}".format(*size) for size in sorted(SIZES, key=lambda size: size != USUAL_SIZE)],
    "least_frames": LEAST,
    "most_frames": MOST,
    "usual_frames": USUAL,
    "shown_scale": 4,  # so large is a pixel in the mp4
}
_TEXT_ENCODER = {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "d_model": text.DIM,
    "d_kv": text.DIM // text.HEADS,
    "d_ff": 2 * text.DIM,
    "num_heads": text.HEADS,
    "num_layers": 1,
    "vocab_size": text.VOCABULARY,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": text.BUCKETS,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": text.EPS,
}
_VAE = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": autoencoder.BASE,
    "z_dim": autoencoder.LATENT_CHANNELS,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}
_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "flow_shift": TASKS["r2v"].shift,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}


def _write(folder: Path, name: str, weights: Weights, config: dict[str, Any]) -> None:
    tensors = {}
    for key, weight in weights.items():
        exact = any(part in key for part in _FLOAT32)
        tensors[key] = weight.detach().to(torch.float32 if exact else torch.bfloat16).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{name}.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    _write_json(folder / "config.json", config)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    _write_text(path, json.dumps(values, indent=1) + "\n")


def _write_text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(content, encoding="utf-8")
