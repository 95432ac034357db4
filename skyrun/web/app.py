"""The routes of the page and of the API. docs/web.md lists them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from skyrun.errors import SkyrunError
from skyrun.web import values
from skyrun.web.clips import Clips
from skyrun.web.folder import Folder, Refused
from skyrun.web.form import form
from skyrun.web.guard import Answer, Guard, parsed, refused
from skyrun.web.helped import URGENT, Helper
from skyrun.web.jobs import Job
from skyrun.web.queue import CLIPS, Queue
from skyrun.web.uploads import TYPES, keep

PAGE = Path(__file__).parent / "page"
_PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_ALIVE = 15.0  # seconds between two signs of life of a stream
_FILES = {"images": "image", "video": "video", "audio": "audio"}  # of a form, and what must be in them
_MOST_PARTS = 200
_LATER = ("prompt", "images", "video", "audio")  # fields that a plan can do without
_NEW = {"cache-control": "no-cache"}
_FINAL = ("done", "failed", "cancelled")


class Page:
    """The handlers of all routes."""

    def __init__(self, folder: Folder, rest: float) -> None:
        self.folder, self.helper = folder, Helper(rest)
        self.queue = Queue(folder)
        self.clips = Clips(folder, self.helper, self.queue)
        self._free: dict[str, int] | None = None  # memory, when no clip was made

    def routes(self) -> list[Route]:
        """The table of routes."""
        get, post = ["GET"], ["POST"]
        return [
            Route("/", self.page, methods=get),
            Route("/page/{name}", self.page, methods=get),
            Route("/api/form", self.form, methods=get),
            Route("/api/plan", self.plan, methods=get),
            Route("/api/files", self.upload, methods=post),
            Route("/api/files/{name:path}", self.file, methods=get),
            Route("/api/events", self.events, methods=get),
            Route("/api/jobs", self.all_jobs, methods=get),
            Route("/api/jobs", self.add, methods=post),
            Route("/api/jobs/{id}", self.one_job, methods=get),
            Route("/api/jobs/{id}", self.cancel, methods=["DELETE"]),
            Route("/api/jobs/{id}", self.move, methods=["PATCH"]),
            Route("/api/jobs/{id}/pause", self.pause, methods=post),
            Route("/api/jobs/{id}/resume", self.resume, methods=post),
            Route("/api/jobs/{id}/again", self.again, methods=post),
            Route("/api/jobs/{id}/events", self.job_events, methods=get),
            Route("/api/jobs/{id}/log", self.log, methods=get),
            Route("/api/jobs/{id}/preview", self.preview, methods=get),
            Route("/api/clips", self.all_clips, methods=get),
            Route("/api/clips/{name}", self.clip, methods=get),
            Route("/api/clips/{name}", self.delete_clip, methods=["DELETE"]),
            Route("/api/clips/{name}/poster", self.poster, methods=get),
        ]

    async def page(self, request: Request) -> Response:
        """A file of the page itself."""
        path = PAGE / request.path_params.get("name", "index.html")
        if path.parent != PAGE or path.suffix not in _PAGE_TYPES or not path.is_file():
            raise Refused(404, f"there is no {request.url.path}", "the page is at /")
        return FileResponse(path, media_type=_PAGE_TYPES[path.suffix], headers=_NEW)

    async def form(self, request: Request) -> Response:
        """What the form is made from."""
        return Answer(form(self.folder), headers=_NEW)

    async def plan(self, request: Request) -> Response:
        """What a clip would take, and what is still wrong with it."""
        asked = values.with_defaults(values.from_texts(request.query_params.multi_items()))
        wrong = values.problems(values.known(asked), self.folder)
        if stated := [problem for name, problems in wrong.items() if name not in _LATER for problem in problems]:
            raise Refused(400, "\n".join(stated), "mend what is named", **wrong)
        sound = {name: value for name, value in asked.items() if name not in wrong}
        free = self._free if self.queue.busy else None
        planned = await self.helper.ask("plan", URGENT, root=str(self.folder.root), values=sound, free=free)
        if not self.queue.busy:
            self._free = {name: planned["hardware"][name]["value"] for name in ("vram_free", "ram_free")}
        return Answer(planned | {"problems": wrong}, headers=_NEW)

    async def upload(self, request: Request) -> Response:
        """Keep a file that a job will need."""
        return Answer(await keep(request.stream(), self.folder, self.helper), 201)

    async def file(self, request: Request) -> Response:
        """What was uploaded, or another picture, video or recording of the folder."""
        name = request.path_params["name"]
        path = self.folder.find(name)
        if path is None or path.suffix.lower() not in TYPES or not path.is_file():
            raise Refused(404, f"there is no file {name[:200]!r}", "POST /api/files uploads one")
        return FileResponse(path, media_type=TYPES[path.suffix.lower()])

    async def all_jobs(self, request: Request) -> Response:
        """All jobs, in their order."""
        return Answer([job.as_json() for job in self.queue.all()], headers=_NEW)

    async def one_job(self, request: Request) -> Response:
        """A job."""
        return _shown(self.queue.job(request.path_params["id"]))

    async def add(self, request: Request) -> Response:
        """Put a clip into the queue."""
        if request.headers.get("content-type", "").lower().startswith("multipart/"):
            asked = await self._from_form(request)
        else:
            asked = parsed(await request.body())
        return _shown(self.queue.add(values.checked(asked, self.folder)), 201)

    async def _from_form(self, request: Request) -> dict[str, Any]:
        """The values of a form, with the names of files that came with it."""
        try:
            async with request.form(max_files=16, max_fields=_MOST_PARTS) as parts:
                texts = [(name, value) for name, value in parts.multi_items() if isinstance(value, str)]
                asked = values.from_texts(texts)
                for name, part in parts.multi_items():
                    if isinstance(part, str):
                        continue
                    if name not in _FILES:
                        raise Refused(400, f"unknown file {name!r}", f"files are {', '.join(_FILES)}")
                    kept = await keep(_pieces(part), self.folder, self.helper, _FILES[name])
                    if values.kind(name) == "files":
                        asked.setdefault(name, []).append(kept["file"])
                    else:
                        asked[name] = kept["file"]
                return asked
        except (MultiPartException, HTTPException) as error:
            raise Refused(
                400, f"the form cannot be read: {getattr(error, 'detail', error)}", "curl -F makes one"
            ) from error

    async def cancel(self, request: Request) -> Response:
        """Cancel a job that runs, remove one that does not."""
        job = self.queue.cancel(request.path_params["id"])
        return Response(status_code=204) if job is None else _shown(job, 202)

    async def move(self, request: Request) -> Response:
        """Change the place of a job in the queue."""
        said = parsed(await request.body())
        position = said.get("position") if isinstance(said, dict) else None
        if not isinstance(position, int) or isinstance(position, bool):
            raise Refused(400, f"got position {position!r}, expected a whole number", 'such as {"position": 0}')
        return _shown(self.queue.move(request.path_params["id"], position))

    async def pause(self, request: Request) -> Response:
        """Pause a job."""
        return _shown(self.queue.pause(request.path_params["id"]), 202)

    async def resume(self, request: Request) -> Response:
        """Let a job go on."""
        return _shown(self.queue.resume(request.path_params["id"]), 202)

    async def again(self, request: Request) -> Response:
        """Put the same clip into the queue, with another seed and whatever the body changes."""
        before, changes = self.queue.job(request.path_params["id"]).values, parsed(await request.body())
        if not isinstance(changes, dict):
            raise Refused(400, "the body is not an object of fields", "leave it out, or send what is to change")
        return _shown(self.queue.add(values.checked(values.again(before, changes), self.folder)), 201)

    async def events(self, request: Request) -> Response:
        """Every job, and then what changes."""
        return _stream(self._changes())

    async def _changes(self) -> AsyncIterator[str]:
        with self.queue.listening() as listener:
            yield _message({"event": "jobs", "jobs": [job.as_json() for job in self.queue.all()]})
            while not self.queue.closed.is_set():
                changed = await listener.wait(_ALIVE)
                for what in changed:
                    if what == CLIPS:
                        yield _message({"event": "clips"})
                    elif what in self.queue.jobs:
                        yield _message({"event": "job", "job": self.queue.jobs[what].as_json()})
                    elif what:
                        yield _message({"event": "removed", "id": what})
                if not changed:
                    yield ": alive\n\n"

    async def job_events(self, request: Request) -> Response:
        """The events of a job from the start, and then what comes, until it is over."""
        return _stream(self._events(self.queue.job(request.path_params["id"])))

    async def _events(self, job: Job) -> AsyncIterator[str]:
        path, place = self.queue.events_path(job.id), 0
        with self.queue.listening() as listener:
            while True:
                over = job.status in _FINAL or job.id not in self.queue.jobs or self.queue.closed.is_set()
                lines, place = await asyncio.to_thread(_lines_after, path, place)
                for line in lines:
                    yield f"data: {line}\n\n"
                if over and not lines:
                    yield _message({"event": "end", "status": job.status})
                    return
                if not lines and not await listener.wait(_ALIVE):
                    yield ": alive\n\n"

    async def log(self, request: Request) -> Response:
        """What the process of a job has said."""
        job = self.queue.job(request.path_params["id"])
        path = self.folder.jobs / job.id / "log.txt"
        return FileResponse(path, media_type="text/plain", headers=_NEW) if path.is_file() else PlainTextResponse("")

    async def preview(self, request: Request) -> Response:
        """The moving picture of the last step."""
        job = self.queue.job(request.path_params["id"])
        path = self.folder.jobs / job.id / "preview.webp"
        if not path.is_file():
            raise Refused(404, "there is no preview yet", "the first is drawn after the first step")
        return FileResponse(path, media_type="image/webp", headers=_NEW)

    async def all_clips(self, request: Request) -> Response:
        """All clips, newest first."""
        return Answer(self.clips.all(), headers=_NEW)

    async def clip(self, request: Request) -> Response:
        """An mp4, or a range of it."""
        path = self.folder.clip(request.path_params["name"])
        name = path.name if "download" in request.query_params else None
        return FileResponse(path, media_type="video/mp4", filename=name, headers=_NEW)

    async def poster(self, request: Request) -> Response:
        """The picture of a clip."""
        return FileResponse(self.clips.poster(request.path_params["name"]), media_type="image/webp", headers=_NEW)

    async def delete_clip(self, request: Request) -> Response:
        """Delete a clip with what belongs to it."""
        self.clips.delete(request.path_params["name"])
        return Response(status_code=204)


def _shown(job: Job, status: int = 200) -> Response:
    return Answer(job.as_json(), status, _NEW)


def _message(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"


def _stream(messages: AsyncIterator[str]) -> Response:
    return StreamingResponse(messages, media_type="text/event-stream", headers={"cache-control": "no-store"})


async def _pieces(part: Any) -> AsyncIterator[bytes]:
    while piece := await part.read(1 << 20):
        yield piece


def _lines_after(path: Path, place: int) -> tuple[list[str], int]:
    """Whole lines of a file from a place on, a megabyte at most, and the place after them."""
    try:
        with open(path, "rb") as file:
            file.seek(place)
            whole = file.read(1 << 20).rpartition(b"\n")[0]
    except FileNotFoundError:
        return [], place
    return whole.decode("utf-8", "replace").splitlines(), place + len(whole) + bool(whole)


async def _refusal(request: Request, error: Exception) -> Response:
    if isinstance(error, Refused):
        return refused(error)
    if isinstance(error, SkyrunError):
        return refused(Refused(400, error.message, error.hint))
    if isinstance(error, HTTPException):
        return refused(
            Refused(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}", "docs/web.md")
        )
    return refused(Refused(507 if isinstance(error, OSError) else 500, f"{error}", "check free space and permissions"))


def application(
    folder: Folder, hosts: tuple[str, ...] = (), token: str = "", port: int = 0, rest: float = 60.0
) -> Guard:
    """The whole application. rest: seconds after which an idle helper ends."""
    page = Page(folder, rest)

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        page.queue.begin()
        page.clips.tidy()
        yield
        await page.queue.close()
        page.helper.close()

    kinds = (Refused, SkyrunError, HTTPException, OSError)
    handlers: Any = dict.fromkeys(kinds, _refusal)
    app = Starlette(routes=page.routes(), lifespan=life, exception_handlers=handlers)
    app.state.page = page
    return Guard(app, hosts, token, port)
