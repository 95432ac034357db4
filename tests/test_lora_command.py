"""LoRA at the command line: where adapters come from, what is said of them, and what they cost."""

import json
from dataclasses import replace

import pytest
import torch
from loras import layers, published_adapter, random_pairs, write_adapter
from safetensors.torch import save_file

from skyrun.cli import main
from skyrun.kernels.files.adapter import fit, read_adapter
from skyrun.planning.adapters import with_adapters
from skyrun.planning.published import published_workload
from skyrun.planning.request import Request
from skyrun.planning.what_if import described_hardware, plan_request, request_workload
from skyrun.presets.timing import step_operations
from skyrun.tasks import TASKS

SPEC = TASKS["r2v"]


@pytest.fixture(scope="module")
def rank_64(tmp_path_factory):
    return published_adapter(tmp_path_factory.mktemp("rank64") / "style.safetensors", "r2v")


def test_rank_64_adds_at_most_2_percent_at_480p(rank_64):
    plain = request_workload(Request("r2v", "", resolution="480P"))
    adapted = request_workload(Request("r2v", "", resolution="480P", loras=(rank_64,)))
    before, after = sum(step_operations(plain)), sum(step_operations(adapted))
    assert 1 < after / before <= 1.02


def test_a_plan_counts_the_adapter(rank_64):
    hardware = described_hardware("RTX 3060")
    plain = plan_request(Request("r2v", "", quant="Q4_K_M"), hardware)
    adapted = plan_request(Request("r2v", "", quant="Q4_K_M", loras=(rank_64,)), hardware)
    one = rank_64.stat().st_size / 40
    assert 0.95 * one < adapted.workload.block_bytes - plain.workload.block_bytes < 1.05 * one
    assert adapted.plan.seconds > plain.plan.seconds
    assert not adapted.plan.problem
    assert adapted.plan.peak_bytes <= adapted.plan.limit_bytes
    whole = rank_64.stat().st_size
    streamed = replace(adapted.plan, resident_blocks=0).peak_bytes - replace(plain.plan, resident_blocks=0).peak_bytes
    assert streamed < whole, "video memory grows by shares of blocks, not by the adapter"


def test_plan_command(rank_64, capsys):
    command = ["plan", "r2v", "--gpu", "RTX 3060", "--quant", "Q4_K_M", "--json"]
    assert main(command) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([*command, "--lora", f"{rank_64}:0.5"]) == 0
    adapted = json.loads(capsys.readouterr().out)
    assert adapted["transformer_bytes"] - plain["transformer_bytes"] == pytest.approx(rank_64.stat().st_size, rel=0.01)


def test_info(rank_64, capsys, tmp_path):
    assert main(["info", str(rank_64), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "an adapter (LoRA)"
    assert said["adapter"]["rank"] == [64]
    assert said["adapter"]["for a width of"] == [5120]
    assert said["adapter"]["changes"]["blocks.N.ffn.0.weight"] == 40
    pair = {"blocks.0.self_attn.q": (torch.ones(2, 8), torch.ones(8, 2))}
    words = {"ss_tag_frequency": json.dumps({"10_cat": {"kitten": 5, "a \x1b[31m": 9}})}
    path = write_adapter(tmp_path / "kitten.safetensors", pair, "kohya", 1, metadata=words)
    assert main(["info", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "kitten" in shown
    assert "\x1b" not in shown


@pytest.fixture
def pairs(converted):
    from skyrun.kernels.files.gguf_file import open_gguf
    from skyrun.models.dit_header import canonical_tensors

    file = open_gguf(next(converted("Q8_0").glob("SkyReels*.gguf")))
    return random_pairs({name: info.shape for name, info in canonical_tensors(file).items()}, layers(2), 4)


def test_a_run_fetches_an_adapter_once(hub, converted, pairs, tmp_path, run_command, capsys):
    folder = tmp_path / "styles"
    folder.mkdir()
    write_adapter(folder / "kitten.safetensors", pairs, "comfyui")
    hub.repos["some/styles"] = folder
    command = [*run_command, "--model", str(converted("Q8_0")), "--seed", "1"]
    command += ["--lora", "some/styles/kitten.safetensors:0.5"]
    assert main([*command, "--dry-run"]) == 0
    assert "would be fetched first" in capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "one.mp4")]) == 0
    asked = len(hub.requests)
    assert main([*command, "-o", str(tmp_path / "two.mp4")]) == 0
    assert len(hub.requests) == asked
    capsys.readouterr()
    assert main([*command, "-o", str(tmp_path / "two.mp4")]) == 0
    assert "it is there already" in capsys.readouterr().err
    assert main([*command[:-1], "some/styles/dog.safetensors"]) == 4
    assert "it has kitten.safetensors" in capsys.readouterr().err
    assert main([*command[:-1], "my/styles/kitten.safetensors"]) == 4
    assert "there is no file my/styles/kitten.safetensors on this machine, and on the hub" in capsys.readouterr().err


def test_a_clip_is_made_again_with_its_adapter(converted, pairs, tmp_path, run_command, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_adapter(tmp_path / "a.safetensors", pairs, "comfyui")
    first, second = tmp_path / "one.mp4", tmp_path / "two.mp4"
    command = [*run_command, "--model", str(converted("Q8_0")), "--seed", "1", "-o", str(first), "--lora"]
    assert main([*command, str(path)]) == 0
    assert main([*command, path.name]) == 0
    assert "it is there already" in capsys.readouterr().err
    assert main(["run", "--from", str(first), "-o", str(second)]) == 0
    assert first.read_bytes() != b""
    assert main(["info", str(second), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["made_from"]["loras"] == [f"{path}:1.0"]


def test_a_changed_adapter_makes_another_clip(converted, pairs, tmp_path, run_command, capsys):
    path, clip, latents = (tmp_path / name for name in ("a.safetensors", "one.mp4", "one.safetensors"))
    command = [*run_command, "--model", str(converted("Q8_0")), "--seed", "1", "-o", str(clip), "--lora", str(path)]
    command += ["--save-latents", str(latents)]
    write_adapter(path, pairs, "comfyui")
    assert main(command) == 0
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)  # with another date
    assert main(command) == 0
    assert "it is there already" in capsys.readouterr().err
    write_adapter(path, {name: (down, 2 * up) for name, (down, up) in pairs.items()}, "comfyui")
    assert len(content) == path.stat().st_size
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"{clip} exists, and {path} changed since" in said and f"{latents} exists, and {path} changed" in said
    assert main([*command, "--overwrite"]) == 0
    assert main(command) == 0
    assert "it is there already" in capsys.readouterr().err


def test_convert_command(checkpoint, pairs, tmp_path, capsys):
    path = write_adapter(tmp_path / "kitten.safetensors", pairs, "comfyui")
    assert main(["convert", str(checkpoint), "-o", str(tmp_path / "out"), "--lora", f"{path}:0.5", "--dry-run"]) == 0
    assert "kitten" in capsys.readouterr().err
    save_file({"x.lora_A.weight": torch.ones(1, 1)}, path)
    assert main(["convert", str(checkpoint), "-o", str(tmp_path / "out"), "--lora", str(path)]) == 2
    assert main(["convert", str(checkpoint / "vae"), "-o", str(tmp_path / "out"), "--lora", str(path)]) == 2
    assert "--lora is about one transformer" in capsys.readouterr().err


def test_the_planned_bytes_hold_the_streamed_ones(converted, pairs, tmp_path):
    """What is planned for a block with adapters is at least what its buffer takes."""
    from skyrun.kernels.files.gguf_file import open_gguf
    from skyrun.models.dit_header import block_layouts, canonical_tensors
    from skyrun.streaming import layout

    path = write_adapter(tmp_path / "a.safetensors", pairs, "kohya", 2)
    file = open_gguf(next(converted("Q8_0").glob("SkyReels*.gguf")))
    shapes = {name: info.shape for name, info in canonical_tensors(file).items()}
    adapters = [fit(read_adapter(path), shapes), fit(read_adapter(path), shapes, 0.5)]
    blocks = block_layouts(file)
    work = replace(published_workload("r2v", "Q8_0"), layers=len(blocks), block_bytes=max(b.nbytes for b in blocks))
    taken = max(block.nbytes for block in layout.with_adapters(blocks, "blocks.", adapters))
    assert taken <= with_adapters(work, adapters).block_bytes <= taken + 64 * len(pairs) * 2
