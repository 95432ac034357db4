"""Which files of a folder are taken for a task, what is passed over, and what is said where none fits."""

import shutil

import gguf
import numpy as np
import pytest

from skyrun.errors import BAD_INPUT, MODEL_MISSING, SkyrunError
from skyrun.models.folder import open_folder
from skyrun.planning.model import choose_model
from skyrun.tasks import TASKS, tasks_in


def rewritten(source, target, architecture=None, drop=(), **keys):
    """A copy of a GGUF file with other metadata; `__` in the names of keys stands for a dot."""
    reader = gguf.GGUFReader(source)
    old = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture or old)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and not name.startswith(tuple(drop)):
            kind = field.types[0]
            writer.add_key_value(
                name, field.contents(), kind, sub_type=field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            )
    for name, value in keys.items():
        writer.add_key_value(
            name.replace("__", "."),
            value,
            gguf.GGUFValueType.UINT16 if isinstance(value, int) else gguf.GGUFValueType.STRING,
        )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return target


@pytest.fixture(scope="module")
def files(tmp_path_factory, converted):
    """Transformers by name: those that say their task, and the same without a word of it."""
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for name, quant, model in (("r2v", "Q4_K", "r2v"), ("v2v", "Q8_0", "v2v"), ("a2v", "Q8_0", "a2v")):
        sources = [path for path in converted(quant, model).glob("*.gguf") if "13" not in path.name]
        said = {path: open_folder(path.parent).transformers for path in sources}
        transformers = next(iter(said.values()))
        path = next(file.path for file in transformers if file.metadata["skyrun.task"] == name)
        found[name] = path
        found[f"silent-{name}"] = rewritten(path, folder / f"silent-{name}.gguf", drop=["skyrun."])
    silent = found["silent-r2v"]
    found["larger"] = rewritten(
        converted("Q8_0") / open_folder(converted("Q8_0")).transformers[0].path.name,
        folder / "larger.gguf",
        drop=["skyrun."],
    )
    found["foreign"] = rewritten(silent, folder / "foreign.gguf", architecture="pig")
    found["part"] = rewritten(silent, folder / "part.gguf", split__no=0, split__count=3)
    return found


@pytest.fixture
def place(tmp_path, converted, files):
    """place(task, {"name.gguf": "r2v"}) is a folder with the encoders of a task and these transformers."""

    def make(task, transformers):
        folder = tmp_path / "model"
        folder.mkdir()
        source = converted("Q8_0", {"shot": "v2v"}.get(task, task))
        own = {file.path for file in open_folder(source).transformers}
        for path in source.iterdir():
            if path not in own:
                shutil.copy(path, folder)
        for name, kind in transformers.items():
            shutil.copy(files[kind], folder / name)
        return folder

    return make


@pytest.mark.parametrize(
    ("task", "transformers", "taken", "passed_over"),
    [
        ("r2v", {"a.gguf": "r2v", "b.gguf": "larger"}, "a.gguf", "b.gguf does not say its task"),
        ("r2v", {"a.gguf": "r2v", "b.gguf": "v2v"}, "a.gguf", "b.gguf is a model for v2v"),
        ("r2v", {"a.gguf": "silent-r2v"}, "a.gguf", ""),
        ("r2v", {"a.gguf": "silent-a2v", "b.gguf": "silent-r2v"}, "b.gguf", "a.gguf takes 36 channels, r2v has 16"),
        ("r2v", {"My-V2V-Q8_0.gguf": "larger", "b.gguf": "silent-r2v"}, "b.gguf", "a model for v2v, by its name"),
        ("r2v", {"a.gguf": "silent-r2v", "b.gguf": "larger"}, "b.gguf", ""),  # of two that fit the one with more bits
        ("r2v", {"a.gguf": "foreign"}, "a.gguf", ""),
        ("a2v", {"a.gguf": "silent-a2v", "b.gguf": "silent-r2v"}, "a.gguf", "b.gguf takes 16 channels, a2v has 36"),
    ],
)
def test_what_is_taken(place, task, transformers, taken, passed_over):
    model = choose_model(open_folder(place(task, transformers)), TASKS[task])
    assert model.files.transformer.path.name == taken
    assert passed_over in " ".join(model.passed_over)
    assert bool(passed_over) == bool(model.passed_over)


@pytest.mark.parametrize(
    ("transformers", "code", "message"),
    [
        ({"a.gguf": "v2v"}, BAD_INPUT, "is a model for v2v, not for r2v"),
        ({"a.gguf": "silent-a2v"}, BAD_INPUT, "a.gguf takes 36 channels, r2v has 16"),
        ({"SkyReels-V3-V2V.gguf": "larger"}, BAD_INPUT, "is a model for v2v, by its name"),
        ({"a.gguf": "part"}, BAD_INPUT, "a.gguf is part 1 of 3 of a split GGUF"),
        ({}, MODEL_MISSING, "has no transformer"),
    ],
)
def test_where_nothing_fits(place, transformers, code, message):
    with pytest.raises(SkyrunError, match=message) as caught:
        choose_model(open_folder(place("r2v", transformers)), TASKS["r2v"])
    assert caught.value.code == code


def test_a_file_that_is_named_is_taken_whatever_it_is_called(place):
    folder = place("r2v", {"SkyReels-V3-V2V.gguf": "larger"})
    model = choose_model(open_folder(folder / "SkyReels-V3-V2V.gguf"), TASKS["r2v"])
    assert model.files.transformer.path.name == "SkyReels-V3-V2V.gguf"


def test_a_link_that_leads_nowhere_is_said(place):
    folder = place("r2v", {})
    (folder / "gone.gguf").symlink_to(folder / "nowhere")
    with pytest.raises(SkyrunError, match=r"gone.gguf is a link to .*nowhere, which does not exist"):
        choose_model(open_folder(folder), TASKS["r2v"])


@pytest.mark.parametrize(
    ("drop", "alone"),
    [
        (("tokenizer.",), "has no tokenizer inside"),
        (("tokenizer.huggingface",), ""),  # ggml's arrays will do
    ],
)
def test_text_encoders(place, drop, alone):
    folder = place("r2v", {"a.gguf": "r2v"})
    own = next(folder.glob("umt5*.gguf"))
    other = rewritten(own, folder / "0-other.gguf", drop=drop)
    model = choose_model(open_folder(folder), TASKS["r2v"])
    assert (model.files.text_encoder.path == own) == bool(alone)
    own.unlink()
    if alone:
        with pytest.raises(SkyrunError, match=alone):
            choose_model(open_folder(folder), TASKS["r2v"])
    else:
        assert choose_model(open_folder(folder), TASKS["r2v"]).files.text_encoder.path == other


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        ("SkyReels-V3-R2V-14B-Q8_0.gguf", ["r2v"]),
        ("V2V/skyreels_v3_v2v_shot-Q4_K.gguf", ["v2v", "shot"]),
        ("talking_a2v.gguf", ["a2v"]),
        ("gunshot.gguf", []),
        ("model.gguf", []),
    ],
)
def test_tasks_in_words(text, tasks):
    assert tasks_in(text) == tasks
