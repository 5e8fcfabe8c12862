"""Source images: how kinds of pixels become RGB; `test_corpus.py` has the files of a data set."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proteus_cache.errors import BadImageError, StorageError
from proteus_cache.views import source
from proteus_cache.views.recipe import draw_recipe
from proteus_cache.views.render import render
from proteus_cache.views.source import read_source
from proteus_cache.views.spec import ViewSpec
from tests.views.image_bytes import patched, png, png_chunk, saved, segment

WIDTH, HEIGHT = 50, 40
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
SMOOTH = PICTURE.resize((4, 4)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


JPEG = saved(PICTURE, "JPEG", quality=95, subsampling=0)
PNG = saved(PICTURE, "PNG")
CMYK = saved(PICTURE.convert("CMYK"), "JPEG", quality=100)
ADOBE = segment(CMYK, 0xEE)
DEEP_GREY = (PIXELS[..., 0].astype(np.uint16) << 8) + PIXELS[..., 1]


def read(folder: Path, data: bytes, name: str = "image.JPEG") -> np.ndarray:
    (folder / name).write_bytes(data)
    found = read_source(folder / name)
    assert found.image.mode == "RGB"
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert (found.width, found.height) == found.image.size
    return np.asarray(found.image)


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


def test_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.png").write_bytes(PNG)
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")

    assert read_source(tmp_path / "link.png").width == WIDTH


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reads fail: Linux has one")
def test_failing_read_is_no_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "READ_AGAIN_S", (0.0, 0.0))

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
        found = read_source(path)

        assert np.array_equal(np.asarray(found.image), np.asarray(default_loader(str(path))))
        recipe = draw_recipe(spec, path.stem, "v000", found.width, found.height)
        assert render(found.image, recipe, spec).shape == (64, 64, 3)
