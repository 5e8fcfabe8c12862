"""Source images: read a file, prove what it was, and give RGB pixels by stated rules.

JPEG and PNG are read, told by content and not by name. To RGB:
    grey, 1 bit          the value in all three channels
    palette              looked up
    alpha, transparency  dropped, the colour under it stays
    16 bits              the upper 8 bits
    CMYK, YCCK           Pillow's plain conversion, Adobe's inversion undone
EXIF orientation and colour profiles are not applied, as in torchvision's ImageFolder. Of an animated PNG the
first image counts. Whatever cannot be decoded is a bad image; whatever cannot be read is an error of the file
system.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, JpegImagePlugin

from proteus_cache.errors import BadImageError, StorageError
from proteus_cache.views.encode import DECODER_ERRORS, open_encoded

MAX_SOURCE_PIXELS = 89_478_485
"""Width times height; Pillow's own limit against decompression bombs."""
MAX_SOURCE_BYTES = 1 << 30
MAX_HEADER_BYTES = 16 << 20
"""Before the pixels of a JPEG: EXIF, colour profile, comments."""
MAX_PARTS = 1000
"""Of what stands before the pixels of a JPEG. A PNG may have one more for each kilobyte."""
MAX_SCANS = 500
"""Of a progressive JPEG; they have about ten."""
READ_AGAIN_S = (0.2, 1.0)
"""Pauses before a second and a third attempt to read a file, in seconds."""

_PASSING = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT}
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """One decoded source image."""

    image: Image.Image
    """Mode RGB, loaded."""
    sha256: str
    """64 hex digits of the file's bytes."""
    width: int
    height: int
    n_bytes: int
    """Of the file."""


def read_source(path: Path) -> Source:
    """Read and decode one image file.

    Raises:
        BadImageError: empty, not JPEG or PNG, cut off, damaged or too large; names the file and the reason.
        StorageError: it cannot be opened or read, or is not a regular file; that says nothing of the image.
    """
    data = _read(path)
    image = decode_source(data, path)
    return Source(image, hashlib.sha256(data).hexdigest(), image.width, image.height, len(data))


def _read(path: Path) -> bytes:
    """All bytes of a file; what network drives say in passing is tried again after a pause."""
    pauses_s = iter(READ_AGAIN_S)
    while True:
        try:
            return _read_once(path)
        except OSError as error:
            reason = error.strerror or str(error)
            pause_s = next(pauses_s, None) if error.errno in _PASSING else None
            if pause_s is None:
                raise StorageError(
                    f"{path}: cannot be read: {reason}; put the file back or make it readable, and run the same "
                    "command again"
                ) from error
            logger.warning("reading again path=%s reason=%s", path, reason)
            time.sleep(pause_s)


def _read_once(path: Path) -> bytes:
    # Without O_NONBLOCK a pipe that took the file's place would block for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _read_all(descriptor, path)
    finally:
        os.close(descriptor)


def _read_all(descriptor: int, path: Path) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if status.st_size > MAX_SOURCE_BYTES:
        raise BadImageError(f"{path}: {status.st_size:,} bytes, more than {MAX_SOURCE_BYTES:,}")
    with open(descriptor, "rb", closefd=False) as file:
        data = file.read(status.st_size + 1)
    if len(data) != status.st_size:
        raise OSError(errno.EAGAIN, "changed while it was read")
    return data


def decode_source(data: bytes, path: Path | str) -> Image.Image:
    """The RGB image that a source's bytes hold, by the rules above.

    Args:
        data: of the whole file.
        path: its name, for the message.

    Raises:
        BadImageError: as `read_source`.
    """
    if not data:
        raise BadImageError(f"{path}: the file is empty")
    _check_effort(data, path)
    try:
        image = open_encoded(data)
        if image is None:
            raise BadImageError(f"{path}: neither JPEG nor PNG (it starts with {data[:8]!r})")
        if image.width * image.height > MAX_SOURCE_PIXELS:
            raise BadImageError(
                f"{path}: {image.width:,} x {image.height:,} pixels, more than {MAX_SOURCE_PIXELS:,} in all"
            )
        return _to_rgb(image)
    except DECODER_ERRORS as error:
        raise BadImageError(f"{path}: cannot be decoded: {error}") from error


def _check_effort(data: bytes, path: Path | str) -> None:
    """Refuse files whose header or scans cost hours: Pillow goes over it byte by byte where it finds no segment, and
    copies all EXIF again for each further segment of it.

    Raises:
        BadImageError: too much metadata, in too many parts, or too many scans.
    """
    if data.startswith(b"\x89PNG"):
        n_parts, most_parts = _count_chunks(data), MAX_PARTS + len(data) // 1024
    elif data.startswith(b"\xff\xd8"):
        n_scans = data.count(b"\xff\xda", 2)
        if n_scans > MAX_SCANS:
            raise BadImageError(f"{path}: {n_scans:,} scans, more than {MAX_SCANS}")
        n_parts, n_bytes = _measure_header(data)
        most_parts = MAX_PARTS
        if n_bytes > MAX_HEADER_BYTES:
            raise BadImageError(
                f"{path}: {n_bytes:,} bytes of metadata before its pixels, more than {MAX_HEADER_BYTES:,}"
            )
    else:
        return
    if n_parts > most_parts:
        raise BadImageError(f"{path}: its metadata are in more than {most_parts:,} parts, or it is damaged")


def _measure_header(data: bytes) -> tuple[int, int]:
    """Parts before the pixels of a JPEG, and their bytes, as Pillow reads them; too many parts are not all counted.

    A part is a segment, or 64 bytes that belong to none.
    """
    position, n_parts, n_between = 2, 0, 0
    while position + 4 <= len(data) and n_parts + n_between // 64 <= MAX_PARTS:
        marker = data[position : position + 2]
        if marker == b"\xff\xda":
            break
        _, _, handler = JpegImagePlugin.MARKER.get(int.from_bytes(marker, "big"), ("", "", None))
        if handler is None:  # no marker, or one that stands alone
            position, n_between = position + 1, n_between + 1
        else:
            length = int.from_bytes(data[position + 2 : position + 4], "big")
            position, n_parts = position + 2 + max(2, length), n_parts + 1
    return n_parts + n_between // 64, position


def _count_chunks(data: bytes) -> int:
    """Chunks of a PNG."""
    position, n_chunks = 8, 0
    while position + 12 <= len(data):
        position += 12 + int.from_bytes(data[position : position + 4], "big")
        n_chunks += 1
    return n_chunks


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    image.info.pop("transparency", None)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
