"""Make many clips on several devices: each device makes whole clips, one after the other, with a worker of its own.

A clip that fails, or a worker that is lost, costs that clip only: for the next one a new worker starts.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

import torch

from skyrun.engine.clip import Result
from skyrun.engine.run import run_job
from skyrun.engine.together import workers
from skyrun.engine.worker import explained
from skyrun.errors import SkyrunError
from skyrun.events import Event, listen
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.planning.request import Request
from skyrun.presets import probe
from skyrun.presets.memory import GIB, PROCESS_BYTES

Prepare = Callable[[Request], tuple[Job, RunState | None] | None]


@dataclass(frozen=True)
class Told:
    """What happens with a clip. what: its job where it begins, events, and its result or an error at the end; None if
    there is nothing to do for it."""

    clip: int
    device: int
    what: Job | Event | Result | SkyrunError | None


class SideBySide:
    """Devices that make the clips of a list. They end with the block in which they are used."""

    def __init__(
        self,
        prepare: Prepare,
        requests: Mapping[int, Request],
        devices: Mapping[int, torch.device],
        sharing: int,
        previews: bool = False,
    ) -> None:
        """
        Args:
            prepare: Makes a job and the state of an earlier run; None if there is nothing to do.
            requests: The clips, by their numbers.
            devices: The devices of this process, by their numbers.
            sharing: How many devices share the machine, with those of other processes.
            previews: Whether an image is drawn after every step.
        """
        self._prepare, self._devices, self._sharing, self._previews = prepare, devices, sharing, previews
        self._waiting: SimpleQueue[tuple[int, Request]] = SimpleQueue()
        for entry in requests.items():
            self._waiting.put(entry)
        self._told: SimpleQueue[Told] = SimpleQueue()
        self._teams = {number: workers(1, device, number, sharing) for number, device in devices.items()}
        self._stopping = False
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in devices]

    def __enter__(self) -> "SideBySide":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        for team in self._teams.values():
            team.interrupt()
        for thread in self._threads:
            thread.join()

    def told(self) -> Iterator[Told]:
        """What happens, until all clips are made or have failed."""
        while True:
            try:
                yield self._told.get(timeout=0.2)
            except Empty:
                if not any(thread.is_alive() for thread in self._threads) and self._told.empty():
                    return

    def _work(self, device: int) -> None:
        """Make clips on a device until none is left."""
        with closing(self._teams[device]), suppress(Empty, KeyboardInterrupt):
            while not self._stopping:
                clip, request = self._waiting.get_nowait()
                try:
                    self._told.put(Told(clip, device, self._made(clip, request, device)))
                except Exception as error:
                    self._told.put(Told(clip, device, explained(error)))

    def _made(self, clip: int, request: Request, device: int) -> Result | None:
        free = (probe("cpu").ram_free - PROCESS_BYTES) / GIB / self._sharing
        limit = free if request.max_ram is None else min(free, request.max_ram)
        prepared = self._prepare(replace(request, devices=1, device=str(self._devices[device]), max_ram=limit))
        if prepared is None:
            return None
        job, state = prepared
        job = replace(job, request=replace(job.request, device=request.device, max_ram=request.max_ram))
        self._told.put(Told(clip, device, job))

        def tell(event: Event) -> None:
            if self._stopping:
                raise KeyboardInterrupt
            self._told.put(Told(clip, device, event))

        return listen(run_job(job, False, state, self._previews, self._teams[device]), tell)
