"""Images as people have them, and as nobody should: what is opened, and what is said of the rest."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from skyrun.errors import SkyrunError
from skyrun.media.image import open_image, write_image

TEAL = (0, 128, 128)


def encoded(format, mode="RGB", size=(60, 40), **options):
    data = io.BytesIO()
    Image.new("RGB", size, TEAL).convert(mode).save(data, format, **options)
    return data.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_with(*chunks):
    """A PNG with chunks after its header."""
    data = encoded("PNG")
    end = 8 + 25
    return data[:end] + b"".join(chunks) + data[end:]


def png_of(width, height):
    """The header of a PNG of that size, and a little of its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def text(megabytes):
    return chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * (megabytes << 20)))


def exif(data):
    return chunk(b"eXIf", data)


OPENED = {
    "png": encoded("PNG"),
    "palette": encoded("PNG", "P"),
    "alpha": encoded("PNG", "RGBA"),
    "jpeg": encoded("JPEG", quality=95),
    "cmyk": encoded("JPEG", "CMYK", quality=95),
    "webp": encoded("WEBP", lossless=True),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
    "gif": encoded("GIF", "P"),
    "two megabytes of text": png_with(text(2)),
    "ten megabytes of text": png_with(text(10)),
    "damaged exif": png_with(exif(b"MM\0*\xff\xff\xff\xff")),
    "exif of another length": png_with(exif(b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\xff\xff\x7f\0\0\0\0")),
    "damaged color profile": png_with(chunk(b"iCCP", b"icc\0\0" + b"no zlib")),
    "many pixels in a jpeg": encoded("JPEG", size=(9000, 8000), quality=95),
}


@pytest.mark.parametrize("kind", OPENED)
def test_what_is_opened(tmp_path, kind):
    path = tmp_path / "a:b.png"  # whatever its name says
    path.write_bytes(OPENED[kind])
    image = open_image(path)
    assert image.mode == "RGB" and image.width * image.height <= 64e6
    assert abs(np.asarray(image.resize((6, 4))).astype(int) - TEAL).max() <= 8
    assert image.width / image.height == pytest.approx(1.125 if "many" in kind else 1.5)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
REFUSED = {
    "nothing": (b"", "is not a readable image", "PNG, JPEG or WebP"),
    "text": (b"not an image", "is not a readable image", "PNG, JPEG or WebP"),
    "postscript": (EPS, "is not a readable image", "PNG, JPEG or WebP"),
    "cut": (encoded("PNG", size=(600, 400))[:200], "is not a readable image", "PNG"),
    "cut jpeg": (encoded("JPEG", size=(600, 400))[:900], "is not a readable image", "PNG"),
    "169 million pixels": (png_of(13000, 13000), "has 13000 x 13000, 169 million pixels, expected at most 64", "scale"),
    "a bomb": (png_of(60000, 60000), "is too large an image", "scale"),
    "a text bomb": (png_with(text(65)), "is not a readable image", "PNG"),
    "floats": (encoded("TIFF", "F"), "has floating-point pixels", "8 bits"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(tmp_path, kind, monkeypatch):
    content, message, hint = REFUSED[kind]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    monkeypatch.setattr("subprocess.check_call", None)  # what would start Ghostscript
    with pytest.raises(SkyrunError, match=message) as caught:
        open_image(path)
    assert "a.png" in caught.value.message and hint in caught.value.hint


def test_damage_anywhere_is_a_sentence_or_an_image(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.png"
    for kind in ("png", "jpeg", "webp", "bmp", "tiff", "gif", "damaged exif"):
        for _ in range(30):
            data = bytearray(OPENED[kind])
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(256)
            path.write_bytes(data[: rng.integers(1, len(data)) if rng.random() < 0.3 else None])
            try:
                assert open_image(path).mode == "RGB"
            except SkyrunError as error:
                assert "\n" not in error.message


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_become_eight(tmp_path, mode):
    levels = np.arange(65536, dtype=np.uint16 if mode == "I;16" else np.int32).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "a.png" if mode == "I;16" else tmp_path / "a.tiff")
    image = open_image(next(tmp_path.iterdir()))
    assert np.array_equal(np.asarray(image)[..., 0], np.round(levels / 257).astype(np.uint8))


def test_images_are_upright(tmp_path):
    image = Image.new("RGB", (40, 20), TEAL)
    image.putpixel((0, 0), (255, 255, 255))
    tags = Image.Exif()
    tags[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.png", exif=tags)
    opened = open_image(tmp_path / "a.png")
    assert opened.size == (20, 40) and opened.getpixel((19, 0)) == (255, 255, 255)


def test_an_image_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SkyrunError, match="cannot write"):
        write_image(tmp_path / "file" / "a.png", Image.new("RGB", (4, 4)))
    write_image(tmp_path / "take1:2.PNG", Image.new("RGB", (4, 4)))
    assert open_image(tmp_path / "take1:2.PNG").size == (4, 4)
