"""Runs in one process leave nothing behind: no open files, threads or tensors (benchmarks/soak.py makes 200)."""

import gc
import threading

import psutil
import pytest
import torch
from small_run import small_request

from skyrun import run
from skyrun.errors import SkyrunError
from skyrun.models.vae import WanVAE


def held():
    """Open files, threads, and bytes of all tensors."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.device.type == "cpu" and t.layout == torch.strided
    }
    return psutil.Process().num_fds(), threading.active_count(), sum(storages.values())


@pytest.mark.skipif(not hasattr(psutil.Process, "num_fds"), reason="counts file descriptors")
@pytest.mark.parametrize("fails", [False, True])
def test_runs_leave_nothing_behind(converted, tmp_path, monkeypatch, fails):
    request = small_request(tmp_path, converted("Q8_0"), steps=2)
    run(request)  # what is loaded once
    if fails:

        def decode(self, latents):
            raise SkyrunError("the disk went away", "plug it in")
            yield

        monkeypatch.setattr(WanVAE, "decode", decode)
    counts = []
    for _ in range(3):
        if fails:
            with pytest.raises(SkyrunError, match="went away"):
                run(request)
        else:
            run(request)
        counts.append(held())
    assert counts[1:] == counts[:1] * 2
