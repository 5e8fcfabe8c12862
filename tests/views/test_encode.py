"""View bytes: exact for png, close for jpeg, pinned by digest, and read strictly."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image

from proteus_cache.errors import FormatError
from proteus_cache.views.encode import decode_view, digest_pixels, encode_view
from proteus_cache.views.spec import ViewFormat

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
SMOOTH = np.asarray(Image.fromarray(PIXELS[:4, :4]).resize((32, 32), Image.Resampling.BICUBIC))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return png[:33] + chunk + png[33:]


@given(arrays(np.uint8, (9, 9, 3)))
def test_png_brings_every_pixel_back(pixels: NDArray[np.uint8]) -> None:
    assert np.array_equal(decode_view(encode_view(pixels, "png"), 9), pixels)


def test_jpeg_is_close_and_has_full_colour() -> None:
    data = encode_view(SMOOTH, "jpeg")
    header = Image.open(io.BytesIO(data))

    assert np.abs(decode_view(data, 32).astype(int) - SMOOTH).max() < 12
    assert header.format == "JPEG"
    assert [component[1:3] for component in header.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]
    assert "progressive" not in header.info


@pytest.mark.parametrize("view_format", ["jpeg", "png"])
def test_decoding_gives_pillows_pixels_in_a_writable_array(view_format: ViewFormat) -> None:
    data = encode_view(PIXELS, view_format)

    pixels = decode_view(memoryview(data), 32)

    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data))))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


def test_encoding_twice_gives_the_same_bytes() -> None:
    assert encode_view(PIXELS, "jpeg") == encode_view(PIXELS.copy(), "jpeg")
    assert encode_view(PIXELS, "png") == encode_view(PIXELS.copy(), "png")


def test_digest_is_pinned_and_of_the_pixels_alone() -> None:
    assert digest_pixels(PIXELS) == "013ed23c913056b5"
    assert digest_pixels(np.asfortranarray(PIXELS)) == digest_pixels(PIXELS)
    assert digest_pixels(PIXELS[::-1]) != digest_pixels(PIXELS)


GREY = Image.fromarray(PIXELS[..., 0])
BAD_VIEWS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "neither JPEG nor PNG"),
    "text": (b"<html>not a view</html>", "neither JPEG nor PNG"),
    "gif": (saved(Image.fromarray(PIXELS), "GIF"), "neither JPEG nor PNG"),
    "jpeg cut off": (encode_view(PIXELS, "jpeg")[:-10], "does not end with its end marker"),
    "jpeg with bytes after it": (encode_view(PIXELS, "jpeg") + b"tail", "does not end with its end marker"),
    "jpeg header only": (encode_view(PIXELS, "jpeg")[:200] + b"\xff\xd9", "several scans or a long header"),
    "png cut off": (encode_view(PIXELS, "png")[:-40], "not ending with IEND"),
    "png with bytes after it": (encode_view(PIXELS, "png") + b"tail", "not ending with IEND"),
    "png in a png": (encode_view(PIXELS, "png") * 2, "not ending with IEND"),
    "png with text": (with_chunk(encode_view(PIXELS, "png"), b"tEXt", b"a\0b"), "other chunks"),
    "png with a chunk of 4 GB": (
        encode_view(PIXELS, "png")[:33] + b"\xff\xff\xff\xffIDAT" + encode_view(PIXELS, "png")[33:],
        "other chunks",
    ),
    "png with wrong pixels": (
        encode_view(PIXELS, "png")[:60] + b"\0\0\0\0" + encode_view(PIXELS, "png")[64:],
        "cannot be decoded",
    ),
    "png without pixels": (
        encode_view(PIXELS, "png")[:33] + encode_view(PIXELS, "png")[-12:],
        "cannot be decoded",
    ),
    "too wide": (encode_view(PIXELS[:, :31], "png"), "31 x 32 RGB found, 32 x 32 RGB expected"),
    "too large": (encode_view(np.zeros((64, 64, 3), np.uint8), "jpeg"), "64 x 64 RGB found"),
    "grey": (saved(GREY, "JPEG"), "32 x 32 L found"),
    "cmyk": (saved(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"), "32 x 32 CMYK found"),
    "alpha": (saved(Image.fromarray(PIXELS).convert("RGBA"), "PNG"), "32 x 32 RGBA found"),
}


@pytest.mark.parametrize("name", BAD_VIEWS)
def test_what_is_no_view_is_refused(name: str) -> None:
    data, message = BAD_VIEWS[name]

    with pytest.raises(FormatError, match=f"view: .*({message})"):
        decode_view(data, 32)


def test_damage_inside_a_jpeg_is_for_checksums_to_find() -> None:
    """The decoder fills what is missing; this is why each view has a CRC and a digest."""
    data = encode_view(PIXELS, "jpeg")

    pixels = decode_view(data[:-300] + b"\xff\xd9", 32)

    assert digest_pixels(pixels) != digest_pixels(decode_view(data, 32))


@given(st.integers(0, 10_000), st.integers(1, 255), st.sampled_from(["jpeg", "png"]))
def test_flipped_bits_give_pixels_or_a_format_error(place: int, change: int, view_format: ViewFormat) -> None:
    data = bytearray(encode_view(SMOOTH, view_format))
    data[place % len(data)] ^= change

    try:
        pixels = decode_view(bytes(data), 32)
    except FormatError:
        return
    assert pixels.shape == (32, 32, 3)
