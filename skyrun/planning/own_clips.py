"""Sizes and lengths of clips that a model's file states, if it makes others than those of its task."""

import re
from dataclasses import dataclass, replace

from skyrun.errors import SkyrunError
from skyrun.kernels.files.gguf_file import GGUFFile
from skyrun.planning.request import Request

_KEY = "skyrun.clip_sizes"
_LARGEST_SCALE = 16


@dataclass(frozen=True)
class OwnClips:
    """The clips that a model makes.

    sizes: (height, width), the usual one first. least, most, usual: frames. scale: how many pixels high and wide the
    mp4 shows a pixel of the clip.
    """

    sizes: tuple[tuple[int, int], ...]
    least: int
    most: int
    usual: int
    scale: int

    def fitted(self, request: Request, height: int, width: int) -> Request:
        """The request with one of these sizes and lengths.

        Without a size it gets the one whose shape is nearest to height and width, those of an input; without a length
        the usual one. Raises SkyrunError if it asks for others.
        """
        size = request.size or min(self.sizes, key=lambda own: abs(own[0] / own[1] - height / width))
        frames = self.usual if request.frames is request.seconds is None else request.frame_count
        problems = []
        if size not in self.sizes:
            asked, known = _name(size), ", ".join(map(_name, self.sizes))
            problems.append(f"this model makes no clips of {asked}, it makes {known} (height x width)")
        if not self.least <= frames <= self.most:
            known = f"{self.least} to {self.most}" if self.least < self.most else str(self.most)
            problems.append(f"this model makes no clips of {frames} frames, it makes {known}")
        if problems:
            raise SkyrunError.listing("this cannot be run", problems, "leave out --size, --frames and --seconds")
        return replace(request, size=size, frames=frames, seconds=None)


def read_own_clips(file: GGUFFile) -> OwnClips | None:
    """What the header states; None if it states nothing. Raises SkyrunError if that cannot be."""
    if _KEY not in file.metadata:
        return None
    sizes = [re.fullmatch(r"(\d{1,4})x(\d{1,4})", size) for size in str(file.metadata[_KEY]).split()]
    names = ("least_frames", "most_frames", "usual_frames", "shown_scale")
    numbers = [file.metadata.get(f"skyrun.{name}") for name in names]
    least, most, usual, scale = (number if isinstance(number, int) else 0 for number in numbers)
    if not sizes or not all(sizes) or not 0 < least <= usual <= most or not 0 < scale <= _LARGEST_SCALE:
        raise SkyrunError(f"{file.path} states sizes and lengths of clips that cannot be", "convert it again")
    return OwnClips(tuple((int(size[1]), int(size[2])) for size in sizes if size), least, most, usual, scale)


def _name(size: object) -> str:
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)
