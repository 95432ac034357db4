"""The header reader: agrees with gguf-py on good files, and survives every bad one."""

import re
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skyrun.errors import MODEL_MISSING, SkyrunError
from skyrun.kernels import FORMATS
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.models.dit_header import read_dims
from skyrun.models.umt5 import UMT5

_OVERHEAD = 1 << 16  # what an exception, a path and small dicts take


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A small file with every kind of value and several types."""
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_string("text", "tokens")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"number.{kind}", 7)
    writer.add_float32("number.f32", 0.5)
    writer.add_float64("number.f64", 0.25)
    writer.add_bool("flag", True)
    writer.add_array("names", ["a", "bc", "def"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("nested", [[1, 2], [3]])
    rng = np.random.default_rng(0)
    for name in FORMATS:
        format = FORMATS[name]
        data = rng.integers(0, 255, (2, 2 * format.block_bytes), dtype=np.uint8)
        writer.add_tensor(f"blocks.0.{name}", data, raw_dtype=gguf.GGMLQuantizationType(format.id))
    writer.add_tensor("five", rng.standard_normal((2, 3, 1, 2, 2)).astype(np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def test_agrees_with_gguf_py(sample):
    file, reference = open_gguf(sample), gguf.GGUFReader(sample)
    assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        info = file.tensors[tensor.name]
        assert info.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert (info.format.id, info.offset, info.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert bytes(file.read(info)) == tensor.data.tobytes()
    scalars = {name: field.contents() for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    arrays = {"names", "numbers", "nested"}
    assert file.metadata == {name: value for name, value in scalars.items() if name not in arrays}


def test_arrays_are_read_when_they_are_asked_for(sample):
    file = open_gguf(sample)
    assert file.array("names") == ["a", "bc", "def"]
    assert file.array("numbers") == [1, 2, 3]
    assert file.array("text") == []  # a string, no array
    with pytest.raises(SkyrunError, match="a nested that cannot be read"):
        file.array("nested")


def test_part_of_a_tensor_can_be_read(sample):
    file = open_gguf(sample)
    info = file.tensors["five"]
    assert file.read(info, 8, 12) == file.read(info)[8:20]


def refused(path):
    """The message of the error, after checking that the reader allocated no more than the file holds."""
    tracemalloc.start()
    try:
        open_gguf(path)
        return ""
    except SkyrunError as error:
        assert error.hint
        return error.message
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * path.stat().st_size + _OVERHEAD


def test_every_cut_is_noticed(sample, tmp_path):
    whole = sample.read_bytes()
    cut = tmp_path / "cut.gguf"
    last = max(info.offset + info.nbytes for info in open_gguf(sample).tensors.values())
    for length in [*range(0, 2000, 7), *range(2000, last, 501), last - 1]:
        cut.write_bytes(whole[:length])
        assert "is not a usable GGUF file" in refused(cut)


@given(st.data())
@settings(max_examples=2500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_corrupted_headers_never_crash(sample, tmp_path, data):
    content = bytearray(sample.read_bytes())
    header = min(info.offset for info in open_gguf(sample).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 8))
        patch = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.integers(0, (1 << 64) - 1).map(lambda n: struct.pack("<Q", n)),
                st.sampled_from([b"\xff" * 8, b"\x00" * 8, struct.pack("<Q", 1 << 40), struct.pack("<I", 9)]),
            )
        )
        content[at : at + len(patch)] = patch
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "corrupt.gguf"
    path.write_bytes(content)
    if not refused(path):  # the damage was to a name or a value: then all tensors still lie inside the file
        for info in open_gguf(path).tensors.values():
            assert info.offset + info.nbytes <= len(content)


@pytest.mark.parametrize(("role", "use"), [("SkyReels*", read_dims), ("umt5*", lambda file: UMT5(file).check())])
@given(data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_corrupted_header_says_is_not_believed(converted, tmp_path, role, use, data):
    """Names, shapes and numbers that pass the reader may still be nonsense for a model."""
    content = bytearray(next(converted("Q8_0").glob(role)).read_bytes())
    names = [
        match.span() for match in re.finditer(rb"(blocks|enc\.blk|skyrun|t5encoder|head|token_embd)[\w.]+", content)
    ]
    for _ in range(data.draw(st.integers(1, 3))):
        start, end = data.draw(st.sampled_from(names))
        at = data.draw(st.integers(start, end + 24))  # in the name, or in the kind, shape or value behind it
        patch = data.draw(st.sampled_from([b"0", b"9", b"x", b".", b"\0", b"\1", b"\x08", b"\xff"]))
        content[at : at + 1] = patch
    path = tmp_path / "corrupt.gguf"
    path.write_bytes(content)
    try:
        use(open_gguf(path))
    except SkyrunError as error:
        assert error.hint


@given(st.binary(max_size=400))
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_after_the_magic_never_crashes(tmp_path, noise):
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + noise)
    refused(path)


def header(tensors=1, values=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + rest


def named(name, shape, kind=0, offset=0):
    text = name.encode()
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(text)) + text + dims + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes|4 bytes expected"),
        (b"PK\x03\x04" + bytes(100), "expected b'GGUF'"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1, expected 2 or 3"),
        (header(1 << 60), "entries cannot fit"),
        (header(1, 1 << 60, bytes(100)), "entries cannot fit"),
        (header(1, 0, struct.pack("<Q", 1 << 62) + bytes(100)), "a text of"),
        (header(1, 0, named("x", [1 << 40]) + bytes(64)), "would take"),
        (header(1, 0, named("x", [1 << 63, 1 << 63]) + bytes(64)), "would take"),
        (header(1, 0, named("x", [0]) + bytes(64)), "has shape"),
        (header(1, 0, named("x", [33], 8) + bytes(64)), "rows of whole Q8_0 blocks"),
        (header(1, 0, named("x", [4], 21) + bytes(64)), "type number 21"),
        (header(1, 0, named("x", [4], 0, 1 << 50) + bytes(64)), "the file at"),
        (header(1, 0, named("x", [4], 0, 3) + bytes(64)), "expected a multiple of 32"),
        (header(1, 0, named("x", [1] * 9) + bytes(64)), "9 dimensions"),
        (header(2, 0, named("x", [4]) + named("x", [4], 0, 32) + bytes(128)), "two tensors are called 'x'"),
        (header(2, 0, named("x", [16]) + named("y", [4], 0, 32) + bytes(256)), "overlaps"),
    ],
)
def test_each_lie_is_named(tmp_path, content, message):
    path = tmp_path / "lie.gguf"
    path.write_bytes(content)
    assert re.search(message, refused(path))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(SkyrunError, match="does not exist") as error:
        open_gguf(tmp_path / "none.gguf")
    assert error.value.code == MODEL_MISSING
    with pytest.raises(SkyrunError, match="cannot read"):
        open_gguf(tmp_path)
