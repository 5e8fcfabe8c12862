"""Image files by hand: PNG chunks, JPEG segments, and kinds that Pillow does not write."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:  # options of that kind
    """The image as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk with its CRC."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(bits: int, colour: int, rows: bytes, *, width: int = 2, height: int = 1, extra: bytes = b"") -> bytes:
    """A PNG by hand, for the kinds that Pillow does not write; `rows` without filter bytes, one row here."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = zlib.compress(b"\0" + rows)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def segment(jpeg: bytes, marker: int) -> tuple[int, int]:
    """Start and end of the first segment with this marker, in a JPEG that Pillow wrote."""
    start = jpeg.index(bytes([0xFF, marker]))
    return start, start + 2 + struct.unpack(">H", jpeg[start + 2 : start + 4])[0]


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    """Put segments (marker, body) in place of the JFIF one."""
    start, end = segment(jpeg, 0xE0)
    made = b"".join(b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments)
    return jpeg[:start] + made + jpeg[end:]


def with_exif(jpeg: bytes, body: bytes) -> bytes:
    """Put an EXIF segment in place of the JFIF one, as cameras do."""
    return with_segments(jpeg, (0xE1, b"Exif\0\0" + body))


def orientation(value: int) -> bytes:
    """The body of an EXIF segment that says how the camera was held."""
    return b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, value, 0) + b"\0\0\0\0"


def patched(data: bytes, place: int, change: bytes) -> bytes:
    """Other bytes from `place` on."""
    return data[:place] + change + data[place + len(change) :]


def grey_jpeg(frame: int, scan: bytes, *, precision: int = 8) -> bytes:
    """An 8 x 8 grey JPEG with steps of 1 and no Huffman tables.

    Args:
        frame: its marker: 0xC9 is the sequential kind with arithmetic coding.
        scan: coded data.
        precision: bits of a value.
    """
    steps = b"\xff\xdb" + struct.pack(">HB", 67, 0) + b"\x01" * 64
    header = b"\xff" + bytes([frame]) + struct.pack(">HBHHB", 11, precision, 8, 8, 1) + b"\x01\x11\x00"
    start = b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\x01\x00" + b"\x00\x3f\x00"
    return b"\xff\xd8" + steps + header + start + scan + b"\xff\xd9"
