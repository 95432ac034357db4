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


@pytest.mark.parametrize(("name", "index"), [("cuda:1", 1), ("cuda:0", 0), ("cuda", 1), (None, 1)])
def test_the_chosen_card_is_the_threads_own(monkeypatch, name, index):
    """Whatever measures, plans or runs on it without naming it means this one."""
    monkeypatch.setenv(OLD, "")
    current = [1]
    monkeypatch.setattr(
        torch,
        "cuda",
        SimpleNamespace(
            is_available=lambda: True,
            device_count=lambda: 2,
            current_device=lambda: current[0],
            set_device=lambda device: current.__setitem__(0, device.index),
        ),
    )
    assert choose_device(name) == torch.device("cuda", index)
    assert current == [index]


def test_a_run_on_the_cpu_leaves_the_card_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("it was set"))
    assert choose_device("cpu") == torch.device("cpu")
