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
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from proteus_cache.errors import BadImageError, StorageError
from proteus_cache.views.encode import DECODER_ERRORS, open_encoded

MAX_SOURCE_PIXELS = 89_478_485
"""Width times height; Pillow's own limit against decompression bombs."""
MAX_SOURCE_BYTES = 1 << 30


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
    image = _decode(data, path)
    return Source(image, hashlib.sha256(data).hexdigest(), image.width, image.height, len(data))


def _read(path: Path) -> bytes:
    try:
        # Without O_NONBLOCK a pipe that took the file's place would block for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            data = _read_all(descriptor, path)
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"{path}: cannot be read: {reason}; put the file back or make it readable, and run the same command again"
        ) from error
    return data


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


def _decode(data: bytes, path: Path) -> Image.Image:
    if not data:
        raise BadImageError(f"{path}: the file is empty")
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


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    image.info.pop("transparency", None)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
