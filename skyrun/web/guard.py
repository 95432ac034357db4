"""Who may ask: the Host and the Origin of a request, the token, the size of a body; and headers of every answer.

A page of another site may make a browser send requests here, directly or under a name of its own that it lets point to
this machine. Neither passes.
"""

import hashlib
import hmac
import json
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response

from skyrun.web.folder import Refused
from skyrun.web.uploads import MAX_UPLOAD

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MAX_JSON = 256 << 10  # bytes of a body that is no file
_MAX_TEXT = 1 << 20  # bytes beside the files of a form
_LARGE = ("/api/files", "/api/jobs")
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
    "connect-src 'self'; manifest-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
}


class Answer(JSONResponse):
    """JSON. Bytes in the names of files and in what clips say that are no UTF-8 are shown as "?"."""

    def render(self, content: Any) -> bytes:
        """The body."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


def refused(refusal: Refused) -> Response:
    """The answer to a request that is refused."""
    told = {"message": refusal.message, "hint": refusal.hint, "code": refusal.code}
    return Answer(told | ({"fields": refusal.fields} if refusal.fields else {}), refusal.status)


class Guard:
    """Lets requests through to an application, or answers them itself.

    hosts: names that this machine may be called by; empty: any, which only a token makes safe. token: that every client
    must know; "": none. port: of the server, for the name of the cookie.
    """

    def __init__(self, app: Starlette, hosts: tuple[str, ...], token: str, port: int) -> None:
        self.app, self._hosts, self._token = app, hosts, token
        self._cookie = f"skyrun-{port}"
        self._secret = hashlib.sha256(b"cookie of skyrun web " + token.encode()).hexdigest()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def guarded_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            self._check_sender(scope, headers)
            welcome = self._check_token(scope, headers)
            if welcome is not None:
                await welcome(scope, receive, guarded_send)
                return
            limit = _limit(scope, headers)
            await self.app(scope, _counted(receive, limit, headers), guarded_send)
        except Refused as refusal:
            await refused(refusal)(scope, receive, guarded_send)

    def _check_sender(self, scope: dict[str, Any], headers: Headers) -> None:
        host = headers.get("host", "")
        if self._hosts and _hostname(host) not in self._hosts:
            raise Refused(403, f"this is not {host[:100]!r}", f"open it as {self._hosts[0]}")
        origin = headers.get("origin")
        if origin is not None and (urlsplit(origin).netloc != host or urlsplit(origin).scheme not in ("http", "https")):
            raise Refused(403, "another site has sent this", "only the page itself, and programs, may")
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and scope["path"] != "/":
            raise Refused(403, "another site has sent this", "only the page itself, and programs, may")

    def _check_token(self, scope: dict[str, Any], headers: Headers) -> Response | None:
        """Let a client in that knows the token. Returns the answer that puts it into a cookie, if it is in the URL."""
        if not self._token:
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        said = dict(query).get("token")
        if said is not None and _equal(said, self._token):
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            if scope["method"] != "GET" or scope["path"] != "/":
                scope["query_string"] = rest.encode()
                return None
            answer = RedirectResponse("/" + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(self._cookie, self._secret, 365 * 86400, httponly=True, samesite="strict")
            return answer
        bearer = headers.get("authorization", "")
        if bearer.lower().startswith("bearer ") and _equal(bearer[7:].strip(), self._token):
            return None
        if _equal(_cookie(headers, self._cookie), self._secret):
            return None
        raise Refused(401, "this page wants a token", "open the address that skyrun web has printed, with ?token=…")


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _equal(said: str, right: str) -> bool:
    return hmac.compare_digest(said.encode("utf-8", "surrogateescape"), right.encode())


def _cookie(headers: Headers, name: str) -> str:
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return morsel.value if morsel is not None else ""


def _limit(scope: dict[str, Any], headers: Headers) -> int:
    """How many bytes the body of a request may have."""
    is_form = headers.get("content-type", "").lower().startswith("multipart/")
    if scope["path"] == _LARGE[0]:
        return MAX_UPLOAD
    return MAX_UPLOAD + _MAX_TEXT if is_form and scope["path"] == _LARGE[1] else _MAX_JSON


def _counted(receive: Any, limit: int, headers: Headers) -> Any:
    """`receive`, which refuses more than so many bytes, whether or not their number is stated. Raises Refused (413)."""
    told = Refused(413, f"the request has more than {limit} bytes", "send less")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()) or int(length) > limit:
        raise told
    count = 0

    async def counted() -> Any:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > limit:
            raise told
        return message

    return counted


def parsed(body: bytes) -> Any:
    """The JSON of a body. Raises Refused if it is none."""
    try:
        return json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise Refused(
            400, f"the body is not JSON: {error}", "send an object of fields, with content-type application/json"
        ) from error
