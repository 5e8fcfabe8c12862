"""One view from file to sample document: what is written down is what was done."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from proteus_cache.errors import BadImageError, ChecksumError, FormatError, StorageError
from proteus_cache.views.encode import decode_view, digest_pixels
from proteus_cache.views.make import SampleRecord, View, make_view
from proteus_cache.views.recipe import draw_recipe
from proteus_cache.views.render import render
from proteus_cache.views.source import read_source
from proteus_cache.views.spec import ViewFormat, ViewSpec

SPEC = ViewSpec(size_px=32)


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def made(path: Path, view: str = "v000", label: int | None = 3, spec: ViewSpec = SPEC) -> View:
    return make_view(path, "pets/cat.png", "cat_0123456789", label, view, spec)


@pytest.mark.parametrize("view_format", ["jpeg", "png"])
def test_pixels_are_those_of_the_bytes(image_path: Path, view_format: ViewFormat) -> None:
    view = made(image_path, spec=ViewSpec(size_px=32, view_format=view_format))

    assert np.array_equal(view.pixels, decode_view(view.data, 32))
    assert view.digest == digest_pixels(view.pixels)
    kind = Image.open(io.BytesIO(view.data)).format
    assert kind == view_format.upper()


@pytest.mark.parametrize("label", [None, 0, 3])
def test_sample_document_says_what_was_done(image_path: Path, label: int | None) -> None:
    view = made(image_path, "v001", label)

    sample = SampleRecord.parse(view.sample_json, "sample")

    assert (sample.key, sample.path, sample.label, sample.view) == (
        "cat_0123456789",
        "pets/cat.png",
        label,
        "v001",
    )
    assert sample.view_digest == view.digest
    assert sample.source.sha256 == hashlib.sha256(image_path.read_bytes()).hexdigest()
    assert (sample.source.width, sample.source.height) == (40, 30)
    assert sample.recipe == draw_recipe(SPEC, "cat_0123456789", "v001", 40, 30)


def test_views_can_be_made_again_from_their_documents(image_path: Path) -> None:
    spec = ViewSpec(size_px=32, view_format="png")
    for number in range(30):
        view = make_view(image_path, "cat.png", f"key_{number}", None, "v000", spec)

        recipe = SampleRecord.parse(view.sample_json, "sample").recipe

        assert digest_pixels(render(read_source(image_path).image, recipe, spec)) == view.digest


def test_damaged_or_unknown_documents_are_refused(image_path: Path) -> None:
    data = made(image_path).sample_json

    with pytest.raises(ChecksumError, match="cat: damaged"):
        SampleRecord.parse(data.replace(b'"label":3', b'"label":4'), "cat")
    with pytest.raises(FormatError, match="cat"):
        SampleRecord.parse(data[:-9], "cat")


def test_making_twice_gives_the_same_bytes(image_path: Path) -> None:
    assert made(image_path).data == made(image_path).data
    assert made(image_path).sample_json == made(image_path).sample_json
    assert made(image_path).digest != made(image_path, "v001").digest


def test_another_process_makes_the_same_view_without_torch(image_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from proteus_cache.views.make import make_view\n"
        "from proteus_cache.views.spec import ViewSpec\n"
        "path, spec = pathlib.Path(sys.argv[1]), ViewSpec(size_px=32)\n"
        "views = [make_view(path, 'pets/cat.png', f'key_{n}', 3, 'v000', spec) for n in range(20)]\n"
        "assert not {'torch', 'timm', 'torchvision', 'pyarrow'} & set(sys.modules)\n"
        "print(*(view.digest for view in views))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(image_path)], capture_output=True, text=True, check=True)

    here = [make_view(image_path, "pets/cat.png", f"key_{n}", 3, "v000", SPEC).digest for n in range(20)]
    assert done.stdout.split() == here


@pytest.mark.parametrize("augment", ["deit", "none"])
def test_one_pixel_is_enough_for_every_view(tmp_path: Path, augment: Any) -> None:
    Image.new("RGB", (1, 1), (200, 100, 50)).save(tmp_path / "dot.png")
    spec = ViewSpec(augment=augment)

    for number in range(25):
        view = make_view(tmp_path / "dot.png", "dot.png", f"dot_{number}", None, "v000", spec)
        assert view.pixels.shape == (224, 224, 3)


def test_errors_of_the_image_pass_through(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"GIF89a")

    with pytest.raises(BadImageError, match=r"bad\.jpg: neither JPEG nor PNG"):
        made(tmp_path / "bad.jpg")
    with pytest.raises(StorageError, match=r"gone\.jpg: cannot be read"):
        made(tmp_path / "gone.jpg")


def test_other_errors_say_which_view_they_belong_to(image_path: Path) -> None:
    with pytest.raises(ValueError, match="a view index is named") as caught:
        made(image_path, "first")

    assert caught.value.__notes__ == ["at key=cat_0123456789, view=first"]


def test_sample_document_is_canonical_json(image_path: Path) -> None:
    data = made(image_path).sample_json

    value = json.loads(data)

    assert data.endswith(b'"}\n')
    assert list(value)[:-1] == sorted(key for key in value if key != "digest")
    assert (value["format"], value["version"]) == ("proteus-cache/sample", 1)


def test_real_photographs_become_views(test_data: Path) -> None:
    paths = sorted((test_data / "imagenet-sample").glob("*/*.JPEG"))[:24]
    sizes = []
    for path in paths:
        view = make_view(path, path.name, path.stem.lower(), None, "v000", ViewSpec())
        assert view.pixels.shape == (224, 224, 3)
        sizes.append(len(view.data))

    # DESIGN counts 35 KB a view; op noise and erasing weigh more than plain photographs.
    assert 20_000 < np.mean(sizes) < 60_000
