"""The four JPEGs that come with the package: of the kinds they are said to be, and decoded as Pillow does."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from proteus_cache.errors import BadImageError
from proteus_cache.views import known
from proteus_cache.views.encode import digest_pixels
from proteus_cache.views.known import SOURCES, VIEW, decode_known, known_jpeg
from tests.views.make_known_jpegs import main

KINDS = {
    "baseline_420": ("RGB", (61, 45), 2, False),
    "progressive": ("RGB", (56, 40), 1, True),
    "grey_odd": ("L", (37, 29), -1, False),
    "view_444": ("RGB", (48, 48), 0, False),
}
"""Name to mode, size, Pillow's number of the colour sampling, and whether it is progressive."""


@pytest.mark.parametrize("name", [*SOURCES, VIEW])
def test_each_is_of_its_kind_and_gives_the_pixels_that_pillow_gives(name: str) -> None:
    image = Image.open(io.BytesIO(known_jpeg(name)))

    assert isinstance(image, JpegImagePlugin.JpegImageFile)
    kind = (image.mode, image.size, JpegImagePlugin.get_sampling(image), "progressive" in image.info)
    assert kind == KINDS[name]
    assert decode_known()[name] == digest_pixels(np.asarray(image.convert("RGB")))


def test_they_are_small() -> None:
    assert sum(len(known_jpeg(name)) for name in KINDS) < 8_000


def test_the_maker_writes_the_same_pictures(tmp_path: Path) -> None:
    main(tmp_path)

    for name in KINDS:
        made = np.asarray(Image.open(f"{tmp_path}/{name}.jpg").convert("RGB")).astype(int)
        kept = np.asarray(Image.open(io.BytesIO(known_jpeg(name))).convert("RGB")).astype(int)
        assert np.abs(made - kept).max() <= 8  # another encoder may round otherwise


def test_a_damaged_installation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "known_jpeg", lambda name: known_jpeg(name)[:200])

    with pytest.raises(BadImageError, match="baseline_420.jpg: cannot be decoded"):
        decode_known()
