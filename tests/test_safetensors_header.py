"""The reader of safetensors headers: agrees with the safetensors library, and refuses every lie, soon."""

import json
import struct
import time

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from skyrun.errors import SkyrunError
from skyrun.kernels.files.safetensors_header import read_safetensors_header


def file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def test_agrees_with_the_library(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3, 5), "b": torch.ones(7, dtype=torch.bfloat16), "c": torch.zeros(0, 4)}
    save_file(tensors | {"d": torch.tensor(2)}, path, {"note": "yes"})
    header = read_safetensors_header(path)
    content = path.read_bytes()
    assert header.metadata == {"note": "yes"}
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == set(header.tensors)
        for name, info in header.tensors.items():
            expected = theirs.get_tensor(name)
            assert info.shape == tuple(expected.shape)
            stored = expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert content[info.offset : info.offset + info.nbytes] == stored


CUT = "it is cut: download it again"
LIES = {
    "overlap": (file({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "b overlaps a", "damaged"),
    "the same place": (file({"a": entry(0, 8), "b": entry(0, 8)}, bytes(16)), "b overlaps a", "damaged"),
    "inside another": (file({"a": entry(0, 12), "b": entry(4, 8)}, bytes(16)), "b overlaps a", "damaged"),
    "gap": (file({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "a gap of 4 bytes before b", "damaged"),
    "more data than tensors": (file({"a": entry(0, 4)}, bytes(9)), "do not cover the 9 bytes", "damaged"),
    "cut": (file({"a": entry(0, 64)}, bytes(9)), "a ends at byte 64, the data at 9", CUT),
    "cut in the header": (file({"a": entry(0, 64)}, length=9999), "a header of 9999 bytes in a file of", CUT),
    "backwards": (file({"a": entry(8, 4, shape=[4])}, bytes(8)), "from 8 to 4", "damaged"),
    "shape": (file({"a": entry(0, 8, shape=[9])}, bytes(8)), r"shape \[9\] in 8 bytes of U8", "damaged"),
    "negative": (file({"a": entry(0, 8, shape=[-8])}, bytes(8)), "shape", "damaged"),
    "a list": (file(b"[]"), r"starts with b'\[\]'", "damaged"),
    "no JSON": (file(b"{" + b" " * 20), "not a usable safetensors", "damaged"),
    "numbers as metadata": (file({"__metadata__": {"a": 1}}), "metadata is not text", "damaged"),
    "deep": (file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not a usable safetensors", "damaged"),
    "many sides": (
        lambda: file({"a": entry(0, 4, shape=[1 << 62] * 500_000)}, bytes(4)),
        "has 500000 dimensions",
        "damaged",
    ),
    "many lists": (lambda: file(b"[" + b"[]," * 30_000_000 + b"[]]"), "starts with", "damaged"),
    "many lists inside": (lambda: file(b'{"a":[' + b"[]," * 30_000_000 + b"[]]}"), "more than .* items", "damaged"),
    "many numbers": (lambda: file(b'{"a":[' + b"1," * 45_000_000 + b"1]}"), "more than .* items", "damaged"),
}


@pytest.mark.parametrize("case", LIES)
def test_each_lie_is_named_soon(tmp_path, case):
    content, message, hint = LIES[case]
    path = tmp_path / "lie.safetensors"
    path.write_bytes(content() if callable(content) else content)
    if not callable(content):
        with pytest.raises(SafetensorError), safe_open(path, "pt"):
            pass
    start = time.process_time()
    with pytest.raises(SkyrunError, match=message) as error:
        read_safetensors_header(path)
    assert time.process_time() - start < 2
    assert hint in error.value.hint
    assert len(error.value.message) < 500


def test_a_header_alone_is_enough_where_the_rest_is_coming(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole := file({"a": entry(0, 8)}))
    assert list(read_safetensors_header(path, len(whole) + 8).tensors) == ["a"]
    with pytest.raises(SkyrunError, match="a ends at byte 8, the data at 0"):
        read_safetensors_header(path)
