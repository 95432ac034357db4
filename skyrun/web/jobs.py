"""A job: a clip that was asked for, a JSON file that holds it, and what its events say about how far it is."""

import json
import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from skyrun.kernels.files.atomic import replacing

WAITING, RUNNING, STOPPING, PAUSED = "waiting", "running", "stopping", "paused"
DONE, FAILED, CANCELLED = "done", "failed", "cancelled"
_AT_WORK = (RUNNING, STOPPING)
_LARGEST = 1 << 20  # bytes of a file
_MOST_NOTICES = 20


@dataclass
class Progress:
    """How far a job is, by its events.

    stage, done, total, unit: of the running stage. block, blocks: of the running step. part: the window, from 1 on, and
    how many there are. begun: when it was planned. left: seconds until the clip is done, at the time `told`.
    previews: how many were drawn. plan: what was decided. seconds: of each stage that is over.
    """

    stage: str = ""
    done: float = 0
    total: float = 0
    unit: str = ""
    block: int = 0
    blocks: int = 0
    part: list[int] | None = None
    begun: float | None = None
    left: float | None = None
    told: float | None = None
    previews: int = 0
    plan: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def take(self, event: dict[str, Any]) -> None:
        """Take an event into account, as `--json` prints it."""
        name = event.get("event")
        if name == "plan":
            plan = event["plan"]
            self.plan = {key: event[key] for key in ("size", "frames", "windows", "tokens")}
            self.plan |= {key: plan[key] for key in ("device_name", "weight_type", "dtype", "seconds", "step_seconds")}
            self.plan["peak_bytes"] = max(_bytes_of(stage, plan) for stage in plan["stages"])
            self.notices = [*event["notices"]]
            self.begun = self.told = time.time()
            self.left = plan["seconds"]
        elif name == "stage_started":
            self.stage, self.unit, self.part = event["stage"], event["unit"], event["part"]
            self.done, self.total, self.block, self.blocks = event["before"], event["total"], 0, 0
        elif name == "block_done":
            self.block, self.blocks = event["index"] + 1, event["total"]
        elif name == "progress":
            self.done, self.block = event["done"], 0
        elif name == "preview":
            self.previews += 1
        elif name == "time_left":
            self.left, self.told = event["seconds"], time.time()
        elif name == "stage_ended":
            self.seconds[event["stage"]] = round(self.seconds.get(event["stage"], 0) + event["seconds"], 3)
        elif name in ("notice", "replanned"):
            self.notices = [*self.notices, event["text"]][-_MOST_NOTICES:]


def _bytes_of(stage: dict[str, Any], plan: dict[str, Any]) -> int:
    return int(stage["device_bytes"] if plan["device"] == "cuda" else stage["host_bytes"])


@dataclass
class Job:
    """A clip that was asked for.

    values: fields of its Request, files by their names in the folder. order: its place among those that wait.
    clip: the name of the mp4. took: seconds of work on it so far. error: message, hint and code of a failure.
    """

    id: str
    values: dict[str, Any]
    clip: str
    order: float
    status: str = WAITING
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    took: float = 0.0
    error: dict[str, Any] | None = None
    progress: Progress = field(default_factory=Progress)

    @classmethod
    def new(cls, values: dict[str, Any], clip: str, order: float) -> "Job":
        """A job that waits. Its id is ours, and sorts by time."""
        return cls(f"{int(time.time()):x}-{secrets.token_hex(4)}", values, clip, order, created=time.time())

    @classmethod
    def read(cls, path: Path) -> "Job | None":
        """The job in a file; None if it is damaged."""
        try:
            with open(path, "rb") as file:
                said: Any = json.loads(file.read(_LARGEST))
            json.dumps(said, ensure_ascii=False).encode()  # clients cannot be sent half of a character
            said["progress"] = Progress(**said["progress"])
            job = cls(**said)
            whole = job.id == path.stem and isinstance(job.values, dict) and job.order + job.took >= job.order
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return job if whole and isinstance(job.clip, str) else None

    @property
    def at_work(self) -> bool:
        """Whether a process works on it."""
        return self.status in _AT_WORK

    def write(self, folder: Path) -> None:
        """Write the file of the job, whole or not at all."""
        with replacing(folder / f"{self.id}.json", private=True) as partial:
            partial.write_text(json.dumps(asdict(self)), "utf-8")

    def as_json(self) -> dict[str, Any]:
        """What clients see."""
        shown = asdict(self)
        return {"id": shown.pop("id"), "status": shown.pop("status"), "request": shown.pop("values")} | shown
