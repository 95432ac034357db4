"""Importance files: what llama.cpp and stable-diffusion.cpp write is read, round trips are exact, lies are refused."""

import json
import re
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skyrun.errors import MODEL_MISSING, SkyrunError
from skyrun.kernels import dequantize
from skyrun.quant import quantize
from skyrun.quant.choose.importance import Importance, original_name, read_importance, write_importance

NAME = "blocks.3.ffn.0.weight"
_OVERHEAD = 1 << 17  # what an exception, a path and small dicts take


def some(names=(NAME, "blocks.0.self_attn.q.weight"), cols=64, **more):
    rng = np.random.default_rng(len(names) + cols)
    sums = {name: torch.from_numpy(rng.gamma(0.3, 100, cols).astype(np.float32)).double() for name in names}
    return Importance(sums, {name: 100 + index for index, name in enumerate(names)}, **more)


def write_like_llama_cpp(path, tensors, datasets=("wiki.train.raw",), chunks=7):
    """tensors: name -> (sums [n, cols], counts [n, 1]), as tools/imatrix stores them."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(datasets))
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in tensors.items():
        writer.add_tensor(f"{name}.in_sum2", np.asarray(sums, np.float32))
        writer.add_tensor(f"{name}.counts", np.asarray(counts, np.float32))
        writer.add_tensor(f"{name}.in_sum", np.asarray(sums, np.float32))  # newer versions also keep plain sums
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def legacy(entries, tail=b""):
    """entries: name -> (calls, values); what llama.cpp and stable-diffusion.cpp wrote before GGUF."""
    content = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        content += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        content += np.asarray(values, np.float32).tobytes()
    return content + tail


def test_a_file_of_llama_cpp(tmp_path):
    path = tmp_path / "imatrix.gguf"
    write_like_llama_cpp(path, {NAME: ([[2, 4, 8]], [[4]])})
    importance = read_importance(path)
    assert importance.mean(NAME).tolist() == [0.5, 1, 2]
    assert importance.mean(NAME).dtype == torch.float32
    assert (importance.counts[NAME], importance.chunks, importance.samples) == (4, 7, ())
    assert importance.mean("blocks.0.ffn.0.weight") is None


@pytest.mark.parametrize(
    ("tail", "chunks", "origin"),
    [
        (b"", 0, ""),
        (struct.pack("<i", 5), 5, ""),  # stable-diffusion.cpp ends here
        (struct.pack("<ii", 5, 8) + b"wiki.raw", 5, "wiki.raw"),
    ],
)
def test_a_file_of_the_older_format(tmp_path, tail, chunks, origin):
    path = tmp_path / "any.name"
    path.write_bytes(legacy({NAME: (4, [2, 4, 8])}, tail))
    importance = read_importance(path)
    assert importance.mean(NAME).tolist() == [0.5, 1, 2]
    assert (importance.chunks, importance.origin) == (chunks, origin)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("blocks.11.self_attn.q.weight", "blocks.11.self_attn.q.weight"),
        ("model.diffusion_model.blocks.11.ffn.2.weight", "blocks.11.ffn.2.weight"),
        ("diffusion_model.blocks.11.cross_attn.o.weight", "blocks.11.cross_attn.o.weight"),
        ("blocks.11.attn1.to_q.weight", "blocks.11.self_attn.q.weight"),
        ("blocks.11.attn2.to_out.0.weight", "blocks.11.cross_attn.o.weight"),
        ("transformer.blocks.0.ffn.net.0.proj.weight", "blocks.0.ffn.0.weight"),
        ("proj_out.weight", "head.head.weight"),
        ("enc.blk.0.attn_q.weight", "enc.blk.0.attn_q.weight"),
    ],
)
def test_names_become_original_ones(tmp_path, stored, name):
    assert original_name(stored) == name
    (tmp_path / "x.dat").write_bytes(legacy({stored: (1, [1])}))
    assert list(read_importance(tmp_path / "x.dat").sums) == [name]


def test_round_trip_of_gguf_is_exact(tmp_path):
    importance = some(origin="a model, 480P", samples=("12ab a dog", "34cd 海"), chunks=2)
    write_importance(tmp_path / "x.gguf", importance)
    again = read_importance(tmp_path / "x.gguf")
    assert (again.counts, again.origin, again.samples, again.chunks) == (
        importance.counts,
        importance.origin,
        importance.samples,
        importance.chunks,
    )
    assert all(torch.equal(again.sums[name], sums) for name, sums in importance.sums.items())


def test_round_trip_of_the_older_format(tmp_path):
    importance = some(origin="a model", chunks=2)
    write_importance(tmp_path / "x.dat", importance)
    again = read_importance(tmp_path / "x.dat")
    assert (again.counts, again.origin, again.chunks) == (importance.counts, "a model", 2)
    for name in importance.sums:
        torch.testing.assert_close(again.mean(name), importance.mean(name))


def test_counts_beyond_int32_keep_their_mean_in_the_older_format(tmp_path):
    write_importance(tmp_path / "x.dat", Importance({NAME: torch.full((4,), 6e9).double()}, {NAME: 3_000_000_000}))
    assert read_importance(tmp_path / "x.dat").mean(NAME).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("samples", [(), ("12ab a dog",)])
def test_what_llama_cpp_looks_for_is_in_the_file(tmp_path, samples):
    """Its loader wants three keys, and pairs of F32 tensors [1, cols] and [1, 1]."""
    write_importance(tmp_path / "x.gguf", some(samples=samples, chunks=len(samples)))
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == (list(samples) or ["unknown"])
    assert fields["imatrix.chunk_count"] == len(samples)
    assert fields["imatrix.chunk_size"] == 101
    shapes = {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist()) for tensor in reader.tensors}
    assert shapes[f"{NAME}.in_sum2"] == ("F32", [64, 1])
    assert shapes[f"{NAME}.counts"] == ("F32", [1, 1])
    assert len(shapes) == 4


def test_merging_adds_sums_counts_and_clips():
    first = some((NAME,), origin="m", samples=("a",), chunks=1)
    second = some((NAME, "blocks.9.ffn.0.weight"), origin="m", samples=("b",), chunks=1)
    both = first.merge(second)
    assert torch.equal(both.sums[NAME], first.sums[NAME] + second.sums[NAME])
    assert both.counts == {NAME: 200, "blocks.9.ffn.0.weight": 101}
    assert (both.origin, both.samples, both.chunks) == ("m", ("a", "b"), 2)
    assert first.merge(some(origin="another")).origin == ""
    assert Importance().merge(first).origin == "m"


def test_merging_refuses_other_widths_and_the_same_clip():
    with pytest.raises(SkyrunError, match="ffn.0.weight has 64 input channels in one and 32 in the other"):
        some().merge(some(cols=32))
    with pytest.raises(SkyrunError, match="1 clips are in both, such as 'a'"):
        some(samples=("a",)).merge(some(samples=("b", "a")))


def test_weights_without_rows_are_absent(tmp_path):
    path = tmp_path / "x.gguf"
    write_like_llama_cpp(path, {NAME: ([[1, 1]], [[2]]), "blocks.4.ffn.0.weight": ([[0, 0]], [[0]])})
    assert list(read_importance(path).sums) == [NAME]


def test_it_lowers_the_weighted_error(tmp_path):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    write_importance(tmp_path / "x.gguf", some(cols=256))
    weight = read_importance(tmp_path / "x.gguf").mean(NAME)
    errors = [
        float((weight * (dequantize(quantize(x, "Q4_K", used), "Q4_K") - x) ** 2).sum()) for used in (None, weight)
    ]
    assert errors[1] < 0.8 * errors[0]


def gguf_bytes(tmp_path, tensors):
    write_like_llama_cpp(tmp_path / "made.gguf", tensors)
    content = (tmp_path / "made.gguf").read_bytes()
    (tmp_path / "made.gguf").unlink()
    return content


def renamed(content, old, new):
    assert old in content
    return content.replace(old, new)


ONE = struct.pack("<i", 1)
# fmt: off
LIES = [
    (lambda _: b"", "4 bytes expected at 0, the file has 0"),
    (lambda _: b"PK\x03\x04" + bytes(100), "not GGUF, and as the older format it would have 67324752 weights"),
    (lambda _: struct.pack("<i", -1) + bytes(100), "would have -1 weights"),
    (lambda _: ONE + struct.pack("<i", 1 << 30) + bytes(100), "a name of 1073741824 bytes, expected 1 to 1024"),
    (lambda _: ONE + struct.pack("<i", 0) + bytes(100), "a name of 0 bytes"),
    (lambda _: legacy({"x": (1, [1])})[:-1], "4 bytes expected at 17, the file has 20"),
    (lambda _: ONE + ONE + b"x" + struct.pack("<ii", 1, 1 << 29) + bytes(8), "2147483648 bytes expected at 17"),
    (lambda _: legacy({"x": (1, [])}), "x has 0 input channels"),
    (lambda _: legacy({"x": (-1, [1])}), "x has a count of -1"),
    (lambda _: legacy({"x": (0, [1])}), "x has sums but a count of 0"),
    (lambda _: legacy({"x": (0, [0])}), "of its 1 weights no row was seen"),
    (lambda _: legacy({"x": (1, [-1])}), "x has sums of squares that are negative"),
    (lambda _: legacy({"x": (1, [float("nan")])}), "negative, infinite or NaN"),
    (lambda _: legacy({"x": (1, [float("inf")])}), "negative, infinite or NaN"),
    (lambda _: legacy({"x": (1, [1])}, struct.pack("<ii", 1, -5)), "-5 bytes expected"),
    (lambda _: legacy({"diffusion_model.x": (1, [1]), "x": (1, [1])}), "x is in it twice"),
    (lambda p: gguf_bytes(p, {}), "none of its tensors is called NAME.in_sum2"),
    (lambda p: gguf_bytes(p, {"x": ([[1]], [[float("nan")]])}), "x has a count of nan"),
    (lambda p: gguf_bytes(p, {"x": ([[1]], [[1e30]])}), "x has a count of 1e\\+30"),
    (lambda p: gguf_bytes(p, {"x": ([[1], [2]], [[1], [2]])}), "x has 2 counts, expected one"),
    (lambda p: gguf_bytes(p, {"x": ([[1], [2]], [[1]])}), "x.in_sum2 is F32 \\[2, 1\\], expected one row of F32"),
    (lambda p: renamed(gguf_bytes(p, {"x": ([[1]], [[1]])}), b"x.counts", b"y.counts"), "x has no .counts"),
    (lambda p: gguf_bytes(p, {"x": ([[1]], [[1]])})[:-40], "is not a usable GGUF file"),
]
# fmt: on


@pytest.mark.parametrize(("make", "message"), LIES)
def test_each_lie_is_named(tmp_path, make, message):
    path = tmp_path / "lie"
    path.write_bytes(make(tmp_path))
    with pytest.raises(SkyrunError) as error:
        read_importance(path)
    assert re.search(message, error.value.message), error.value.message
    assert str(path) in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    "value", ["[1]", "[" * 100_000, "{}x", "[" + json.dumps("\ud800") + "]", "null", "[" * 10], ids=range(6)
)
def test_a_list_of_clips_that_is_none(tmp_path, value):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "imatrix")
    writer.add_string("skyrun.calibration.samples", value)
    writer.add_tensor("x.in_sum2", np.ones((1, 4), np.float32))
    writer.add_tensor("x.counts", np.ones((1, 1), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(SkyrunError, match="are not a list of texts"):
        read_importance(tmp_path / "x.gguf")


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(SkyrunError, match="does not exist") as error:
        read_importance(tmp_path / "none")
    assert error.value.code == MODEL_MISSING
    with pytest.raises(SkyrunError, match="cannot read"):
        read_importance(tmp_path)


def test_a_failed_write_keeps_what_was_there(tmp_path):
    (tmp_path / "x.gguf").write_text("old")
    with pytest.raises(SkyrunError, match="without any weight"):
        write_importance(tmp_path / "x.gguf", Importance())
    with pytest.raises(SkyrunError, match="ends in neither .gguf nor .dat"):
        write_importance(tmp_path / "x.bin", some())
    (tmp_path / "folder.dat").mkdir()
    with pytest.raises(SkyrunError, match="cannot write"):
        write_importance(tmp_path / "folder.dat", some())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.dat", "x.gguf"]
    assert (tmp_path / "x.gguf").read_text() == "old"


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A good file of each format."""
    folder = tmp_path_factory.mktemp("importance")
    for suffix in (".gguf", ".dat"):
        write_importance(folder / f"x{suffix}", some(origin="a model", samples=("12ab a dog",), chunks=1))
    return [(folder / f"x{suffix}").read_bytes() for suffix in (".gguf", ".dat")]


@pytest.mark.parametrize("format", [0, 1])
@given(data=st.data())
@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_corrupted_files_never_crash(samples, tmp_path, format, data):
    content = bytearray(samples[format])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 8))
        patch = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.sampled_from([b"\xff" * 8, b"\x00" * 8, struct.pack("<Q", 1 << 40), struct.pack("<i", 1 << 30)]),
            )
        )
        content[at : at + len(patch)] = patch
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "corrupt"
    path.write_bytes(content)
    allowed = 8 * len(content) + _OVERHEAD
    # What other threads of this process allocate meanwhile is counted too, so one that is too high is measured again.
    assert peak_of_reading(path) < allowed or peak_of_reading(path) < allowed


def peak_of_reading(path):
    """Bytes that reading a file, and writing what is read, take at most."""
    tracemalloc.start()
    try:
        importance = read_importance(path)
    except SkyrunError as error:
        assert error.hint
    else:  # the damage was to a name or a number: what is left must still be usable, and writable
        assert all(torch.isfinite(importance.mean(name)).all() for name in importance.sums)
        write_importance(path.with_name("again.gguf"), importance)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak
