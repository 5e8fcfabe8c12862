"""Image files of every kind that a data set may hold, with what must become of each.

`kind` is the first cell of its row in section 1 of docs/views.md.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from proteus_cache.views.source import MAX_SOURCE_PIXELS
from tests.views.image_bytes import (
    grey_jpeg,
    orientation,
    patched,
    png,
    png_chunk,
    saved,
    segment,
    with_exif,
    with_segments,
)

WIDTH, HEIGHT = 50, 40


@dataclass(frozen=True)
class Good:
    """A file that becomes a view."""

    kind: str
    data: bytes
    pixels: NDArray[np.uint8] | None
    """(H, W, 3) that the stated rule gives; None where only the decoder decides (then equal to Pillow's)."""


@dataclass(frozen=True)
class Bad:
    """A file that is quarantined."""

    kind: str
    data: bytes
    reason: str
    """Part of the reason."""


def _picture() -> NDArray[np.uint8]:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    planes = (x * 5 % 256, (x * x + y * 3) % 256, (y * 6 + x * y) % 256)
    return np.stack(planes, axis=-1).astype(np.uint8)


def _pixels(*row: tuple[int, int, int]) -> NDArray[np.uint8]:
    """One row of an image."""
    return np.array([row], dtype=np.uint8)


def _decoded(jpeg: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def _plain(colour: tuple[int, ...], mode: str) -> bytes:
    """One colour, with quantisation steps of 1: a JPEG keeps it exactly."""
    return saved(Image.new(mode, (16, 16), colour), "JPEG", quality=100, subsampling=0)


def _whole(colour: tuple[int, int, int], side: int = 16) -> NDArray[np.uint8]:
    return np.full((side, side, 3), colour, dtype=np.uint8)


def _ink(cyan: int, magenta: int, yellow: int, black: int) -> tuple[int, int, int]:
    """Pillow's plain conversion of CMYK."""

    def light(ink: int) -> int:
        product = (255 - black) * ink + 128
        return 255 - black - ((product >> 8) + product >> 8)

    return light(cyan), light(magenta), light(yellow)


PIXELS = _picture()
PICTURE = Image.fromarray(PIXELS)
TURNED = PICTURE.rotate(90)
JPEG = saved(PICTURE, "JPEG", quality=95, subsampling=0)
AS_JPEG = _decoded(JPEG)
PNG = saved(PICTURE, "PNG")
FRAME = segment(JPEG, 0xC0)[0]
SCAN = segment(JPEG, 0xDA)[1]
INKS = (30, 90, 160, 40)
CMYK = _plain(INKS, "CMYK")
ADOBE = segment(CMYK, 0xEE)
YCCK = _plain((200, 127, 127, 0), "CMYK")
"""Stored inverted: luma 55, no colour, no black."""
DEEP = np.array([[0x05FF, 0xFF00, 0x00FF, 0x8000]], dtype=np.uint16)
PALETTE = png_chunk(b"PLTE", b"\1\2\3\4\5\6")
MANY_EXIF = tuple((0xE1, b"Exif\0\0" + bytes(65_000)) for _ in range(64))
PROFILE = b"ICC_PROFILE\0\1\1"

_GREY = "grey; 1, 2 or 4 bits"
_ALPHA = "alpha, transparent colour"
_DEEP = "16 bits"
_CMYK = "CMYK, YCCK"
_UNUSED = "EXIF (orientation too), colour profile, text, comments"
_CODED = "progressive, arithmetic coding, restart markers"
_FIRST = "animated PNG, multi-picture JPEG"
_TAIL = "bytes after the end; a PNG without its end chunk"
_SHAPE = "1 x 1, 1 x 10,000, 10,000 x 1"
_NAME = "another name than its kind"

GOOD: dict[str, Good] = {
    "grey jpeg": Good(_GREY, _plain((77,), "L"), _whole((77, 77, 77))),
    "1 bit": Good(_GREY, png(1, 0, b"\x40"), _pixels((0, 0, 0), (255, 255, 255))),
    "2 bits": Good(_GREY, png(2, 0, b"\x70"), _pixels((85, 85, 85), (255, 255, 255))),
    "4 bits": Good(_GREY, png(4, 0, b"\x1f"), _pixels((17, 17, 17), (255, 255, 255))),
    "grey png": Good(_GREY, png(8, 0, b"\x05\xc8"), _pixels((5, 5, 5), (200, 200, 200))),
    "palette": Good("palette", png(8, 3, b"\1\0", extra=PALETTE), _pixels((4, 5, 6), (1, 2, 3))),
    "palette with alpha": Good(
        _ALPHA, png(8, 3, b"\1\0", extra=PALETTE + png_chunk(b"tRNS", b"\0\x80")), _pixels((4, 5, 6), (1, 2, 3))
    ),
    "colour and alpha": Good(
        _ALPHA, png(8, 6, b"\x05\x06\x07\x00\xc8\xc9\xca\x80"), _pixels((5, 6, 7), (200, 201, 202))
    ),
    "grey and alpha": Good(_ALPHA, png(8, 4, b"\x05\x00\xc8\xff"), _pixels((5, 5, 5), (200, 200, 200))),
    "transparent colour": Good(_ALPHA, saved(PICTURE, "PNG", transparency=tuple(PIXELS[0, 0].tolist())), PIXELS),
    "16-bit grey": Good(
        _DEEP,
        saved(Image.fromarray(DEEP), "PNG"),
        _pixels((5, 5, 5), (255, 255, 255), (0, 0, 0), (128, 128, 128)),
    ),
    "16-bit colour": Good(
        _DEEP, png(16, 2, b"\x05\xff\x06\x00\x07\x80\xc8\x00\xc9\xff\xca\x01"), _pixels((5, 6, 7), (200, 201, 202))
    ),
    "16-bit colour and alpha": Good(
        _DEEP,
        png(16, 6, b"\x05\xff\x06\x00\x07\x80\0\0\xc8\x00\xc9\xff\xca\x01\xff\xff"),
        _pixels((5, 6, 7), (200, 201, 202)),
    ),
    "cmyk with adobe's marker": Good(_CMYK, CMYK, _whole(_ink(*INKS))),
    "cmyk without it": Good(_CMYK, CMYK[: ADOBE[0]] + CMYK[ADOBE[1] :], _whole(_ink(*INKS))),
    "ycck": Good(_CMYK, patched(YCCK, segment(YCCK, 0xEE)[1] - 1, b"\x02"), _whole((200, 200, 200))),
    **{f"orientation {value}": Good(_UNUSED, with_exif(JPEG, orientation(value)), AS_JPEG) for value in range(1, 9)},
    "damaged exif": Good(_UNUSED, with_exif(JPEG, b"MM\0*\0\0\0\x08\xff\xff" + b"\1" * 50), AS_JPEG),
    "exif that is none": Good(_UNUSED, with_exif(JPEG, b"\0\1\2"), AS_JPEG),
    "exif of 4 MB": Good(_UNUSED, with_segments(JPEG, *MANY_EXIF), AS_JPEG),
    "colour profile": Good(_UNUSED, with_segments(JPEG, (0xE2, PROFILE + bytes(3000))), AS_JPEG),
    "damaged colour profile": Good(_UNUSED, with_segments(JPEG, (0xE2, b"ICC_PROFILE\0\7\2x")), AS_JPEG),
    "text of 8 MB": Good(
        _UNUSED,
        png(8, 2, b"\1\2\3\4\5\6", extra=png_chunk(b"tEXt", b"a\0" + b"x" * 8_000_000)),
        _pixels((1, 2, 3), (4, 5, 6)),
    ),
    "progressive": Good(_CODED, saved(PICTURE, "JPEG", quality=95, subsampling=0, progressive=True), AS_JPEG),
    "restart markers": Good(
        _CODED, saved(PICTURE, "JPEG", quality=95, subsampling=0, restart_marker_blocks=1), AS_JPEG
    ),
    "arithmetic coding": Good(_CODED, grey_jpeg(0xC9, b""), _whole((128, 128, 128), 8)),
    "animated png": Good(_FIRST, saved(PICTURE, "PNG", save_all=True, append_images=[TURNED]), PIXELS),
    "multi-picture jpeg": Good(
        _FIRST, saved(PICTURE, "MPO", quality=95, subsampling=0, save_all=True, append_images=[TURNED]), AS_JPEG
    ),
    "jpeg with bytes after it": Good(_TAIL, JPEG + b"tail" * 100, AS_JPEG),
    "png with bytes after it": Good(_TAIL, PNG + b"tail", PIXELS),
    "png without its end chunk": Good(_TAIL, PNG[:-12], PIXELS),
    "png cut in its end chunk": Good(_TAIL, PNG[:-5], PIXELS),
    "a flipped bit": Good("damaged pixels that still decode", patched(JPEG, SCAN + 300, b"\x15"), None),
    "1 x 1": Good(_SHAPE, saved(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), _pixels((9, 8, 7))),
    "1 x 10,000": Good(
        _SHAPE, saved(Image.new("RGB", (1, 10_000), (9, 8, 7)), "PNG"), np.full((10_000, 1, 3), (9, 8, 7), np.uint8)
    ),
    "10,000 x 1": Good(
        _SHAPE, saved(Image.new("RGB", (10_000, 1), (9, 8, 7)), "PNG"), np.full((1, 10_000, 3), (9, 8, 7), np.uint8)
    ),
    "png named .JPEG": Good(_NAME, PNG, PIXELS),
}
"""Every file is written under the name `image.JPEG`."""

_EMPTY = "empty"
_OTHER = "not JPEG or PNG"
_CUT = "cut off or damaged"
_TYPE = "12 bits, lossless JPEG, unknown PNG type"
_LARGE = "more than 89,478,485 pixels"
_BOMB = "compressed text or profile over 1 MB (64 MB in all)"
_EFFORT = "more than 16 MiB of JPEG metadata, more than 500 scans"
_NONSENSE = "neither JPEG nor PNG"
_UNREADABLE = "cannot be decoded"


UNPACKS_TO_100_MB = zlib.compress(bytes(100_000_000))


def _bomb(kind: bytes, head: bytes) -> bytes:
    return png(8, 2, b"\1\2\3\4\5\6", extra=png_chunk(kind, head + UNPACKS_TO_100_MB))


BAD: dict[str, Bad] = {
    "no bytes": Bad(_EMPTY, b"", "the file is empty"),
    "one byte": Bad(_OTHER, b"\xff", _NONSENSE),
    **{kind: Bad(_OTHER, saved(PICTURE, kind), _NONSENSE) for kind in ("GIF", "BMP", "TIFF", "WEBP", "PPM")},
    "heic": Bad(_OTHER, b"\0\0\0\x18ftypheic\0\0\0\0", _NONSENSE),
    "svg": Bad(_OTHER, b"<svg xmlns='http://www.w3.org/2000/svg'/>", _NONSENSE),
    "eps": Bad(_OTHER, b"%!PS-Adobe-3.0 EPSF-3.0\n", _NONSENSE),
    "html": Bad(_OTHER, b"<!DOCTYPE html><title>404</title>", _NONSENSE),
    "jpeg start only": Bad(_CUT, JPEG[:3], _UNREADABLE),
    "jpeg header only": Bad(_CUT, JPEG[:100], _UNREADABLE),
    **{f"jpeg cut at {n} %": Bad(_CUT, JPEG[: len(JPEG) * n // 100], _UNREADABLE) for n in (25, 50, 99)},
    "jpeg without its end marker": Bad(_CUT, JPEG[:-2], "truncated"),
    "jpeg 0 high": Bad(_CUT, patched(JPEG, FRAME + 5, b"\0\0"), _UNREADABLE),
    "png start only": Bad(_CUT, PNG[:8], _UNREADABLE),
    **{f"png cut at {n} %": Bad(_CUT, PNG[: len(PNG) * n // 100], _UNREADABLE) for n in (25, 50, 90)},
    "png with a damaged header": Bad(_CUT, patched(PNG, 29, b"\0"), _UNREADABLE),
    "png with damaged pixels": Bad(_CUT, patched(PNG, 60, b"\0\0\0\0"), _UNREADABLE),
    "png with no pixels": Bad(_CUT, PNG[:33] + PNG[-12:], _UNREADABLE),
    "png 0 wide": Bad(_CUT, png(8, 2, b"", width=0), _UNREADABLE),
    "png of an unknown kind": Bad(_TYPE, png(3, 7, b"\0"), _UNREADABLE),
    "jpeg with 12 bits": Bad(_TYPE, patched(JPEG, FRAME + 4, b"\x0c"), "12-bit"),
    "arithmetic jpeg with 12 bits": Bad(_TYPE, grey_jpeg(0xC9, b"", precision=12), "12-bit"),
    "jpeg of the lossless kind": Bad(_TYPE, patched(JPEG, FRAME + 1, b"\xc3"), _UNREADABLE),
    "jpeg of 90 megapixels": Bad(_LARGE, patched(JPEG, FRAME + 5, b"\x25\x1c\x25\xe4"), "9,700 x 9,500 pixels"),
    "jpeg of 400 megapixels": Bad(_LARGE, patched(JPEG, FRAME + 5, b"\x4e\x20\x4e\x20"), "20,000 x 20,000 pixels"),
    "png of 90 megapixels": Bad(_LARGE, png(8, 2, b"", width=9_000, height=10_000), "9,000 x 10,000 pixels"),
    "png of 400 megapixels": Bad(_LARGE, png(8, 2, b"", width=20_000, height=20_000), "20,000 x 20,000 pixels"),
    "png just over": Bad(_LARGE, png(8, 0, b"", width=MAX_SOURCE_PIXELS + 1), "89,478,486 x 1 pixels"),
    "compressed text": Bad(_BOMB, _bomb(b"zTXt", b"a\0\0"), "too large"),
    "compressed international text": Bad(_BOMB, _bomb(b"iTXt", b"a\0\1\0\0\0"), "too large"),
    "compressed profile": Bad(_BOMB, _bomb(b"iCCP", b"a\0\0"), "too large"),
    "exif of 17 MB": Bad(
        _EFFORT, with_segments(JPEG, *(MANY_EXIF * 5)[:270]), "17,5.* bytes of metadata before its pixels"
    ),
    "501 scans": Bad(_EFFORT, JPEG[:-2] + b"\xff\xda" * 500 + JPEG[-2:], "501 scans"),
}
