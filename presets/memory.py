"""How much working memory each stage needs, computed from sizes alone. Streamed weights are not included."""

from skyrun.presets.workload import Workload

GIB = 1 << 30

# In use before the first tensor: the interpreter with torch on the host, the CUDA context on the device.
PROCESS_BYTES = int(0.45 * GIB)
CONTEXT_BYTES = int(0.6 * GIB)

# Left free on a GPU for workspaces of the vendor's libraries and for fragmentation.
RESERVE_BYTES, RESERVE_SHARE = GIB // 2, 0.08

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Streaming of blocks. Pieces wait for the device in page-locked memory, at most 256 MiB: Windows and WSL cannot lock
# much more. Each loader handles one piece at a time: it reads it, repacks it for the kernels, or waits for room.
STAGING_PIECES, LOADERS = 8, 4
RING_SLOTS = 3  # the block in use, the next one, and the one being read
_PIECE, _PAGE = 32 << 20, 4096

_HEAD_DIM = 128  # values per token in the rotary table
_TEXT_ROWS = 512  # rows of the prompt's keys and values
# Memory of the VAE, in units of the activations of four frames at full resolution: the cache of earlier frames, the
# input and output of the current convolution, and a tile's input with cached frames and its output.
_VAE_FRAMES = 4
_VAE_MEMORY, _VAE_WHOLE, _VAE_SLAB = 6.2, 2.0, 2.5


def denoise_bytes(workload: Workload, dtype: str, rows: int | None = None, parked: bool = False) -> int:
    """Bytes for activations, one decoded matrix, and the transformer's weights outside of its blocks.

    For all tokens there are activations, keys and values, the rotary table, and the prompt's keys and values. For the
    rows of a chunk there are either activations and the hidden layer before and after GELU, or activations, the hidden
    layer, a matmul's result and a float32 sum (tests/test_memory.py counts them).

    Args:
        workload: the clip and its models.
        dtype: of activations.
        rows: how many tokens pass through a block at a time; None stands for all.
        parked: whether the activations of the other tokens wait on the host.
    """
    size, tokens, dim, ffn = BYTES[dtype], workload.tokens, workload.dim, workload.ffn_dim
    of_all = tokens * ((2 if parked else 3) * dim * size + _HEAD_DIM * 4) + 2 * _TEXT_ROWS * dim * size
    summing = (2 * dim + ffn) * size + dim * (4 if size == 4 else 4 + size)
    passing = min(rows or tokens, tokens) * max((dim + 2 * ffn) * size, summing)
    return workload.outer_bytes + ffn * dim * size + of_all + passing


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
