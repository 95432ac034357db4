"""What torch, its libraries, Triton and the driver say when memory is short, and when the device is lost."""

import errno

import pytest
import torch

from skyrun.kernels.machine import failures
from skyrun.kernels.machine.failures import is_device_lost, is_out_of_memory

GIB = 1 << 30
# Messages as they are raised, with the type that they have.
SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 11.99 GiB"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
]
PERHAPS = [
    "GET was unable to find an engine to execute this computation",
    "FIND was unable to find an engine to execute this computation after trying 6 plans.",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasGemmEx`",
]
LOST = [
    "CUDA error: an illegal memory access was encountered",
    "Triton Error [CUDA]: an illegal memory access was encountered",
    "CUDA error: unspecified launch failure",
    "CUDA error: misaligned address",
    "CUDA error: device-side assert triggered",
    "CUDA error: the launch timed out and was terminated",
    "CUDA error: an illegal instruction was encountered",
    "CUDA error: uncorrectable ECC error encountered",
]
OTHERS = [
    RuntimeError("shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("out of memory"),
    Exception("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
]


@pytest.mark.parametrize("error", SHORT, ids=repr)
def test_memory_is_short(error):
    assert is_out_of_memory(error) and not is_device_lost(error)


@pytest.mark.parametrize("text", PERHAPS)
@pytest.mark.parametrize(
    ("before", "now", "free", "short"),
    [
        (0, 0, 8 * GIB, False),
        (2, 2, 8 * GIB, False),  # refused in an earlier attempt
        (2, 3, 8 * GIB, True),  # refused to the library, which went on until it had no other way
        (0, 0, GIB // 4, True),  # refused by the driver, which torch does not count
    ],
)
def test_memory_may_be_short(monkeypatch, text, before, now, free, short):
    monkeypatch.setattr(failures, "refused_allocations", lambda: now)
    monkeypatch.setattr(failures, "free_device_bytes", lambda: free)
    assert is_out_of_memory(RuntimeError(text), before) == short


@pytest.mark.parametrize("text", LOST)
def test_the_device_is_lost(monkeypatch, text):
    monkeypatch.setattr(failures, "refused_allocations", lambda: 1)
    assert is_device_lost(RuntimeError(text)) and not is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_failures(error):
    assert not is_out_of_memory(error) and not is_device_lost(error)


def test_without_a_gpu_nothing_was_refused_and_nothing_is_short():
    if not torch.cuda.is_available():
        assert not is_out_of_memory(RuntimeError(PERHAPS[0]))
