"""The name of a transformer of Wan 2.1 or SkyReels-V2: tensors alone do not tell such models apart."""

import re

from skyrun.quant.sources.checkpoint import Part, read_json

_NAME = re.compile(
    r"(?<![a-z0-9])(?P<family>skyreels[-_. ]?v2|wan[-_. ]?2[-_. ]?1)[-_. ]+(?P<kind>t2v|i2v|df)"
    r"(?:[-_. ]+(?P<first>480p|540p|720p))?(?:[-_. ]+(?P<size>14b|1[._]3b))?(?:[-_. ]+(?P<resolution>480p|540p|720p))?",
    re.IGNORECASE,
)
_FAMILIES = {"SkyReelsV2Transformer3DModel": "SkyReels-V2", "WanTransformer3DModel": "Wan2.1"}
_TASKS = {"t2v": "t2v", "i2v": "i2v", "df": "t2v"}
_LICENSES = {"Wan2.1": "Apache-2.0", "SkyReels-V2": "Skywork Community License"}


def model_name(part: Part) -> str:
    """The published name, such as Wan2.1-I2V-14B-480P, as the file, its header or a folder above it says; else ""."""
    for text in _texts(part):
        if said := _NAME.search(text):
            family = "Wan2.1" if said["family"].lower().startswith("wan") else "SkyReels-V2"
            size, resolution = (said["size"] or "").replace("_", "."), said["resolution"] or said["first"] or ""
            return "-".join(word for word in (family, *(s.upper() for s in (said["kind"], size, resolution))) if word)
    return ""


def _texts(part: Part) -> list[str]:
    header = part.gguf.metadata if part.gguf else {}
    said = [str(header[key]) for key in ("general.basename", "general.name") if key in header]
    path = part.files[0].absolute()
    return [*said, path.stem, *(folder.name for folder in path.parents)]


def task_of_name(name: str) -> str:
    """The task of a published name; "" if it is none."""
    said = _NAME.match(name)
    return _TASKS[said["kind"].lower()] if said else ""


def family_of(part: Part, task: str) -> str:
    """A name for a transformer whose published name is not known: by the class in its config, and its task."""
    said = str(part.config.get("_class_name", ""))
    index = str(read_json(part.folder.parent / "model_index.json").get("_class_name", ""))
    kind = "DF" if "DiffusionForcing" in index else task.upper()
    return f"{_FAMILIES.get(said, 'Wan')}-{kind}"


def license_of(name: str) -> str:
    """The license of a published model."""
    return next((license for family, license in _LICENSES.items() if name.startswith(family)), "")
