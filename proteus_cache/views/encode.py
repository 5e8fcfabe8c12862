"""View bytes and view pixels: encoding, strict decoding, and the digest that proves pixels equal.

Teacher and student both see what `decode_view` gives, so they agree by construction under one decoder and by
digest under two. It is the loader's inner loop: Pillow's JPEG or PNG reader is built directly, without a
guess at the format, and all but some 40 of its 460 microseconds (224 pixels, one core) are libjpeg's.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin

from proteus_cache.errors import FormatError
from proteus_cache.views.spec import ViewFormat

JPEG_QUALITY = 95
PNG_COMPRESS_LEVEL = 1

DECODER_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    LookupError,
    EOFError,
    TypeError,
    struct.error,
    zlib.error,
)
"""What Pillow raises on bytes that are not the image they claim to be."""

_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_JPEG_BASELINE, _JPEG_SCAN = 0xC0, 0xDA
_JPEG_TABLES = {0xC4, 0xDB, 0xE0, 0xEE}
"""Huffman and quantisation tables, and the headers of JFIF and Adobe."""
_JPEG_MAX_HEADER_BYTES = 4096
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


class JpegReader(JpegImagePlugin.JpegImageFile):
    """Pillow's JPEG reader without a look into EXIF."""

    def _read_dpi_from_exif(self) -> None:
        """Leave the resolution out: nobody asks, and parsing damaged EXIF for it is slow and warns."""


def open_encoded(data: bytes | memoryview) -> ImageFile.ImageFile | None:
    """Read the header of a JPEG or PNG, told by content; None for any other kind of bytes.

    Raises:
        one of DECODER_ERRORS: the header is damaged.
    """
    start = bytes(data[:8])
    if start.startswith(_JPEG_START):
        return JpegReader(io.BytesIO(data))
    if start == _PNG_START:
        return PngImagePlugin.PngImageFile(io.BytesIO(data))
    return None


def encode_view(pixels: NDArray[np.uint8], view_format: ViewFormat) -> bytes:
    """The stored form of a view.

    Args:
        pixels: (H, W, 3) uint8.
        view_format: `jpeg` (baseline, quality 95, 4:4:4, standard Huffman tables) or `png` (lossless).
    """
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if view_format == "jpeg":
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=False, progressive=False)
    else:
        image.save(buffer, "PNG", compress_level=PNG_COMPRESS_LEVEL)
    return buffer.getvalue()


def most_view_bytes(side_px: int) -> int:
    """More bytes than an encoded view of this side can have: 27 bits for each JPEG coefficient, and its tables."""
    return 12 * side_px * side_px + (64 << 10)


def decode_view(data: bytes | memoryview, side_px: int) -> NDArray[np.uint8]:
    """The pixels of a stored view.

    Args:
        data: what `encode_view` gave.
        side_px: the side that the view must have.

    Returns:
        (side_px, side_px, 3) uint8, contiguous and writable.

    Raises:
        FormatError: not a JPEG of one scan or a plain PNG from end to end, damaged, or of another size or colour mode.
    """
    _check_ends(data)
    try:
        image = open_encoded(data)
        if image is None:
            raise FormatError(f"view: neither JPEG nor PNG (it starts with {bytes(data[:8])!r})")
        if image.size != (side_px, side_px) or image.mode != "RGB":
            width, height = image.size
            raise FormatError(f"view: {width} x {height} {image.mode} found, {side_px} x {side_px} RGB expected")
        return np.array(image)
    except DECODER_ERRORS as error:
        raise FormatError(f"view: cannot be decoded ({error})") from error


def _check_ends(data: bytes | memoryview) -> None:
    """Refuse bytes after the image, and PNGs with more in them than pixels."""
    start = bytes(data[:8])
    if start == _PNG_START:
        if bytes(data[-12:]) != _PNG_END or not _only_pixels(data):
            raise FormatError("view: a PNG with other chunks than IHDR, IDAT and IEND, or not ending with IEND")
        if bytes(data[12:16]) != b"IHDR" or data[24] != 8 or bytes(data[26:29]) != bytes(3):
            raise FormatError("view: a PNG of another kind than 8 bits in plain rows")
    elif start.startswith(_JPEG_START):
        if bytes(data[-2:]) != _JPEG_END:
            raise FormatError("view: a JPEG that does not end with its end marker (cut off, or with bytes after it)")
        if not _is_one_scan(data):
            raise FormatError("view: a JPEG with several scans or a long header, which stored views do not have")


def _is_one_scan(data: bytes | memoryview) -> bool:
    """Whether a JPEG is of the one kind that `encode_view` writes: baseline, all colours in its first scan.

    A few kilobytes can hold a thousand scans, and a decoder goes over the whole image for each of them; after such a
    first scan it stops.
    """
    position, n_colours = 2, 0
    while position + 10 <= min(len(data), _JPEG_MAX_HEADER_BYTES) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _JPEG_SCAN:
            return data[position + 4] == n_colours
        if marker == _JPEG_BASELINE:
            n_colours = data[position + 9]
        elif marker not in _JPEG_TABLES:
            return False
        position += 2 + (data[position + 2] << 8 | data[position + 3])
    return False


def _only_pixels(data: bytes | memoryview) -> bool:
    position, kinds = 8, list[bytes]()
    most = 16 + len(data) // 1024  # encoders fill their chunks
    while position + 12 <= len(data) and len(kinds) < most:
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind not in (b"IHDR", b"IDAT", b"IEND"):
            return False
        kinds.append(kind)
        position += 12 + length
    return position == len(data) and kinds.count(b"IEND") == 1


def digest_pixels(pixels: NDArray[np.uint8]) -> str:
    """16 hex digits: BLAKE2b with 8 bytes of the pixels, row by row, channels together."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=8).hexdigest()
