"""The metadata of a converted file: dims derived from the tensors, everything else from the checkpoint's config.

A config may omit values, but must not contradict the tensors.
"""

import json
from collections.abc import Mapping
from math import isqrt
from typing import Any

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.files.names import Match
from skyrun.kernels.name_tables import CLASS_TASKS, FOLDER_TASKS, TASKS, WAN_TRANSFORMER
from skyrun.quant.sources.checkpoint import Part, read_json
from skyrun.quant.sources.model_name import family_of, license_of, model_name, task_of_name

Dims = Mapping[str, int]

_PUBLISHED = "compare it with the published checkpoint, or download that"
_HEAD_DIM = 128  # of every Wan transformer
_CLIP_HEAD_DIM, _AUDIO_HEAD_DIM = 80, 64
_AUDIO_WINDOW = 5  # frames of audio around a video frame
_AUDIO_LAYERS = 12  # layers of wav2vec2 whose outputs are features
_NAMED = ("t2v", "i2v")  # tasks that several published models do
_REDUCED = "tiny_dims.json"  # beside checkpoints of reduced size: dims that are hard-coded for the real models


class Said:
    """Reads and checks values of a part's config. It is ignored unless it has one of `marks`, the model's own keys."""

    def __init__(self, part: Part, *marks: str) -> None:
        self._config = part.config if any(mark in part.config for mark in marks) else {}
        self._where = part.config_source

    def number(self, key: str, default: float) -> float:
        value = self._config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise SkyrunError(f"{self._where} says {key} = {value!r}", "expected a number")
        return float(value)

    def count(self, key: str, default: int) -> int:
        value = self._config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SkyrunError(f"{self._where} says {key} = {value!r}", "expected a whole number")
        return value

    def numbers(self, key: str, length: int) -> list[float] | None:
        """A list of `length` numbers, or None if the config has no such key."""
        values = self._config.get(key)
        if values is None:
            return None
        if not isinstance(values, list) or len(values) != length or not all(_is_number(value) for value in values):
            raise SkyrunError(f"{self._where} says {key} = {values!r}", f"expected {length} numbers")
        return values

    def text(self, key: str) -> str:
        return str(self._config.get(key, ""))

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty if the config has no such key. A header of ours has them in one text."""
        values = self._config.get(key, [])
        values = values.split() if isinstance(values, str) else values
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise SkyrunError(f"{self._where} says {key} = {values!r}", "expected a list of texts")
        return values

    def agree(self, expected: Mapping[str, Any]) -> None:
        """Raise SkyrunError if the config contradicts these values. A key lists all names of a value, with spaces."""
        problems = [
            f"{self._where} says {key} = {self._config[key]}, the tensors say {value}"
            for keys, value in expected.items()
            for key in keys.split()
            if self._config.get(key) not in (None, value)
        ]
        if problems:
            raise SkyrunError.listing(f"{self._where} and the tensors differ", problems, _PUBLISHED)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def task_of(part: Part, match: Match) -> str:
    """The task that a transformer was trained for; "" if that is unknown, since several tasks have the same tensors."""
    said = Said(part, "ffn_dim", "task")
    if said.text("task") in TASKS:
        return said.text("task")
    if match.table is not WAN_TRANSFORMER:
        return match.table.tasks[0]
    if match.table.namings[match.naming] == "diffusers":
        return CLASS_TASKS.get(said.text("_class_name"), "") if said.text("_class_name") else "r2v"
    task = FOLDER_TASKS.get(part.folder.name, "") if part.gguf is None else ""
    return task or task_of_name(model_name(part))


def basename(part: Part, task: str) -> str:
    """What a transformer's file is named after."""
    if task in _NAMED:
        return model_name(part) or family_of(part, task)
    return f"SkyReels-V3-{task.upper()}" if task else "Wan"


def unknown_class(part: Part, match: Match) -> str:
    """A note about a transformer whose config names an unknown class; "" for others."""
    name = Said(part, "ffn_dim").text("_class_name")
    if task_of(part, match) or not name or match.table.namings[match.naming] != "diffusers":
        return ""
    return (
        f"{part.config_source} says {name}, which is not a class that skyrun knows: the task of {part.label} is unknown"
    )


def known_dims(part: Part) -> dict[str, int]:
    """Dims that cannot be derived from shapes."""
    return {"audio_window": Said(part, "ffn_dim").count("audio_window", _AUDIO_WINDOW)}


def transformer(part: Part, dims: Dims, task: str) -> dict[str, Any]:
    """The metadata of a transformer."""
    if dims["dim"] % _HEAD_DIM:
        raise SkyrunError(
            f"{part.label} is {dims['dim']} wide, expected a multiple of the {_HEAD_DIM} of a head",
            _PUBLISHED,
        )
    said = Said(part, "ffn_dim")
    values = {
        "dim": dims["dim"],
        "heads": dims["dim"] // _HEAD_DIM,
        "layers": dims["layers"],
        "ffn_dim": dims["ffn"],
        "in_channels": dims["in"],
        "out_channels": dims["out"],
        "text_dim": dims["text"],
        "freq_dim": dims["freq"],
    }
    others = {"heads": "num_attention_heads num_heads", "layers": "num_layers"}
    others |= {"in_channels": "in_dim", "out_channels": "out_dim"}
    if "image" in dims:
        values |= {"image_dim": dims["image"]}
        others |= {"image_dim": "img_dim"}
    if "audio_features" in dims:
        values |= _audio(part, dims)
        others |= {"audio_hidden": "intermediate_dim", "audio_dim": "output_dim"}
    said.agree({f"{key} {others.get(key, '')}": value for key, value in values.items()})
    said.agree({"attention_head_dim": _HEAD_DIM})
    keys: dict[str, Any] = {"general.type": "model"}
    if task:
        license = license_of(basename(part, task)) if task in _NAMED else "Skywork Community License"
        keys |= {"general.license": "other", "general.license.name": license} if license else {}
        keys |= {"skyrun.task": task}
    keys |= {f"skyrun.{key}": value for key, value in values.items()} | {"skyrun.eps": said.number("eps", 1e-6)}
    return keys | _clips(said)


def _clips(said: Said) -> dict[str, Any]:
    """Sizes and lengths of the clips that a small model makes; the published ones make those of their task."""
    if not (sizes := said.texts("clip_sizes")):
        return {}
    numbers = {key: said.count(key, 1) for key in ("least_frames", "most_frames", "usual_frames", "shown_scale")}
    return {"skyrun.clip_sizes": " ".join(sizes)} | {f"skyrun.{key}": number for key, number in numbers.items()}


def _audio(part: Part, dims: Dims) -> dict[str, int]:
    """Dims of the modules that only the talking-avatar transformer has."""
    if dims["audio_features"] % _AUDIO_LAYERS:
        features = f"{dims['audio_features']} features per frame of audio"
        raise SkyrunError(f"{part.label} takes {features}, expected a multiple of {_AUDIO_LAYERS}", _PUBLISHED)
    return {
        "audio_window": dims["audio_window"],
        "vae_scale": dims["middle_window"] - dims["audio_window"] + 1,
        "audio_layers": _AUDIO_LAYERS,
        "audio_channels": dims["audio_features"] // _AUDIO_LAYERS,
        "audio_hidden": dims["audio_hidden"],
        "audio_dim": dims["audio_dim"],
        "context_tokens": dims["context_tokens"],
    }


def text_encoder(part: Part, dims: Dims, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The metadata of GGUF's t5encoder architecture, and of the tokenizer."""
    said = Said(part, "d_model", "embedding_length")
    values = {
        "block_count num_layers": dims["layers"],
        "embedding_length d_model": dims["dim"],
        "feed_forward_length d_ff": dims["ffn"],
        "attention.head_count num_heads": dims["heads"],
        "attention.key_length d_kv": dims["inner"] // dims["heads"],
        "attention.value_length": dims["inner"] // dims["heads"],
        "attention.relative_buckets_count relative_attention_num_buckets": dims["buckets"],
        "vocab_size": dims["vocab"],
    }
    said.agree(values)
    eps = said.number("attention.layer_norm_rms_epsilon", said.number("layer_norm_epsilon", 1e-6))
    keys: dict[str, Any] = {"general.type": "model", "t5encoder.context_length": 512}
    keys |= {f"t5encoder.{names.split()[0]}": value for names, value in values.items()}
    return keys | {"t5encoder.attention.layer_norm_rms_epsilon": eps} | tokenizer


def vae(part: Part, dims: Dims) -> dict[str, Any]:
    """The metadata of the VAE as one JSON entry: safetensors writes several entries in random order."""
    config = Said(part, "base_dim", "z_dim")
    config.agree({"base_dim": dims["base"], "z_dim": dims["z"]})
    said: dict[str, Any] = {"role": "vae", "base_dim": dims["base"], "z_dim": dims["z"]}
    for key in ("latents_mean", "latents_std"):
        if values := config.numbers(key, dims["z"]):
            said[key] = values
    return {"skyrun": json.dumps(said)}


def image_encoder(part: Part, dims: Dims) -> dict[str, Any]:
    """The metadata of GGUF's clip architecture."""
    side = isqrt(dims["positions"] - 1)
    if side * side + 1 != dims["positions"]:
        raise SkyrunError(
            f"{part.label} has {dims['positions']} positions, expected a square of patches and one", _PUBLISHED
        )
    reduced = read_json(part.folder / _REDUCED).get("clip_visual")
    usual = reduced.get("num_heads") if isinstance(reduced, dict) else None
    said = Said(part, "embedding_length", "projection_dim")  # a key of GGUF, or of transformers
    in_transformers = bool(said.text("num_attention_heads"))
    heads = said.count(
        "num_attention_heads" if in_transformers else "attention.head_count",
        usual if isinstance(usual, int) else dims["dim"] // _CLIP_HEAD_DIM,
    )
    if dims["dim"] % heads:
        raise SkyrunError(f"{part.label} is {dims['dim']} wide: unknown number of heads", "expected CLIP ViT-H/14")
    values = {
        "block_count": dims["layers"],
        "embedding_length": dims["dim"],
        "feed_forward_length": dims["ffn"],
        "projection_dim": dims.get("projection"),
        "patch_size": dims["patch"],
        "image_size": side * dims["patch"],
    }
    values = {key: value for key, value in values.items() if value is not None}
    said.agree(values)
    keys: dict[str, Any] = {"general.type": "clip-vision", "clip.has_vision_encoder": True}
    keys |= {f"clip.vision.{key}": value for key, value in values.items()}
    keys["clip.vision.attention.head_count"] = heads
    eps = said.number("layer_norm_eps" if in_transformers else "attention.layer_norm_epsilon", 1e-5)
    return keys | {"clip.vision.attention.layer_norm_epsilon": eps}


def audio_encoder(part: Part, dims: Dims) -> dict[str, Any]:
    """The metadata of the audio encoder as one JSON entry, with the keys of wav2vec2's config.json."""
    if dims["layers"] != _AUDIO_LAYERS:
        raise SkyrunError(
            f"{part.label} is a wav2vec2 of {dims['layers']} blocks, SkyReels-V3 uses the base one of {_AUDIO_LAYERS}",
            "get chinese-wav2vec2-base from the repository of SkyReels-V3-A2V, or download that",
        )
    config = Said(part, "conv_kernel")
    values: dict[str, Any] = {
        "hidden_size": dims["dim"],
        "intermediate_size": dims["ffn"],
        "num_hidden_layers": dims["layers"],
        "conv_dim": [dims["conv"]] * 7,
        "conv_kernel": [dims[f"kernel{layer}"] for layer in range(7)],
        "num_conv_pos_embeddings": dims["position_kernel"],
        "num_conv_pos_embedding_groups": dims["dim"] // dims["group"],
    }
    config.agree(values)
    config.agree({"feat_extract_norm": "group", "do_stable_layer_norm": False, "hidden_act": "gelu"})
    config.agree({"feat_extract_activation": "gelu"})
    heads = config.count("num_attention_heads", max(1, dims["dim"] // _AUDIO_HEAD_DIM))
    if dims["dim"] % heads:
        raise SkyrunError(f"{part.label} is {dims['dim']} wide with {heads} heads", _PUBLISHED)
    values |= {
        "conv_stride": config.numbers("conv_stride", 7) or [5, 2, 2, 2, 2, 2, 2],
        "num_attention_heads": heads,
        "layer_norm_eps": config.number("layer_norm_eps", 1e-5),
        "feat_extract_norm": "group",
    }
    return {"skyrun": json.dumps({"role": "audio_encoder"} | values)}
