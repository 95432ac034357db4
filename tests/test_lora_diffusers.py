"""Adapters mean here what they mean to diffusers and peft: the same velocity."""

import json
from importlib.util import find_spec

import pytest
import torch
from loras import layers, random_pairs, write_adapter

from skyrun.events import drain
from skyrun.kernels.files.adapter import fit, read_adapter
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.kernels.name_tables import WAN_TRANSFORMER
from skyrun.models.dit import Context, DiT
from skyrun.models.dit_header import block_layouts, canonical_tensors
from skyrun.streaming.layout import with_adapters
from skyrun.streaming.stream import BlockStream

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not (find_spec("diffusers") and find_spec("peft")), reason="diffusers or peft is not installed"
)


def ours(file, adapter, inputs):
    latents, time, text = inputs
    dit = DiT(file, CPU, torch.float32, adapters=[adapter])
    blocks = with_adapters(block_layouts(file), "blocks.", [adapter])
    with torch.inference_mode(), BlockStream(file.path, blocks, CPU, adapters=[adapter.path]) as stream:
        (embedding,) = dit.embed_times([time])
        times, context = [embedding] * latents.shape[1], Context(dit.embed_text(text))
        return drain(dit.forward(stream, latents, times, context, dit.rope(latents)))


def theirs(file, checkpoint, path, strength, inputs):
    from diffusers import WanTransformer3DModel
    from diffusers.loaders import WanLoraLoaderMixin

    said = json.loads((checkpoint / "transformer" / "config.json").read_text())
    known = {"patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim"}
    known |= {"freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "qk_norm", "eps", "rope_max_seq_len"}
    model = WanTransformer3DModel(**{name: value for name, value in said.items() if name in known})
    tensors = canonical_tensors(file)
    names = {row.name(1): row.name() for row in WAN_TRANSFORMER.expand(len(block_layouts(file)))}
    data = {name: torch.frombuffer(file.read(tensors[names[name]]), dtype=torch.float32) for name in names}
    model.load_state_dict({name: data[name].view(value.shape) for name, value in model.state_dict().items()})
    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
    WanLoraLoaderMixin.load_lora_into_transformer(state, model, adapter_name="a", metadata=metadata)
    model.set_adapters(["a"], [strength])
    latents, time, text = inputs
    padded = torch.cat((text, torch.zeros(512 - len(text), text.shape[1])))
    with torch.inference_mode():
        return model(latents[None], torch.tensor([time]), padded[None], return_dict=False)[0][0]


@pytest.mark.parametrize("task", ["r2v", "v2v"])
@pytest.mark.parametrize(
    ("style", "alpha"), [("diffusers", 6), ("diffusers", None), ("lightx2v", 6), ("comfyui", None)]
)
def test_the_same_velocity(checkpoint, converted, tmp_path, task, style, alpha):
    file = open_gguf(next(converted("F32", task).glob(f"SkyReels-V3-{task.upper()}*.gguf")))
    shapes = {name: info.shape for name, info in canonical_tensors(file).items()}
    names = layers(len(block_layouts(file)))
    pairs = random_pairs(shapes, names, 4)
    path = write_adapter(tmp_path / "a.safetensors", pairs, style, alpha, names)
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(16, 6, 4, 6, generator=generator), 937, torch.randn(9, 128, generator=generator)
    expected = theirs(file, checkpoint, path, 0.7, inputs)
    made = ours(file, fit(read_adapter(path), shapes, 0.7), inputs)
    assert float((made - expected).norm() / expected.norm()) < 1e-5
