"""The only place that opens video and audio. Formats, decoders and frame sizes are limited, and only files are read."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av

from skyrun.errors import SkyrunError

# FFmpeg reads hundreds more, including playlists that refer to other files and hosts.
FORMATS = (
    *("mov", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "mxf", "gif", "ivf", "dv", "nut"),
    *("h264", "hevc", "obu", "m4v", "mpegvideo", "yuv4mpegpipe", "rm"),
    *("wav", "w64", "mp3", "aac", "loas", "flac", "aiff", "caf", "amr", "ac3", "eac3", "dts", "au", "ape", "wv", "tta"),
)
_VIDEO = (
    *("h264", "hevc", "vvc", "av1", "vp8", "vp9", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2"),
    *("msmpeg4v3", "h263", "flv1", "wmv1", "wmv2", "wmv3", "vc1", "theora", "rv30", "rv40", "prores", "dnxhd", "cfhd"),
    *("dvvideo", "mjpeg", "png", "gif", "ffv1", "huffyuv", "ffvhuff", "utvideo", "magicyuv", "qtrle", "rawvideo"),
    *("v210", "svq1", "svq3", "cinepak"),
)
_AUDIO = (
    *("aac", "aac_latm", "mp3", "mp2", "mp1", "opus", "vorbis", "speex", "flac", "alac", "ape", "tta", "wavpack"),
    *("ac3", "eac3", "dts", "truehd", "mlp", "wmav1", "wmav2", "wmapro", "wmalossless", "amr_nb", "amr_wb", "gsm"),
    *("gsm_ms", "adpcm_ms", "adpcm_ima_wav", "adpcm_ima_qt", "adpcm_swf", "adpcm_g722", "adpcm_g726", "nellymoser"),
    *("cook", "pcm_alaw", "pcm_mulaw", "pcm_bluray", "pcm_dvd", "pcm_u8", "pcm_s8", "pcm_s8_planar", "pcm_s16le"),
    *("pcm_s16be", "pcm_s16le_planar", "pcm_s16be_planar", "pcm_u16le", "pcm_u16be", "pcm_s24le", "pcm_s24be"),
    *("pcm_s24le_planar", "pcm_s32le", "pcm_s32be", "pcm_s32le_planar", "pcm_s64le", "pcm_s64be", "pcm_f32le"),
    *("pcm_f32be", "pcm_f64le", "pcm_f64be"),
)
# Decoders that are not named like their codecs.
_DECODERS = (
    *("libdav1d", "libaom-av1", "libvpx", "libvpx-vp9", "flv", "libopus", "libvorbis", "libspeex", "mp3float"),
    *(
        "mp2float",
        "mp1float",
        "dca",
        "amrnb",
        "amrwb",
        "libopencore_amrnb",
        "libopencore_amrwb",
        "g722",
        "g726",
        "msmpeg4",
    ),
)
_STILL = frozenset(("mjpeg", "png", "gif", "bmp", "webp", "tiff"))  # codecs of cover images
_MOST_PIXELS = 40_000_000  # of a frame; an 8K frame has 35 million
_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": ",".join(FORMATS),
    "codec_whitelist": ",".join((*_VIDEO, *_AUDIO, *_DECODERS)),
    "max_pixels": str(_MOST_PIXELS),
}
_HINTS = {"video": "use MP4, MOV, MKV or WebM", "recording": "use WAV, MP3, M4A or a video"}
# Errors of decoders that mean damaged data, as opposed to lack of memory or a failing disk.
_INVALID: Any = av.error.classes[errno.EINVAL]  # its name differs between versions of PyAV
_DAMAGE = (av.error.InvalidDataError, av.error.PatchWelcomeError, av.error.BugError, _INVALID)


@contextmanager
def opened(path: Path, kind: str) -> Iterator[Any]:
    """Open a container, and turn every error inside the block into a SkyrunError. kind: "video" or "recording"."""
    try:
        with _open(path) as container:
            yield container
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "it takes too much memory"
        raise SkyrunError(f"{path} is not a readable {kind}: {reason}", _HINTS[kind]) from error


def _open(path: Path) -> Any:
    if not path.is_file():  # pipes and devices may never end
        raise OSError("it is a folder" if path.is_dir() else "there is no such file")
    try:
        # FFmpeg takes what precedes a colon in a relative path for a protocol.
        return av.open(str(path.absolute()), options=_OPTIONS, metadata_errors="replace")
    except _INVALID as error:
        raise OSError("its format is not supported") from error


class Track:
    """Decodes the video or audio of an open container. skipped: how many damaged pieces were skipped so far."""

    def __init__(self, container: Any, stream: Any) -> None:
        self._container, self.stream = container, stream
        self.skipped = 0

    @classmethod
    def video(cls, path: Path, container: Any) -> "Track":
        """The video stream; of several, one that is not a cover. Raises SkyrunError if there is none."""
        streams = _decodable(path, container.streams.video, _VIDEO, "video", "give a video to --video")
        stream = min(streams, key=lambda stream: (*_stillness(stream), stream.index))
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > _MOST_PIXELS:
            limit = f"at most {_MOST_PIXELS // 10**6} million pixels"
            raise SkyrunError(f"{path} has frames of {width} x {height}, expected {limit}", "scale it down")
        stream.codec_context.options = {"max_pixels": _OPTIONS["max_pixels"]}
        return cls(container, stream)

    @classmethod
    def audio(cls, path: Path, container: Any) -> "Track":
        """The first audio stream that can be decoded. Raises SkyrunError if there is none."""
        hint = "give a recording of speech to --audio"
        return cls(container, _decodable(path, container.streams.audio, _AUDIO, "audio", hint)[0])

    def frames(self) -> Iterator[Any]:
        """Decode all frames from the current position on, and skip what is damaged."""
        begun = False  # packets before the first key frame cannot be decoded
        for packet in self.packets():
            begun = begun or packet is None or packet.is_keyframe or not packet.size
            try:
                frames = self.stream.decode(packet)
            except _DAMAGE:
                self.skipped += 1
                continue
            self.skipped += not begun and not frames
            yield from frames

    def packets(self) -> Iterator[Any]:
        """All packets up to the first that cannot be read, and an empty one that flushes the decoder."""
        packets = self._container.demux(self.stream)
        try:
            yield from packets
        except _DAMAGE:
            self.skipped += 1
            yield None

    @property
    def damage(self) -> str:
        """A clause about skipped pieces for the user; "" if there were none."""
        pieces = "1 damaged piece was" if self.skipped == 1 else f"{self.skipped} damaged pieces were"
        return f"{pieces} skipped" if self.skipped else ""


def _decodable(path: Path, streams: Any, codecs: tuple[str, ...], what: str, hint: str) -> list[Any]:
    known = [stream for stream in streams if _codec(stream) in codecs]
    if not known and len(streams):
        raise SkyrunError(
            f"{path} has {what} in a codec that is not supported: {_codec(streams[0])}", "convert it to H.264 and AAC"
        )
    if not known:
        raise SkyrunError(f"{path} has no {what} in it", hint)
    return known


def _codec(stream: Any) -> str:
    context = stream.codec_context
    return str(context.codec.canonical_name) if context is not None else "unknown"


def _stillness(stream: Any) -> tuple[bool, bool, bool]:
    flags = av.stream.Disposition(stream.disposition)
    return (
        bool(flags & av.stream.Disposition.attached_pic),
        _codec(stream) in _STILL,
        not flags & av.stream.Disposition.default,
    )
