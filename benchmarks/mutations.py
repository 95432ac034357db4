"""Damage for files: bits, cuts and lengths anywhere, and values in JSON, in the headers and archives that carry it."""

import copy
import io
import json
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

_DEEP = 100_000  # lists within lists
_MARK = "[deep]"  # stands for them among values, which Python cannot write
_NUMBERS = (0, 1, 7, 0x7F, 0x80, 0xFF, 0xFFFF, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63)
_NUMBERS += ((1 << 64) - 1,)
_LAYOUTS = ("<B", "<H", "<I", "<Q", ">H", ">I", ">Q")
_PIECES = (
    *(b"\0" * 8, b"\xff" * 8, b"[" * _DEEP, b'{"a":' * _DEEP, b"9" * 400, b"-1", b"1e999", b"NaN", b"null", b"true"),
    *(b"../../x", b"\x1b[2J", b"\xef\xbb\xbf", b'"\\ud800"', b"\r\n\r\n", b"GGUF", b"PK\x03\x04", b"[]," * 50, b"\n"),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2.5, -0.5, 1 << 31, 1 << 63, -(1 << 63), 1 << 64, 10**400, 1e308, 1e-320),
    *(
        float("nan"),
        float("inf"),
        "",
        " ",
        "\0",
        "a\0b",
        "../../x",
        "/etc/passwd",
        "\x1b[2J\x07",
        "\ud800",
        "nan",
        "9" * 400,
    ),
    *("x" * 100_000, [], {}, [[]], [1, 2], ["a"], {"a": 1}, _MARK, [None] * 100, {"": ""}, "C:\\x", "猫", [1e999]),
)


def mutated(data: bytes, random: Random) -> bytes:
    """One to four damages; most are near the beginning, where files say what they are."""
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 4))):
        random.choice(_DAMAGES)(content, random)
    return bytes(content)


def _place(content: bytearray, random: Random) -> int:
    return int(random.random() ** random.choice((1, 3, 6)) * len(content))


def _flip(content: bytearray, random: Random) -> None:
    for _ in range(random.choice((1, 1, 2, 8))):
        if content:
            content[_place(content, random)] ^= 1 << random.randrange(8)


def _cut(content: bytearray, random: Random) -> None:
    del content[_place(content, random) :]


def _insert(content: bytearray, random: Random) -> None:
    at = _place(content, random)
    content[at:at] = random.choice((random.choice(_PIECES), random.randbytes(random.randrange(1, 64))))


def _write(content: bytearray, random: Random) -> None:
    at, piece = _place(content, random), random.choice((random.choice(_PIECES)[:64], random.randbytes(4)))
    content[at : at + len(piece)] = piece


def _number(content: bytearray, random: Random) -> None:
    layout = random.choice(_LAYOUTS)
    width = struct.calcsize(layout)
    at = _place(content, random)
    old = int.from_bytes(content[at : at + width], "little")
    number = random.choice((random.choice(_NUMBERS), old + 1, old - 1, 2 * old, -old))
    content[at : at + width] = struct.pack(layout, number % (1 << 8 * width))


def _swap(content: bytearray, random: Random) -> None:
    width = random.choice((1, 4, 8))
    a, b = sorted(_place(content, random) for _ in range(2))
    if a + width <= b and b + width <= len(content):
        content[a : a + width], content[b : b + width] = content[b : b + width], content[a : a + width]


def _remove(content: bytearray, random: Random) -> None:
    at = _place(content, random)
    del content[at : at + random.choice((1, 4, 8, 64, 1000))]


def _repeat(content: bytearray, random: Random) -> None:
    at = _place(content, random)
    content[at:at] = content[at : at + random.choice((1, 8, 64, 1000))] * random.choice((1, 2, 50))


_DAMAGES = (_flip, _flip, _cut, _insert, _write, _number, _number, _swap, _remove, _repeat)


def mutated_value(value: Any, random: Random) -> Any:
    """The same plain values with some of them replaced, removed, renamed or exchanged."""
    whole = [copy.deepcopy(value)]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        holder, key = random.choice(list(_slots(whole)))
        action = random.randrange(6)
        if action == 0 and isinstance(holder, dict):
            holder[random.choice(("", "a\0", "__metadata__", "../x", str(key).upper()))] = holder.pop(key)
        elif action == 1 and holder is not whole:
            del holder[key]
        elif action == 2:
            other, place = random.choice(list(_slots(whole)))
            holder[key] = copy.deepcopy(other[place])
        elif action == 3 and isinstance(holder[key], (int, float)):
            holder[key] = random.choice((-holder[key], holder[key] + 1, holder[key] * 1000, str(holder[key])))
        else:
            holder[key] = copy.deepcopy(random.choice(_VALUES))
    return whole[0]


def _slots(value: Any) -> Any:
    """Where values are: the list or dict that has each, and its place there."""
    for key in range(len(value)) if isinstance(value, list) else list(value):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _slots(value[key])


def json_text(value: Any, random: Random) -> bytes:
    """The JSON of values with some of them changed."""
    text = json.dumps(mutated_value(value, random), ensure_ascii=random.random() < 0.9)
    return text.replace(f'"{_MARK}"', "[" * _DEEP + "]" * _DEEP).encode("utf-8", "surrogatepass")


def either(*mutations: Mutation) -> Mutation:
    """One of several, by chance."""
    return lambda data, random: random.choice(mutations)(data, random)


def json_file(data: bytes, random: Random) -> bytes:
    """A file of JSON."""
    return json_text(json.loads(data), random)


def safetensors_file(data: bytes, random: Random) -> bytes:
    """The header of a safetensors file, framed as it should be."""
    start = 8 + int.from_bytes(data[:8], "little")
    said = json.loads(data[8:start])
    own = said.get("__metadata__", {})
    if "skyrun" in own and random.random() < 0.4:  # JSON within JSON
        own["skyrun"] = json_text(json.loads(own["skyrun"]), random).decode("utf-8", "replace")
        header = json.dumps(said).encode()
    else:
        header = json_text(said, random)
    return len(header).to_bytes(8, "little") + header + data[start:]


def torch_file(data: bytes, random: Random) -> bytes:
    """The pickle in a file of torch.save, in a zip file as it should be."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            target.writestr(info.filename, mutated(content, random) if info.filename.endswith("data.pkl") else content)
    return out.getvalue()
