"""Requests to plan for without inputs, in a few words."""

from dataclasses import replace

from skyrun.planning.request import Request
from skyrun.planning.what_if import plan_request


def clip_of(task, resolution="480P", seconds=5.0, quant=None, model=None):
    """A clip of a task that is not made from anything yet."""
    return Request(task, "", resolution=resolution, seconds=seconds, quant=quant, model=model)


def plan_clip(request, hardware, prefer="quality", **limits):
    """The plan for it on a machine."""
    return plan_request(replace(request, prefer=prefer), hardware, **limits)
