"""What a plan needs to know of model files, read from their headers."""

import re
from dataclasses import replace
from math import prod
from pathlib import Path

from skyrun.errors import SkyrunError
from skyrun.kernels.gguf_file import GGUFFile
from skyrun.kernels.safetensors_header import read_safetensors_header
from skyrun.models.folder import find_model, main_type, transformers_in
from skyrun.presets import Candidate, Workload

_BLOCK = re.compile(r"\bbl(?:oc)?ks?\.(\d+)\.")
_FEED_FORWARD = re.compile(r"\bblocks\.0\.ffn\.(?:0|net\.0\.proj)\.weight")


def with_model(workload: Workload, model: Path, quant: str | None) -> Workload:
    """The workload with these files. Of a folder with several transformers all are on offer, unless quant names one."""
    files = find_model(model, workload.task, quant)
    candidates = [files.transformer]
    if quant is None and model.is_dir():
        candidates = transformers_in(model, workload.task)
    blocks, outer = _bytes(files.transformer)
    text, _ = _bytes(files.text_encoder)
    ffn, dim = _feed_forward(files.transformer)
    vae = read_safetensors_header(files.vae).tensors
    return replace(
        workload,
        layers=len(blocks),
        dim=dim,
        ffn_dim=ffn,
        weight_type=main_type(files.transformer),
        block_bytes=max(blocks.values()),
        outer_bytes=outer,
        text_layers=len(text),
        text_block_bytes=max(text.values()),
        vae_base_dim=vae["decoder.head.2.weight"].shape[1],
        vae_weights=sum(prod(tensor.shape) for tensor in vae.values()),
        candidates=tuple(Candidate(main_type(file), max(_bytes(file)[0].values())) for file in candidates),
    )


def _bytes(file: GGUFFile) -> tuple[dict[int, int], int]:
    """Bytes of every block, and of everything else."""
    blocks: dict[int, int] = {}
    outer = 0
    for info in file.tensors.values():
        if match := _BLOCK.search(info.name):
            blocks[int(match[1])] = blocks.get(int(match[1]), 0) + info.nbytes
        else:
            outer += info.nbytes
    return blocks, outer


def _feed_forward(file: GGUFFile) -> tuple[int, int]:
    for info in file.tensors.values():
        if _FEED_FORWARD.search(info.name) and len(info.shape) == 2:
            return info.shape[0], info.shape[1]
    raise SkyrunError(f"{file.path} has no feed-forward in its first block", "use a SkyReels-V3 transformer")
