"""Make a clip on several devices: in worker processes, of which rank 0 runs the job and the others follow it."""

from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from skyrun.engine.clip import Result
from skyrun.errors import SkyrunError
from skyrun.events import Event, Preview, listen
from skyrun.parallel.group import Group
from skyrun.parallel.team import Done, Team
from skyrun.pipelines.stages import follow
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job

RunJob = Callable[[Job, bool, RunState | None, bool], Generator[Event, None, Result]]

_WORKER = "skyrun.engine.worker"


def workers(size: int, device: torch.device, first: int = 0, of: int = 0) -> Team:
    """Start that many workers, one for each device of a type.

    Args:
        size: How many.
        device: A device of that type.
        first: The number of the first of their devices.
        of: How many workers share the machine, if there are others.
    """
    return Team(size, _WORKER, device.type, first, of)


@dataclass(frozen=True)
class Make:
    """What rank 0 is sent: `run_job` and its arguments."""

    run_job: RunJob
    job: Job
    keep_frames: bool
    state: RunState | None
    previews: bool

    def __call__(self, group: Group, send: Callable[[Any], None]) -> Result:
        """Make the clip, and send its events."""

        def tell(event: Event) -> None:
            send(replace(event, latents=event.latents.cpu()) if isinstance(event, Preview) else event)

        job = replace(self.job, device=group.device)
        result = listen(self.run_job(job, self.keep_frames, self.state, self.previews), tell)
        group.hand_over(None)
        return result


def do_as_told(group: Group, send: Callable[[Any], None]) -> None:
    """What the other ranks are sent: do what rank 0 hands over."""
    with torch.inference_mode():
        for _ in follow(group):
            pass


def run_together(
    run_job: RunJob, job: Job, keep_frames: bool, state: RunState | None, previews: bool, team: Team | None = None
) -> Generator[Event, None, Result]:
    """Run a job on as many devices as the job's request says.

    Raises SkyrunError for a device that fails; all workers have ended then.

    Args:
        run_job: Runs a job in one process, or as rank 0.
        job: The job to run.
        keep_frames: Whether the result contains the frames.
        state: The state of an earlier run to resume from.
        previews: Whether an image is drawn after every step.
        team: Workers that are there already, and stay.
    """
    with closing(workers(job.request.devices, job.device)) if team is None else nullcontext(team) as team:
        followers = [do_as_told] * (team.size - 1)
        try:
            team.send(Make(run_job, job, keep_frames, state, previews), *followers)
            for rank, message in team.messages():
                if rank == 0 and isinstance(message, Done):
                    result: Result = message.value
                    return result
                if not isinstance(message, Done):
                    yield message
        except SkyrunError:
            team.stop(at_once=True)
            raise
        except BaseException:
            team.stop(at_once=False)
            raise
    raise AssertionError("the messages of a team have no end")
