"""The transformers of video extension, shot switching and talking avatars against what upstream computes."""

import pytest
import torch

from skyrun.events import drain
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.models.audio_projection import later_slots, windows
from skyrun.models.dit import Context, DiT
from skyrun.models.dit_header import block_layouts
from skyrun.streaming.stream import BlockStream

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("inference")


def worst(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.fixture
def transformer(converted):
    """transformer("shot", rows) is the F32 file of a task's transformer, and it loaded."""

    def load(task, rows=None):
        folder = converted("F32", {"shot": "v2v"}.get(task, task))
        file = open_gguf(next(folder.glob(f"SkyReels-V3-{task.upper()}-*.gguf")))
        return file, DiT(file, CPU, torch.float32, rows=rows)

    return load


@pytest.mark.parametrize("rows", [None, 7])
def test_extension(goldens, transformer, rows):
    golden = goldens("dit_v2v/tensor_t5_4x8")
    file, dit = transformer("v2v", rows)
    context, latents = Context(dit.embed_text(golden["in.context_valid"])), golden["in.x"][0]
    assert worst(context.text[:22], golden["out.context"]) < 2e-5
    rope = dit.rope(latents)
    with BlockStream(file.path, block_layouts(file), CPU, passes=2) as stream:
        for index, row in enumerate(golden["in.t"].tolist()):
            clean, noisy = dit.embed_times([0, row[-1]])
            times = [noisy if time else clean for time in row]
            sample = drain(dit.forward(stream, latents, times, context, rope))
            assert worst(sample, golden[f"out.sample{index}"][0]) < 3e-5


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize(("case", "task"), [("list_t4+2_4x8", "shot"), ("list_t2+2+1_4x6", "v2v")])
def test_shot_switching(goldens, transformer, case, task, rows):
    golden = goldens(f"dit_v2v/{case}")
    file, dit = transformer(task, rows)
    context, new = Context(dit.embed_text(golden["in.context_valid"])), golden["in.x"][0]
    before = [golden[name][0] for name in ("in.prefix0", "in.prefix1") if name in golden.tensors]
    latents = torch.cat((new, *before), 1)
    frames, count = latents.shape[1], new.shape[1]
    rope = dit.rope(latents, [*range(count), *range(1024, 1024 + frames - count)])
    if "out.rope" in golden.tensors:
        assert worst(torch.stack(rope, 2), golden["out.rope"]) < 5e-5
    with BlockStream(file.path, block_layouts(file), CPU, passes=2) as stream:
        for index, row in enumerate(golden["in.t"].tolist()):
            noisy, clean = dit.embed_times([row[0], 0])
            times = [noisy if time else clean for time in row]
            sample = drain(dit.forward(stream, latents, times, context, rope))
            assert worst(sample[:, :count], golden[f"out.sample{index}"][0]) < 5e-5


def test_windows_of_audio(goldens):
    golden = goldens("audio_proj/frames9")
    numbers = torch.arange(9).view(9, 1, 1)
    around = windows(numbers, 0, 9)
    assert torch.equal(around.flatten(1), golden["out.window_indices"])
    assert torch.equal(later_slots(around[1:]).flatten(1), golden["out.latter_slots"])
    assert windows(numbers, 6, 4).flatten(1).tolist()[-1] == [7, 8, 8, 8, 8]


@pytest.mark.parametrize("rows", [None, 4, 7])
def test_talking_avatar(goldens, transformer, rows):
    golden = goldens("dit_a2v/t3_4x6")
    file, dit = transformer("a2v", rows)
    image, audio = dit.embed_image(golden["in.clip_fea"][0]), dit.embed_audio(golden["in.audio"][0])
    assert worst(image[:8], golden["out.clip_tokens"]) < 2e-5
    assert worst(audio, golden["out.audio_tokens"][0]) < 2e-5
    context = Context(dit.embed_text(golden["in.context_valid"]), image, audio)
    latents = torch.cat((golden["in.x"], golden["in.y"][0]))
    rope = dit.rope(latents)
    assert worst(torch.stack(rope, 2), golden["out.rope"]) < 1e-6
    with BlockStream(file.path, block_layouts(file), CPU, passes=2) as stream:
        for index, time in enumerate(dit.embed_times(golden["in.timesteps"].tolist())):
            sample = drain(dit.forward(stream, latents, [time] * 3, context, rope))
            assert worst(sample, golden[f"out.sample{index}"]) < 5e-5


def test_audio_projection(goldens, transformer):
    golden = goldens("audio_proj/frames9")
    _, dit = transformer("a2v")
    assert worst(dit.embed_audio(windows(golden["in.features"], 0, 9)), golden["out.tokens"][0]) < 2e-5
