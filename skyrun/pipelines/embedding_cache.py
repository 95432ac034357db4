"""Cache prompt embeddings on disk, so that the text encoder runs once for a prompt, not once for every clip."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from skyrun.kernels.files.atomic import replacing
from skyrun.kernels.files.gguf_file import GGUFFile
from skyrun.kernels.machine.cache import cache_folder
from skyrun.models.identity import gguf_identity
from skyrun.version import __version__

_MOST = 64  # of up to 8 MB each; those that were used last stay
_NAME, _CHECKSUM = "embedding", "sha256"


class CachedEmbedding:
    """The cache entry of one prompt's embedding. Damaged files are ignored, and a full disk is not an error."""

    def __init__(self, file: GGUFFile, ids: list[int], dim: int, device: torch.device) -> None:
        """file: the text encoder. ids: the prompt's tokens, whose embedding is [len(ids), dim]."""
        self._shape = (len(ids), dim)
        self._path = _folder() / f"{_key(file, ids, device)}.safetensors"

    def load(self) -> Tensor | None:
        """float32 [len(ids), dim] on the CPU, if it is there and as it was stored."""
        try:
            with safe_open(self._path, "pt") as file:
                embedding: Tensor = file.get_tensor(_NAME)
                checksum = (file.metadata() or {}).get(_CHECKSUM)
        except (OSError, SafetensorError, KeyError):
            return None
        whole = embedding.dtype == torch.float32 and embedding.shape == self._shape
        if not whole or checksum != self._checksum(embedding):
            return None
        with suppress(OSError):
            os.utime(self._path)
        return embedding

    def store(self, embedding: Tensor) -> None:
        """Keep it, and let go of the ones that were not used for longest."""
        embedding = embedding.float().cpu().contiguous()
        with suppress(OSError, SafetensorError):
            with replacing(self._path, private=True) as partial:
                save_file({_NAME: embedding}, partial, {_CHECKSUM: self._checksum(embedding)})
            for path in sorted(_folder().glob("*.safetensors"), key=lambda path: -path.stat().st_mtime)[_MOST:]:
                path.unlink(missing_ok=True)

    def _checksum(self, embedding: Tensor) -> str:
        """A digest of the values and of what they belong to: one flipped bit would make another clip."""
        return hashlib.sha256(self._path.stem.encode() + embedding.numpy().tobytes()).hexdigest()


def _folder() -> Path:
    return cache_folder() / "prompts"


def _key(file: GGUFFile, ids: list[int], device: torch.device) -> str:
    """A digest of everything that determines the embedding's values: tokens, file, device type and versions."""
    deciding = [ids, gguf_identity(file), device.type, torch.__version__, __version__]
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:32]
