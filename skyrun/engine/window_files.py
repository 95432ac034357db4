"""Store the frames and latents of finished windows of a long clip, until the clip is complete.

Frames are stored losslessly (FFV1), so that a resumed run makes the same clip as one that was not interrupted. The
latents' file has a checksum of both.
"""

import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from skyrun.errors import SkyrunError
from skyrun.kernels.files.atomic import replacing
from skyrun.media.container import Track, opened
from skyrun.media.pixels import Frames

_CHECKSUM = "crc32"
_ANEW = "begin anew: choose another -o, or delete the state"


class WindowStore:
    """The window files of a run, named after its state. Frames are [n, height, width, 3]."""

    def __init__(self, state: Path, height: int, width: int) -> None:
        self._state = state.absolute()  # FFmpeg takes what precedes a colon for a protocol
        self._height, self._width = height, width
        self._stack = ExitStack()
        self._container: Any = None
        self._window = self._checksum = 0

    def begin(self, window: int) -> None:
        """Begin a window: the next frames belong to it."""
        self.abandon()
        self._window, self._checksum = window, 0

    def add(self, frames: Frames) -> None:
        """Store frames of the window. Raises OSError if they cannot be written."""
        with _as_oserror():
            if self._container is None:
                partial = self._stack.enter_context(replacing(self._path(self._window, ".mkv")))
                self._container = self._stack.enter_context(av.open(str(partial), "w", format="matroska"))
                stream = self._container.add_stream("ffv1", rate=24)
                stream.height, stream.width, stream.pix_fmt = self._height, self._width, "bgr0"
            for pixels in frames:
                self._checksum = zlib.crc32(np.ascontiguousarray(pixels).data, self._checksum)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                self._container.mux(self._container.streams.video[0].encode(frame.reformat(format="bgr0")))

    def finish(self, latents: Tensor) -> None:
        """Finish the window and store its latents. Raises OSError if they cannot be written."""
        with _as_oserror():
            if self._container is not None:
                self._container.mux(self._container.streams.video[0].encode())
                self._container = None
                self._stack.close()
            with replacing(self._path(self._window, ".safetensors")) as partial:
                metadata = {_CHECKSUM: _checksum(latents.contiguous(), self._checksum)}
                save_file({"latents": latents.contiguous()}, partial, metadata)

    def abandon(self) -> None:
        """Discard the unfinished window."""
        if self._container is not None:
            self._container = None
            with suppress(OSError, av.FFmpegError):
                self._stack.__exit__(OSError, OSError("abandoned"), None)
        self._stack = ExitStack()

    def read(self, window: int, expected: int) -> tuple[Iterator[Frames], Tensor]:
        """Frames of a finished window one by one, and its latents. Raises SkyrunError if they are damaged or gone."""
        try:
            with safe_open(self._path(window, ".safetensors"), "pt") as file:
                latents, checksum = file.get_tensor("latents"), (file.metadata() or {}).get(_CHECKSUM)
        except (OSError, SafetensorError) as error:
            raise self._damaged(window, error) from error
        return self._frames(window, expected, latents, checksum), latents

    def remove(self) -> None:
        """Remove the files of all windows."""
        for path in self._state.parent.iterdir():
            if self._is_of_a_window(path):
                path.unlink(missing_ok=True)

    def _is_of_a_window(self, path: Path) -> bool:
        name, _, window = path.stem.rpartition(".")
        return name == self._state.stem and window.isdecimal() and path.suffix in (".mkv", ".safetensors")

    def _frames(self, window: int, expected: int, latents: Tensor, checksum: str | None) -> Iterator[Frames]:
        count = found = 0
        if expected:
            path = self._path(window, ".mkv")
            try:
                with opened(path, "video") as container:
                    for frame in Track.video(path, container).frames():
                        pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
                        if pixels.shape != (self._height, self._width, 3):
                            raise self._damaged(window, f"it has frames of {pixels.shape[1]} x {pixels.shape[0]}")
                        count, found = count + 1, zlib.crc32(pixels, found)
                        yield pixels[None]
            except SkyrunError as error:
                raise self._damaged(window, error.message) from error
        if count != expected:
            raise self._damaged(window, f"it has {count} frames, expected {expected}")
        if checksum != _checksum(latents, found):
            raise self._damaged(window, "its contents do not have the checksum that is beside them")

    def _damaged(self, window: int, why: object) -> SkyrunError:
        path = self._path(window, ".mkv")
        return SkyrunError(f"what was finished of the clip cannot be read from {path}: {why}", _ANEW)

    def _path(self, window: int, suffix: str) -> Path:
        return self._state.with_name(f"{self._state.stem}.{window}{suffix}")


def _checksum(latents: Tensor, frames: int) -> str:
    """Of latents and their shape, after the checksum of the frames."""
    return f"{zlib.crc32(latents.float().numpy().data, zlib.crc32(str(latents.shape).encode(), frames)):08x}"


@contextmanager
def _as_oserror() -> Iterator[None]:
    """Raise the errors of all writing libraries as OSError."""
    try:
        yield
    except (av.FFmpegError, SafetensorError) as error:
        raise OSError(str(error)) from error
