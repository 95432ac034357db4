"""Planes hold the same bytes in another order, and lead back."""

import gguf
import numpy as np
import pytest
import torch
from blocks import BLOCK_TYPES, random_blocks

from skyrun.kernels import FORMATS
from skyrun.kernels.planes import FIELDS, from_planes, needs_planes, to_planes
from skyrun.kernels.torch.decode import dequantize


@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_fields_fill_the_block_and_planes_stay_aligned(type):
    fields = FIELDS.get(type, ())
    assert needs_planes(type) == bool(FORMATS[type].block_bytes % 16) == bool(fields)
    for start in ("block_start", "plane_start"):
        end = 0
        for field in sorted(fields, key=lambda field: getattr(field, start)):
            assert getattr(field, start) == end
            end += field.width
        assert end in (0, FORMATS[type].block_bytes)
    for field in fields:  # read in words of as many bytes as divide its width; n may be odd
        word = next(word for word in (16, 4, 2) if field.width % word == 0)
        assert field.plane_start % word == 0


@pytest.mark.parametrize("type", sorted(FIELDS))
def test_each_plane_is_one_field_of_all_blocks(type):
    data = random_blocks(type, 3, 5 * 256)
    blocks = data.view(-1, FORMATS[type].block_bytes)
    expected = torch.cat([blocks[:, f.block_start : f.block_start + f.width].reshape(-1) for f in FIELDS[type]])
    planes = to_planes(data, type)
    assert planes.shape == data.shape
    assert torch.equal(planes.view(-1), expected)


@pytest.mark.parametrize("type", ["F32", "F16", *BLOCK_TYPES])
@pytest.mark.parametrize("rows, cols", [(1, 256), (7, 768), (3, 256 * 700), (0, 512)])
def test_there_and_back(type, rows, cols):
    data = torch.randint(0, 256, (rows, FORMATS[type].row_bytes(cols)), dtype=torch.uint8)
    kept = data.clone()
    out = torch.empty_like(data)
    assert to_planes(data, type, out) is out
    assert torch.equal(out, to_planes(data, type))
    assert torch.equal(from_planes(out, type), data)
    assert from_planes(out, type, back := torch.empty_like(data)) is back
    assert torch.equal(back, data)
    assert torch.equal(data, kept)
    assert rows * cols <= 256 or torch.equal(out, data) != needs_planes(type)


@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_decoding_planes_equals_ggml(type):
    data = random_blocks(type, 5, 768)
    expected = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[type])
    np.testing.assert_array_equal(dequantize(to_planes(data, type), type, planar=True).numpy(), expected)


def test_devices_other_than_the_host_get_the_same_planes():
    from skyrun.kernels import planes

    data = random_blocks("Q6_K", 4, 512)
    out = torch.empty_like(data)
    planes._copy(data.view(-1), out.view(-1), "Q6_K", apart=True)
    assert torch.equal(out, to_planes(data, "Q6_K"))
