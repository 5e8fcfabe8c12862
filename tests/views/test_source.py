"""Source images: the corpus of good, odd and bad files, and the line between a bad image and a bad disk."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from proteus_cache.errors import BadImageError, StorageError
from proteus_cache.views.recipe import draw_recipe
from proteus_cache.views.render import render
from proteus_cache.views.source import MAX_SOURCE_PIXELS, read_source
from proteus_cache.views.spec import ViewSpec

WIDTH, HEIGHT = 50, 40
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
SMOOTH = PICTURE.resize((4, 4)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
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


def with_exif(jpeg: bytes, body: bytes) -> bytes:
    """Put an EXIF segment in place of the JFIF one, as cameras do."""
    start, end = segment(jpeg, 0xE0)
    exif = b"Exif\0\0" + body
    return jpeg[:start] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[end:]


def orientation(value: int) -> bytes:
    return b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, value, 0) + b"\0\0\0\0"


def patched(data: bytes, place: int, change: bytes) -> bytes:
    return data[:place] + change + data[place + len(change) :]


JPEG = saved(PICTURE, "JPEG", quality=95, subsampling=0)
PNG = saved(PICTURE, "PNG")
CMYK = saved(PICTURE.convert("CMYK"), "JPEG", quality=100)
FRAME = segment(JPEG, 0xC0)[0]
ADOBE = segment(CMYK, 0xEE)
DEEP_GREY = (PIXELS[..., 0].astype(np.uint16) << 8) + PIXELS[..., 1]
HUGE_SIDES = struct.pack(">HH", 20_000, 20_000)

GOOD: dict[str, bytes] = {
    "jpeg": JPEG,
    "png": PNG,
    "progressive": saved(PICTURE, "JPEG", quality=95, subsampling=0, progressive=True),
    "restart markers": saved(PICTURE, "JPEG", quality=95, subsampling=0, restart_marker_blocks=1),
    "bytes after the end": JPEG + b"tail" * 100,
    "png bytes after the end": PNG + b"tail",
    "png without its end chunk": PNG[:-12],
    "damaged colour profile": saved(PICTURE, "JPEG", quality=95, subsampling=0, icc_profile=b"no profile" * 10),
    **{f"orientation {value}": with_exif(JPEG, orientation(value)) for value in range(1, 9)},
    "damaged exif": with_exif(JPEG, b"MM\0*\0\0\0\x08\xff\xff" + b"\1" * 50),
    "exif that is none": with_exif(JPEG, b"\0\1\2"),
    "exif as large as can be": with_exif(JPEG, orientation(1) + b"\0" * 65_000),
    "animated png": saved(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(90)]),
    "multi-picture jpeg": saved(PICTURE, "MPO", quality=95, subsampling=0, save_all=True, append_images=[SMOOTH]),
    "transparent colour": saved(PICTURE, "PNG", transparency=tuple(PIXELS[0, 0].tolist())),
    "alpha": saved(Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]])), "PNG"),
}
"""Each decodes to the pixels of PICTURE, as its JPEG or PNG stores them."""

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "one byte": (b"\xff", "neither JPEG nor PNG"),
    "jpeg start only": (JPEG[:3], "cannot be decoded"),
    "jpeg header only": (JPEG[:100], "cannot be decoded"),
    **{f"jpeg cut at {share} %": (JPEG[: len(JPEG) * share // 100], "cannot be decoded") for share in (25, 50, 99)},
    "jpeg without its end marker": (JPEG[:-2], "truncated"),
    "png start only": (PNG[:8], "cannot be decoded"),
    **{f"png cut at {share} %": (PNG[: len(PNG) * share // 100], "cannot be decoded") for share in (25, 50, 99)},
    "png with a damaged header": (patched(PNG, 29, b"\0"), "cannot be decoded"),
    "png with damaged pixels": (patched(PNG, 60, b"\0\0\0\0"), "cannot be decoded"),
    "png with no pixels": (PNG[:33] + PNG[-12:], "cannot be decoded"),
    "png 0 wide": (png(8, 2, b"", width=0), "cannot be decoded"),
    "png of an unknown kind": (png(3, 7, b"\0"), "cannot be decoded"),
    "jpeg with 12 bits": (patched(JPEG, FRAME + 4, b"\x0c"), "12-bit"),
    "jpeg of the lossless kind": (patched(JPEG, FRAME + 1, b"\xc3"), "cannot be decoded"),
    "jpeg 0 high": (patched(JPEG, FRAME + 5, b"\0\0"), "cannot be decoded"),
    "jpeg of 400 megapixels": (patched(JPEG, FRAME + 5, HUGE_SIDES), "20,000 x 20,000 pixels"),
    "png of 400 megapixels": (png(8, 2, b"", width=20_000, height=20_000), "20,000 x 20,000 pixels"),
    "png just over the limit": (png(8, 0, b"", width=MAX_SOURCE_PIXELS + 1), "89,478,486 x 1 pixels"),
    "compressed text bomb": (
        png(8, 2, b"", extra=png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000)))),
        "too large",
    ),
    **{kind: (saved(PICTURE, kind), "neither JPEG nor PNG") for kind in ("GIF", "BMP", "TIFF", "WEBP", "PPM")},
    "html": (b"<!DOCTYPE html><title>404</title>", "neither JPEG nor PNG"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "neither JPEG nor PNG"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "neither JPEG nor PNG"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0", "neither JPEG nor PNG"),
}


def read(folder: Path, data: bytes, name: str = "image.JPEG") -> np.ndarray:
    (folder / name).write_bytes(data)
    source = read_source(folder / name)
    assert source.image.mode == "RGB"
    assert source.sha256 == hashlib.sha256(data).hexdigest()
    assert (source.width, source.height) == source.image.size
    return np.asarray(source.image)


@pytest.mark.parametrize("name", GOOD)
def test_odd_files_of_good_images_are_read_without_a_word(tmp_path: Path, name: str) -> None:
    expected = PIXELS if GOOD[name].startswith(b"\x89PNG") else np.asarray(Image.open(io.BytesIO(JPEG)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read(tmp_path, GOOD[name])

    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("name", BAD)
def test_bad_image_is_named_with_its_reason(tmp_path: Path, name: str) -> None:
    data, reason = BAD[name]

    with pytest.raises(BadImageError, match=reason) as caught:
        read(tmp_path, data)

    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'image.JPEG'}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(png(1, 0, b"\x40"), [[0, 0, 0], [255, 255, 255]], id="1 bit"),
        pytest.param(png(2, 0, b"\x70"), [[85, 85, 85], [255, 255, 255]], id="2 bits"),
        pytest.param(png(4, 0, b"\x1f"), [[17, 17, 17], [255, 255, 255]], id="4 bits"),
        pytest.param(png(8, 0, b"\x05\xc8"), [[5, 5, 5], [200, 200, 200]], id="grey"),
        pytest.param(png(16, 0, b"\x05\xff\xff\x00"), [[5, 5, 5], [255, 255, 255]], id="16-bit grey"),
        pytest.param(png(8, 4, b"\x05\x00\xc8\xff"), [[5, 5, 5], [200, 200, 200]], id="grey and alpha"),
        pytest.param(
            png(16, 4, b"\x05\xff\0\0\xc8\0\xff\xff"),
            [[5, 5, 5], [200, 200, 200]],
            id="16-bit grey and alpha",
        ),
        pytest.param(
            png(16, 2, b"\x05\xff\x06\x00\x07\x80\xc8\x00\xc9\xff\xca\x01"),
            [[5, 6, 7], [200, 201, 202]],
            id="16-bit colour",
        ),
        pytest.param(
            png(16, 6, b"\x05\xff\x06\x00\x07\x80\0\0\xc8\x00\xc9\xff\xca\x01\xff\xff"),
            [[5, 6, 7], [200, 201, 202]],
            id="16-bit colour and alpha",
        ),
        pytest.param(
            png(8, 3, b"\x01\x00", extra=png_chunk(b"PLTE", b"\1\2\3\4\5\6")),
            [[4, 5, 6], [1, 2, 3]],
            id="palette",
        ),
        pytest.param(
            png(8, 3, b"\x01\x00", extra=png_chunk(b"PLTE", b"\1\2\3\4\5\6") + png_chunk(b"tRNS", b"\0\x80")),
            [[4, 5, 6], [1, 2, 3]],
            id="palette with alpha",
        ),
        pytest.param(
            png(8, 0, b"\x05\xc8", extra=png_chunk(b"tRNS", b"\0\x05")),
            [[5, 5, 5], [200, 200, 200]],
            id="transparent grey",
        ),
    ],
)
def test_every_kind_of_png_becomes_rgb(tmp_path: Path, data: bytes, expected: list[list[int]]) -> None:
    assert read(tmp_path, data).tolist() == [expected]


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    pixels = read(tmp_path, saved(Image.fromarray(DEEP_GREY), "PNG"))

    assert np.array_equal(pixels, np.repeat(PIXELS[..., :1], 3, axis=2))


def test_grey_jpeg_becomes_rgb(tmp_path: Path) -> None:
    pixels = read(tmp_path, saved(SMOOTH.convert("L"), "JPEG"))

    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert np.abs(pixels[..., 0].astype(int) - np.asarray(SMOOTH.convert("L"))).max() < 12


def test_cmyk_jpegs_keep_their_colours(tmp_path: Path) -> None:
    data = saved(SMOOTH.convert("CMYK"), "JPEG", quality=100)
    start, end = segment(data, 0xEE)

    inverted, plain = read(tmp_path, data), read(tmp_path, data[:start] + data[end:])

    assert np.abs(inverted.astype(int) - np.asarray(SMOOTH)).max() < 12
    assert np.array_equal(plain, inverted)


def test_ycck_jpeg_is_read_as_pillow_reads_it(tmp_path: Path) -> None:
    data = patched(CMYK, ADOBE[1] - 1, b"\x02")

    assert np.array_equal(read(tmp_path, data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_name_does_not_matter(tmp_path: Path) -> None:
    assert np.array_equal(read(tmp_path, PNG, "n02105855_2933.JPEG"), PIXELS)
    assert read(tmp_path, JPEG, "photograph.png").shape == PIXELS.shape


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 10_000), (10_000, 1)])
def test_images_of_extreme_shape_are_good(tmp_path: Path, width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), (9, 8, 7))

    assert read(tmp_path, saved(image, "PNG")).shape == (height, width, 3)
    assert read(tmp_path, saved(image, "JPEG")).shape == (height, width, 3)


def test_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.png").write_bytes(PNG)
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")

    assert read_source(tmp_path / "link.png").width == WIDTH


def test_what_the_file_system_refuses_is_no_bad_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")

    for name, reason in [
        ("gone.jpg", "No such file"),
        ("pipe.jpg", "not a regular file"),
        ("folder.jpg", "not a regular file"),
        ("loop.jpg", "Too many levels"),
    ]:
        with pytest.raises(StorageError, match=rf"{name}: cannot be read: {reason}.*; put the file back"):
            read_source(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reads fail: Linux has one")
def test_failing_read_is_no_bad_image() -> None:
    with pytest.raises(StorageError, match="Input/output error"):
        read_source(Path("/proc/self/mem"))


def test_file_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "large.jpg", "wb") as file:
        file.truncate((1 << 30) + 1)

    with pytest.raises(BadImageError, match="1,073,741,825 bytes"):
        read_source(tmp_path / "large.jpg")


@pytest.mark.parametrize("data", [saved(SMOOTH, "JPEG"), saved(SMOOTH, "PNG")], ids=["jpeg", "png"])
def test_damaged_bytes_give_an_image_or_a_bad_image(tmp_path: Path, data: bytes) -> None:
    draws = np.random.default_rng(0)
    path = tmp_path / "image.jpg"
    n_bad = 0
    for _ in range(400):
        damaged = bytearray(data)
        for place in draws.integers(0, len(data), draws.integers(1, 5)):
            damaged[place] = draws.integers(0, 256)
        path.write_bytes(damaged[: draws.integers(len(data) // 2, len(data) + 1)])
        try:
            image = read_source(path).image
        except BadImageError:
            n_bad += 1
        else:
            assert image.mode == "RGB"

    assert n_bad > 100


def test_real_photographs_decode_as_torchvision_does(test_data: Path) -> None:
    from torchvision.datasets.folder import default_loader

    spec = ViewSpec(size_px=64)
    for path in sorted((test_data / "imagenet-sample").glob("*/*.JPEG"))[::8]:
        source = read_source(path)

        assert np.array_equal(np.asarray(source.image), np.asarray(default_loader(str(path))))
        recipe = draw_recipe(spec, path.stem, "v000", source.width, source.height)
        assert render(source.image, recipe, spec).shape == (64, 64, 3)
