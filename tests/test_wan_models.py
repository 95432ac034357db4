"""Models of text to video and image to video by name: fetched, converted, found again, and planned."""

import pytest
from wan_checkpoint import SEED, write_original, write_wan

from skyrun.cli import main
from skyrun.hub.store import parse_name, stored
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.planning.request import Request
from skyrun.planning.what_if import described_hardware, plan_request
from skyrun.presets.timing import step_operations
from skyrun.tasks import MODELS, spec_of
from skyrun.tasks.sources import SOURCES, tasks_of

SMALL = ["--size", "32x48", "--frames", "5", "--steps", "2", "--device", "cpu", "--seed", str(SEED)]


def planned(model, card, **changes):
    spec = next(spec for models in MODELS.values() for spec in models if spec.model == model)
    return plan_request(Request(spec.name, "", **changes).of(spec), described_hardware(gpu=card))


def test_every_model_of_a_task_can_be_fetched_by_its_name():
    named = [(spec.name, spec.model) for models in MODELS.values() if len(models) > 1 for spec in models]
    assert len(named) == len(set(named)) and {name for _, name in named} <= set(SOURCES)
    for task, name in named:
        assert task in tasks_of(name)
        assert spec_of(task, name).title == SOURCES[name].checkpoint.split("/")[1]
        assert parse_name(name).task == tasks_of(name)[0]
        assert parse_name(name, task=task).task == task


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "i2v"])
def test_a_model_is_fetched_and_used_by_its_name(hub, tmp_path, name, capsys):
    (task,) = tasks_of(name)
    source = SOURCES[name]
    parts = write_wan(tmp_path / "diffusers", "Wan2.1", task == "i2v")
    folder = tmp_path / source.checkpoint.split("/")[1]
    write_original(folder, parts)
    hub.repos[source.checkpoint] = folder
    assert main(["pull", name, "--quant", "F32"]) == 0
    (model,) = stored()
    assert (model.name, model.task, model.complete) == (f"{name}:F32", task, True)
    (transformer,) = model.folder.glob(f"{folder.name}*.gguf")
    assert open_gguf(transformer).metadata["skyrun.task"] == task
    image = ["--image", str(_picture(tmp_path))] if task == "i2v" else []
    clip = tmp_path / "clip.mp4"
    capsys.readouterr()
    assert main(["run", task, "-p", "a sea", "--model", name, *image, *SMALL, "-o", str(clip)]) == 0
    assert clip.exists() and "does not say which model" not in capsys.readouterr().err
    assert main(["run", task, "-p", "a sea", "--model", name, *image, *SMALL, "-o", str(clip)]) == 0
    assert "it is there already" in capsys.readouterr().err
    other = next(other for other in SOURCES if task not in tasks_of(other))
    assert main(["run", task, "-p", "a sea", "--model", other, *image, *SMALL, "-o", str(tmp_path / "other.mp4")]) == 2
    assert f"{other} is a model for {tasks_of(other)[0]}, not for {task}" in capsys.readouterr().err


def _picture(folder):
    from PIL import Image

    Image.new("RGB", (96, 64), "teal").save(folder / "picture.png")
    return folder / "picture.png"


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("wan2.1_t2v_1.3B_fp16", "t2v"),
        ("wan2.1_i2v_480p_14B_fp16", "i2v"),
        ("Wan2_1-T2V-14B_fp8", "t2v"),
        ("something", ""),
    ],
)
def test_a_single_file_of_another_program_says_its_task_by_its_name(tmp_path, name, task):
    from safetensors.torch import save_file
    from wan_checkpoint import renamed, transformer

    from skyrun.kernels.name_tables import TRANSFORMERS
    from skyrun.quant.plan import Settings
    from skyrun.quant.planner import plan_conversion

    weights = renamed(transformer("Wan2.1", task == "i2v").state_dict(), TRANSFORMERS, "original")
    save_file({f"model.diffusion_model.{n}": t for n, t in weights.items()}, tmp_path / f"{name}.safetensors")
    (file,) = plan_conversion(tmp_path / f"{name}.safetensors", tmp_path / "out", Settings("F16")).files
    assert file.task == task


def test_the_small_model_stays_in_the_memory_of_a_6_gb_card():
    plan = planned("wan2.1-t2v-1.3b", "RTX 2060").plan
    assert not plan.problem and plan.peak_bytes <= plan.limit_bytes
    assert plan.resident_blocks == 30 and plan.weight_type == "Q8_0"


def test_guidance_doubles_a_step_and_reads_no_more():
    plain, guided = (planned("t2v", "RTX 4090", guidance=scale, quant="Q8_0", attention="int8") for scale in (1.0, 6.0))
    assert (plain.workload.contexts, guided.workload.contexts) == (1, 2)
    assert step_operations(plain.workload) == step_operations(guided.workload)
    assert guided.plan.step_seconds == pytest.approx(2 * plain.plan.step_seconds, rel=0.02)
    assert guided.plan.peak_bytes > plain.plan.peak_bytes


def test_a_plan_of_text_to_video_encodes_no_images():
    assert [stage.name for stage in planned("t2v", "RTX 4090").plan.stages] == [
        "start",
        "text",
        "load",
        "denoise",
        "decode",
        "write",
    ]
