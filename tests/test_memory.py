"""The plan's arithmetic against the bytes that the models really hold, counted tensor by tensor."""

import dataclasses
import json
import weakref
from itertools import accumulate
from math import prod

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skyrun.events import drain
from skyrun.kernels.name_tables import WAN_VAE
from skyrun.models.dit import Context, DiT
from skyrun.models.dit_header import block_layouts
from skyrun.models.vae import Memory, WanVAE, read_vae_dims
from skyrun.planning.job import prepare
from skyrun.planning.request import Request
from skyrun.presets.memory import BYTES, denoise_bytes, vae_bytes, vae_memory_bytes
from skyrun.streaming.stream import BlockStream

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("inference")


def address_of(tensor):
    return tensor.untyped_storage()._cdata  # of the storage itself: tensors on the meta device have no data


class CountingAllocator(TorchDispatchMode):
    """Adds up the storage of all tensors that operations make, while any tensor uses it. What was there before, and
    views of it, do not count."""

    def __init__(self):
        super().__init__()
        self.users, self.sizes = {}, {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {address_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                address = address_of(tensor)
                if address in given and address not in self.sizes:
                    continue
                self.sizes[address] = tensor.untyped_storage().nbytes()
                self.users[address] = self.users.get(address, 0) + 1
                weakref.finalize(tensor, self._drop, address)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result

    def _drop(self, address):
        self.users[address] -= 1
        if not self.users[address]:
            del self.users[address], self.sizes[address]


@pytest.fixture
def job(converted, request):
    picture = request.path.parent / "data/goldens/e2e/r2v_1img/ref0.png"
    return prepare(Request("r2v", "x", (picture,), model=converted("F32"), size=(256, 384), frames=9, device="cpu"))


@pytest.mark.parametrize("rows", [None, 300, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_denoising(job, dtype, rows):
    file, work = job.files.transformer, job.workload
    dit = DiT(file, CPU, getattr(torch, dtype), rows=rows)
    latents = torch.randn(16, work.latent_frames, work.height // 8, work.width // 8)
    (time,) = dit.embed_times([500.0])
    context, rope = Context(dit.embed_text(torch.randn(20, dit.dims.text_dim))), dit.rope(latents)
    tables = sum(table.nbytes for table in rope)
    with BlockStream(file.path, block_layouts(file), CPU) as stream, CountingAllocator() as counted:
        drain(dit.forward(stream, latents, [time] * latents.shape[1], context, rope))
    expected = denoise_bytes(work, dtype, rows) - work.outer_bytes
    assert counted.peak + tables == pytest.approx(expected, rel=0.1)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The header of the published autoencoder, before a hole in place of its weights."""
    shapes = WAN_VAE.shapes("original", {"base": 96, "z": 16})
    ends = list(accumulate(2 * prod(shape) for shape in shapes.values()))
    places = zip(shapes.items(), zip([0, *ends], ends, strict=False), strict=True)
    header = {name: {"dtype": "BF16", "shape": shape, "data_offsets": place} for (name, shape), place in places}
    text = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("published") / "vae.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + ends[-1])
    return path


@pytest.mark.parametrize(("dtype", "tile"), [("float32", None), ("bfloat16", (360, 1280)), ("bfloat16", (90, 1280))])
def test_the_autoencoder(published, job, dtype, tile):
    base, weights = read_vae_dims(published)
    work = dataclasses.replace(job.workload, height=720, width=1280, vae_base_dim=base, vae_weights=weights)
    vae = WanVAE(published, torch.device("meta"), getattr(torch, dtype), tile)
    with CountingAllocator() as decoding:
        for pixels in vae.decode(torch.empty(16, 3, work.height // 8, work.width // 8, device="meta")):
            del pixels
    expected = vae_bytes(work, dtype, tile)
    assert decoding.peak + weights * BYTES[dtype] == pytest.approx(expected, rel=0.02)
    with CountingAllocator() as encoding:
        vae.encode(torch.empty(3, 9, work.height, work.width, device="meta"))
    assert encoding.peak < decoding.peak


def test_what_the_autoencoder_remembers(published, job, monkeypatch):
    work = dataclasses.replace(job.workload, height=720, width=1280, vae_base_dim=96)
    kept = {}
    monkeypatch.setattr(Memory, "keep", lambda self, frames, *layer: kept.update({layer: frames.nbytes}))
    vae = WanVAE(published, torch.device("meta"), torch.bfloat16)
    for pixels in vae.decode(torch.empty(16, 2, 90, 160, device="meta")):
        del pixels
    assert sum(kept.values()) == pytest.approx(vae_memory_bytes(work, "bfloat16"), rel=0.02)
