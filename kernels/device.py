"""What a device can do, and which kernels run on it. The only file of the kernels that talks to CUDA."""

from functools import lru_cache
from importlib.util import find_spec

import torch

_OLDEST = (8, 0)  # compute capability: Triton's own limit, and the first with tensor cores for bfloat16 and int8


@lru_cache
def uses_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on the device; torch stands in for them elsewhere."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _OLDEST
