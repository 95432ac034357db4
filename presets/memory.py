"""How much memory each stage works in, from sizes alone. Weights of blocks are not part of it."""

from skyrun.presets.workload import Workload

GIB = 1 << 30

# Taken before the first tensor: the interpreter with torch on the host, the CUDA context on the device.
PROCESS_BYTES = int(0.45 * GIB)
CONTEXT_BYTES = int(0.6 * GIB)

# Left free on a GPU: workspaces of the vendor's libraries, and what fragmentation costs.
RESERVE_BYTES, RESERVE_SHARE = GIB // 2, 0.08

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Numbers alive at the peak, counted in the code that allocates them (tests/test_memory.py counts them again). In a
# block, per token and width: input, q, k, v in the activations' type, and as much again in float32 for the rotation.
_ACTIVATIONS, _FLOAT32 = 4, 4
_HEAD_DIM = 128  # numbers per token of the rotary table
# In the autoencoder: activations of its widest level while a group of four frames passes.
_VAE_ACTIVATIONS, _VAE_FRAMES = 11.25, 4


def denoise_bytes(workload: Workload, dtype: str) -> int:
    """Activations, one decoded matrix, and what of the transformer lies outside its blocks."""
    size, tokens, dim, ffn = BYTES[dtype], workload.tokens, workload.dim, workload.ffn_dim
    attention = tokens * (dim * (_ACTIVATIONS * size + _FLOAT32 * 4) + _HEAD_DIM * 4)
    feed_forward = tokens * ((2 * ffn + 3 * dim) * size + _HEAD_DIM * 4)
    return workload.outer_bytes + ffn * dim * size + max(attention, feed_forward)


def vae_bytes(workload: Workload, dtype: str) -> int:
    """The autoencoder's weights, and activations of encoding or decoding a group of frames."""
    level = workload.vae_base_dim * _VAE_FRAMES * workload.height * workload.width
    return int((workload.vae_weights + _VAE_ACTIVATIONS * level) * BYTES[dtype])


def page_locked_bytes(block_bytes: int) -> int:
    """Host memory of the two buffers that a GPU's blocks pass through; torch rounds each up to a power of two."""
    return 2 * (1 << (block_bytes - 1).bit_length()) if block_bytes else 0


def text_bytes(workload: Workload) -> int:
    """The largest decoded matrix of the encoder, float32; its feed-forward is at most four times its width."""
    return 4 * workload.text_dim**2 * 4
