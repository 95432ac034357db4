"""Files of torch.save are read without torch: the same tensors as torch finds, and no memory for what files claim."""

import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch

from skyrun.errors import SkyrunError
from skyrun.quant.sources.torch_file import read_torch_file

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def values(path):
    return {name: tensor.read().view(tensor.shape) for name, tensor in read_torch_file(path).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_numbers_are_those_that_torch_reads(tmp_path, dtype, protocol):
    base = torch.randn(6, 8).to(dtype)
    module = torch.nn.Linear(4, 3, dtype=torch.float32)
    state = OrderedDict(matrix=base, rows=base[2:5], scalar=base[0, 0], empty=base[:0], flat=base.view(-1)[5:9])
    state |= {"one": base[:, :1][:1], "weight": torch.nn.Parameter(module.weight.detach()), "again": base}
    state._metadata = OrderedDict(version=1)  # as state_dict() leaves it
    torch.save(state, tmp_path / "x.pth", pickle_protocol=protocol)
    expected = torch.load(tmp_path / "x.pth", weights_only=False)  # our own; the other mode knows protocol 2 only
    got = values(tmp_path / "x.pth")
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert torch.equal(got[name], value.float()), name


A, B = torch.ones(2, 2), torch.zeros(2, 2)
WRAPPED = {
    "bare": ({"a": A}, A),
    "state_dict": ({"epoch": 3, "state_dict": {"a": A}, "optimizer": {"state": {0: {"m": B}}}}, A),
    "a step that is a tensor": ({"step": torch.tensor(7), "model": {"a": A}}, A),
    "twice": ({"model": {"module": {"a": A}}}, A),
    "settings that are called so": ({"a": A, "params": {"lr": 0.1}, "model": "wan"}, A),
    "averaged weights are meant for use": ({"model": {"a": B}, "ema": {"a": A}, "lr": 0.1}, A),
    "of a generator": ({"generator": {"a": B}, "generator_ema": {"a": A}, "critic": {"a": B}}, A),
    "of a module": ({"module": {"a": A}, "dtype": torch.bfloat16, "shape": torch.Size([2])}, A),
}


@pytest.mark.parametrize("form", WRAPPED)
def test_what_trainers_wrap_around_a_state_dict(tmp_path, form):
    state, expected = WRAPPED[form]
    torch.save(state, tmp_path / "x.pth")
    assert torch.equal(values(tmp_path / "x.pth")["a"], expected)


def archive(path, objects, data=b"", key="0"):
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("x/data.pkl", objects)
        out.writestr(f"x/data/{key}", data)
    return path


def call(module, name, *arguments):
    """A pickle that calls a function, whichever it is."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps(arguments, 2)[2:-1] + b"R."


def tensor(shape, strides, dtype="FloatStorage", key="0", offset=0, numel=4):
    """The pickle of a state dict of one tensor."""

    def packed(value):
        return pickle.dumps(value, 2)[2:-1]

    storage = packed("storage") + f"ctorch\n{dtype}\n".encode() + packed(key) + packed("cpu") + packed(numel)
    place = b"(" + storage + b"tQ" + packed(offset) + packed(shape) + packed(strides) + b"\x89N"
    return b"\x80\x02}" + packed("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + b"tRs."


def test_a_pickle_made_by_hand(tmp_path):
    data = torch.tensor([1.0, 2, 3, 4]).numpy().tobytes()
    path = archive(tmp_path / "x.pth", tensor((2, 2), (2, 1)), data)
    assert values(path)["w"].tolist() == [[1, 2], [3, 4]]


GIB = 1 << 30
HOSTILE = {
    "a bytearray of 6 GB": (call("builtins", "bytearray", 6 * GIB), "holds more than tensors"),
    "bytes of 6 GB": (call("builtins", "bytes", 6 * GIB), "holds more than tensors"),
    "a storage of 6 GB": (call("torch", "FloatStorage", 6 * GIB), "is damaged"),
    "torch.zeros": (call("torch", "zeros", 6 * GIB), "holds more than tensors"),
    "a range": (call("builtins", "range", 6 * GIB), "holds more than tensors"),
    "a shell": (call("os", "system", "true"), "holds more than tensors"),
    "a tensor larger than its storage": (tensor((1 << 20, 1 << 10), (1 << 10, 1)), "takes 4294967296 bytes.*has 16"),
    "a tensor beyond its storage": (tensor((2,), (1,), offset=3), "takes 20 bytes, its storage has 16"),
    "a storage that is not there": (tensor((2,), (1,), key="9"), "is damaged"),
    "a negative side": (tensor((-2,), (1,)), "is damaged"),
    "a negative place": (tensor((2,), (1,), offset=-1), "is damaged"),
    "a side of many digits": (tensor((10**400,), (1,)), "is damaged"),
    "many axes": (tensor((1,) * 99, (1,) * 99), "is damaged"),
    "a broadcast number": (tensor((1 << 40,), (0,)), "stored with strides"),
    "an unknown type": (tensor((2,), (1,), "ComplexDoubleStorage"), "holds more than tensors"),
    "a place in memory far away": (b"\x80\x02]r\xff\xff\xff\x7f.", "is damaged"),
    "text as a number": (tensor(("a",), (1,)), "is damaged"),
    "no dictionary": (b"\x80\x02K\x05.", "holds no tensors by name"),
    "nothing": (b"", "is damaged"),
    "a state for a tensor": (tensor((2,), (1,))[:-2] + b"}U\x05shapeU\x01asbs.", "is damaged"),
    "an extension": (b"\x80\x02\x82\x01.", "is damaged"),
    "deep lists": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds no tensors by name"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path, case):
    objects, message = HOSTILE[case]
    path = archive(tmp_path / "x.pth", objects, bytes(16))
    with pytest.raises(SkyrunError, match=message) as error:
        read_torch_file(path)
    assert error.value.hint
    assert len(error.value.message) < 600


_LIMITED = """
import resource, sys
from pathlib import Path
from skyrun.errors import SkyrunError
from skyrun.quant.sources.torch_file import read_torch_file
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), resource.RLIM_INFINITY))
for path in sys.argv[1:]:
    try:
        read_torch_file(Path(path))
    except SkyrunError as error:
        assert "memory" not in error.message.lower(), error.message
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and POSIX limits")
def test_hostile_files_take_no_memory(tmp_path):
    paths = [
        archive(tmp_path / f"{index}.pth", objects, bytes(16)) for index, (objects, _) in enumerate(HOSTILE.values())
    ]
    assert all(path.stat().st_size < 1000 for path, case in zip(paths, HOSTILE, strict=True) if case != "deep lists")
    done = subprocess.run([sys.executable, "-c", _LIMITED, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as out:
        out.writestr("notes.txt", "hello")
    with pytest.raises(SkyrunError, match="is not a file of torch.save"):
        read_torch_file(tmp_path / "x.pth")
    path = archive(tmp_path / "x.pth", tensor((2,), (1,)), bytes(16))
    with zipfile.ZipFile(path, "a") as out:
        out.writestr("x/byteorder", "big")
    with pytest.raises(SkyrunError, match="big-endian"):
        read_torch_file(path)


def test_the_directory_of_the_archive_is_not_believed(tmp_path):
    content = bytearray(archive(tmp_path / "x.pth", tensor((2,), (1,)), bytes(16)).read_bytes())
    at = content.rindex(b"PK\x01\x02")  # the entry of the storage: its sizes lie 20 bytes on
    content[at + 20 : at + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(SkyrunError, match="is damaged: .* does not lie in it"):
        read_torch_file(tmp_path / "x.pth")
