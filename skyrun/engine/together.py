"""Run the pipeline of a job on several devices: in worker processes, of which rank 0 runs it and the others follow it.

What rank 0 finishes comes here with its events, so that nothing is lost with a worker.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import torch

from skyrun.engine.attempt import attempt
from skyrun.events import Event, Preview
from skyrun.parallel.group import Group
from skyrun.parallel.team import Done, Team
from skyrun.pipelines.stages import follow
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.presets.memory import CONTEXT_BYTES
from skyrun.streaming.device import vram_limited

_WORKER = "skyrun.engine.worker"


def workers(size: int, device: torch.device, first: int = 0, of: int = 0) -> Team:
    """A team of that many workers, one for each device of a type.

    Args:
        size: How many.
        device: A device of that type.
        first: The number of the first of their devices.
        of: How many workers share the machine, if there are others.
    """
    return Team(size, _WORKER, device.type, first, of)


@dataclass(frozen=True)
class Finished:
    """What is new in the state of rank 0. values: of its fields, by their names."""

    values: dict[str, Any]


@dataclass(frozen=True)
class Lead:
    """What rank 0 is sent: a job, and what is finished of it."""

    job: Job
    state: RunState

    def __call__(self, group: Group, send: Callable[[Any], None]) -> None:
        """Run the pipeline. Send its events, before each what is finished."""
        job, told = replace(self.job, device=group.device), _fields(self.state)

        def tell_state() -> None:
            nonlocal told
            before, told = told, _fields(self.state)
            new = {name: value for name, value in told.items() if value is not before[name]}
            if len(before["encoded"]) == len(told["encoded"]):
                del new["encoded"]
            if new:
                send(Finished(new))

        with vram_limited(group.device, job.plan.limit_bytes - CONTEXT_BYTES):
            for event in attempt(job, self.state):
                tell_state()
                send(replace(event, latents=event.latents.cpu()) if isinstance(event, Preview) else event)
            tell_state()
        group.hand_over(None)


def _fields(state: RunState) -> dict[str, Any]:
    return {**vars(state), "encoded": dict(state.encoded)}  # the one that grows


def do_as_told(group: Group, send: Callable[[Any], None]) -> None:
    """What the other ranks are sent: do what rank 0 hands over."""
    for _ in follow(group):
        pass


def attempt_together(team: Team, job: Job, state: RunState) -> Generator[Event, None, None]:
    """Do what the state does not have yet, on all devices of a team.

    Raises SkyrunError for a device that fails, OutOfMemory where memory runs out; all workers have ended then.

    Args:
        team: The workers. They stay.
        job: The job.
        state: What is finished; it gets what rank 0 finishes.
    """
    try:
        team.send(Lead(job, state), *[do_as_told] * (team.size - 1))
        for rank, message in team.messages():
            if isinstance(message, Finished):
                vars(state).update(message.values)
            elif rank == 0 and isinstance(message, Done):
                return
            elif not isinstance(message, Done):
                yield message
    except BaseException:
        team.close()
        raise
