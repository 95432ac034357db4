"""The server's side of the helper: starts it when there is a question, and ends it after a while of rest."""

import asyncio
import json
import subprocess
import sys
from contextlib import suppress
from itertools import count
from typing import Any

from skyrun.errors import FAILED
from skyrun.web.folder import Refused
from skyrun.web.process import APART

URGENT, USUAL = 0, 1  # a plan goes before pictures of clips
_LONGEST = 1 << 24  # bytes of an answer


class Helper:
    """Asks a process of its own, one question at a time. rest: seconds after which an idle one ends."""

    def __init__(self, rest: float = 60.0) -> None:
        self._rest = rest
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Condition()
        self._waiting: list[tuple[int, int]] = []
        self._number = count()
        self._asking = False
        self._end: asyncio.TimerHandle | None = None

    async def ask(self, question: str, urgency: int = USUAL, **arguments: Any) -> dict[str, Any]:
        """The answer to a question. Raises Refused (400) with what the helper says is wrong."""
        ticket = (urgency, next(self._number))
        self._waiting.append(ticket)
        try:
            async with self._turn:
                await self._turn.wait_for(lambda: not self._asking and min(self._waiting) == ticket)
                self._asking = True
        finally:
            self._waiting.remove(ticket)
        task = asyncio.ensure_future(self._exchange({"ask": question, **arguments}))
        task.add_done_callback(lambda done: asyncio.ensure_future(self._next()))
        try:
            said = await asyncio.shield(task)  # a client that goes away does not cut a question in two
        except (OSError, ValueError, asyncio.IncompleteReadError) as failure:
            raise Refused(
                500, f"the helper ended: {failure}", "ask again; the terminal of the server may say more"
            ) from failure
        if "error" in said:
            error = said["error"]
            refusal = Refused(500 if error["code"] == FAILED else 400, error["message"], error["hint"])
            refusal.code = error["code"]
            raise refusal
        answer: dict[str, Any] = said["answer"]
        return answer

    async def _next(self) -> None:
        async with self._turn:
            self._asking = False
            self._turn.notify_all()
        if self._end is not None:
            self._end.cancel()
        self._end = asyncio.get_running_loop().call_later(self._rest, self.close)

    async def _exchange(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "skyrun.web.helper"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                limit=_LONGEST,
                **APART,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readuntil()
        except BaseException:
            self._process = None
            with suppress(ProcessLookupError):
                process.kill()
            raise
        said: dict[str, Any] = json.loads(line)
        return said

    @property
    def running(self) -> bool:
        """Whether there is a process now."""
        return self._process is not None

    def close(self) -> None:
        """End the process, unless it is at work on an answer."""
        if self._process is not None and not self._asking:
            process, self._process = self._process, None
            if process.stdin is not None:
                process.stdin.close()
            with suppress(ProcessLookupError):
                process.terminate()
