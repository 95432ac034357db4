"""Recognise by their tensors formats and models that skyrun does not read, and say what to do instead."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from skyrun.kernels.errors import BAD_INPUT, SkyrunError
from skyrun.kernels.files.reading import open_unbuffered, read_into
from skyrun.kernels.name_tables import role_of
from skyrun.quant.sources.arrange import NOTE
from skyrun.quant.sources.source import SourceTensor

_OTHER_COPY = "take a copy of the model in BF16, F16, fp8 or GGUF, or skyrun pull TASK for the published one"
_PUBLISHED = "skyrun pull TASK gets the published model"
_MOST_NOTE = 1 << 12  # bytes of a note about a layer
_READ = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_blockwise")  # formats in notes that are supported


class Unsupported(SkyrunError):
    """A file that skyrun does not read. role: of the model that it is; "" for files that are not a whole model."""

    def __init__(self, message: str, hint: str, role: str) -> None:
        super().__init__(message, hint, BAD_INPUT)
        self.role = role


@dataclass(frozen=True)
class _Kind:
    """A kind of file that skyrun does not read.

    pattern: matches names that only this kind has. what: a clause that says what the file is. role: of the model; None
    if it is recognised by names. also: a further condition on the tensors.
    """

    pattern: str
    what: str
    hint: str
    role: str | None = None
    also: Callable[[Mapping[str, SourceTensor]], bool] = lambda tensors: True


def _lacks(pattern: str) -> Callable[[Mapping[str, SourceTensor]], bool]:
    return lambda tensors: not any(re.search(pattern, name) for name in tensors)


def _wide(tensors: Mapping[str, SourceTensor]) -> bool:
    """Whether the latents of a VAE have 48 channels, as in Wan 2.2."""
    names = (r"decoder\.conv1\.weight$", r"decoder\.conv_in\.weight$")
    shapes = [tensor.shape for name, tensor in tensors.items() if any(re.search(n, name) for n in names)]
    return any(len(shape) == 5 and shape[1] == 48 for shape in shapes)


def _shared_bias(tensors: Mapping[str, SourceTensor]) -> bool:
    """Whether only the first block of an encoder has a position bias."""
    several = any(re.search(r"\b(blk|block)\.1\.", name) for name in tensors)
    return several and _lacks(r"\b(blk|block)\.1\..*(attn_rel_b|relative_attention_bias)")(tensors)


_WAN = r"(^|\.)(patch_embedding|time_embedding\.0|condition_embedder\.time_embedder\.linear_1)\.weight$"
_NOT_OURS = f"SkyReels-V3 is needed: {_PUBLISHED}"
_KINDS = (
    _Kind(r"\.weight_scale_2$", "is in nvfp4, which skyrun does not read", _OTHER_COPY),
    _Kind(
        r"\.quant_state\.|\.absmax$|\.SCB$", "is in a format of bitsandbytes, which skyrun does not read", _OTHER_COPY
    ),
    _Kind(r"\._data$", "is in a format of quanto, which skyrun does not read", _OTHER_COPY),
    _Kind(r"\.(wscales|smooth_factor)$", "is in nunchaku's 4-bit format, which skyrun does not read", _OTHER_COPY),
    _Kind(r"\.qweight$", "is in a format of GPTQ or AWQ, which skyrun does not read", _OTHER_COPY),
    _Kind(
        r"(lora_(A|B|up|down)\b|\.lokr_|\.hada_|\.lora\.|\.diff_b$)",
        "is a LoRA, which changes a model but is not one",
        "use it with --lora of `skyrun run`, or merge it with --lora of `skyrun convert MODEL`",
        role="",
    ),
    _Kind(
        r"(^|\.)(audio_proj|audio_cross_attn)\.",
        "holds the audio modules of a talking avatar without their transformer",
        f"the whole transformer is needed in one file or one set of shards: {_PUBLISHED}",
        role="transformer",
        also=_lacks(_WAN),
    ),
    _Kind(r"vace_(blocks|patch_embedding)\.", "is VACE, another model of the Wan family", _NOT_OURS, "transformer"),
    _Kind(
        r"face_adapter\.|motion_encoder\.", "is Wan Animate, another model of the Wan family", _NOT_OURS, "transformer"
    ),
    _Kind(r"casual_audio_encoder\.", "is Wan S2V, another model of the Wan family", _NOT_OURS, "transformer"),
    _Kind(r"audio_proj\.audio_proj_glob", "is HuMo, another model of the Wan family", _NOT_OURS, "transformer"),
    _Kind(
        r"control_adapter\.", "is a Wan model with camera control, another one of the family", _NOT_OURS, "transformer"
    ),
    _Kind(
        r"(img_emb\.emb_pos|image_embedder\.pos_embed)$",
        "is a Wan model that makes clips between a first and a last frame, another one of the family",
        _NOT_OURS,
        role="transformer",
    ),
    _Kind(
        r"decoder\.conv(1|_in)\.weight$",
        "is the autoencoder of Wan 2.2, whose latents have 48 channels; SkyReels-V3 uses Wan 2.1's with 16",
        "get Wan2.1_VAE.pth or wan_2.1_vae.safetensors",
        role="vae",
        also=_wide,
    ),
    _Kind(
        r"feature_extractor\.conv_layers\.[1-6]\.layer_norm\.",
        "is a large wav2vec2; SkyReels-V3 uses chinese-wav2vec2-base, whose features have another width",
        "get chinese-wav2vec2-base from the repository of SkyReels-V3-A2V",
        role="audio_encoder",
    ),
    _Kind(
        r"(attn_rel_b|relative_attention_bias)",
        "is a T5 v1.1 such as Flux and SD3 use; SkyReels-V3 uses UMT5, whose blocks have a position bias each",
        "get umt5-xxl, for example models_t5_umt5-xxl-enc-bf16.pth",
        role="text_encoder",
        also=_shared_bias,
    ),
)


def check_known(label: str, tensors: Mapping[str, SourceTensor], texts: Mapping[str, str]) -> None:
    """Raise Unsupported for a known format or model that is not read. texts: the metadata in the file's header."""
    if format := _unread_format(tensors, texts):
        kept = {"convrot": "int8 with rotated weights (ConvRot)"}.get(format, format)
        raise Unsupported(f"{label} is in {kept}, which skyrun does not read", _OTHER_COPY, role_of(tensors))
    for kind in _KINDS:
        if any(re.search(kind.pattern, name) for name in tensors) and kind.also(tensors):
            raise Unsupported(f"{label} {kind.what}", kind.hint, role_of(tensors) if kind.role is None else kind.role)


def _unread_format(tensors: Mapping[str, SourceTensor], texts: Mapping[str, str]) -> str:
    """The first format in notes about layers that is not supported; "" if there is none."""
    for name, tensor in tensors.items():
        if name.endswith(NOTE):
            if format := _format(_text(tensor)):
                return format
        elif name.endswith((".weight_scale", ".scale_weight")) and tensor.dtype in ("U8", "F8_E8M0"):
            return "mxfp8"
    try:
        layers = json.loads(texts.get("_quantization_metadata", "{}")).get("layers", {})
        found = (_format(json.dumps(note)) for note in layers.values())
        return next((format for format in found if format), "")
    except (ValueError, AttributeError, RecursionError):
        return ""


def _format(note: str) -> str:
    """The format in a note such as {"format": "nvfp4"}; "" if it is supported."""
    try:
        said = json.loads(note)
        if said.get("convrot"):
            return "convrot"
        format = str(said.get("format", ""))
    except (ValueError, AttributeError, RecursionError):
        return ""
    return "" if format in _READ else format[:40]


def _text(tensor: SourceTensor) -> str:
    data = bytearray(min(tensor.numel, _MOST_NOTE))
    with open_unbuffered(tensor.file) as file:
        read_into(file, memoryview(data), tensor.offset)
    return data.decode("utf-8", "replace")
