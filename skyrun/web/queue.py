"""The queue: jobs in files, one clip at a time on a device, and whoever listens to what changes."""

import asyncio
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from skyrun.web.folder import Folder, Refused
from skyrun.web.jobs import CANCELLED, DONE, FAILED, PAUSED, RUNNING, STOPPING, WAITING, Job
from skyrun.web.process import Work

_APART = 0.1  # seconds between two messages about one job
_LEAST_GAP = 1e-6  # between two places in the queue, before all are numbered anew
CLIPS = "clips"  # what changed when a clip came or went


class Listener:
    """What has changed since a client was told last. A slow client is told once of many changes."""

    def __init__(self) -> None:
        self._changed: dict[str, None] = {}
        self._event = asyncio.Event()

    def add(self, what: str) -> None:
        """Note that a job, or the list of clips, has changed."""
        self._changed[what] = None
        self._event.set()

    async def wait(self, seconds: float) -> list[str]:
        """What has changed; nothing if nothing does within so many seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)
            await asyncio.sleep(_APART)
        self._event.clear()
        changed, self._changed = [*self._changed], {}
        return changed


class Queue:
    """All jobs of a folder. Only the event loop's thread uses it."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        found = {path: Job.read(path) for path in sorted(folder.jobs.glob("*.json"))}
        self.jobs = {job.id: job for job in found.values() if job is not None}
        self.unread = [path for path, job in found.items() if job is None]  # damaged, or of another version: left alone
        for job in [job for job in self.jobs.values() if job.at_work]:  # its process is gone, it goes on from there
            job.status = WAITING
            self._put_first(job)
        self.closed = asyncio.Event()
        self._listeners: set[Listener] = set()
        self._works: dict[str, Work] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._next: dict[str, str] = {}  # what a job that is stopping becomes

    def all(self) -> list[Job]:
        """At work first, then those that wait in their order, then the others, the latest first."""
        rank = {RUNNING: 0, STOPPING: 0, WAITING: 1, PAUSED: 1}
        return sorted(
            self.jobs.values(),
            key=lambda job: (rank.get(job.status, 2), job.order if job.status in rank else -job.order),
        )

    def job(self, id: str) -> Job:
        """The job of an id. Raises Refused (404) if there is none."""
        if id not in self.jobs:
            raise Refused(404, f"there is no job {id!r}", "GET /api/jobs lists them")
        return self.jobs[id]

    @property
    def busy(self) -> bool:
        """Whether a process is at work."""
        return bool(self._works)

    def add(self, values: dict[str, Any]) -> Job:
        """Put a clip at the end of the queue. Raises Refused (409) if its name is taken."""
        clip = values.pop("output", None) or self._free_name(f"{values['task']}-{values['seed']}")
        if not self._is_free(clip):
            raise Refused(409, f"{clip} exists, or a job makes it", "choose another output", output=[f"{clip} exists"])
        job = Job.new(values, clip, max((job.order for job in self.jobs.values()), default=0.0) + 1)
        job.write(self.folder.jobs)
        self.jobs[job.id] = job
        self.tell(job.id)
        self._start()
        return job

    def _is_free(self, clip: str) -> bool:
        return self.folder.is_free(clip) and all(job.clip != clip for job in self.jobs.values() if job.status != DONE)

    def _free_name(self, stem: str) -> str:
        name, number = f"{stem}.mp4", 1
        while not self._is_free(name):
            name, number = f"{stem}-{number}.mp4", number + 1
        return name

    def move(self, id: str, position: int) -> Job:
        """Put a job that waits or is paused at a place among these, counted from 0."""
        job = self.job(id)
        others = [other for other in self.all() if other.status in (WAITING, PAUSED) and other is not job]
        if job.status not in (WAITING, PAUSED):
            raise Refused(409, f"the job is {job.status}", "only jobs that wait have a place in the queue")
        position = min(max(position, 0), len(others))
        before = others[position - 1].order if position else None
        after = others[position].order if position < len(others) else None
        if before is not None and after is not None:
            job.order = (before + after) / 2
        elif before is not None or after is not None:
            job.order = before + 1 if before is not None else (after or 0.0) - 1
        gaps = [abs(other - job.order) for other in (before, after) if other is not None]
        if min(gaps, default=1.0) < _LEAST_GAP:
            for number, other in enumerate([*others[:position], job, *others[position:]]):
                other.order = float(number)
                self._save(other)
        self._save(job)
        self._start()
        return job

    def pause(self, id: str) -> Job:
        """Stop a job, or keep one that waits from its turn."""
        job = self.job(id)
        if job.status == RUNNING:
            self._stop(job, PAUSED)
        elif job.status == WAITING:
            self._become(job, PAUSED)
        elif job.status != PAUSED:
            raise Refused(409, f"the job is {job.status}", "only a job that runs or waits can be paused")
        return job

    def resume(self, id: str) -> Job:
        """Let a job wait for its turn again, which goes on from its last finished step."""
        job = self.job(id)
        if job.status in (PAUSED, FAILED, CANCELLED):
            job.error = None
            self._become(job, WAITING)
            self._start()
        elif job.status not in (WAITING, RUNNING):
            raise Refused(409, f"the job is {job.status}", "POST .../again makes its clip anew")
        return job

    def cancel(self, id: str) -> Job | None:
        """Stop a job that runs, or remove one that does not. Returns None if it was removed.

        A job that is stopping already is ended at once.
        """
        job = self.job(id)
        if job.status == RUNNING:
            self._stop(job, CANCELLED)
        elif job.status == STOPPING:
            self._next[id] = CANCELLED
            self._works[id].kill()
        else:
            self._remove(job)
            return None
        return job

    def forget(self, clip: str) -> None:
        """Remove the finished job of a clip that is deleted."""
        for job in [job for job in self.jobs.values() if job.clip == clip and job.status == DONE]:
            self._remove(job)
        self.tell(CLIPS)

    def _remove(self, job: Job) -> None:
        (self.folder.jobs / f"{job.id}.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder.jobs / job.id, ignore_errors=True)
        if job.status != DONE:
            for path in [*self.folder.beside(self.folder.root / job.clip)]:
                path.unlink(missing_ok=True)
        del self.jobs[job.id]
        self.tell(job.id)

    def _start(self) -> None:
        """Start what may start."""
        for job in self.all():
            if job.status == WAITING and not self.closed.is_set() and self._is_device_free(job):
                task = asyncio.create_task(self._work(job))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _is_device_free(self, job: Job) -> bool:
        """Whether no job runs on the same device. One that names none may take any."""
        mine, taken = _device(job), [_device(self.jobs[id]) for id in self._works]
        return not taken or (mine != "" and "" not in taken and mine not in taken)

    async def _work(self, job: Job) -> None:
        if job.id in self._works or job.status != WAITING or not self._is_device_free(job):
            return
        work = self._works[job.id] = Work(self.folder, job, lambda event: self._took(job, event))
        begun = time.time()
        job.started, job.ended, job.error = job.started or begun, None, None
        job.progress.stage, job.progress.left = "", None
        self._become(job, RUNNING)
        try:
            error = await work.run()
        except (OSError, ValueError) as failure:
            error = {
                "message": f"the process of the clip failed: {failure}",
                "hint": "check memory and disk",
                "code": 1,
            }
        del self._works[job.id]
        after = self._next.pop(job.id, "")
        job.ended, job.took = time.time(), job.took + time.time() - begun
        if error is None:
            self._become(job, DONE)
            self.tell(CLIPS)
        elif after:
            self._become(job, after)
        else:
            job.error = error
            self._become(job, FAILED)
        self._start()

    def _took(self, job: Job, event: dict[str, Any]) -> None:
        job.progress.take(event)
        self.tell(job.id)

    def _stop(self, job: Job, then: str) -> None:
        self._next[job.id] = then
        self._works[job.id].stop()
        self._become(job, STOPPING)

    def _become(self, job: Job, status: str) -> None:
        job.status = status
        self._save(job)

    def _save(self, job: Job) -> None:
        with suppress(OSError):  # on a full disk the queue goes on in memory
            job.write(self.folder.jobs)
        self.tell(job.id)

    def _put_first(self, job: Job) -> None:
        job.order = min(other.order for other in self.jobs.values()) - 1

    def begin(self) -> None:
        """Start to work."""
        self._start()

    async def close(self, seconds: float = 60.0) -> None:
        """Stop what runs, so that it waits for the next start, and send every listener away."""
        self.closed.set()
        for job in [self.jobs[id] for id in self._works if self.jobs[id].status == RUNNING]:
            self._put_first(job)
            self._stop(job, WAITING)
        self.tell("")
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        for work in self._works.values():
            work.kill()

    def tell(self, what: str) -> None:
        """Tell whoever listens that something has changed."""
        for listener in self._listeners:
            listener.add(what)

    @contextmanager
    def listening(self) -> Iterator[Listener]:
        """A listener, as long as the block lasts."""
        listener = Listener()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def events_path(self, id: str) -> Path:
        """The file with the events of a job."""
        return self.folder.jobs / id / "events.jsonl"


def _device(job: Job) -> str:
    """The device that a job asks for; "" if it takes what there is, or several."""
    device = str(job.values.get("device") or "")
    return "" if job.values.get("devices", 1) != 1 else {"cuda": "cuda:0"}.get(device, device)
