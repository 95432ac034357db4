"""Tiny checkpoints of Wan 2.1 and SkyReels-V2 with random weights, written by diffusers in its published layout."""

import json
import math

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from skyrun.kernels.name_tables import CLIP_VISION, TRANSFORMERS, UMT5_ENCODER, WAN_VAE
from skyrun.kernels.names import recognise
from skyrun.tools.tiny_checkpoint import ascii_tokenizer

TEXT, IMAGE, HEADS, LAYERS, SEED = 128, 64, 2, 2, 3
CLASSES = {"Wan2.1": WanTransformer3DModel, "SkyReels-V2": SkyReelsV2Transformer3DModel}


class UpstreamScheduler(UniPCMultistepScheduler):
    """UniPC with the sigmas of the models' own code, from which newer versions of diffusers differ."""

    def set_timesteps(self, num_inference_steps=None, device=None, **_):
        sigmas = np.linspace(0.999, 0, num_inference_steps + 1)[:-1]
        shift = self.config.flow_shift
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas)
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        assert np.allclose(self.sigmas[:-1].numpy(), sigmas)


def scheduler(shift):
    return UpstreamScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


@torch.no_grad()
def randomized(model, seed):
    """The model with weights that keep activations at about their size, so that no part of it is without effect."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "scale_shift_table" in name:
            weight.copy_(noise / math.sqrt(weight.shape[-1]))
        elif weight.dim() == 1:
            weight.copy_(0.05 * noise + (0 if name.endswith("bias") else 1))
        elif name.endswith("gamma"):
            weight.copy_(1 + 0.05 * noise)
        elif "shared" in name or "embed_tokens" in name or "fps_embedding" in name:
            weight.copy_(noise)
        else:
            weight.copy_(noise / math.sqrt(weight[0].numel()))
    return model.eval()


def transformer(family, image, seed=0, **dims):
    values = {"num_attention_heads": HEADS, "num_layers": LAYERS, "ffn_dim": 512, "text_dim": TEXT, "freq_dim": 256}
    if image:
        values |= {"in_channels": 36, "out_channels": 16, "image_dim": IMAGE, "added_kv_proj_dim": 128 * HEADS}
    return randomized(CLASSES[family](**values | dims), seed)


def text_encoder():
    config = UMT5Config(vocab_size=256, d_model=TEXT, d_kv=32, d_ff=256, num_heads=4, num_layers=2)
    return randomized(UMT5EncoderModel(config), 1)


def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=ascii_tokenizer(), pad_token="<pad>", eos_token="</s>")


def autoencoder():
    return randomized(AutoencoderKLWan(base_dim=8), 2)


def image_encoder():
    sizes = {"hidden_size": IMAGE, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
    config = CLIPVisionConfig(**sizes, image_size=56, patch_size=14, hidden_act="gelu", projection_dim=32)
    return randomized(CLIPVisionModel(config), 3)


def write_wan(folder, family="Wan2.1", image=False, pipeline="WanPipeline", **dims):
    """Write a checkpoint as `DiffusionPipeline.save_pretrained` lays it out. Returns the models."""
    parts = {
        "transformer": transformer(family, image, **dims),
        "text_encoder": text_encoder(),
        "vae": autoencoder(),
    }
    if image:
        parts["image_encoder"] = image_encoder()
    for name, model in parts.items():
        model.save_pretrained(folder / name)
    tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return parts


def renamed(weights, table, naming):
    """Weights of diffusers or transformers under the names of another naming."""
    (match, *_) = recognise(weights, [table] if not isinstance(table, tuple) else table)
    rows = {row.name(): row.name(match.table.namings.index(naming)) for row in match.table.expand(match.layers)}
    return {rows[name]: weights[there].clone() for name, there in match.names.items()}


def packed(weights):
    """CLIP's queries, keys and values as one projection, as in the models' own file."""
    joined = {}
    for name, weight in weights.items():
        if ".q_proj." in name:
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            joined[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            joined[name] = weight
    return joined


def write_original(folder, parts):
    """Write the models as their authors lay them out: the transformer at the top, everything else in .pth files."""
    folder.mkdir(parents=True)
    config = parts["transformer"].config
    said = {"_class_name": "WanModel", "model_type": "i2v" if config.image_dim else "t2v", "in_dim": config.in_channels}
    said |= {"dim": 128 * HEADS, "ffn_dim": config.ffn_dim, "num_layers": config.num_layers, "num_heads": HEADS}
    (folder / "config.json").write_text(json.dumps(said))
    weights = renamed(parts["transformer"].state_dict(), TRANSFORMERS, "original")
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    torch.save(renamed(parts["vae"].state_dict(), WAN_VAE, "original"), folder / "Wan2.1_VAE.pth")
    encoder = renamed(parts["text_encoder"].state_dict(), UMT5_ENCODER, "original")
    torch.save(encoder, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    tokenizer().save_pretrained(folder / "google" / "umt5-xxl")
    if "image_encoder" in parts:
        clip = renamed(packed(parts["image_encoder"].state_dict()), CLIP_VISION, "original")
        torch.save(clip, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
        (folder / "tiny_dims.json").write_text(json.dumps({"clip_visual": {"num_heads": 4}}))
