"""Store the frames and latents of finished windows of a long clip, until the clip is complete.

Frames are stored losslessly (FFV1), so that a resumed run makes the same clip as one that was not interrupted.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from skyrun.errors import SkyrunError
from skyrun.kernels.atomic import replacing
from skyrun.media.pixels import Frames

_ANEW = "begin anew: choose another -o, or delete the state"


class WindowStore:
    """The window files of a run, named after its state. Frames are [n, height, width, 3]."""

    def __init__(self, state: Path, height: int, width: int) -> None:
        self._state = state.absolute()  # FFmpeg takes what precedes a colon for a protocol
        self._height, self._width = height, width
        self._stack = ExitStack()
        self._container: Any = None
        self._window = 0

    def begin(self, window: int) -> None:
        """Begin a window: the next frames belong to it."""
        self.abandon()
        self._window = window

    def add(self, frames: Frames) -> None:
        """Store frames of the window. Raises OSError if they cannot be written."""
        with _as_oserror():
            if self._container is None:
                partial = self._stack.enter_context(replacing(self._path(self._window, ".mkv")))
                self._container = self._stack.enter_context(av.open(str(partial), "w", format="matroska"))
                stream = self._container.add_stream("ffv1", rate=24)
                stream.height, stream.width, stream.pix_fmt = self._height, self._width, "bgr0"
            for pixels in frames:
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
                save_file({"latents": latents.contiguous()}, partial)

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
            latents = load_file(self._path(window, ".safetensors"))["latents"]
        except (OSError, SafetensorError, KeyError) as error:
            raise self._damaged(window, error) from error
        return self._frames(window, expected), latents

    def remove(self) -> None:
        """Remove the files of all windows."""
        for path in self._state.parent.iterdir():
            if self._is_of_a_window(path):
                path.unlink(missing_ok=True)

    def _is_of_a_window(self, path: Path) -> bool:
        name, _, window = path.stem.rpartition(".")
        return name == self._state.stem and window.isdecimal() and path.suffix in (".mkv", ".safetensors")

    def _frames(self, window: int, expected: int) -> Iterator[Frames]:
        count = 0
        try:
            if expected:
                with av.open(str(self._path(window, ".mkv"))) as container:
                    for frame in container.decode(video=0):
                        count += 1
                        yield frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)[None]
        except (av.FFmpegError, OSError) as error:
            raise self._damaged(window, error) from error
        if count != expected:
            raise self._damaged(window, f"it has {count} frames, expected {expected}")

    def _damaged(self, window: int, why: object) -> SkyrunError:
        path = self._path(window, ".mkv")
        return SkyrunError(f"what was finished of the clip cannot be read from {path}: {why}", _ANEW)

    def _path(self, window: int, suffix: str) -> Path:
        return self._state.with_name(f"{self._state.stem}.{window}{suffix}")


@contextmanager
def _as_oserror() -> Iterator[None]:
    """Raise the errors of all writing libraries as OSError."""
    try:
        yield
    except (av.FFmpegError, SafetensorError) as error:
        raise OSError(str(error)) from error
