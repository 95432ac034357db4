"""Attention without a mask: softmax(q k^T / sqrt(d)) v, by the fastest backend here: one of torch's or our own kernel.

Keys and values are prepared once and kept; queries may come in parts of any number of rows.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.machine.choice import bucket, fastest
from skyrun.kernels.machine.device import has_float8, uses_triton
from skyrun.kernels.quantized_keys import (
    BLOCK,
    HEAD_DIM,
    LARGEST,
    PRECISIONS,
    KeyRoom,
    QuantizedKeys,
    empty_values,
    largest_values,
)
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
_FIRST = 1024  # keys that are quantized first where their codes take their place


@dataclass(frozen=True)
class PassingValues:
    """Values [M, heads * d] that are never all in memory: they are computed anew while they are quantized.

    largest: magnitude of each channel, float32 [heads * d]. parts: makes them in order, [n, heads * d] at a time.
    """

    largest: Tensor
    parts: Callable[[], Iterable[Tensor]]


class Keys:
    """Keys and values [M, heads * d]. The object owns them and frees the copies that the chosen kernel does not read.

    precision: of PRECISIONS. What it stands for may be used where that is quicker, and is where the torch twin runs;
    heads then have 128 dims, or they are exact. Keys in a room are quantized in their place. Passing values must be
    quantized: call `prepare`.
    """

    def __init__(self, k: Tensor | KeyRoom, v: Tensor | PassingValues, heads: int, precision: str = "exact") -> None:
        self.heads, self.precision = heads, precision
        self._room = k if isinstance(k, KeyRoom) else None
        self._k: Tensor | None = k.keys if isinstance(k, KeyRoom) else k
        self._v: Tensor | PassingValues | None = v
        self._quantized: QuantizedKeys | None = None

    @property
    def plain(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they were given."""
        assert self._k is not None and self._v is not None, "keys and values were quantized and the originals freed"
        assert isinstance(self._v, Tensor), "passing values are never all in memory"
        return self._k, self._v

    @property
    def checked(self) -> tuple[Tensor, ...]:
        """Tensors that are not finite if a key or a value was not."""
        done = self._quantized
        return self.plain if done is None else (done.scales, done.value_scales)

    @property
    def quantized(self) -> QuantizedKeys:
        """Keys and values in this precision. The first access frees the originals, each as early as possible."""
        if self._quantized is None:
            k, v, room = self._k, self._v, self._room
            assert k is not None and v is not None
            self._k = self._v = self._room = None
            room, count = room if self.precision in LARGEST else None, len(k)
            codes, scales = _kernels(k.device).quantize_keys(k) if room is None else _in_place(k, room)
            del k
            self._quantized = QuantizedKeys(
                self.precision, codes, scales, *_quantized_values(v, count, self.precision, room)
            )
        return self._quantized

    def prepare(self) -> None:
        """Quantize now, unless they are exact, so that all queries meet the same numbers."""
        if self.precision != "exact":
            _ = self.quantized

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


def _in_place(k: Tensor, room: KeyRoom) -> tuple[Tensor, Tensor]:
    """Codes that are written over the keys of a room, and their scales.

    Codes of as many rows as have been read fit into the memory of these. Only the first rows need other memory.
    """
    kernels, mean = _kernels(k.device), k.mean(0, dtype=torch.float32)
    codes = room.codes
    scales = torch.empty((k.shape[1] // HEAD_DIM, len(k)), dtype=torch.float32, device=k.device)
    codes[:_FIRST], scales[:, :_FIRST] = kernels.quantize_keys(k[:_FIRST], mean)
    first = _FIRST
    while first < len(k):
        rows = slice(first, 2 * first)
        _, scales[:, rows] = kernels.quantize_keys(k[rows], mean, codes[rows])
        first *= 2
    return codes, scales


def _quantized_values(
    v: Tensor | PassingValues, count: int, precision: str, room: KeyRoom | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values, scales and sums of blocks, as `QuantizedKeys` has them."""
    passing = v if isinstance(v, PassingValues) else PassingValues(largest_values(v), lambda: [v])
    values, scales, sums = empty_values(passing.largest, count, precision, room)
    kernels, first = _kernels(scales.device), 0
    for part in _whole_blocks(passing.parts()):
        kernels.write_values(part, first, values, scales, sums)
        first += len(part)
    return values, scales, sums


def _whole_blocks(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same rows in order; only the last part may end within a block."""
    rest = None
    for part in parts:
        joined = part if rest is None else torch.cat((rest, part))
        whole = len(joined) // BLOCK * BLOCK
        if whole:
            yield joined[:whole]
        rest = joined[whole:].clone() if whole < len(joined) else None
    if rest is not None:
        yield rest


def quantizes(precision: str, width: int, heads: int, device: torch.device) -> bool:
    """Whether keys of a width can be quantized on a device in this precision, if it is one that quantizes."""
    return precision != "exact" and width == heads * HEAD_DIM and (device.type != "cuda" or uses_triton(device))


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
