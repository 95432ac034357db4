"""Compute a workload from a model's files."""

from skyrun.kernels.files.gguf_file import GGUFFile
from skyrun.models.dit_header import block_layouts, canonical_tensors
from skyrun.models.folder import main_type
from skyrun.models.umt5 import TEXT_LENGTH
from skyrun.models.vae import read_vae_dims
from skyrun.planning.adapters import with_adapters
from skyrun.planning.model import Model
from skyrun.presets import Candidate, Workload
from skyrun.tasks import TaskSpec


def model_workload(spec: TaskSpec, model: Model) -> Workload:
    """The workload of a model and its adapters, read from their headers, without a clip.

    Its other transformers become candidates.
    """
    files, vision = model.files, model.vision
    tensors = canonical_tensors(files.transformer)
    vae_base_dim, vae_weights = read_vae_dims(files.vae)
    workload = Workload(
        task=spec.name,
        height=0,
        width=0,
        frames=0,
        latent_frames=0,
        steps=0,
        layers=model.dims.layers,
        dim=model.dims.dim,
        ffn_dim=model.dims.ffn_dim,
        weight_type=main_type(files.transformer),
        block_bytes=_block_bytes(files.transformer),
        outer_bytes=sum(info.nbytes for name, info in tensors.items() if not name.startswith("blocks.")),
        text_layers=model.encoder.layers,
        text_dim=model.encoder.dim,
        text_block_bytes=model.encoder.block_bytes,
        token_matrices=2 if model.dims.audio_dim else 0,
        context_matrices=2 if model.dims.audio_dim else 0,
        image_layers=vision.layers if vision else 0,
        image_block_bytes=vision.block_bytes if vision else 0,
        context_tokens=TEXT_LENGTH + (vision.tokens if vision else 0),
        vae_base_dim=vae_base_dim,
        vae_weights=vae_weights,
        candidates=_candidates(model),
    )
    return with_adapters(workload, files.adapters)


def _candidates(model: Model) -> tuple[Candidate, ...]:
    """The transformers that a plan may choose from; none if there is only one."""
    sizes = {main_type(file): _block_bytes(file) for file in reversed((model.files.transformer, *model.others))}
    return tuple(Candidate(*size) for size in sizes.items()) if len(sizes) > 1 else ()


def _block_bytes(file: GGUFFile) -> int:
    return max(block.nbytes for block in block_layouts(file))
