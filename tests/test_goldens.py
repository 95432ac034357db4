"""Every component against what upstream computes, through converted files."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from skyrun.errors import SkyrunError
from skyrun.events import drain
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.media.image import open_image
from skyrun.media.pixels import letterbox, to_uint8
from skyrun.models.dit import Context, DiT
from skyrun.models.dit_header import block_layouts
from skyrun.models.umt5 import UMT5, clean_prompt
from skyrun.models.vae import WanVAE
from skyrun.pipelines.samplers import UniPC
from skyrun.streaming.stream import BlockStream
from skyrun.tasks.sizes import BUCKETS, nearest_bucket

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("inference")


def worst(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def encoder(converted):
    return UMT5(open_gguf(next(converted("F32").glob("umt5*.gguf"))))


@pytest.fixture(scope="module")
def vae(converted):
    return WanVAE(next(converted("F32").glob("*.safetensors")), CPU)


def embed(encoder, ids):
    with encoder.open_stream(CPU) as stream:
        return drain(encoder.encode(ids, stream, CPU))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_tokens_of_prompts(goldens, encoder, index):
    golden = goldens("umt5/prompts")
    prompt = golden.notes["prompts"][index]
    assert clean_prompt(prompt["prompt"]) == prompt["r2v_cleaned"]
    for length in (226, 512):
        assert encoder.token_ids(prompt["prompt"], length) == golden[f"out.r2v{length}_ids_p{index}"].tolist()


def test_tokens_of_hard_strings(goldens, encoder):
    for row in goldens("umt5/prompts").notes["tokenizer_table"]:
        assert clean_prompt(row["text"]) == row["cleaned"]
        assert encoder.token_ids(row["text"]) == row["ids_cleaned"], row["text"]


def test_a_long_prompt_is_cut_before_its_closing_token(encoder):
    ids = encoder.token_ids("a person is talking " * 400)
    assert len(ids) == 512
    assert ids[-1] == 1


def test_umt5(goldens, encoder):
    golden = goldens("umt5/prompts")
    short, long, third = (golden[f"out.wan512_ids_p{index}"].tolist() for index in range(3))
    assert worst(embed(encoder, short), golden["out.wan512_emb_p0"]) < 2e-5
    assert worst(embed(encoder, third), golden["out.wan512_emb_p2"]) < 2e-5
    embedding = embed(encoder, long)
    assert worst(embedding[:16], golden["out.wan512_emb_first16_p1"]) < 2e-5
    assert worst(embedding[-16:], golden["out.wan512_emb_last16_p1"]) < 2e-5


def test_a_tokenizer_that_pads_is_told_not_to(converted, encoder):
    file = open_gguf(next(converted("F32").glob("umt5*.gguf")))
    key = "tokenizer.huggingface.json"
    padding = {"strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    text = json.dumps(json.loads(file.metadata[key]) | {"padding": padding})
    padded = UMT5(dataclasses.replace(file, metadata=file.metadata | {key: text}))
    assert padded.token_ids("a sea") == encoder.token_ids("a sea")


def test_umt5_of_tensors_that_do_not_fit_is_refused(converted, encoder):
    file = open_gguf(next(converted("F32").glob("umt5*.gguf")))
    name = "enc.blk.1.ffn_down.weight"
    tensors = file.tensors | {name: dataclasses.replace(file.tensors[name], shape=(64, 256))}
    broken = UMT5(dataclasses.replace(file, tensors=tensors))
    with pytest.raises(SkyrunError, match="block 1 of .* has tensors that do not fit each other"):
        broken.check()
    encoder.check()


def test_a_token_outside_the_vocabulary_is_refused(encoder):
    with pytest.raises(SkyrunError, match="row 768 of token_embd.weight was asked for, .* has 768"):
        embed(encoder, [5, 768])


@pytest.mark.parametrize("case", ["1l_4x6", "3l_4x2", "5l_2x3"])
def test_vae_decode(goldens, vae, case):
    golden = goldens(f"wan_vae/decode_{case}")
    groups = list(vae.decode(golden["in.latents"][0]))
    assert [group.shape[1] for group in groups] == [1] + [4] * (len(groups) - 1)
    assert worst(torch.cat(groups, 1), golden["out.video"][0]) < 2e-5


@pytest.mark.parametrize("case", ["17f_32x32", "1f_64x96", "9f_32x64"])
def test_vae_encode(goldens, vae, case):
    golden = goldens(f"wan_vae/encode_{case}")
    video = golden["in.video_u8"].permute(3, 0, 1, 2) / 127.5 - 1
    mean, log_variance = vae.encode(video)
    assert worst(mean, golden["out.raw_mean"][0]) < 5e-5
    assert worst(log_variance, golden["out.raw_logvar"][0]) < 5e-5
    assert worst(vae.normalise(mean), golden["out.latents"][0]) < 5e-5
    if "in.sample_noise" in golden.tensors:
        sampled = vae.sample(video, golden["in.sample_noise"][0])
        assert worst(sampled, golden["out.r2v_sampled_latents"][0]) < 5e-5


def test_vae_drops_frames_after_the_last_whole_group(vae):
    video = torch.rand(3, 12, 16, 16) * 2 - 1
    torch.testing.assert_close(vae.encode(video), vae.encode(video[:, :9]))


def test_dit(goldens, converted):
    golden = goldens("dit_r2v/t6_4x6")
    file = open_gguf(next(converted("F32").glob("SkyReels*.gguf")))
    dit = DiT(file, CPU, torch.float32)
    timesteps = golden["in.timesteps"].tolist()
    times = dit.embed_times(timesteps)
    time, projection = times[0]
    assert worst(time, golden["out.temb"][0]) < 2e-5
    assert worst(projection.flatten(), golden["out.timestep_proj"][0]) < 2e-5
    context = dit.embed_text(golden["in.context_valid"])
    assert context.shape[0] == 512
    assert worst(context[:22], golden["out.context"]) < 2e-5
    latents = golden["in.hidden_states"][0]
    rope = dit.rope(latents)
    assert worst(torch.stack(rope, 2), golden["out.rope"]) < 1e-6
    with BlockStream(file.path, block_layouts(file), CPU, passes=len(timesteps)) as stream:
        for index, time in enumerate(times):
            sample = drain(dit.forward(stream, latents, [time] * 6, Context(context), rope))
            assert worst(sample, golden[f"out.sample{index}"][0]) < 2e-5


@pytest.mark.parametrize("shift", [5, 8])
@pytest.mark.parametrize("steps", [4, 8, 20, 50])
def test_unipc(goldens, shift, steps):
    name = "r2v_unipc" if shift == 5 else "v2v_flowunipc"
    golden = goldens(f"schedulers/{name}_shift{shift}_{steps}")
    sampler, sample = UniPC(steps, shift), golden["in.x0"]
    assert sampler.timesteps == golden["out.timesteps"].tolist()
    assert worst(torch.tensor(sampler.sigmas), golden["out.sigmas"]) < 1e-6
    for velocity, expected in zip(golden["in.model_out"], golden["out.traj"], strict=True):
        sample = sampler.step(velocity, sample)
        assert worst(sample, expected) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_unipc_finds_the_answer_of_a_perfect_model_in_few_steps(steps):
    clean, noise = torch.randn(16, 2, 2), torch.randn(16, 2, 2)
    sampler = UniPC(steps, 5.0)
    sample = noise
    for sigma in sampler.sigmas[:-1]:
        sample = sampler.step((sample - clean) / sigma, sample)
    torch.testing.assert_close(sample, clean, atol=1e-5, rtol=1e-5)


def test_size_buckets(goldens, request):
    rows = json.loads((request.path.parent / "data/goldens/size_buckets/table.json").read_text())["rows"]
    assert len(rows) > 10
    for row in rows:
        for resolution in ("480P", "540P", "720P"):
            assert list(nearest_bucket(BUCKETS, resolution, row["height"], row["width"])) == row[resolution]


def test_letterbox(goldens, tmp_path):
    golden = goldens("preprocess/letterbox")
    for row in golden.notes["config"]["rows"]:
        path = tmp_path / f"{row['case']}.png"
        Image.fromarray(golden[f"in.letterbox{row['case']}"].numpy()).save(path)
        image = letterbox(open_image(path), row["target_height"], row["target_width"])
        np.testing.assert_array_equal(np.array(image), golden[f"out.letterbox{row['case']}"].numpy())


def test_letterbox_of_a_sliver_keeps_a_pixel():
    assert letterbox(Image.new("RGB", (2000, 2)), 32, 48).size == (48, 32)


def test_pixels_are_rounded_and_clamped():
    levels = to_uint8(torch.tensor([0.0, -1.0, 1.0, -9.0, 999.0, -0.99]).view(1, 1, 1, 6).expand(3, 1, 1, 6))
    assert levels.shape == (1, 1, 6, 3)
    assert levels[0, 0, :, 0].tolist() == [128, 0, 255, 0, 255, 1]
