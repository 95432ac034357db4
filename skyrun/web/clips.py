"""The gallery: the mp4 files of the folder with the settings inside them, and a picture of each."""

import asyncio
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from skyrun.errors import SkyrunError
from skyrun.kernels.files.atomic import replacing
from skyrun.web.folder import Folder, Refused
from skyrun.web.helped import Helper
from skyrun.web.queue import CLIPS, Queue
from skyrun.web.values import names_in

_LARGEST = 1 << 21  # bytes of what is known of a clip
_UNUSED = 24 * 3600.0  # seconds that an upload is kept which nothing refers to: a form may


class Clips:
    """What is known of each clip. The helper looks into new ones, one after the other."""

    def __init__(self, folder: Folder, helper: Helper, queue: Queue) -> None:
        self._folder, self._helper, self._queue = folder, helper, queue
        self._looking: asyncio.Task[None] | None = None

    def all(self) -> list[dict[str, Any]]:
        """Every clip, newest first. Of one that is new, `known` is false, and only name, bytes and time are there."""
        found = [self._described(path) for path in self._folder.clips()]
        if not all(clip["known"] for clip in found) and (self._looking is None or self._looking.done()):
            self._looking = asyncio.ensure_future(self._look())
        return found

    def poster(self, name: str) -> Path:
        """The picture of a clip. Raises Refused (404) if it is not drawn yet, or could not be."""
        path = _beside(self._folder.clip(name), self._folder, ".webp")
        if not path.is_file():
            raise Refused(404, f"{name} has no picture yet", "GET /api/clips has it drawn")
        return path

    def delete(self, name: str) -> None:
        """Delete a clip with its picture, and with what was uploaded for it and nothing else needs any more."""
        clip = self._folder.clip(name)
        if any(job.clip == name and job.at_work for job in self._queue.jobs.values()):
            raise Refused(409, f"a job makes {name}", "cancel that job first")
        for path in (clip, *(_beside(clip, self._folder, suffix) for suffix in (".webp", ".json"))):
            path.unlink(missing_ok=True)
        self._queue.forget(name)
        self.tidy()

    def tidy(self) -> None:
        """Delete uploads that no clip and no job refers to, and that are a day old."""
        if self._queue.unread:
            return  # they may refer to any of them
        used = {name for job in self._queue.jobs.values() for name in _names(job.values)}
        for path in self._folder.clips():
            described = self._described(path)
            if not described["known"]:
                return  # it may refer to any of them
            used |= _names(described["request"] or {})
        for path in self._folder.inputs.iterdir():
            if path.name not in used and path.stat().st_mtime < time.time() - _UNUSED:
                path.unlink(missing_ok=True)

    def _described(self, path: Path) -> dict[str, Any]:
        state = path.stat()
        facts = {"name": path.name, "bytes": state.st_size, "modified": state.st_mtime, "known": False}
        try:
            with open(_beside(path, self._folder, ".json"), "rb") as file:
                said: Any = json.loads(file.read(_LARGEST))
            if said.pop("of") != [state.st_mtime_ns, state.st_size]:
                return facts
            request = names_in(said.pop("request") or {}, self._folder) or None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return facts
        return {**said, **facts, "known": True, "request": request}

    async def _look(self) -> None:
        for path in self._folder.clips():
            if self._described(path)["known"]:
                continue
            picture = _beside(path, self._folder, ".webp")
            try:
                state = path.stat()
                seen = await self._helper.ask("poster", path=str(path), to=str(picture))
            except FileNotFoundError:
                continue
            except SkyrunError as error:
                seen = {"request": None, "problem": error.message}
            with replacing(_beside(path, self._folder, ".json"), private=True) as partial:
                partial.write_text(json.dumps({**seen, "of": [state.st_mtime_ns, state.st_size]}), "utf-8")
            self._queue.tell(CLIPS)


def _beside(clip: Path, folder: Folder, suffix: str) -> Path:
    """What is kept of a clip, under a name that any name of a clip can become."""
    return folder.posters / (hashlib.sha256(clip.name.encode("utf-8", "surrogateescape")).hexdigest()[:24] + suffix)


def _names(values: dict[str, Any]) -> set[str]:
    """All texts in the values of a request: names of uploads among them."""
    texts = [item for value in values.values() for item in (value if isinstance(value, (list, tuple)) else [value])]
    return {text for text in texts if isinstance(text, str)}
