"""Where the tensors of a `.pth` file lie, found without building one object of it.

torch's restricted unpickler runs over fake tensors, which have shapes and the places of their storages but no memory.
Every place is then checked against the zip file's own directory.
"""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from skyrun.kernels.errors import SkyrunError
from skyrun.quant.source import PLAIN, SourceTensor

_NAMES = {dtype: name for name, dtype in PLAIN.items()}
_WRAPPERS = ("state_dict", "model", "module", "model_state", "model_state_dict")
_MOST_WRAPPERS = 4  # a dictionary may hold itself
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
_MOST_OBJECTS = 64 << 20  # bytes of the pickle: names and shapes, no weights


def read_torch_file(path: Path) -> dict[str, SourceTensor]:
    """The tensors of a state dict. SkyrunError if it is damaged, of torch before 1.6, or holds more than tensors."""
    entries = _entries(path)
    try:
        with FakeTensorMode():
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        raise SkyrunError(
            f"{path} holds more than tensors, and skyrun runs no code from files",
            "get the model as .safetensors, or save only its state_dict()",
        ) from error
    except Exception as error:  # the unpickler meets whatever a damaged file makes of its stack
        raise SkyrunError(f"{path} is damaged: {error}", "download it again") from error
    return _located(path, _state_dict(path, loaded), entries)


def _state_dict(path: Path, loaded: Any) -> dict[str, Tensor]:
    """The tensors by name, out of the dictionaries that trainers wrap around them."""
    for _ in range(_MOST_WRAPPERS):
        if not isinstance(loaded, Mapping):
            break
        tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
        if tensors:
            return {str(name): value for name, value in tensors.items()}
        loaded = next((loaded[key] for key in _WRAPPERS if key in loaded), None)
    raise SkyrunError(f"{path} holds no tensors by name", "expected a state_dict saved by torch.save")


def _located(path: Path, tensors: dict[str, Tensor], entries: dict[int, int]) -> dict[str, SourceTensor]:
    found, problems = {}, []
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            problems.append(f"{name} in {path.name} is {tensor.layout}, expected plain numbers")
            continue
        storage = tensor.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)
        skipped, nbytes = int(tensor.storage_offset()) * tensor.itemsize, tensor.numel() * tensor.itemsize
        if not isinstance(start, int) or start not in entries:
            problems.append(f"{name} in {path.name} has no place in the file")
        elif not tensor.is_contiguous():
            problems.append(f"{name} in {path.name} is stored with strides {list(tensor.stride())}, not row after row")
        elif skipped + nbytes > entries[start]:
            problems.append(f"{name} in {path.name} takes {skipped + nbytes} bytes, its storage has {entries[start]}")
        else:
            dtype = _NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            found[name] = SourceTensor(name, tuple(tensor.shape), dtype, path, start + skipped)
    if problems:
        hint = "download it again, or save it anew with contiguous tensors"
        raise SkyrunError.listing(f"cannot use {path}", problems, hint)
    return found


def _entries(path: Path) -> dict[int, int]:
    """Where the data of each storage begins, and its bytes. SkyrunError for anything but torch's kind of zip file."""
    again = f"{path} is damaged", "download it again"
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise SkyrunError(
                    f"{path} is no zip file: it was not saved by torch 1.6 or newer, or is something else",
                    "get the model as .safetensors, or save it again with a newer torch",
                )
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
            packed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise SkyrunError(
                    f"{path} is compressed ({packed[0]}), which torch never does", "get it from its publisher"
                )
            places = {}
            for info in infos:
                if info.filename.endswith("data.pkl") and info.file_size > _MOST_OBJECTS:
                    raise SkyrunError(f"{path} has {info.file_size} bytes of objects", "expected weights and names")
                file.seek(info.header_offset)
                signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                start = info.header_offset + _LOCAL_HEADER.size + name + extra
                if signature != b"PK\x03\x04" or start + info.file_size > archive.start_dir:
                    raise SkyrunError(*again)
                places[start] = info.file_size
                file.seek(start)
                if info.filename.endswith("/byteorder") and file.read(6) != b"little":
                    raise SkyrunError(f"{path} was saved by a big-endian machine", "get the model as .safetensors")
            return places
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
        raise SkyrunError(f"{again[0]}: {error}", again[1]) from error
    except OSError as error:
        raise SkyrunError(f"cannot read {path}: {error}", "check the path and its permissions") from error
