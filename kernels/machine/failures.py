"""Tell failures of torch, its libraries, Triton and the CUDA driver apart by what they say: few have a type."""

import errno

import torch

# What is said where memory is short.
_OUT_OF_MEMORY = (
    "out of memory",  # the CUDA runtime and driver; Triton, which passes on the driver's words
    "can't allocate memory",  # torch's allocator of host memory
    "not enough memory",  # the same on Windows
    "ALLOC_FAILED",  # cuBLAS, cuSOLVER, and cuDNN before 9
    "ALLOCATION_FAILED",  # cuDNN 9 says whether on the host or the device
    "CUBLAS_STATUS_NOT_INITIALIZED",  # a handle of cuBLAS did not get its workspace
)
# What is also said for other reasons: cuDNN catches failed allocations and tries its next way until none is left.
_PERHAPS_OUT_OF_MEMORY = (
    "unable to find an engine to execute this computation",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_INTERNAL_ERROR",
)
_LIBRARY_BYTES = 512 << 20  # of device memory that libraries may need for their code, beside torch's allocator
# After these nothing works on the device until the process ends.
_DEVICE_LOST = (
    "an illegal memory access",
    "misaligned address",
    "an illegal instruction",
    "invalid program counter",
    "not supported on global/shared address space",
    "unspecified launch failure",
    "launch timed out",
    "device-side assert",
    "hardware stack error",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
)


def is_out_of_memory(error: BaseException, refused: int = 0) -> bool:
    """Whether the error is a failed allocation, on the device or the host.

    refused: what `refused_allocations` said before. Of errors that may have another cause, those count during which
    torch refused memory, or after which a device has next to none left.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError) or is_device_lost(error):
        return False
    if any(sign in str(error) for sign in _OUT_OF_MEMORY):
        return True
    if not any(sign in str(error) for sign in _PERHAPS_OUT_OF_MEMORY):
        return False
    return refused_allocations() > refused or free_device_bytes() < _LIBRARY_BYTES


def is_device_lost(error: BaseException) -> bool:
    """Whether the error is one after which every further call of CUDA in this process fails."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _DEVICE_LOST)


def refused_allocations() -> int:
    """How many allocations torch has refused on GPUs so far, including those where a library went on without."""
    return sum(torch.cuda.memory_stats(index).get("num_ooms", 0) for index in _used_gpus())


def free_device_bytes() -> float:
    """Bytes that are free on the fullest GPU that this process uses; infinite without one."""
    return min((torch.cuda.mem_get_info(index)[0] for index in _used_gpus()), default=float("inf"))


def _used_gpus() -> list[int]:
    if not torch.cuda.is_initialized():
        return []
    return [index for index in range(torch.cuda.device_count()) if torch.cuda.memory_stats(index)]
