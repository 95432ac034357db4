"""Tiny checkpoints of Wan 2.1 and SkyReels-V2 with random weights, and what diffusers makes with them."""

import json
import math

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from skyrun.kernels.files.names import recognise
from skyrun.kernels.name_tables import CLIP_VISION, TRANSFORMERS, UMT5_ENCODER, WAN_VAE
from skyrun.tools.tiny_checkpoint import ascii_tokenizer

TEXT, IMAGE, HEADS, LAYERS, SEED = 128, 64, 2, 2, 3
CLASSES = {"Wan2.1": WanTransformer3DModel, "SkyReels-V2": SkyReelsV2Transformer3DModel}
PIPELINES = {  # by family, and whether they start from an image
    ("Wan2.1", False): WanPipeline,
    ("Wan2.1", True): WanImageToVideoPipeline,
    ("SkyReels-V2", False): SkyReelsV2Pipeline,
    ("SkyReels-V2", True): SkyReelsV2ImageToVideoPipeline,
}


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


def clip_tokens(encoder, pixels):
    """The tokens of an image [1, 3, H, W], which the models' own code stretches, where diffusers may crop."""
    size = encoder.config.image_size
    scaled = F.interpolate(pixels, (size, size), mode="bicubic") * 0.5 + 0.5
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return encoder(pixel_values=(scaled - mean) / std, output_hidden_states=True).hidden_states[-2]


@torch.inference_mode()
def reference_latents(family, parts, request, change=lambda pipe: None):
    """What diffusers makes of a request, with sigmas and the image as in the models' own code.

    The image must have the shape of the clip: that code crops it in ways of its own. change: of the pipeline.
    """
    given, more = {}, {}
    if request.images:
        image = Image.open(request.images[0])
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        if family == "Wan2.1":
            frame = F.interpolate(pixels, request.size, mode="bicubic")
        else:
            scaled = np.array(image.resize(request.size[::-1], Image.Resampling.LANCZOS))
            frame = pixels = torch.from_numpy(scaled).permute(2, 0, 1)[None].float() / 127.5 - 1
        given, more = {"image": frame}, {"image_processor": None}
    pipeline = PIPELINES[family, bool(request.images)]
    pipe = pipeline(tokenizer=tokenizer(), scheduler=scheduler(request.shift), **parts, **more)
    if request.images:
        pipe.encode_image = lambda image, device=None: clip_tokens(parts["image_encoder"], pixels)
        pipe.video_processor.preprocess = lambda image, **_: image
    pipe.set_progress_bar_config(disable=True)
    change(pipe)
    height, width = request.size
    shape = 1, 16, (request.frames + 3) // 4, height // 8, width // 8
    noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(request.seed))
    sizes = {"height": height, "width": width, "num_frames": request.frames, "num_inference_steps": request.steps}
    prompts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    prompts |= {"guidance_scale": request.guidance}
    return pipe(**prompts, **sizes, **given, latents=noise, output_type="latent").frames[0]


@torch.inference_mode()
def reference_frames(vae, latents):
    """The frames that diffusers' autoencoder decodes, as levels [T, H, W, 3] that are not rounded."""
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, 16, 1, 1, 1) for name in ("mean", "std"))
    pixels = vae.decode(latents[None] * std + mean).sample[0]
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 3, 0).numpy()
