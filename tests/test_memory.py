"""The plan's arithmetic against the bytes that the models really hold, counted tensor by tensor."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skyrun.events import drain
from skyrun.job import prepare
from skyrun.models.dit import DiT, block_layouts
from skyrun.models.vae import WanVAE
from skyrun.presets.memory import denoise_bytes, vae_bytes
from skyrun.request import Request
from skyrun.stream import BlockStream

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("inference")


def address_of(tensor):
    return tensor.untyped_storage().data_ptr()


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_denoising(job, dtype):
    file, work = job.files.transformer, job.workload
    dit = DiT(file, CPU, getattr(torch, dtype))
    latents = torch.randn(16, work.latent_frames, work.height // 8, work.width // 8)
    (time,) = dit.embed_times([500.0])
    context, rope = dit.embed_text(torch.randn(20, dit.dims.text_dim)), dit.rope(latents)
    tables = sum(table.nbytes for table in rope)
    with BlockStream(file.path, block_layouts(file), CPU) as stream, CountingAllocator() as counted:
        drain(dit.forward(stream, latents, time, context, rope))
    expected = denoise_bytes(work, dtype) - work.outer_bytes
    assert counted.peak + tables == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding(job, dtype):
    vae = WanVAE(job.files.vae, CPU, getattr(torch, dtype))
    latents = torch.randn(16, 3, job.height // 8, job.width // 8)
    with CountingAllocator() as counted:
        for pixels in vae.decode(latents):
            del pixels
    expected = vae_bytes(dataclasses.replace(job.workload, vae_weights=0), dtype)
    assert counted.peak == pytest.approx(expected, rel=0.1)


def test_encoding_takes_no_more_than_decoding(job):
    vae = WanVAE(job.files.vae, CPU)
    with CountingAllocator() as counted:
        vae.encode(torch.randn(3, 9, job.height, job.width))
    assert counted.peak < vae_bytes(job.workload, "float32")
