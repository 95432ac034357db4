"""LoRA: adapters beside quantized weights do what they do when they are merged into the checkpoint."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loras import layers, random_pairs, write_adapter
from safetensors.torch import load_file, save_file

from skyrun import Request, run
from skyrun.engine.resume import continue_or_start
from skyrun.engine.run import run_job
from skyrun.errors import SkyrunError
from skyrun.events import Preview, drain
from skyrun.kernels.files.adapter import fit, read_adapter
from skyrun.kernels.files.adapter_names import entry_of
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.kernels.torch.int8 import quantize_rows, rotate
from skyrun.media.video_writer import read_request
from skyrun.models.dit import Context, DiT
from skyrun.models.dit_header import block_layouts, canonical_tensors
from skyrun.planning.job import prepare
from skyrun.planning.lora import Lora, parse_lora
from skyrun.quant import convert
from skyrun.streaming import low_rank
from skyrun.streaming.layout import with_adapters
from skyrun.streaming.low_rank import Addition, add_products
from skyrun.streaming.stream import BlockStream, spread

CPU = torch.device("cpu")

RANK = 4


@pytest.fixture(scope="module")
def shapes(converted):
    file = open_gguf(next(converted("F32").glob("SkyReels*.gguf")))
    return {name: info.shape for name, info in canonical_tensors(file).items()}


@pytest.fixture(scope="module")
def blocks(shapes):
    return len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})


@pytest.fixture(scope="module")
def pairs(shapes, blocks):
    return random_pairs(shapes, [*layers(blocks), "time_embedding.0", "text_embedding.2", "head.head"], RANK)


def merged_checkpoint(checkpoint, pairs, folder, scale=1.0, more=()):
    """A copy of the checkpoint with pairs of down and up added to its transformer. more: (tensor, difference)."""
    shutil.copytree(checkpoint, folder)
    names = {}
    from skyrun.kernels.name_tables import WAN_TRANSFORMER

    for row in WAN_TRANSFORMER.expand(16):
        names[row.name()] = row.name(1)
    for path in (folder / "transformer").glob("*.safetensors"):
        tensors = load_file(path)
        for layer, (down, up) in pairs.items():
            name = names[f"{layer}.weight"]
            if name in tensors:
                tensors[name] = (tensors[name].float() + scale * up @ down).to(torch.float32)
        for name, difference in more:
            if names[name] in tensors:
                tensors[names[name]] = tensors[names[name]].float() + difference.view(tensors[names[name]].shape)
        save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def request_of(checkpoint, tmp_path_factory):
    """request_of(model, loras=...) asks for a small clip."""
    from PIL import Image

    image = tmp_path_factory.mktemp("lora") / "her.png"
    Image.new("RGB", (48, 32), "teal").save(image)
    usual = dict(size=(32, 48), frames=5, steps=2, seed=3, device="cpu")
    return lambda model, **more: Request("r2v", "a sea", (image,), model=model, **{**usual, **more})


def off(latents, reference):
    return float((latents - reference).norm() / reference.norm())


@pytest.fixture(scope="module")
def whole(checkpoint, pairs, tmp_path_factory, request_of):
    """Latents that the merged checkpoint makes, in F32, at the strength that is asked for."""
    folder = tmp_path_factory.mktemp("merged")

    def latents(scale):
        place = folder / f"{scale}"
        if not place.exists():
            source = merged_checkpoint(checkpoint, pairs, folder / f"{scale}-source", scale)
            convert(source, place, "F32")
        return run(request_of(place)).latents

    return latents


@pytest.mark.parametrize("style", ["kohya", "diffusers", "peft", "comfyui", "lightx2v"])
def test_every_format_is_the_merged_checkpoint(style, converted, pairs, blocks, whole, request_of, tmp_path):
    names = {name: name for name in pairs} | layers(blocks)
    names |= {
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "head.head": "proj_out",
    }
    alpha = 2 * RANK if style in ("kohya", "lightx2v", "diffusers") else None
    path = write_adapter(tmp_path / "a.safetensors", pairs, style, alpha, names)
    strength = 0.5 if alpha else 1.0
    made = run(request_of(converted("F32"), loras=(Lora(path, strength),))).latents
    plain = run(request_of(converted("F32"))).latents
    assert off(plain, whole(1.0)) > 0.01, "the adapter has to matter"
    assert off(made, whole(1.0)) < 1e-4


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K"])
def test_beside_is_closer_than_merged_and_quantized_again(quant, converted, pairs, whole, request_of, tmp_path):
    """Weights that are quantized once lose less than those that are decoded, changed and quantized again."""
    path = write_adapter(tmp_path / "a.safetensors", pairs, "comfyui")
    convert(converted(quant), tmp_path / "again", quant, loras=[(path, 1.0)])
    beside = run(request_of(converted(quant), loras=(path,))).latents
    again = run(request_of(tmp_path / "again")).latents
    assert off(beside, whole(1.0)) < 0.9 * off(again, whole(1.0))


def test_convert_merges(checkpoint, pairs, whole, request_of, tmp_path):
    path = write_adapter(tmp_path / "kitten.safetensors", pairs, "kohya", alpha=RANK)
    said = convert(checkpoint, tmp_path / "out", "F32", loras=[(path, 1.0)])
    assert "kitten" in next(file["path"] for file in said["files"] if file["role"] == "transformer")
    assert off(run(request_of(tmp_path / "out")).latents, whole(1.0)) < 1e-4
    file = open_gguf(next((tmp_path / "out").glob("SkyReels*.gguf")))
    assert json.loads(file.metadata["skyrun.loras"]) == [["kitten.safetensors", 1.0]]


def test_int8_rows_meet_rotated_matrices(monkeypatch):
    """The product with rows in rotated int8 is that with the rows that they stand for, however many at a time."""
    generator = torch.Generator().manual_seed(7)
    x, down, up, whole = (torch.randn(*size, generator=generator) for size in ((9, 512), (4, 512), (6, 4), (6, 512)))
    gate = torch.randn(6, generator=generator)
    rows = quantize_rows(x)
    plain = rotate(rows.codes * rows.scales.unsqueeze(1))
    expected = 1 + gate * (plain @ (2 * up @ down + 0.5 * whole).T)
    for count in (1, 4, 9, 100):
        monkeypatch.setattr(low_rank, "ADAPTER_ROWS", count)
        additions = [Addition(up, down, 1.5), Addition(up, down, 0.5), Addition(whole, None, 0.5)]
        made = add_products(torch.ones(9, 6), rows, additions, gate)
        assert off(made, expected) < 1e-5


@pytest.mark.parametrize("thin", [True, False])
def test_inputs_in_another_dtype(monkeypatch, thin):
    """Inside a block tokens may be in float16 while those that a layer adds to are in bfloat16."""
    monkeypatch.setattr(low_rank, "ADAPTER_ROWS", 4)  # in several parts
    generator = torch.Generator().manual_seed(7)
    x, down, up = (torch.randn(*size, generator=generator) / 5 for size in ((9, 512), (512, 512), (6, 512)))
    made = add_products(torch.ones(9, 6).bfloat16(), x.half(), [Addition(up, down if thin else None, 0.5)])
    expected = 1 + 0.5 * x @ (up @ down if thin else up).T
    assert made.dtype == torch.bfloat16 and off(made, expected) < 0.01


def test_int8_layers(converted, pairs, request_of, tmp_path):
    """In int8 a clip with an adapter is about as far from the exact one as a clip without."""
    path = write_adapter(tmp_path / "a.safetensors", pairs, "comfyui")
    exact, fast = (run(request_of(converted("Q8_0"), precision=one)).latents for one in ("exact", "fast"))
    both = [run(request_of(converted("Q8_0"), precision=one, loras=(path,))).latents for one in ("exact", "fast")]
    assert off(both[1], both[0]) < 2 * off(fast, exact)


@pytest.mark.parametrize(
    ("rows", "parked", "slots", "resident"), [(None, False, 2, 0), (5, True, 3, 1), (7, False, 5, 2)]
)
def test_the_stream_and_the_parts_do_not_matter(
    goldens, converted, pairs, shapes, tmp_path, rows, parked, slots, resident
):
    path = write_adapter(tmp_path / "a.safetensors", pairs, "kohya", alpha=1)
    file = open_gguf(next(converted("Q4_K").glob("SkyReels*.gguf")))
    adapters = [fit(read_adapter(path), shapes, 0.5), fit(read_adapter(path), shapes, 0.25)]
    golden = goldens("dit_r2v/t6_4x6")
    with torch.inference_mode():
        usual = forward(file, golden, adapters)
        made = forward(file, golden, adapters, slots=slots, resident=resident, rows=rows, parked=parked)
    assert off(made, usual) < 1e-5


def forward(file, golden, adapters, *, slots=3, resident=0, **how):
    dit = DiT(file, CPU, torch.float32, adapters=adapters, **how)
    (time,) = dit.embed_times(golden["in.timesteps"].tolist()[:1])
    latents = golden["in.hidden_states"][0]
    context, rope = Context(dit.embed_text(golden["in.context_valid"])), dit.rope(latents)
    blocks, paths = with_adapters(block_layouts(file), "blocks.", adapters), [one.path for one in adapters]
    kept = spread(resident, dit.dims.layers)
    with BlockStream(file.path, blocks, CPU, slots=slots, resident=kept, adapters=paths) as stream:
        return drain(dit.forward(stream, latents, [time] * latents.shape[1], context, rope))


@pytest.mark.parametrize("limit", [4096, 1 << 20])
@pytest.mark.parametrize("planar", [False, True])
def test_pieces_are_the_extents(converted, pairs, shapes, tmp_path, limit, planar):
    """What goes to a device in pieces is what is read in one go, adapters too."""
    path = write_adapter(
        tmp_path / "a.safetensors", {n: (d.half(), u.half()) for n, (d, u) in pairs.items()}, "kohya", 3
    )
    file = open_gguf(next(converted("Q8_0").glob("SkyReels*.gguf")))
    adapters = [fit(read_adapter(path), shapes)] * 2
    data = [Path(one).read_bytes() for one in (file.path, path, path)]
    for block in with_adapters(block_layouts(file), "blocks.", adapters):
        whole, pieced = torch.zeros(2, block.nbytes, dtype=torch.uint8)
        for one in block.extents:
            whole[one.at : one.at + one.nbytes] = bytes_of(data[one.file][one.offset : one.offset + one.nbytes])
        for piece in (piece for whole_run in block.runs(planar) for piece in whole_run.split(limit)):
            if piece.info is None:
                for target, source in piece.moves(pieced, bytes_of(data[piece.file][piece.offset :][: piece.nbytes])):
                    target.copy_(source)
        for _, update in block.updates:
            one, other = update.addition(whole), update.addition(pieced)
            assert torch.equal(one.up, other.up) and torch.equal(one.down, other.down)
            layer = next(name for name, (down, _) in pairs.items() if torch.equal(one.down, down.half()))
            assert torch.equal(one.up, pairs[layer][1].half())
            assert update.scale == 3 / RANK


def bytes_of(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def test_an_unfinished_clip_goes_on_with_its_adapter_only(converted, pairs, request_of, tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", pairs, "comfyui")
    request = replace(request_of(converted("Q8_0"), loras=(Lora(path, 0.5),)), output=tmp_path / "c.mp4", steps=3)
    undisturbed = run(replace(request, output=None)).latents
    steps = 0
    with suppress(KeyboardInterrupt):
        for event in run_job(*continue_or_start(request)[:1]):
            steps += isinstance(event, Preview)
            if steps == 2:
                raise KeyboardInterrupt
    with pytest.raises(SkyrunError, match="with another loras"):
        continue_or_start(replace(request, loras=()))
    job, state = continue_or_start(request)
    assert state.steps == 2
    assert torch.equal(drain(run_job(job, state=state)).latents, undisturbed)


def test_a_changed_adapter_ends_a_resumed_run(converted, pairs, request_of, tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", pairs, "comfyui")
    request = replace(request_of(converted("Q8_0"), loras=(path,)), output=tmp_path / "c.mp4")
    for event in run_job(*continue_or_start(request)[:1]):
        if isinstance(event, Preview):
            break
    write_adapter(path, {name: (2 * down, up) for name, (down, up) in pairs.items()}, "comfyui")
    with pytest.raises(SkyrunError, match="adapter 1 .* changed since"):
        continue_or_start(request)


def test_strength_0_is_none_and_two_are_their_sum(converted, pairs, request_of, tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", pairs, "comfyui")
    plain = run(request_of(converted("Q4_K"))).latents
    assert torch.equal(run(request_of(converted("Q4_K"), loras=(f"{path}:0",))).latents, plain)
    once = run(request_of(converted("Q4_K"), loras=(Lora(path, 0.75),))).latents
    twice = run(request_of(converted("Q4_K"), loras=(Lora(path, 0.5), Lora(path, 0.25)))).latents
    assert off(twice, once) < 1e-5 < off(once, plain)


def test_differences(checkpoint, converted, shapes, request_of, tmp_path):
    generator = torch.Generator().manual_seed(5)
    changed = {
        "blocks.0.norm3.weight": "blocks.0.norm3.diff",
        "blocks.1.norm3.bias": "blocks.1.norm3.diff_b",
        "blocks.0.self_attn.q.bias": "blocks.0.self_attn.q.diff_b",
        "blocks.1.self_attn.norm_q.weight": "blocks.1.self_attn.norm_q.diff",
        "blocks.0.modulation": "blocks.0.diff_m",
        "head.modulation": "head.diff_m",
        "blocks.1.ffn.0.weight": "blocks.1.ffn.0.diff",
        "patch_embedding.weight": "patch_embedding.diff",
        "patch_embedding.bias": "patch_embedding.diff_b",
    }
    more = {name: torch.randn(shapes[name], generator=generator) * 0.05 for name in changed}
    extra = {f"diffusion_model.{changed[name]}": one for name, one in more.items()}
    path = write_adapter(tmp_path / "d.safetensors", {}, "comfyui", extra=extra)
    convert(merged_checkpoint(checkpoint, {}, tmp_path / "source", more=more.items()), tmp_path / "F32", "F32")
    expected = run(request_of(tmp_path / "F32")).latents
    assert off(run(request_of(converted("F32"), loras=(path,))).latents, expected) < 1e-4
    convert(checkpoint, tmp_path / "merged", "F32", loras=[(path, 1.0)])
    assert off(run(request_of(tmp_path / "merged")).latents, expected) < 1e-4


def test_a_clip_names_its_adapters_and_resumes(converted, pairs, request_of, tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", pairs, "comfyui")
    request = replace(request_of(converted("Q8_0"), loras=(Lora(path, 0.5),)), output=tmp_path / "c.mp4")
    run(request)
    assert read_request(tmp_path / "c.mp4")["loras"] == [f"{path}:0.5"]


def test_names_of_files():
    assert parse_lora("C:\\a.safetensors") == Lora(Path("C:\\a.safetensors"))
    assert parse_lora("take1:2.safetensors") == Lora(Path("take1:2.safetensors"))
    assert parse_lora("OWNER/NAME/F:0.8") == Lora(Path("OWNER/NAME/F"), 0.8)
    assert Lora(Path("OWNER/NAME/F")).on_hub == ("OWNER/NAME", "F")
    assert Lora(Path("./b/a.safetensors")).on_hub is None
    assert parse_lora("a.safetensors:-1e-1") == Lora(Path("a.safetensors"), -0.1)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("transformer.blocks.3.attn2.add_k_proj.lora_A.weight", ("down", "blocks.3.cross_attn.k_img.weight")),
        ("diffusion_model.blocks.3.cross_attn.v_img.diff_b", ("difference", "blocks.3.cross_attn.v_img.bias")),
        ("lora_unet_blocks_39_cross_attn_norm_k_img.w_norm", ("difference", "blocks.39.cross_attn.norm_k_img.weight")),
        ("lora_unet__blocks_0_ffn_0.lora_up.weight", ("up", "blocks.0.ffn.0.weight")),
        ("lora_unet_img_emb_proj_1.alpha", ("alpha", "img_emb.proj.1.weight")),
        (
            "lora_unet_blocks_0_audio_cross_attn_q_linear.lora_down.weight",
            ("down", "blocks.0.audio_cross_attn.q_linear.weight"),
        ),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", None),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", None),
    ],
)
def test_names_in_adapters(name, entry):
    assert entry_of(name) == entry


def test_an_existing_path_wins_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:2").touch()
    assert parse_lora("a:2") == Lora(Path("a:2"))
    assert parse_lora("a:2:3") == Lora(Path("a:2"), 3.0)


def test_a_part_that_fits_is_used_and_said(converted, pairs, request_of, tmp_path):
    other = {name: (down, up) for name, (down, up) in pairs.items()}
    down, up = other["blocks.0.ffn.0"]
    other["blocks.0.ffn.0"] = (torch.zeros(RANK, down.shape[1] + 8), up)
    path = write_adapter(tmp_path / "a.safetensors", other, "comfyui", extra={"lora_te1_x.alpha": torch.ones(1)})
    job = prepare(request_of(converted("Q8_0"), loras=(path,)))
    assert any(
        "layers that a.safetensors changes fit; not used: blocks.N.ffn.0.weight is for" in n for n in job.notices
    )
    assert any("text encoder" in n for n in job.notices)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"blocks.0.self_attn.q.hada_w1_a": torch.ones(2, 2)}, "is a LoHa"),
        ({"blocks.0.self_attn.q.lokr_w1": torch.ones(2, 2)}, "is a LoKr"),
        ({"blocks.0.self_attn.q.dora_scale": torch.ones(2, 2)}, "is a DoRA"),
        ({"blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 2)}, "has no up matrix"),
        ({"blocks.0.self_attn.q.diff": torch.ones(2, 2, dtype=torch.int32)}, "has tensors of I32"),
        ({"unet.down.0.lora_A.weight": torch.ones(2, 2)}, "holds no LoRA of a transformer"),
        (
            {f"diffusion_model.blocks.0.self_attn.q.lora_{x}.weight": torch.ones(4, 4) for x in "AB"},
            "nothing of",
        ),
    ],
)
def test_mistakes(converted, request_of, tmp_path, tensors, said):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(SkyrunError, match=said):
        prepare(request_of(converted("Q8_0"), loras=(tmp_path / "a.safetensors",)))


@pytest.mark.parametrize(
    ("loras", "said"),
    [
        ("a.safetensors", "expected a list of files"),
        ([3], "expected a file"),
        ([("a", "b")], "expected a file"),
        (["absent.safetensors"], "absent.safetensors does not exist"),
        ([("absent.safetensors", float("nan"))], "has a strength of nan"),
    ],
)
def test_wrong_values(converted, request_of, loras, said):
    with pytest.raises(SkyrunError, match=said):
        prepare(request_of(converted("Q8_0"), loras=loras))
