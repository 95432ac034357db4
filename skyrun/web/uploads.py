"""Take files from clients: counted while they arrive, looked into, and kept under names that we give them."""

import errno
import hashlib
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from skyrun.web.folder import Folder, Refused
from skyrun.web.helped import URGENT, Helper
from skyrun.web.values import names_in

MAX_UPLOAD = 4 << 30  # bytes of a file
MAX_IMAGE = 256 << 20
_SUFFIXES = {  # by the format that is in a file
    **{name: f".{name}" for name in ("png", "webp", "gif", "bmp", "tiff", "avif", "wav", "mp3", "flac", "ogg", "avi")},
    **{"jpeg": ".jpg", "mov": ".mp4", "matroska": ".webm", "webm": ".webm"},
}
TYPES = {  # that clients are told, by the suffix
    **{f".{name}": f"image/{name}" for name in ("png", "webp", "gif", "bmp", "tiff", "avif")},
    **{
        ".jpg": "image/jpeg",
        ".jpeg": "image/jpeg",
        ".mp4": "video/mp4",
        ".webm": "video/webm",
        ".wav": "audio/wav",
        ".mp3": "audio/mpeg",
    },
    **{".flac": "audio/flac", ".ogg": "audio/ogg"},
}


async def keep(pieces: AsyncIterator[bytes], folder: Folder, helper: Helper, kind: str = "") -> dict[str, Any]:
    """Keep a file, and say what it is: its name, kind, size and length, and how it was made if that is in it.

    Raises Refused if it is not an image, video or recording, or not of the kind that is asked for.
    """
    partial = folder.inputs / f".{secrets.token_hex(8)}.partial"
    try:
        digest, nbytes = await _written(pieces, partial)
        if not nbytes:
            raise Refused(400, "the file is empty", "send its bytes as the body")
        try:
            seen = await helper.ask("look", URGENT, path=str(partial))
        except Refused as refusal:
            refusal.args = (refusal.message.replace(str(partial), "the file"),)
            refusal.message = refusal.message.replace(str(partial), "the file")
            raise
        if seen["kind"] == "image" and nbytes > MAX_IMAGE:
            raise Refused(413, f"an image of {nbytes} bytes is too large", "scale it down; a few megapixels are enough")
        if kind and kind != seen["kind"] and not (kind == "audio" and seen.get("sound")):
            raise Refused(400, f"got a file with {seen['kind']} in it, expected {kind}")
        format = seen.pop("format")
        name = digest + _SUFFIXES.get(format, f".{format}")
        os.replace(partial, folder.inputs / name)
        os.utime(folder.inputs / name)
    finally:
        partial.unlink(missing_ok=True)
    if seen.get("request"):
        seen["request"] = names_in(seen["request"], folder)
    return {"file": name, "bytes": nbytes} | seen


async def _written(pieces: AsyncIterator[bytes], path: Path) -> tuple[str, int]:
    """Write what arrives. Returns its digest and its size."""
    digest, nbytes = hashlib.sha256(), 0
    try:
        with open(path, "xb") as file:
            async for piece in pieces:
                nbytes += len(piece)
                if nbytes > MAX_UPLOAD:
                    raise Refused(413, f"the file has more than {MAX_UPLOAD >> 30} GiB", "cut or scale it down")
                digest.update(piece)
                file.write(piece)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise Refused(507, "the disk is full", "make room, and send it again") from error
        raise
    return digest.hexdigest()[:24], nbytes
