"""Make clips on several devices at the same time, a clip on each, and show them line by line."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from skyrun.cli.console import emit, say, show_error
from skyrun.engine.checkpoint import kept
from skyrun.engine.clip import Result
from skyrun.engine.side_by_side import SideBySide, Told
from skyrun.errors import SkyrunError
from skyrun.events import Notice, Preview, Progress, StageEnded, as_json
from skyrun.media.image import write_image
from skyrun.parallel.group import Group, apart, here, stated_place
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.planning.request import Request
from skyrun.streaming.device import choose_device
from skyrun.units import duration


@dataclass(frozen=True)
class SeveralClips:
    """At least as many clips as there are devices. Each process of torch's launcher makes every size-th of them.

    prepare: makes the job of a request and the state of an earlier run; None if the clip is there already. finish:
    called with the job of each clip that is made. Both are functions of a module, and get the arguments too: json and
    preview are used here.
    """

    requests: Sequence[Request]
    prepare: Callable[[Request, Namespace], tuple[Job, RunState | None] | None]
    finish: Callable[[Job, Namespace], None]
    arguments: Namespace
    plan: ClassVar[None] = None

    def make(self) -> list[Request]:
        """Make the clips. Returns those that failed."""
        group = here()
        group.hand_over(self)
        return self.follow(group)

    def follow(self, group: Group) -> list[Request]:
        """Make the clips of this process, and wait for those of the others. Returns all that failed."""
        with apart():
            failed = self._made(range(group.rank, len(self.requests), group.size), group.device)
        return [self.requests[clip] for clip in sorted(set().union(*group.collected(failed)))]

    def _made(self, clips: Sequence[int], device: torch.device) -> set[int]:
        """Make some of the clips. Returns the numbers of those that failed."""
        arguments, failed, jobs = self.arguments, set[int](), dict[int, Job]()
        if (place := stated_place()) is not None:
            devices, sharing = {place.local_rank: device}, place.local_size
        else:
            sharing = self.requests[0].devices
            kind = choose_device(self.requests[0].device, sharing).type
            devices = {n: torch.device(f"cuda:{n}" if kind == "cuda" else "cpu") for n in range(sharing)}
        requests = {clip: self.requests[clip] for clip in clips}
        with SideBySide(
            lambda request: self.prepare(request, arguments), requests, devices, sharing, arguments.preview is not None
        ) as making:
            for told in making.told():
                _show(told, len(self.requests), jobs, arguments.json)
                try:
                    if isinstance(told.what, SkyrunError):
                        failed.add(told.clip)
                    elif isinstance(told.what, Result):
                        self.finish(jobs[told.clip], arguments)
                    elif isinstance(told.what, Preview) and told.what.image is not None:
                        write_image(arguments.preview, told.what.image)
                except SkyrunError as error:  # a picture of it cannot be drawn
                    show_error(error, arguments.json)
                    failed.add(told.clip)
        return failed


def _show(told: Told, clips: int, jobs: dict[int, Job], as_json_too: bool) -> None:
    """Say what matters of a clip, with its number; as JSON say all."""
    name, what, values = f"clip {told.clip + 1} of {clips}, device {told.device}", told.what, None
    if isinstance(what, Job):
        jobs[told.clip] = what
        values = {"event": "plan"} | what.as_json()
        notes = "".join(f"\nnote: {notice}" for notice in what.notices)
        say(f"{name}: {what.request.output}, {duration(what.plan.seconds)} expected{notes}")
    elif isinstance(what, Result):
        seconds: dict[str, float] = {}
        for stage in what.stages:
            seconds[stage.stage] = round(seconds.get(stage.stage, 0.0) + stage.seconds, 3)
        values = {"event": "result", "output": str(what.output), "seed": what.request.seed, "seconds": seconds}
        say(f"{name}: {what.output} in {duration(sum(seconds.values()))}")
    elif isinstance(what, SkyrunError):
        say(f"{name}:")
        show_error(what, as_json_too)
        if told.clip in jobs and (left := kept(jobs[told.clip].request)) is not None:
            say(f"what is finished is kept; go on with: {left.command}")
    elif what is not None:
        values = as_json(what)
        if isinstance(what, Progress) and what.stage == "denoise":
            say(f"{name}: step {what.done:.0f} of {jobs[told.clip].request.passes}")
        elif isinstance(what, StageEnded):
            say(f"{name}: {what.stage} done in {duration(what.seconds)}")
        elif isinstance(what, Notice):
            say(f"{name}: {what.text}")
    if as_json_too and values is not None:
        emit(values | {"clip": told.clip + 1, "device": told.device})
