"""The plan's arithmetic against the bytes that the models really hold, counted tensor by tensor."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skyrun.events import drain
from skyrun.kernels.tiles import USUAL
from skyrun.models.dit import Context, DiT
from skyrun.models.dit.sparse import Learned, SelfCheck
from skyrun.models.dit.tile_order import Frames, tile_order
from skyrun.models.dit_header import block_layouts
from skyrun.models.vae import WanVAE, read_vae_dims
from skyrun.models.vae_memory import Memory
from skyrun.parallel import group as group_module
from skyrun.parallel.group import Arriving, Completing, Group
from skyrun.planning.job import prepare
from skyrun.planning.request import Request
from skyrun.presets.memory import BYTES, denoise_bytes, vae_bytes, vae_memory_bytes
from skyrun.presets.timing import gathered_bytes, sent_bytes
from skyrun.streaming.stream import BlockStream, spread

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


def denoising_peak(file, dit, work, neighbours=None):
    """Bytes that a step takes at most, with the rotary table. neighbours: read shares of the blocks."""
    latents = torch.randn(16, work.latent_frames, work.height // 8, work.width // 8)
    (time,) = dit.embed_times([500.0])
    context, rope = Context(dit.embed_text(torch.randn(20, dit.dims.text_dim))), dit.rope(latents)
    tables = sum(table.nbytes for table in rope)
    blocks = block_layouts(file)
    with BlockStream(file.path, blocks, CPU, neighbours=neighbours) as stream, CountingAllocator() as counted:
        drain(dit.forward(stream, latents, [time] * latents.shape[1], context, rope))
    return counted.peak + tables


@pytest.mark.parametrize("rows", [None, 300, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_denoising(job, dtype, rows):
    file, work = job.files.transformer, job.workload
    dit = DiT(file, CPU, getattr(torch, dtype), rows=rows)
    peak = denoising_peak(file, dit, work)
    expected = denoise_bytes(work, dtype, rows) - work.outer_bytes
    assert peak == pytest.approx(expected, rel=0.1)


class Echo(Group):
    """A group of which only this rank is there: what the others would send is zeros."""

    def _send(self, parts, sending, receiving):
        return Arriving(None, parts.new_zeros(sum(receiving)), parts)

    def _complete(self, parts):
        for rank, part in parts:
            if rank != self.rank:
                part.zero_()
        return Completing()


@pytest.mark.parametrize("rows", [None, 96, 64])
def test_denoising_on_two_devices(job, monkeypatch, rows):
    """What one of them takes, and what it sends."""
    group = Echo(1, 2, CPU)
    monkeypatch.setattr(group_module, "_here", group)
    file, work = job.files.transformer, dataclasses.replace(job.workload, devices=2)
    dit = DiT(file, CPU, torch.float32, rows=rows)
    peak = denoising_peak(file, dit, work)
    expected = denoise_bytes(work, "float32", rows) - work.outer_bytes
    assert peak == pytest.approx(expected, rel=0.1 if rows else 0.2)
    own, dim, layers, devices = work.tokens / 2, work.dim, work.layers, 2
    formula = layers * 4 * own * dim * 4 * (devices - 1) / devices + own * 256 * (devices - 1)  # of docs/devices.md
    assert group.sent == sent_bytes(work, "float32") == formula


def test_what_attention_that_skips_sends_on_top(job, monkeypatch):
    """Sampled queries, and what has been learned. Devices have as many of all tiles, but not of the sample."""
    file, work, sent = job.files.transformer, dataclasses.replace(job.workload, devices=2), 0
    dit, latents = DiT(file, CPU, torch.float32), torch.randn(16, work.latent_frames, work.height // 8, work.width // 8)
    (time,), context = dit.embed_times([500.0]), Context(dit.embed_text(torch.randn(20, dit.dims.text_dim)))
    order = tile_order([Frames(1, True), Frames(work.latent_frames - 1)], work.height // 16, work.width // 16, USUAL)
    for rank in range(2):
        group = Echo(rank, 2, CPU)
        monkeypatch.setattr(group_module, "_here", group)
        check = SelfCheck(0.01, order, (1, work.layers, dit.dims.heads), Learned())
        with BlockStream(file.path, block_layouts(file), CPU) as stream:
            times = [time] * latents.shape[1]
            drain(dit.velocities(stream, latents, times, [context], dit.rope(latents), order, check))
        check.finish_step()
        sent += group.sent
    extra = work.layers * (1536 / 2 * work.dim * 4 / 2 + 24 * dit.dims.heads / 2)  # of docs/devices.md
    assert sent / 2 == sent_bytes(work, "float32", sparse=True) == sent_bytes(work, "float32") + extra


@pytest.mark.parametrize("rows", [None, 64])
def test_shares_of_weights_take_no_memory_besides_the_ring(job, rows):
    """They are sent from the buffers that they were read into, and received in others."""
    file, work, dit = job.files.transformer, job.workload, DiT(job.files.transformer, CPU, torch.float32, rows=rows)
    whole, shared = (denoising_peak(file, dit, work, neighbours) for neighbours in (None, Echo(1, 2, CPU)))
    assert shared == whole


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("resident", [0, 1])
def test_what_of_the_weights_is_sent(job, size, resident):
    """By all devices together, in a step after the first."""
    file, work = job.files.transformer, dataclasses.replace(job.workload, devices=size)
    blocks, sent = block_layouts(file), 0
    for rank in range(size):
        group, kept = Echo(rank, size, CPU), spread(resident, len(blocks))
        with BlockStream(file.path, blocks, CPU, passes=2, resident=kept, neighbours=group) as stream:
            for _ in stream.blocks():
                pass
            first = group.sent  # and the next block, which is on its way
            for _ in stream.blocks():
                pass
        sent += group.sent - first
    stored = sum(block.nbytes for index, block in enumerate(blocks) if index not in kept)
    ahead = next(block.nbytes for index, block in enumerate(blocks) if index not in kept)
    formula = stored * (size - 1) / size  # of docs/devices.md
    assert (sent + ahead * (size - 1)) / size == gathered_bytes(work, resident) == formula


def of_size(job, published_vae, height, width, stills=False):
    base, weights = read_vae_dims(published_vae)
    size = {"height": height, "width": width, "vae_base_dim": base, "vae_weights": weights}
    return dataclasses.replace(job.workload, stills=stills, **size)


@pytest.mark.parametrize("tile", [None, (360, 1280), (90, 1280)])
def test_decoding(published_vae, job, tile):
    work = of_size(job, published_vae, 720, 1280)
    vae = WanVAE(published_vae, torch.device("meta"), torch.bfloat16, tile)
    with CountingAllocator() as counted:
        for pixels in vae.decode(torch.empty(16, 3, work.height // 8, work.width // 8, device="meta")):
            del pixels
    expected = vae_bytes(work, "decode", "bfloat16", tile)
    assert counted.peak + work.vae_weights * BYTES["bfloat16"] == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("tile", [None, (90, 1280)])
@pytest.mark.parametrize("size", [2, 4])
def test_decoding_on_several_devices(published_vae, job, size, tile):
    """The second of them, which has neighbours above and, among four, below."""
    work = dataclasses.replace(of_size(job, published_vae, 720, 1280), devices=size)
    vae = WanVAE(published_vae, torch.device("meta"), torch.bfloat16, tile, None, Echo(1, size, torch.device("meta")))
    with CountingAllocator() as counted:
        for pixels in vae.decode(torch.empty(16, 3, work.height // 8, work.width // 8, device="meta")):
            assert not pixels.numel()
    expected = vae_bytes(work, "decode", "bfloat16", tile)
    assert counted.peak + work.vae_weights * BYTES["bfloat16"] == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("tile", [None, (360, 1280), (90, 1280)])
def test_encoding(published_vae, job, tile):
    work = of_size(job, published_vae, 720, 1280)
    vae = WanVAE(published_vae, torch.device("meta"), torch.float32, tile)
    with CountingAllocator() as counted:
        vae.encode(torch.empty(3, 9, work.height, work.width, device="meta"))
    expected = vae_bytes(work, "encode", "float32", tile)
    assert counted.peak + work.vae_weights * BYTES["float32"] == pytest.approx(expected, rel=0.03)


def test_encoding_an_image(published_vae, job):
    """Small: without a device, attention makes a matrix of scores, which a large image would be outweighed by."""
    work = of_size(job, published_vae, 256, 384, stills=True)
    vae = WanVAE(published_vae, torch.device("meta"), torch.float32)
    with CountingAllocator() as counted:
        vae.encode(torch.empty(3, 1, work.height, work.width, device="meta"))
    expected = vae_bytes(work, "encode", "float32") - work.vae_weights * BYTES["float32"]
    assert 0.75 * expected < counted.peak < 1.03 * expected


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_what_the_autoencoder_remembers(published_vae, job, monkeypatch, way):
    work = of_size(job, published_vae, 720, 1280)
    kept, keep = {}, Memory.keep

    def counted(self, frames, *layer):
        kept[layer] = frames.nbytes
        keep(self, frames, *layer)

    monkeypatch.setattr(Memory, "keep", counted)
    vae = WanVAE(published_vae, torch.device("meta"), torch.bfloat16)
    if way == "decode":
        for pixels in vae.decode(torch.empty(16, 2, 90, 160, device="meta")):
            del pixels
    else:
        vae.encode(torch.empty(3, 5, 720, 1280, device="meta"))
    assert sum(kept.values()) == pytest.approx(vae_memory_bytes(work, way, "bfloat16"), rel=0.02)


def test_an_image_leaves_nothing_to_remember(published_vae, job, monkeypatch):
    monkeypatch.setattr(Memory, "_place", lambda *_: pytest.fail("something is kept"))
    WanVAE(published_vae, torch.device("meta")).encode(torch.empty(3, 1, 64, 96, device="meta"))
    assert vae_memory_bytes(of_size(job, published_vae, 64, 96, stills=True), "encode", "float32") == 0
