"""Adapter files (LoRA): what they add to a transformer's tensors, and how much of it a model can use."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.files.adapter_names import entry_of, is_for_text, layer_of, other_kind
from skyrun.kernels.files.names import Shape, brief
from skyrun.kernels.files.reading import open_unbuffered, read_into
from skyrun.kernels.files.safetensors_header import StoredTensor, read_safetensors_header

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_ANEW = "download it again, or take it from another source"
_METADATA = "lora_adapter_metadata"  # where diffusers keeps the settings of peft
_CONFIG = "adapter_config.json"  # where peft itself keeps them, beside the file
_MOST_CONFIG = 1 << 20
_MOST_WORDS = 8  # that are shown


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a tensor: scale * up @ down or, without a down, scale * up itself.

    name: the tensor. up: [rows, rank], or a difference. down: [rank, cols]. Convolutions have more axes.
    """

    name: str
    up: StoredTensor
    down: StoredTensor | None = None
    scale: float = 1.0

    @property
    def shape(self) -> Shape:
        """Of the tensor that is changed."""
        return self.up.shape if self.down is None else (self.up.shape[0], *self.down.shape[1:])

    @property
    def rank(self) -> int:
        """Of the product; 0 for a difference."""
        return self.down.shape[0] if self.down else 0

    @property
    def weights(self) -> int:
        """How many values it has."""
        return sum(prod(part.shape) for part in self.parts)

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The tensors that are read: down before up."""
        return (self.up,) if self.down is None else (self.down, self.up)

    def fits(self, shape: Shape) -> bool:
        """Whether it can be added to a tensor of that shape."""
        if self.down is not None:
            return len(shape) > 1 and (shape[0], prod(shape[1:])) == (self.shape[0], prod(self.shape[1:]))
        return [side for side in shape if side != 1] == [side for side in self.shape if side != 1]


@dataclass(frozen=True)
class Adapter:
    """An adapter file.

    updates: by the name of the tensor that they change. text: how many tensors are for a text encoder. unknown: layers
    that no transformer has, as the file names them.
    """

    path: Path
    metadata: dict[str, str]
    updates: dict[str, Update]
    text: int = 0
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fitted:
    """What of an adapter a model can use, and how much of it is added.

    updates: by the name of the tensor. notices: sentences about what is not used.
    """

    path: Path
    strength: float
    updates: dict[str, Update]
    notices: tuple[str, ...] = ()

    def within(self, prefix: str) -> dict[str, Update]:
        """The updates of tensors whose names begin with the prefix, by the rest of the name."""
        return {name.removeprefix(prefix): one for name, one in self.updates.items() if name.startswith(prefix)}

    def outside(self, prefix: str) -> dict[str, Update]:
        """The updates of all other tensors."""
        return {name: one for name, one in self.updates.items() if not name.startswith(prefix)}


def read_adapter(path: Path) -> Adapter:
    """Read the header of an adapter and its scales.

    Raises SkyrunError if it is no safetensors file, an adapter of another kind, or not whole.
    """
    header = read_safetensors_header(path)
    if kinds := sorted({kind for name in header.tensors if (kind := other_kind(name))}):
        raise SkyrunError(
            f"{path} is a {' and '.join(kinds)}, which skyrun cannot add",
            "use a LoRA, or merge it into the checkpoint with the program that made it and convert the result",
        )
    parts: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    layers: dict[str, str] = {}  # as the file names them
    problems: list[str] = []
    unknown, text = set(), 0
    for name, stored in header.tensors.items():
        entry = entry_of(name)
        if is_for_text(name):
            text += 1
        elif entry is None:
            unknown.add(layer_of(name))
        elif entry.part in parts[entry.tensor]:
            problems.append(f"{name} changes {entry.tensor}, which another of its tensors does too")
        else:
            parts[entry.tensor][entry.part] = stored
            layers[entry.tensor] = layer_of(name)
    settings = _settings(path, header.metadata)
    updates = dict(_updates(path, parts, layers, settings, problems))
    if problems:
        raise SkyrunError.listing(f"{path} is not a usable LoRA", brief(problems, "are wrong"), _ANEW)
    if not updates:
        about = (
            "it is for a text encoder only"
            if text
            else f"its tensors are named like {next(iter(header.tensors), '')!r}"
        )
        hint = (
            "expected one for Wan 2.1 or SkyReels, with names like diffusion_model.blocks.0.self_attn.q.lora_A.weight"
        )
        raise SkyrunError(f"{path} holds no LoRA of a transformer that skyrun knows: {about}", hint)
    return Adapter(path, header.metadata, updates, text, tuple(sorted(unknown)))


def fit(adapter: Adapter, shapes: Mapping[str, Shape], strength: float = 1.0) -> Fitted:
    """What of an adapter fits a model. Raises SkyrunError if nothing does.

    Args:
        adapter: the adapter.
        shapes: of the model's tensors, by original name.
        strength: how much of it is added.
    """
    usable = {name: one for name, one in adapter.updates.items() if name in shapes and one.fits(shapes[name])}
    left = [*_misfits(adapter, shapes)]
    if not usable:
        raise SkyrunError(
            f"nothing of {adapter.path} fits this model: {'; '.join(brief(left, 'do not fit either'))}",
            "use a LoRA for a model of this size and kind; SkyReels-V3 has the shapes of Wan 2.1 14B",
        )
    notices = []
    if left:
        count = len(adapter.updates) + len(adapter.unknown)
        rest = "; ".join(brief(left, "are not used either"))
        notices.append(f"{len(usable)} of the {count} layers that {adapter.path.name} changes fit; not used: {rest}")
    if adapter.text:
        notices.append(
            f"{adapter.text} tensors of {adapter.path.name} are for a text encoder, which it does not change"
        )
    return Fitted(adapter.path, strength, usable, tuple(notices))


def _misfits(adapter: Adapter, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """A sentence for each group of updates that do not fit, and for the layers that are not known."""
    groups: dict[tuple[str, Shape, Shape | None], int] = defaultdict(int)
    for name, update in adapter.updates.items():
        shape = shapes.get(name)
        if shape is None or not update.fits(shape):
            groups[re.sub(r"^blocks\.\d+\.", "blocks.N.", name), update.shape, shape] += 1
    for (name, got, expected), count in groups.items():
        many = f" ({count} blocks)" if count > 1 else ""
        has = f"the model's is {_by(expected)}" if expected else "the model has none"
        yield f"{name}{many} is for {_by(got)}, {has}"
    if adapter.unknown:
        some = ", ".join(adapter.unknown[:2]) + (", ..." if len(adapter.unknown) > 2 else "")
        yield f"{len(adapter.unknown)} layers that no such model has: {some}"


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a single value"


def _updates(
    path: Path,
    parts: Mapping[str, Mapping[str, StoredTensor]],
    layers: Mapping[str, str],
    settings: "_Settings",
    problems: list[str],
) -> Iterator[tuple[str, Update]]:
    """The update of every tensor. What is wrong with others is added to the problems."""
    for name, of in parts.items():
        up, down = of.get("up"), of.get("down")
        wrong = sorted({part.dtype for kind, part in of.items() if part.dtype not in DTYPES and kind != "alpha"})
        if wrong:
            problems.append(f"{name} has tensors of {', '.join(wrong)}, expected {', '.join(DTYPES)}")
        elif "difference" in of and (up or down):
            problems.append(f"{name} has a product and a difference")
        elif "difference" in of:
            yield name, Update(name, of["difference"])
        elif up is None or down is None:
            problems.append(f"{name} has {'no up' if up is None else 'no down'} matrix")
        elif len(up.shape) < 2 or len(down.shape) < 2 or prod(up.shape[1:]) != down.shape[0] or 0 in up.shape:
            problems.append(f"{name} has an up of {_by(up.shape)} and a down of {_by(down.shape)}")
        else:
            alpha = _scalar(path, of["alpha"]) if "alpha" in of else None
            yield name, Update(name, up, down, settings.scale(layers[name], down.shape[0], alpha))


def _scalar(path: Path, stored: StoredTensor) -> float:
    """The value of a tensor with one value."""
    width = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}.get(stored.dtype)
    if width is None or prod(stored.shape) != 1:
        raise SkyrunError(f"{path} has an alpha of {stored.dtype} {list(stored.shape)}, expected one number", _ANEW)
    data = bytearray(stored.nbytes)
    with open_unbuffered(path) as file:
        read_into(file, memoryview(data), stored.offset)
    value = np.frombuffer(data, width)
    if stored.dtype == "BF16":
        value = (value.astype(np.uint32) << 16).view(np.float32)
    if not np.isfinite(value[0]):
        raise SkyrunError(f"{path} has an alpha of {value[0]}", _ANEW)
    return float(value[0])


@dataclass(frozen=True)
class _Settings:
    """What peft says of an adapter whose file has no alphas. patterns: alphas of some layers."""

    alpha: float | None = None
    patterns: tuple[tuple[str, float], ...] = ()
    by_root: bool = False

    def scale(self, layer: str, rank: int, alpha: float | None) -> float:
        """alpha / rank or, in rank-stabilised LoRA, alpha / sqrt(rank); 1 if there is no alpha."""
        if alpha is None:
            found = [value for pattern, value in self.patterns if layer == pattern or layer.endswith(f".{pattern}")]
            alpha = found[0] if found else self.alpha
        if alpha is None:
            return 1.0
        return alpha / (sqrt(rank) if self.by_root else rank)


def _settings(path: Path, metadata: Mapping[str, str]) -> _Settings:
    """The settings that peft or diffusers has left in the file or beside it. SkyrunError for those of another kind."""
    beside = path.with_name(_CONFIG)
    try:
        if _METADATA in metadata:
            said = json.loads(metadata[_METADATA])
        elif path.name == "adapter_model.safetensors" and beside.is_file() and beside.stat().st_size < _MOST_CONFIG:
            said = json.loads(beside.read_text(encoding="utf-8"))
        else:
            return _Settings()
        said = {name.removeprefix("transformer."): value for name, value in said.items()}
        alpha, patterns = said.get("lora_alpha"), said.get("alpha_pattern") or {}
        if said.get("use_dora"):
            raise SkyrunError(f"{path} is a DoRA, which skyrun cannot add", "use a LoRA")
        return _Settings(
            None if alpha is None else float(alpha),
            tuple((str(name).lstrip("^"), float(value)) for name, value in patterns.items()),
            bool(said.get("use_rslora")),
        )
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SkyrunError(f"the settings that peft left with {path} cannot be read: {error}", _ANEW) from error


def described(adapter: Adapter) -> dict[str, Any]:
    """Rank, scale, what it changes and for which shapes, and its trigger words, as plain values."""
    kinds: dict[str, int] = defaultdict(int)
    for name in adapter.updates:
        kinds[re.sub(r"^blocks\.\d+\.", "blocks.N.", name)] += 1
    blocks = {found[1] for name in adapter.updates if (found := re.match(r"blocks\.(\d+)\.", name))}
    updates = adapter.updates.values()
    widths = {one.shape[1] for name, one in adapter.updates.items() if re.search(r"attn\.[qo]\.weight$", name)}
    return {
        "rank": sorted({one.rank for one in updates if one.down}),
        "scale": sorted({round(one.scale, 6) for one in updates}),
        "blocks": len(blocks),
        "for a width of": sorted(widths),
        "weights": sum(one.weights for one in updates),
        "changes": dict(kinds),
        "for a text encoder": adapter.text,
        "unknown layers": list(adapter.unknown),
        "trigger words": trigger_words(adapter.metadata),
    }


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """Words that the adapter was trained on, as its trainer has left them; the most frequent first."""
    for key in ("modelspec.trigger_phrase", "trigger_words", "trigger_word", "activation text"):
        if text := metadata.get(key, "").strip():
            return [word.strip() for word in text.strip("[]").replace('"', "").split(",") if word.strip()]
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: dict[str, int] = defaultdict(int)
        for words in folders.values():
            for word, count in words.items():
                counts[str(word).strip()] += int(count)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return []
    return sorted(counts, key=lambda word: -counts[word])[:_MOST_WORDS]
