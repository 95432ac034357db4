"""GGUF files as other programs write them: they run as they are, like our own file of the same values, and convert."""

import shutil

import pytest
import torch

from skyrun import Request, run
from skyrun.kernels import dequantize
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.kernels.name_tables import WAN_TRANSFORMER
from skyrun.models.dit_header import read_dims
from skyrun.quant import convert, quantize
from skyrun.quant.sources.families import find_families


def mixed_type(name):
    """A Q4_K_M as ComfyUI-GGUF mixes it: other types for values and the second half of the feed-forward."""
    if not name.startswith("blocks.") or not name.endswith(".weight") or "norm" in name:
        return "BF16" if name.endswith(".weight") and "norm" not in name and "patch" not in name else "F32"
    return "Q5_K" if ".v." in name else "Q8_0" if "ffn.2" in name else "Q4_K"


@pytest.fixture(scope="module")
def own(converted, goldens):
    """Tensors by our names in our order, the matrices as blocks; vectors have values that Q8_0 holds."""
    source = open_gguf(next(converted("F32").glob("SkyReels*.gguf")))
    values = {}
    for name, info in source.tensors.items():
        value = dequantize(torch.frombuffer(source.read(info), dtype=torch.uint8), "F32").view(info.shape)
        kind = mixed_type(name)
        if kind == "Q5_K":
            value = goldens("quant/Q5_K")["dit.bytes"].reshape(-1, 176).repeat(2, 1)
        elif kind != "F32":
            value = quantize(value, kind)
        elif name != "patch_embedding.weight":
            value = dequantize(quantize(value.view(1, -1), "Q8_0"), "Q8_0").view(info.shape)
        values[name] = value
    return values


def diffusers(name):
    names = {row.name(0): row.name(1) for row in WAN_TRANSFORMER.expand(2)}
    return names[name]


def folded(name, tensor):
    """Axes of length 1 dropped, five axes folded into four."""
    if name == "patch_embedding.weight":
        return tensor.flatten(0, 1)
    return tensor.squeeze(0) if name.endswith("modulation") else tensor


def vectors(kind):
    """Another type for what is F32 in our files."""
    return lambda name, old: kind if old == "F32" and name != "patch_embedding.weight" else old


FILES = {
    "ours": {},
    "sorted": {"order": sorted},
    "backwards": {"order": lambda names: list(names)[::-1]},
    "comfy": {"rename": "model.diffusion_model.{}".format},
    "another prefix": {"rename": "dit.net.{}".format},
    "diffusers": {"rename": diffusers},
    "prefixed diffusers": {"rename": lambda name: "transformer." + diffusers(name)},
    "folded": {"reshape": folded},
    "half": {"retype": vectors("F16")},
    "quantized vectors": {"order": sorted, "reshape": folded, "retype": vectors("Q8_0")},
}
LIMITS = {"half": 1e-3}  # rounded once more


@pytest.fixture(scope="module")
def files(own, write_gguf, tmp_path_factory):
    """One file of each kind, all of the same values."""
    metadata = {"general.architecture": "wan", "general.quantization_version": 2, "general.file_type": 15}
    folder = tmp_path_factory.mktemp("community")

    def write(kind, order=list, rename=str, reshape=lambda _, t: t, retype=lambda _, kind: kind):
        tensors = {rename(name): reshape(name, own[name]) for name in order(own)}
        types = {rename(name): retype(name, mixed_type(name)) for name in own}
        return write_gguf(folder / f"{kind}.gguf", tensors, metadata, types)

    return {kind: write(kind, **changes) for kind, changes in FILES.items()}


@pytest.fixture(scope="module")
def denoised(converted, goldens, tmp_path_factory):
    """The latents of a short run of a file."""

    def make(file):
        model = tmp_path_factory.mktemp("model")
        for part in (*converted("F32").glob("umt5*"), *converted("F32").glob("*.safetensors"), file):
            shutil.copy(part, model)
        image = goldens("e2e/r2v_1img/golden").folder / "ref0.png"
        request = Request("r2v", "a sea", (image,), model=model, size=(32, 32), frames=1, steps=1, seed=1, device="cpu")
        return run(request).latents

    return make


@pytest.fixture(scope="module")
def reference(files, denoised):
    return denoised(files["ours"])


@pytest.mark.parametrize("kind", ["backwards", "comfy", "prefixed diffusers", "half", "quantized vectors"])
def test_a_file_of_others_runs_like_ours(files, denoised, reference, kind):
    assert read_dims(open_gguf(files[kind])) == read_dims(open_gguf(files["ours"]))
    difference = (denoised(files[kind]) - reference).norm() / reference.norm()
    assert float(difference) < LIMITS.get(kind, 1e-5)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_others_is_a_source(files, kind):
    (ours,), (theirs,) = (find_families(files[name]).families for name in ("ours", kind))
    assert theirs.task == ("r2v" if "diffusers" in kind else "")
    for expected, got in zip(ours.tensors, theirs.tensors, strict=True):
        assert (got.name, got.shape) == (expected.name, expected.shape)
        assert torch.allclose(
            got.source.read().flatten(), expected.source.read().flatten(), rtol=LIMITS.get(kind, 1e-6)
        )


def test_a_file_of_others_becomes_one_of_ours(files, denoised, reference, tmp_path):
    convert(files["quantized vectors"], tmp_path, "F32")
    (written,) = tmp_path.iterdir()
    assert float((denoised(written) - reference).norm() / reference.norm()) < 1e-4
