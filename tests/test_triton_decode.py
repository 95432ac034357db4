"""Triton decodes bit for bit what torch decodes."""

import inspect
import math

import pytest
import torch
from blocks import BLOCK_TYPES, random_blocks

from skyrun.kernels import FORMATS, decode
from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.planes import to_planes
from skyrun.kernels.torch import decode as torch_decode
from skyrun.kernels.triton import decode as triton_decode
from skyrun.kernels.weight import QuantizedWeight

DTYPES = [torch.float32, torch.float16]
TILE = 1 << 16  # few large programs: the interpreter takes its time for each
GUARD = 512  # numbers on each side that nobody may write


def decoded(data, type, dtype, planar=False, tile=TILE):
    return triton_decode._dequantize(data, type, dtype, planar, tile)


def same(got, expected):
    """Equal bits, but for the payload of NaN."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(0.0, torch.inf, -torch.inf), expected.nan_to_num(0.0, torch.inf, -torch.inf))


def test_twins():
    mine, twin = (inspect.signature(module.dequantize) for module in (triton_decode, torch_decode))
    assert mine == twin


@pytest.mark.parametrize("case", ["student", "edge", "dit", "random"])
@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_equals_torch_on_reference_blocks(goldens, type, case):
    data = goldens(f"quant/{type}")[f"{case}.bytes"]
    for dtype in DTYPES:
        same(decoded(data, type, dtype), torch_decode.dequantize(data, type, dtype))


@pytest.mark.parametrize("shape", [(1, 256), (7, 2304), (2, 3, 768), (0, 256), (3, 13824)])
@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_equals_torch_on_any_shape(type, shape):
    data = random_blocks(type, math.prod(shape[:-1]), shape[-1])
    row_bytes = data.shape[-1]
    planes = to_planes(data, type).view(*shape[:-1], row_bytes)
    data = data.view(*shape[:-1], row_bytes)
    expected = torch_decode.dequantize(data, type)
    assert expected.shape == shape
    same(decoded(data, type, torch.float32), expected)
    same(decoded(planes, type, torch.float32, planar=True), expected)


@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_bfloat16_is_the_value_rounded(type):
    """By one step at most: the interpreter cuts off where the hardware rounds."""
    data = random_blocks(type, 5, 768)
    got, expected = decoded(data, type, torch.bfloat16), torch_decode.dequantize(data, type, torch.bfloat16)
    assert (got.view(torch.int16).int() - expected.view(torch.int16).int()).abs().max() <= 1


@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_nothing_is_written_outside(type):
    """Several programs, the last of them not full."""
    data = random_blocks(type, 3, 768)
    out = torch.full((3 * 768 + 2 * GUARD,), 7.0)
    blocks = 3 * 768 // FORMATS[type].block_size
    fixed = triton_decode.constants(type, 1024)
    grid = (-(-blocks // fixed["NB"]),)
    assert blocks % fixed["NB"]
    triton_decode.decode_kernel[grid](triton_decode.aligned(data, type, False), out[GUARD:-GUARD], blocks, **fixed)
    assert (out[:GUARD] == 7).all() and (out[-GUARD:] == 7).all()
    same(out[GUARD:-GUARD].view(3, 768), torch_decode.dequantize(data, type))


@pytest.mark.parametrize("type", ["Q4_K", "Q6_K"])
def test_any_strides_and_addresses(type):
    data = random_blocks(type, 6, 512)
    expected = torch_decode.dequantize(data, type)
    same(decoded(data[::2], type, torch.float32), expected[::2])
    bytes = torch.empty(data.numel() + 3, dtype=torch.uint8)
    odd = bytes[3:].view(data.shape).copy_(data)
    same(decoded(odd, type, torch.float32), expected)
    same(decoded(data[1:], type, torch.float32), expected[1:])


def test_bad_blocks_are_refused():
    with pytest.raises(SkyrunError, match="multiple of 34 bytes"):
        decoded(torch.zeros(1, 35, dtype=torch.uint8), "Q8_0", torch.float32)


def test_the_dispatcher_takes_triton_where_it_runs(monkeypatch):
    taken = []
    monkeypatch.setattr(decode, "uses_triton", lambda device: True)
    monkeypatch.setattr(triton_decode, "dequantize", lambda *arguments: taken.append(arguments))
    data = random_blocks("Q8_0", 2, 256)
    QuantizedWeight(data, "Q8_0", planar=True).dense(torch.float16)
    assert taken == [(data, "Q8_0", torch.float16, True)]
    decode.dequantize(torch.zeros(2, 8, dtype=torch.uint8), "F16")  # has no blocks to decode
    assert len(taken) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_on_the_gpu(type, dtype):
    for seed, (rows, cols) in enumerate([(1, 256), (77, 5120), (513, 13824)]):
        data = random_blocks(type, rows, cols, seed).cuda()
        expected = torch_decode.dequantize(data, type, dtype)
        for _ in range(3):
            same(triton_decode.dequantize(data, type, dtype), expected)
        same(triton_decode.dequantize(to_planes(data, type), type, dtype, planar=True), expected)
