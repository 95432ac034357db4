"""A trivial kernel, to find out whether Triton works on a device."""

import torch
import triton
import triton.language as tl

_ANSWER = 42


@triton.jit
def _answer_kernel(out, answer):
    tl.store(out, answer)


def launch(device: torch.device) -> None:
    """Compile and launch the kernel, with what Triton builds at its first launch. Raises whatever goes wrong."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    _answer_kernel[(1,)](out, _ANSWER)
    if out.item() != _ANSWER:
        raise RuntimeError(f"a kernel that stores {_ANSWER} stored {out.item()}")
