"""How much memory each stage works in, from sizes alone. Weights of blocks are not part of it."""

from skyrun.presets.workload import Workload

GIB = 1 << 30

# Taken before the first tensor: the interpreter with torch on the host, the CUDA context on the device.
PROCESS_BYTES = int(0.45 * GIB)
CONTEXT_BYTES = int(0.6 * GIB)

# Left free on a GPU: workspaces of the vendor's libraries, and what fragmentation costs.
RESERVE_BYTES, RESERVE_SHARE = GIB // 2, 0.08

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Of the stream of blocks. Pieces wait for the device in page-locked memory, 256 MiB at most; Windows and WSL lock
# little more. Every loader has a piece under way: one is read, others are laid out for the kernels or wait for room.
STAGING_PIECES, LOADERS = 8, 4
RING_SLOTS = 3  # the block in use, the next one, and the one being read
_PIECE, _PAGE = 32 << 20, 4096

_HEAD_DIM = 128  # numbers per token of the rotary table
_TEXT_ROWS = 512  # of the prompt's keys and values
# In the autoencoder, in activations of its widest level while a group of four frames passes: what convolutions remember
# of earlier frames, the input and output of the one at work, and of a slab its input with the past and its output.
_VAE_FRAMES = 4
_VAE_MEMORY, _VAE_WHOLE, _VAE_SLAB = 6.2, 2.0, 2.5


def denoise_bytes(workload: Workload, dtype: str, rows: int | None = None, parked: bool = False) -> int:
    """Activations, one decoded matrix, and what of the transformer lies outside its blocks.

    Of all tokens their numbers, keys and values are there, the rotary table, and the prompt's keys and values. Of the
    `rows` that pass at a time (None: all) either numbers and twice the hidden ones, before and after GELU, or numbers,
    product, hidden ones and the float32 sum (tests/test_memory.py counts them). parked: tokens wait on the host.
    """
    size, tokens, dim, ffn = BYTES[dtype], workload.tokens, workload.dim, workload.ffn_dim
    of_all = tokens * ((2 if parked else 3) * dim * size + _HEAD_DIM * 4) + 2 * _TEXT_ROWS * dim * size
    summing = (2 * dim + ffn) * size + dim * (4 if size == 4 else 4 + size)
    passing = min(rows or tokens, tokens) * max((dim + 2 * ffn) * size, summing)
    return workload.outer_bytes + ffn * dim * size + of_all + passing


def parked_bytes(workload: Workload, dtype: str) -> int:
    """Host memory of tokens that wait there."""
    return workload.tokens * workload.dim * BYTES[dtype]


def vae_bytes(workload: Workload, dtype: str, tile: tuple[int, int] | None = None) -> int:
    """The autoencoder's weights, and activations of encoding or decoding a group of frames.

    tile: height and width of what a convolution works on at a time, None: whole frames.
    """
    numbers = workload.vae_weights + (_VAE_MEMORY + _VAE_WHOLE) * _vae_level(workload)
    return int(numbers * BYTES[dtype]) + vae_copy_bytes(workload, dtype, tile)


def vae_copy_bytes(workload: Workload, dtype: str, tile: tuple[int, int] | None = None) -> int:
    """A convolution's input and output, of which its library makes copies in an order of its own."""
    share = 1.0 if tile is None else min(1.0, tile[0] * tile[1] / (workload.height * workload.width))
    return int(_VAE_SLAB * share * _vae_level(workload) * BYTES[dtype])


def vae_memory_bytes(workload: Workload, dtype: str) -> int:
    """What the autoencoder remembers of earlier frames: the part of its activations that can wait on the host."""
    return int(_VAE_MEMORY * _vae_level(workload) * BYTES[dtype])


def _vae_level(workload: Workload) -> int:
    return workload.vae_base_dim * _VAE_FRAMES * workload.height * workload.width


def piece_bytes(block_bytes: int) -> int:
    """Bytes of the buffers through which a block reaches a GPU, in whole pages: one more than the pieces take."""
    return min(_PIECE, (-(-block_bytes // _PAGE) + 1) * _PAGE) if block_bytes else 0


def staging_bytes(block_bytes: int) -> int:
    """Host memory that blocks pass through on their way to a GPU: page-locked, and one buffer for each thread."""
    return (STAGING_PIECES + LOADERS) * piece_bytes(block_bytes)


def text_bytes(workload: Workload) -> int:
    """The largest decoded matrix of the encoder, float32; its feed-forward is at most four times its width."""
    return 4 * workload.text_dim**2 * 4
