"""Arrange the tensors of a file as the name tables list them.

Compilers and distributed trainers wrap names, ComfyUI stores scales and markers beside weights, and transformers splits
or transposes tensors of the original CLIP.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from skyrun.kernels.files.names import brief
from skyrun.quant.sources.source import PLAIN, SourceTensor, scale_blocks

Tensors = dict[str, SourceTensor]

# What torch.compile, FSDP, activation checkpointing, DDP and DeepSpeed insert between the names of modules.
_WRAPPER = re.compile(
    r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module)\."
)
_MARKERS = ("scaled_fp8", "v_pred", "ztsnr", "num_batches_tracked")
_WEIGHT_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
NOTE = ".comfy_quant"  # suffix of a tensor with JSON about a layer's format
_INPUT_SCALES = (".scale_input", ".input_scale", ".scale_output", ".output_scale", NOTE)  # not needed for weights
_SCALE_TYPES = ("F32", "F16", "BF16")
_QUERY = re.compile(r"(.+\.self_attn\.)q_proj(\.weight|\.bias)")
_PROJECTION = re.compile(r"(.+\.)?visual_projection\.weight")


def unwrap(tensors: Mapping[str, SourceTensor]) -> tuple[Tensors, list[str]]:
    """Remove markers, and wrappers from names -> the tensors, and problems with names that are then not unique."""
    plain: Tensors = {}
    problems = []
    for name, tensor in tensors.items():
        short = _WRAPPER.sub("", name)
        if not tensor.numel or short.split(".")[-1] in _MARKERS:
            continue
        if short in plain:
            problems.append(f"{name} and {plain[short].name} in {tensor.file.name} are the same tensor, wrapped")
        plain[short] = tensor
    return plain, problems


def apply_scales(tensors: Mapping[str, SourceTensor]) -> tuple[Tensors, list[str]]:
    """Attach the scales that are stored beside weights to them -> the weights, and problems with scales."""
    plain = dict(tensors)
    orphans, misfits = [], []
    for name, scale in tensors.items():
        if name.endswith(_INPUT_SCALES):
            del plain[name]
        elif name.endswith(_WEIGHT_SCALES):
            del plain[name]
            weight = f"{name.rsplit('.', 1)[0]}.weight"
            if weight not in plain:
                orphans.append(f"{name} in {scale.file.name} belongs to no weight")
            elif scale.dtype not in _SCALE_TYPES or scale_blocks(plain[weight], scale) is None:
                got = f"{name} in {scale.file.name} is {scale.dtype} {list(scale.shape)}"
                shape = list(plain[weight].shape)
                expected = f"expected one number or {plain[weight].rows}, or a grid over blocks of {shape}"
                misfits.append(f"{got}, {expected}")
            else:
                plain[weight] = replace(plain[weight], scale=scale)
    return plain, [*brief(orphans, "belong to no weight"), *brief(misfits, "do not fit either")]


def join(tensors: Mapping[str, SourceTensor]) -> tuple[Tensors, list[str]]:
    """Join and transpose tensors of transformers' CLIP -> the tensors, and problems with missing parts."""
    plain = dict(tensors)
    problems = []
    for name, query in tensors.items():
        if found := _QUERY.fullmatch(name):
            names = [f"{found[1]}{part}_proj{found[2]}" for part in "qkv"]
            missing = [other for other in names if other not in tensors]
            parts = tuple(tensors[other] for other in names if other in tensors)
            if missing:
                problems.append(f"{missing[0]} is missing beside {name}")
            elif len({(part.shape, part.dtype, part.file) for part in parts}) > 1:
                problems.append(f"{', '.join(names)} differ in shape or type, or lie in several files")
            else:
                shape = (3 * query.shape[0], *query.shape[1:]) if query.shape else (3,)
                joined = f"{found[1]}qkv_proj{found[2]}"
                plain = {other: tensor for other, tensor in plain.items() if other not in names}
                plain[joined] = replace(query, name=joined, shape=shape, parts=parts)
        elif _PROJECTION.fullmatch(name) and len(query.shape) == 2 and query.dtype in PLAIN and query.scale is None:
            plain[name] = replace(query, shape=query.shape[::-1], transposed=True)
    return plain, brief(problems, "are missing or differ")
