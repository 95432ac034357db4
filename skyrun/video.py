"""Write a clip as mp4, and read back what it was made from."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace

from skyrun.errors import FAILED, SkyrunError
from skyrun.kernels.atomic import replacing

# The `comment` tag survives remuxing and re-encoding; custom keys do not.
_TAG = "comment"
_CRF = "16"
_BT709 = 1
_OPTIONS = {"movflags": "+faststart"}  # the index first, so that players start before the end


class VideoWriter:
    """Takes frames as they are decoded; H.264, yuv420p, BT.709."""

    def __init__(self, container: Any, height: int, width: int, fps: int) -> None:
        self._container = container
        self._stream = container.add_stream("libx264", rate=fps, options={"crf": _CRF})
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709

    def add(self, frames: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Encode uint8 [n, H, W, 3]."""
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Write what the encoder still holds."""
        self._container.mux(self._stream.encode())


@contextmanager
def writing_video(path: Path, height: int, width: int, fps: int, request: dict[str, Any]) -> Iterator[VideoWriter]:
    """A writer for an mp4 that appears under `path` when it is whole, with the request as JSON in its comment."""
    try:
        with replacing(path) as partial, av.open(str(partial), "w", format="mp4", options=_OPTIONS) as container:
            container.metadata[_TAG] = json.dumps(request)
            writer = VideoWriter(container, height, width, fps)
            yield writer
            writer.finish()
    except (av.FFmpegError, OSError) as error:
        raise SkyrunError(f"cannot write {path}: {error}", "check free space and permissions", FAILED) from error


def read_request(path: Path) -> dict[str, Any] | None:
    """The request in a clip's comment; None if the clip carries none. SkyrunError if it is no video."""
    try:
        with av.open(str(path)) as container:
            comment = container.metadata.get(_TAG, "")
    except (av.FFmpegError, OSError) as error:
        raise SkyrunError(f"{path} is not a readable video: {error}", "check the path") from error
    try:
        request = json.loads(comment)
    except ValueError:
        return None
    return request if isinstance(request, dict) else None
