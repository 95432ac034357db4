"""A process of a job, seen from the server: its events as they come, and ways to stop it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from skyrun.errors import FAILED
from skyrun.web.folder import Folder
from skyrun.web.jobs import Job

_LONGEST = 1 << 22  # bytes of a line
_PASSING = "block_done"  # superseded by the next one, so it is not kept

# Ctrl-C in the terminal of the server is for the server alone, which then stops its processes.
APART: dict[str, Any] = (
    {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    if os.name == "nt"
    else {"start_new_session": True}
)


class Work:
    """The process that makes the clip of a job."""

    def __init__(self, folder: Folder, job: Job, on: Callable[[dict[str, Any]], None]) -> None:
        self._folder, self._job, self._on = folder, job, on
        self._process: asyncio.subprocess.Process | None = None
        self._stopped = False

    async def run(self) -> dict[str, Any] | None:
        """Run it to its end. Returns None if the clip is made, else message, hint and code of what went wrong."""
        place = self._folder.jobs / self._job.id
        place.mkdir(exist_ok=True)
        with open(place / "log.txt", "ab") as log, open(place / "events.jsonl", "a", encoding="utf-8") as events:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "skyrun.web.worker", str(self._folder.root), self._job.id),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self._folder.root,
                limit=_LONGEST,
                **APART,
            )
            if self._stopped:
                self.stop()
            last = await self._listen(events)
        code = await self._process.wait()
        if last.get("event") == "result":
            return None
        if last.get("event") == "error":
            return {name: last[name] for name in ("message", "hint", "code")}
        return _ended(code)

    async def _listen(self, events: TextIO) -> dict[str, Any]:
        """Hand every event on. Returns the result or the error, whichever came."""
        assert self._process is not None and self._process.stdout is not None
        last: dict[str, Any] = {}
        while line := await self._process.stdout.readline():
            try:
                event = json.loads(line)
            except ValueError:  # cut off, because the process was killed
                continue
            if event.get("event") != _PASSING:
                with suppress(OSError):  # a full disk ends no run
                    events.write(line.decode())
                    events.flush()
            if event.get("event") in ("result", "error"):
                last = event
            self._on(event)
        return last

    def stop(self) -> None:
        """Let it stop as after Ctrl-C, which keeps what is finished."""
        self._stopped = True
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def kill(self) -> None:
        """End it at once. What was not saved is lost."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                if os.name == "nt":
                    self._process.kill()
                else:  # with what it has started, such as a compiler
                    os.killpg(self._process.pid, signal.SIGKILL)


def _ended(code: int) -> dict[str, Any]:
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    hint = "the system kills what takes more memory than there is; resume goes on from the last saved step"
    return {"message": f"the process of the clip ended {how} and said nothing", "hint": hint, "code": FAILED}
