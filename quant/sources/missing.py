"""Find which models of a task a folder will still lack after a conversion."""

from collections.abc import Collection
from pathlib import Path

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.files.names import recognise
from skyrun.kernels.name_tables import TABLES, needed_roles
from skyrun.quant.plan import PlannedFile
from skyrun.quant.sources.checkpoint import open_parts

_WORDS = {
    "text_encoder": "text encoder (UMT5)",
    "vae": "autoencoder (Wan 2.1's VAE)",
    "image_encoder": "image encoder (CLIP ViT-H/14)",
    "audio_encoder": "audio encoder (wav2vec2 base)",
}


def missing_roles(files: Collection[PlannedFile], out: Path) -> tuple[str, ...]:
    """Roles that the transformers among the files need but that neither the files nor the folder `out` have."""
    needed = [role for file in files if file.role == "transformer" for role in needed_roles(file.task)]
    made = {file.role for file in files}
    missing = [role for role in dict.fromkeys(needed) if role not in made]
    there = _roles_in(out) if missing else set()
    return tuple(role for role in missing if role not in there)


def missing_text(files: Collection[PlannedFile], source: Path, missing: Collection[str]) -> str:
    """A note about missing roles; "" if none are missing."""
    if not missing:
        return ""
    tasks = [file.task for file in files if file.role == "transformer" and file.task]
    who = " and ".join(tasks) or "this transformer"
    what = " and no ".join(_WORDS[role] for role in missing)
    rest = "convert what is missing into the same folder"
    return f"{who} will not run from there yet: {source} has no {what}; {rest}"


def _roles_in(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    try:
        parts, _ = open_parts(folder, {})
    except SkyrunError:
        return set()
    return {match.table.role for part in parts for match in recognise(part.tensors, TABLES)}
