"""How much working memory each stage needs, computed from sizes alone. Streamed weights are not included."""

from skyrun.kernels.machine.capability import FLOAT16_SUMS, OLDEST
from skyrun.presets.workload import Workload

GIB = 1 << 30

# In use before the first tensor: the interpreter with torch on the host, the CUDA context on the device.
PROCESS_BYTES = int(0.45 * GIB)
CONTEXT_BYTES = int(0.6 * GIB)

# Taken by NCCL for its buffers and code, where several GPUs make a clip together (assumed).
NCCL_BYTES = int(0.3 * GIB)

# Taken on a GPU besides tensors: pages of the allocator that are used in part, and workspaces of libraries.
ALLOCATOR_BYTES = 160 << 20

# Of activations, taken on top where the allocator cannot join free memory of any sizes, as on Windows: a replay of
# denoising needs at most 0.28 (benchmarks/block_memory.py --fixed). With guidance two sequences stay in memory, between
# which holes are left even where free memory can be joined.
FRAGMENTS, GUIDED_FRAGMENTS = 0.3, 0.17

# Left free on a GPU before blocks are kept there, and by the VAE: bytes at least, and a share of the limit. So a replay
# finds no plan out of memory (benchmarks/block_memory.py); a block in int8 or in plain torch leaves more holes.
_RESERVES = {"vae": (GIB // 2, 0.08), "int8": (3 * GIB // 8, 0.06), "plain": (3 * GIB // 8, 0.06)}
_RESERVE = (5 * GIB // 16, 0.05)

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Streaming of blocks. Pieces wait for the device in page-locked memory, at most 256 MiB: Windows and WSL cannot lock
# much more. Each loader handles one piece at a time: it reads it, repacks it for the kernels, or waits for room.
STAGING_PIECES, LOADERS = 8, 4
RING_SLOTS = 3  # the block in use, the next one, and the one being read
_PIECE, _PAGE = 32 << 20, 4096
PARKING_PIECE, PARKING_PIECES = 32 << 20, 2  # page-locked buffers through which parked tokens and frames travel
ALIGNMENT = 32  # of what is read from different places, in a block's buffer
ADAPTER_ROWS = 2048  # in int8 that an adapter's matrices are multiplied with at a time

# Rows of a span that are on their way between devices, or have just arrived: queries of the next one, sent and
# received; what this one found, here and there; and what the one before has found. Of a single span only that is left.
_TRAVELLING, _TRAVELLED = 5, 1
# Keys and values of two spans, each as it was projected, as it is sent, and as it arrives.
_SENT = 8
HEAD_DIM = 128  # values per token in the rotary table
# Attention that skips tiles: queries and keys of a tile, what lists may take of keys and values in 16 bits, and tiles
# of queries that are looked at (kernels/tiles.py, kernels/selection.py, models/dit/sparse.py).
QUERY_TILE, KEY_TILE = 128, 64
LISTS_SHARE = 0.005
SAMPLED = 12
# Memory of the VAE, in units of the activations of four frames at full resolution: the cache of earlier frames, the
# input and output of the current convolution, and a tile's input with cached frames and its output.
_VAE_FRAMES = 4
_VAE_MEMORY = {"encode": 3.7, "decode": 6.2}
_VAE_WHOLE, _VAE_SLAB = 2.0, 2.5
_VAE_LENT = 1.0  # the input again, with the rows that neighbours lend
_STILL = 0.25  # of that for a single frame, which leaves no cache


def way_of(cuda: bool, capability: tuple[int, int], dtype: str, fast: bool) -> str:
    """How a block is computed: "int8", "float16 sums" and "exact" with Triton's kernels, or "plain" without them."""
    if not cuda or capability < OLDEST:
        return "plain"
    if fast:
        return "int8"
    return "float16 sums" if capability in FLOAT16_SUMS and dtype != "float32" else "exact"


def without_reserve(limit: int, way: str) -> int:
    """Bytes of a limit that may be filled. way: as `way_of` has it, or "vae"."""
    least, share = _RESERVES.get(way, _RESERVE)
    return limit - max(least, int(share * limit))


def denoise_bytes(
    workload: Workload,
    dtype: str,
    rows: int | None = None,
    parked: bool = False,
    way: str = "",
    attention: str = "exact",
    sparse: bool = False,
) -> int:
    """Bytes for activations, one decoded matrix, and the transformer's weights outside of its blocks.

    Args:
        workload: the clip and its models.
        dtype: of activations.
        rows: how many tokens pass through a block at a time; None stands for all.
        parked: whether the activations of the other tokens wait on the host.
        way: as `way_of` has it; "" stands for "plain".
        attention: its precision.
        sparse: whether it skips tiles.
    """
    size, tokens, own, dim = BYTES[dtype], workload.tokens, workload.own_tokens, workload.dim
    attention = attention if way not in ("", "plain") else "exact"
    once = parked and values_pass(workload.devices, attention)
    # With the heads of this device only: as they are projected, quantized, and kept.
    plain = (1 if once else 2) * (dim // workload.devices) * size
    keys, of_keys = _key_bytes(dim // workload.devices, size, attention, once)
    passing, matrix = _block_values(workload, size, way)
    held = own * (0 if parked else workload.contexts * dim * size) + tokens * HEAD_DIM * 4
    context = ((1 + workload.contexts) * workload.context_tokens + 3 * workload.avoided_tokens) * dim * size
    part = min(rows or own, own)
    queries = part * (1 + parked) * dim * size  # and their tokens, while the keys are quantized
    projecting = part * (2 + parked + once) * dim * size + dim * dim * matrix  # their norm, and what is made of it
    if workload.devices > 1:
        travelling = (_TRAVELLING if part < own else _TRAVELLED) * dim * size
        passing, queries = passing + travelling, 0
        projecting = part * (_SENT if part < own else _SENT // 2) * dim * size + dim * dim * matrix
    passes = part * passing + workload.ffn_dim * dim * matrix
    if sparse:
        heads = dim // HEAD_DIM // workload.devices
        held += -(-tokens // KEY_TILE) * heads * (HEAD_DIM + 5)  # means of tiles of keys
        passes = max(passes, checking_bytes(workload, size))
    peak = max(tokens * keys + passes, tokens * of_keys + queries, tokens * plain + projecting)
    return workload.outer_bytes + held + context + peak + adapter_bytes(workload, part, size, way)


def checking_bytes(workload: Workload, size: int) -> int:
    """What attention takes to measure its error: lists, sampled queries, their codes, and results in float32.

    When tokens pass, lists take less than the hidden layer that comes after.
    """
    dim = workload.dim // workload.devices
    lists = int(LISTS_SHARE * 4 * workload.tokens * dim)
    return lists + SAMPLED * QUERY_TILE * dim * (2 * size + 1 + 4 * 4)


def adapter_bytes(workload: Workload, part: int, size: int, way: str) -> int:
    """What the products with adapters' matrices take: of tokens that pass, and copies of the matrices of a layer.

    With rows in int8 there are, in float32 and in the activations' dtype, as many of them as are multiplied at a time.
    """
    if not workload.adapter_rank:
        return 0
    copies = 2 * (workload.dim + workload.ffn_dim) * workload.adapter_rank * (4 + size)
    rows = min(ADAPTER_ROWS, part) * max(workload.dim, workload.ffn_dim) * (4 + size) if way == "int8" else 0
    return part * workload.adapter_rank * size + copies + rows


def values_pass(devices: int, attention: str) -> bool:
    """Whether values are computed twice if tokens wait on the host: never are all in memory that are not quantized."""
    return devices == 1 and attention != "exact"


def _key_bytes(dim: int, size: int, attention: str, passing: bool) -> tuple[int, int]:
    """Bytes of a token's keys and values, and of these while they are quantized. passing: whether values are not all in
    memory then.

    Codes have scales for each head. Values are in float16; or in 8 bits, with the sums of blocks of 64, and then they
    and the codes of the keys take the place of the keys.
    """
    if attention == "exact":
        return 2 * dim * size, 2 * dim * size
    if attention == "int8":
        keys = dim + dim // 32 + 2 * dim
        return keys, max(dim * (1 + size), keys) if passing else max(2 * dim * size + dim, dim * size + keys)
    keys = dim * size + dim // 32 + dim // 16
    return keys, keys if passing else dim * size + keys


def _block_values(workload: Workload, size: int, way: str) -> tuple[int, int]:
    """What a block takes besides its tokens and keys: bytes of a token that passes through, where most is held; and of
    a value of a decoded matrix.

    A token that passes holds its activations and a hidden layer, which GELU changes in place, and one thing more: the
    norm before the first projection, or the results of the second one (tests/test_memory.py counts them). Without
    Triton's kernels these are summed in float32; in int8 GELU writes other memory.
    """
    dim, ffn = workload.dim, workload.ffn_dim
    if way == "int8":
        codes, hidden = 1, ffn * size
        return max(dim * size + hidden + ffn, dim * (size + codes) + hidden), 1
    passing = (2 * dim + ffn) * size
    return passing if way in ("exact", "float16 sums") else passing + 4 * dim, size


def parked_bytes(workload: Workload, dtype: str) -> int:
    """Host memory that the activations of parked tokens take."""
    return workload.contexts * workload.own_tokens * workload.dim * BYTES[dtype]


def vae_bytes(workload: Workload, way: str, dtype: str, tile: tuple[int, int] | None = None) -> int:
    """Bytes of the VAE's weights, and of its activations when it encodes or decodes a group of frames.

    Args:
        workload: the clip.
        way: "encode" or "decode".
        dtype: of weights and activations.
        tile: height and width in pixels that a convolution works on at a time; None stands for whole frames.
    """
    shared = own_rows(workload, way) < 1
    whole = (_VAE_WHOLE + _VAE_LENT * shared) * own_rows(workload, way) * _vae_level(workload, way) * BYTES[dtype]
    taken = workload.vae_weights * BYTES[dtype] + whole + vae_copy_bytes(workload, way, dtype, tile)
    return int(taken) + vae_memory_bytes(workload, way, dtype)


def vae_copy_bytes(workload: Workload, way: str, dtype: str, tile: tuple[int, int] | None = None) -> int:
    """Bytes of a convolution's input and output, which its library may copy."""
    share = own_rows(workload, way)
    share = share if tile is None else min(share, tile[0] * tile[1] / (workload.height * workload.width))
    return int(_VAE_SLAB * share * _vae_level(workload, way) * BYTES[dtype])


def vae_memory_bytes(workload: Workload, way: str, dtype: str) -> int:
    """Bytes of the VAE's cache of earlier frames: the part of its activations that can wait on the host."""
    if way == "encode" and workload.stills:
        return 0
    return int(_VAE_MEMORY[way] * own_rows(workload, way) * _vae_level(workload, way) * BYTES[dtype])


def own_rows(workload: Workload, way: str) -> float:
    """The share of the rows of frames that the VAE of one device works on: several decode together."""
    rows = workload.height // 8  # of latents
    if way == "encode" or workload.devices == 1 or rows < workload.devices:
        return 1.0
    return -(-rows // workload.devices) / rows


def _vae_level(workload: Workload, way: str) -> float:
    frames = _VAE_FRAMES * (_STILL if way == "encode" and workload.stills else 1)
    return workload.vae_base_dim * frames * workload.height * workload.width


def piece_bytes(block_bytes: int) -> int:
    """Bytes of one staging buffer for a block, in whole pages: one page more than its pieces take."""
    return min(_PIECE, (-(-block_bytes // _PAGE) + 1) * _PAGE) if block_bytes else 0


def staging_bytes(block_bytes: int) -> int:
    """Host memory that stages blocks on their way to a GPU: page-locked pieces, and one buffer for each thread."""
    return (STAGING_PIECES + LOADERS) * piece_bytes(block_bytes)


def text_bytes(workload: Workload) -> int:
    """Bytes of the text encoder's largest decoded matrix in float32. Its ffn_dim is at most four times its dim."""
    return 4 * workload.text_dim**2 * 4
