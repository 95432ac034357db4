"""How much working memory each stage needs, computed from sizes alone. Streamed weights are not included."""

from skyrun.kernels.capability import FLOAT16_SUMS, OLDEST
from skyrun.presets.workload import Workload

GIB = 1 << 30

# In use before the first tensor: the interpreter with torch on the host, the CUDA context on the device.
PROCESS_BYTES = int(0.45 * GIB)
CONTEXT_BYTES = int(0.6 * GIB)

# Taken on a GPU besides tensors: pages of the allocator that are used in part, and workspaces of libraries.
ALLOCATOR_BYTES = 160 << 20

# Of activations, taken on top where the allocator cannot join free memory of any sizes, as on Windows: a replay of
# denoising needs at most 0.18 (benchmarks/block_memory.py --fixed).
FRAGMENTS = 0.2

# Left free on a GPU before blocks are kept there.
RESERVE_BYTES, RESERVE_SHARE = GIB // 2, 0.08

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Streaming of blocks. Pieces wait for the device in page-locked memory, at most 256 MiB: Windows and WSL cannot lock
# much more. Each loader handles one piece at a time: it reads it, repacks it for the kernels, or waits for room.
STAGING_PIECES, LOADERS = 8, 4
RING_SLOTS = 3  # the block in use, the next one, and the one being read
_PIECE, _PAGE = 32 << 20, 4096
PARKING_PIECE, PARKING_PIECES = 32 << 20, 2  # page-locked buffers through which parked tokens travel

_HEAD_DIM = 128  # values per token in the rotary table
# Memory of the VAE, in units of the activations of four frames at full resolution: the cache of earlier frames, the
# input and output of the current convolution, and a tile's input with cached frames and its output.
_VAE_FRAMES = 4
_VAE_MEMORY, _VAE_WHOLE, _VAE_SLAB = 6.2, 2.0, 2.5


def way_of(cuda: bool, capability: tuple[int, int], dtype: str, fast: bool) -> str:
    """How a block is computed: "int8", "float16 sums" and "exact" with Triton's kernels, or "plain" without them."""
    if not cuda or capability < OLDEST:
        return "plain"
    if fast:
        return "int8"
    return "float16 sums" if capability in FLOAT16_SUMS and dtype != "float32" else "exact"


def denoise_bytes(workload: Workload, dtype: str, rows: int | None = None, parked: bool = False, way: str = "") -> int:
    """Bytes for activations, one decoded matrix, and the transformer's weights outside of its blocks.

    Args:
        workload: the clip and its models.
        dtype: of activations.
        rows: how many tokens pass through a block at a time; None stands for all.
        parked: whether the activations of the other tokens wait on the host.
        way: as `way_of` has it; "" stands for "plain".
    """
    size, tokens, dim = BYTES[dtype], workload.tokens, workload.dim
    keys, of_keys, passing, matrix = _block_values(workload, size, way)
    held = tokens * ((0 if parked else dim * size) + _HEAD_DIM * 4)
    context = 2 * workload.context_tokens * dim * size
    part = min(rows or tokens, tokens)
    queries = part * (2 + parked) * dim * size  # before and after their norm, while the keys are quantized
    peak = max(tokens * keys + part * passing + workload.ffn_dim * dim * matrix, tokens * of_keys + queries)
    return workload.outer_bytes + held + context + peak


def _block_values(workload: Workload, size: int, way: str) -> tuple[int, int, int, int]:
    """What a block takes besides its tokens: bytes of a token's keys and values; of these while they are quantized; of
    a token that passes through, where most is held; and of a value of a decoded matrix.

    A token that passes holds its activations and a hidden layer, and one thing more: the hidden layer before GELU, the
    norm before the first projection, or the results of the second one (tests/test_memory.py counts them).
    """
    dim, ffn = workload.dim, workload.ffn_dim
    if way == "int8":
        codes, hidden = 1, ffn * size
        return 3 * dim + dim // 32, 5 * dim, max(dim * size + hidden + ffn, dim * (size + codes) + hidden), 1
    if way == "float16 sums":  # a product's float16 result is there beside that in the activations' dtype
        first, second = 2 * dim * size + 2 * dim + 2 * ffn, dim * size + ffn * size + 2 * ffn + 2 * dim
        return 2 * dim * size, 2 * dim * size, max(first + ffn * size - 2 * dim, second), size
    if way == "exact":
        return 2 * dim * size, 2 * dim * size, max(dim + 2 * ffn, 3 * dim + ffn) * size, size
    summing = (2 * dim + ffn) * size + dim * (4 if size == 4 else 4 + size)
    return 2 * dim * size, 2 * dim * size, max((dim + 2 * ffn) * size, summing), size


def parked_bytes(workload: Workload, dtype: str) -> int:
    """Host memory that the activations of parked tokens take."""
    return workload.tokens * workload.dim * BYTES[dtype]


def vae_bytes(workload: Workload, dtype: str, tile: tuple[int, int] | None = None) -> int:
    """Bytes of the VAE's weights, and of its activations when it encodes or decodes a group of frames.

    tile: height and width in pixels that a convolution works on at a time; None stands for whole frames.
    """
    values = workload.vae_weights + (_VAE_MEMORY + _VAE_WHOLE) * _vae_level(workload)
    return int(values * BYTES[dtype]) + vae_copy_bytes(workload, dtype, tile)


def vae_copy_bytes(workload: Workload, dtype: str, tile: tuple[int, int] | None = None) -> int:
    """Bytes of a convolution's input and output, which its library copies into another memory layout."""
    share = 1.0 if tile is None else min(1.0, tile[0] * tile[1] / (workload.height * workload.width))
    return int(_VAE_SLAB * share * _vae_level(workload) * BYTES[dtype])


def vae_memory_bytes(workload: Workload, dtype: str) -> int:
    """Bytes of the VAE's cache of earlier frames: the part of its activations that can wait on the host."""
    return int(_VAE_MEMORY * _vae_level(workload) * BYTES[dtype])


def _vae_level(workload: Workload) -> int:
    return workload.vae_base_dim * _VAE_FRAMES * workload.height * workload.width


def piece_bytes(block_bytes: int) -> int:
    """Bytes of one staging buffer for a block, in whole pages: one page more than its pieces take."""
    return min(_PIECE, (-(-block_bytes // _PAGE) + 1) * _PAGE) if block_bytes else 0


def staging_bytes(block_bytes: int) -> int:
    """Host memory that stages blocks on their way to a GPU: page-locked pieces, and one buffer for each thread."""
    return (STAGING_PIECES + LOADERS) * piece_bytes(block_bytes)


def text_bytes(workload: Workload) -> int:
    """Bytes of the text encoder's largest decoded matrix in float32. Its ffn_dim is at most four times its dim."""
    return 4 * workload.text_dim**2 * 4
