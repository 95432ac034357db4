"""Attention without a mask: softmax(q k^T / sqrt(d)) v, by the fastest backend here: one of torch's or our own kernel.

Keys and values are prepared once and kept; queries may come in parts of any number of rows.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.machine.choice import bucket, fastest
from skyrun.kernels.machine.device import has_float8, uses_triton
from skyrun.kernels.quantized_keys import HEAD_DIM, PRECISIONS, QuantizedKeys
from skyrun.kernels.tiles import Selection
from skyrun.kernels.torch import attention as torch_attention

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Earlier versions of cuDNN give wrong results for lengths that are no multiple of 128 (pytorch issue 169849).
_CUDNN_IS_RIGHT = 91501
# Backends are measured on at most this many: beyond, the time per query and key stays the same.
_QUERIES, _KEYS = 4096, 16384


class Keys:
    """Keys and values [M, heads * d]. The object owns them and frees the copies that the chosen kernel does not read.

    precision: of PRECISIONS. What it stands for may be used where that is quicker, and is where the torch twin runs;
    heads then have 128 dims, or they are exact.
    """

    def __init__(self, k: Tensor, v: Tensor, heads: int, precision: str = "exact") -> None:
        self.heads, self.precision = heads, precision
        self._k: Tensor | None = k
        self._v: Tensor | None = v
        self._quantized: QuantizedKeys | None = None

    @property
    def plain(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they were given."""
        assert self._k is not None and self._v is not None, "keys and values were quantized and the originals freed"
        return self._k, self._v

    @property
    def quantized(self) -> QuantizedKeys:
        """Keys and values in this precision. The first access frees the originals, each as early as possible."""
        if self._quantized is None:
            k, v = self.plain
            kernels = _kernels(k.device)
            self._k = self._v = None
            codes, scales = kernels.quantize_keys(k)
            del k
            self._quantized = QuantizedKeys(self.precision, codes, scales, *kernels.quantize_values(v, self.precision))
        return self._quantized

    @property
    def is_quantized(self) -> bool:
        """Whether the keys and values have been quantized."""
        return self._quantized is not None

    def first(self, count: int) -> "Keys":
        """The first `count` keys and values, to measure with."""
        k, v = self.plain
        return Keys(k[:count], v[:count], self.heads, self.precision)

    def may_be_quantized(self, q: Tensor) -> bool:
        """Whether the precision and the width of a head leave anything but exact attention."""
        return self.precision != "exact" and q.shape[1] == self.heads * HEAD_DIM


def quick_precisions(device: torch.device) -> tuple[str, ...]:
    """The precisions, besides "exact", that have a kernel on the device."""
    if not uses_triton(device):
        return ()
    return tuple(name for name in PRECISIONS if name != "exact" and (name != "fp8" or has_float8(device)))


def attend(q: Tensor, keys: Keys, chosen: Selection | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Attend from q [L, heads * d] to all keys, or to those that are chosen -> [L, heads * d].

    The result has q's dtype, which may be another than the keys'. chosen: for heads of 128 dims. dtype: of the result,
    in place of q's, where keys are chosen.
    """
    if chosen is not None:
        kernels = _kernels(q.device)
        if keys.is_quantized:
            return kernels.attend(q, keys.quantized, chosen, dtype)  # type: ignore[no-any-return]
        k, v = keys.plain
        return kernels.attend_plain(q.to(k.dtype), k, v, chosen, dtype or q.dtype)  # type: ignore[no-any-return]
    if keys.is_quantized:
        return _quantized(q, keys)
    if q.device.type != "cuda" and not (keys.precision != "exact" and uses_triton(q.device)):
        return _quantized(q, keys) if keys.may_be_quantized(q) else _sdpa(q, keys)
    return ways(q, keys)[_choose(q, keys)]()


def ways(q: Tensor, keys: Keys) -> dict[str, Callable[[], Tensor]]:
    """The attention backends of q's device by name, bound to q and keys. Some may raise for these shapes or dtypes.

    That of the keys' precision comes last: it frees what the other backends read.
    """
    found: dict[str, Callable[[], Tensor]]
    if q.device.type == "cuda":
        found = {name: partial(_sdpa, q, keys, backend) for name, backend in _backends().items()}
        found["math"] = partial(_sdpa, q, keys, SDPBackend.MATH)
    else:
        found = {"math": partial(_sdpa, q, keys)}
    if keys.may_be_quantized(q) and uses_triton(q.device):
        found[keys.precision] = partial(_quantized, q, keys)
    return found


def _backends() -> dict[str, SDPBackend]:
    """torch's backends by name, without cuDNN where its version gives wrong results."""
    cudnn = torch.backends.cudnn.version() or 0
    return {name: backend for name, backend in _BACKENDS.items() if name != "cudnn" or cudnn >= _CUDNN_IS_RIGHT}


def _choose(q: Tensor, keys: Keys) -> str:
    """The backend that is fastest on the first queries and keys. "math" stores all scores: it is the last resort."""
    count = min(len(keys.plain[0]), _KEYS)
    few = q[:_QUERIES]
    candidates = ways(few, keys.first(count))
    if q.device.type == "cuda":
        del candidates["math"]
    size = f"{bucket(len(few))}x{bucket(count)}x{keys.heads}x{q.shape[1] // keys.heads}"
    try:
        return fastest(q.device, f"attention {size} {str(q.dtype).removeprefix('torch.')}", candidates)
    except SkyrunError:
        return "math"


def _sdpa(q: Tensor, keys: Keys, backend: SDPBackend | None = None) -> Tensor:
    k, v = keys.plain
    split = [t.to(k.dtype).unflatten(1, (keys.heads, -1)).transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
    if backend is None:
        mixed = F.scaled_dot_product_attention(*split)
    else:
        with sdpa_kernel(backend):
            mixed = F.scaled_dot_product_attention(*split)
    return mixed.squeeze(0).transpose(0, 1).flatten(1).to(q.dtype)


def _quantized(q: Tensor, keys: Keys) -> Tensor:
    attended: Tensor = _kernels(q.device).attend(q, keys.quantized)
    return attended


def _kernels(device: torch.device) -> ModuleType:
    if not uses_triton(device):
        return torch_attention
    from skyrun.kernels.triton import attention as triton_attention

    return triton_attention
