"""What torch's allocator is told before CUDA starts, and which memory a stage reports."""

import os
from types import SimpleNamespace

import pytest
import torch

from skyrun.streaming import device as module
from skyrun.streaming.device import choose_device, peak_bytes, reset_peak

OLD, NEW = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
EXPANDS = "expandable_segments:True"


@pytest.mark.parametrize(
    ("torch_version", "platform", "given", "expected"),
    [
        ("2.7.1+cu126", "linux", {}, {OLD: EXPANDS}),
        ("2.8.0", "linux", {}, {OLD: EXPANDS}),
        ("2.10.0+cu128", "linux", {}, {NEW: EXPANDS}),
        ("2.13.0+cpu", "linux", {}, {NEW: EXPANDS}),
        ("2.13.0", "win32", {}, {}),
        ("2.13.0", "linux", {OLD: "backend:cudaMallocAsync"}, {OLD: "backend:cudaMallocAsync"}),
        ("2.8.0", "linux", {NEW: ""}, {NEW: ""}),
    ],
)
def test_free_memory_is_joined_unless_the_user_decides(monkeypatch, torch_version, platform, given, expected):
    for name in (OLD, NEW):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(module.sys, "platform", platform)
    choose_device("cpu")
    assert {name: os.environ[name] for name in (OLD, NEW) if name in os.environ} == given
    choose_device(None)
    found = {name: os.environ.pop(name) for name in (OLD, NEW) if name in os.environ}
    assert found == expected


def test_a_peak_is_what_is_reserved_and_what_lies_outside_of_torch(monkeypatch):
    now = SimpleNamespace(free=900, reserved=40, most=40)
    cuda = SimpleNamespace(
        mem_get_info=lambda device: (now.free, 1000),
        memory_reserved=lambda device: now.reserved,
        max_memory_reserved=lambda device: now.most,
        reset_peak_memory_stats=lambda device: setattr(now, "most", now.reserved),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    card = torch.device("cuda", 0)
    reset_peak(card)  # 60 outside
    now.free, now.reserved, now.most = 700, 240, 300
    assert peak_bytes(card) == 360
    now.free = 600  # 160 outside, by now
    assert peak_bytes(card) == 460
