"""Attention without a mask: softmax(q k^T / sqrt(d)) v, by whichever of torch's kernels and our own is quickest here.

Keys and values are prepared once and stay; queries come in parts of any number of rows.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from skyrun.kernels.choice import bucket, fastest
from skyrun.kernels.device import uses_triton
from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.quantized_keys import HEAD_DIM, QuantizedKeys

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# A measurement takes at most so many: speed per query and key does not change beyond.
_QUERIES, _KEYS = 4096, 16384


class Keys:
    """Keys and values [M, heads * d], taken over: those that the chosen kernel does not read are let go.

    fast: scores may be computed in int8.
    """

    def __init__(self, k: Tensor, v: Tensor, heads: int, fast: bool = False) -> None:
        self.heads, self.fast = heads, fast
        self._k: Tensor | None = k
        self._v: Tensor | None = v
        self._quantized: QuantizedKeys | None = None

    @property
    def plain(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they came."""
        assert self._k is not None and self._v is not None, "these were quantized and let go"
        return self._k, self._v

    @property
    def quantized(self) -> QuantizedKeys:
        """Keys and values for int8 scores; the plain ones are gone from then on, each as soon as it can be."""
        if self._quantized is None:
            from skyrun.kernels import triton_attention as kernels

            k, v = self.plain
            self._k = self._v = None
            codes, scales = kernels.quantize_keys(k)
            del k
            self._quantized = QuantizedKeys(codes, scales, *kernels.quantize_values(v))
        return self._quantized

    @property
    def is_quantized(self) -> bool:
        """Whether that has happened."""
        return self._quantized is not None

    def first(self, count: int) -> "Keys":
        """The first of them, to measure with."""
        k, v = self.plain
        return Keys(k[:count], v[:count], self.heads, self.fast)


def attend(q: Tensor, keys: Keys) -> Tensor:
    """q [L, heads * d] -> [L, heads * d]. Every query sees every key."""
    if q.device.type != "cuda" and not (keys.fast and uses_triton(q.device)):
        return _sdpa(q, keys)
    if keys.is_quantized:
        return _int8(q, keys)
    return ways(q, keys)[_choose(q, keys)]()


def ways(q: Tensor, keys: Keys) -> dict[str, Callable[[], Tensor]]:
    """Every way to attend that there is on q's device, by name; some may refuse what they are given.

    "int8" comes last: after it the keys are no longer there for the others.
    """
    found: dict[str, Callable[[], Tensor]]
    if q.device.type == "cuda":
        found = {name: partial(_sdpa, q, keys, backend) for name, backend in _BACKENDS.items()}
        found["math"] = partial(_sdpa, q, keys, SDPBackend.MATH)
    else:
        found = {"math": partial(_sdpa, q, keys)}
    if keys.fast and uses_triton(q.device) and q.shape[1] == keys.heads * HEAD_DIM:
        found["int8"] = partial(_int8, q, keys)
    return found


def _choose(q: Tensor, keys: Keys) -> str:
    """The quickest way, measured on the first queries and keys; the one that needs memory for all scores comes last."""
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
    split = [t.unflatten(1, (keys.heads, -1)).transpose(0, 1).unsqueeze(0) for t in (q, *keys.plain)]
    if backend is None:
        mixed = F.scaled_dot_product_attention(*split)
    else:
        with sdpa_kernel(backend):
            mixed = F.scaled_dot_product_attention(*split)
    return mixed.squeeze(0).transpose(0, 1).flatten(1)


def _int8(q: Tensor, keys: Keys) -> Tensor:
    from skyrun.kernels import triton_attention

    return triton_attention.attend(q, keys.quantized)
