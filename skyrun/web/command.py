"""`skyrun web`: check the options, take the port and the folder, and serve until Ctrl-C."""

import socket
import sys
from argparse import Namespace
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

from filelock import FileLock, Timeout

from skyrun.errors import FAILED, SkyrunError
from skyrun.units import printable
from skyrun.web.folder import Folder

FOLDER = Path("~/skyrun-clips")
_NEEDED = ("starlette", "uvicorn", "python_multipart")
_SHORTEST = 8  # characters of a token
_GRACE = 3  # seconds that answers have to end


def execute(arguments: Namespace) -> int:
    """Serve the page. Returns the exit code."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise SkyrunError(f"the page needs {', '.join(missing)}", "pip install 'skyrun[web]'", FAILED)
    from skyrun.web.guard import LOOPBACK

    host, token = arguments.host, arguments.token or ""
    local = host in LOOPBACK
    _check_token(host, token, local)
    folder = Folder(Path(arguments.folder or FOLDER).expanduser().absolute())
    folder.create()
    lock = FileLock(folder.state / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SkyrunError(
            f"another skyrun web serves {folder.root}", "open its page, or choose another --folder"
        ) from error
    with lock, _listening(host, arguments.port) as taken:
        return _serve(folder, taken, LOOPBACK if local else (), token, host)


def _check_token(host: str, token: str, local: bool) -> None:
    if not local and not token:
        hint = f"choose one: --token {token_urlsafe(12)}"
        raise SkyrunError(f"--host {host} opens the page to the network, which needs a token", hint)
    if token and len(token) < _SHORTEST:
        raise SkyrunError(f"a token of {len(token)} characters is guessed soon", f"use one of {_SHORTEST} or more")


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises SkyrunError if the address is taken, or not ours."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        taken = socket.socket(family, socket.SOCK_STREAM)
        if sys.platform != "win32":  # where the option would let two servers share a port
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
        taken.listen()
    except (OSError, OverflowError) as error:
        raise SkyrunError(
            f"{host}:{port} cannot be listened at: {error}", "choose another --port, or --host"
        ) from error
    return taken


def _serve(folder: Folder, taken: socket.socket, hosts: tuple[str, ...], token: str, host: str) -> int:
    import uvicorn

    from skyrun.web.app import application

    port = taken.getsockname()[1]
    app = application(folder, hosts, token, port)
    queue = app.app.state.page.queue

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            """Send those away that listen to events, or the server would wait for them."""
            queue.closed.set()
            queue.tell("")
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE,
    )
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}/"
    _say(f"skyrun web: {address}{f'?token={token}' if token else ''}   clips in {folder.root}")
    waiting = sum(job.status == "waiting" for job in queue.jobs.values())
    if waiting:
        _say(f"{waiting} clips wait: going on with them")
    for path in queue.unread:
        _say(f"{path} is damaged, or a job of another version of skyrun: it is left alone")
    with suppress(KeyboardInterrupt):
        Server(config).run([taken])
    _say("stopped; what is unfinished goes on with the next start")
    return 0


def _say(text: str) -> None:
    with suppress(OSError, ValueError):
        print(printable(text), file=sys.stderr, flush=True)
