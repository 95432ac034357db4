"""What the compiler makes of the elementwise kernels, for every architecture: no spills, wide loads and stores."""

import pytest
from cubins import ARCHS, SHARED_LIMIT, Cubins, Variant, arch_param

from skyrun.kernels.triton import elementwise as kernels

DIM, FFN = 5120, 13824
ROPE_HALF = 64


def row_kernel(name, kernel, signature, cols, **constants):
    tile = {"D": cols, "TILE": kernels.row_tile(cols)}
    pointers = {"x": "*bf16", "stride": "i32", **signature}
    return Variant(
        name,
        f"skyrun.kernels.triton.elementwise:{kernel}",
        pointers,
        tile | constants,
        warps=kernels.row_warps(cols),
    )


def tile_kernel(name, kernel, signature, cols, **constants):
    tile = {"D": cols, "ROWS": kernels._ROWS, "COLS": kernels._COLS}
    return Variant(
        name,
        f"skyrun.kernels.triton.elementwise:{kernel}",
        {"x": "*bf16", "out": "*bf16", "rows": "i32", **signature},
        tile | constants,
        warps=kernels._WARPS,
        unaligned=("rows",),
    )


NORM = {"gain": "*fp32", "shift": "*fp32", "scales": "*fp32", "eps": "fp32"}
ROPE = {"weight": "*fp32", "cos": "*fp32", "sin": "*fp32", "out": "*bf16", "eps": "fp32"}
ROTATED = {"out": "*i8", "scales": "*fp32"}
SUM = {"y": "*bf16", "gate": "*fp32", "x_stride": "i32", "y_stride": "i32"}
FRAMES = {"x": "*bf16", "weight": "*fp32", "out": "*bf16", "count": "i32", "x_stride": "i32", "out_stride": "i32"}


def frames_kernel(channels):
    """Channels are an argument: autoencoders of all widths up to a power of two share a kernel."""
    tile = 1 << (channels - 1).bit_length()
    return Variant(
        f"norm and SiLU, {channels}",
        "skyrun.kernels.triton.elementwise:norm_silu_kernel",
        FRAMES | {"D": "i32", "eps": "fp32"},
        {"ROWS": kernels._ROWS * kernels._COLS // tile, "COLS": tile},
        warps=kernels._WARPS,
        unaligned=("count",),
    )


# Instructions of a thread for each number of the row: what was measured, and a tenth. Tiles are powers of two, rows are
# not: 1.6 lanes per number at 5120, 1.2 at 13824.
VARIANTS = [
    (row_kernel("layer norm", "layer_norm_kernel", NORM | {"out": "*bf16"}, DIM, ROTATED=False), 17),
    (row_kernel("layer norm, float16", "layer_norm_kernel", NORM | {"out": "*fp16"}, DIM, ROTATED=False), 17),
    (row_kernel("layer norm, rotated", "layer_norm_kernel", NORM | ROTATED, DIM, ROTATED=True), 54),
    (row_kernel("RMS norm", "rms_norm_kernel", ROPE, DIM, HALF=0), 12.5),
    (row_kernel("RMS norm, rope", "rms_norm_kernel", ROPE, DIM, HALF=ROPE_HALF), 15.5),
    (row_kernel("GELU, rotated", "gelu_rotated_kernel", ROTATED, FFN), 48),
    (row_kernel("rows", "quantize_kernel", ROTATED, DIM), 38.5),
    (tile_kernel("GELU", "gelu_kernel", {"stride": "i32"}, FFN), 21),
    (tile_kernel("gated sum", "add_gated_kernel", SUM, DIM), 9.2),
    (tile_kernel("gated sum of float16", "add_gated_kernel", SUM | {"y": "*fp16"}, DIM), 9.2),
    *((frames_kernel(channels), 26) for channels in (96, 192, 384)),
]


@pytest.fixture(scope="module")
def cubins():
    return Cubins([variant for variant, _ in VARIANTS])


@pytest.mark.parametrize("arch", [arch_param(arch) for arch in ARCHS])
@pytest.mark.parametrize(("variant", "bound"), VARIANTS, ids=[variant.name for variant, _ in VARIANTS])
def test_cubin(cubins, variant, bound, arch):
    cubin = cubins[variant.name, arch]
    assert cubin.stack == 0
    assert cubin.shared <= SHARED_LIMIT[arch]
    assert cubin.count("LDG.E.128")
    rotated = variant.signature.get("out") == "*i8"
    assert cubin.count("STG.E.128") or (rotated and cubin.count("STG.E.64"))
    assert bool(cubin.float16_matmuls) == rotated
    elements = variant.constants.get("ROWS", 1) * variant.constants.get("COLS", variant.constants.get("D"))
    assert cubin.per_element(elements) < bound
