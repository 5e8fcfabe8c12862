"""Views of a part: which pixels, in which order, by any number of threads; bad images once each."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import hflip, resized_crop

from proteus_cache.errors import ProteusCacheError
from proteus_cache.evaluate.labelled import Part, find_labelled_images
from proteus_cache.evaluate.reading import (
    BadImages,
    Request,
    ViewBatch,
    centre_view,
    in_order,
    random_crop_view,
    read_views,
)
from proteus_cache.views.recipe import draw_recipe
from proteus_cache.views.spec import ViewSpec
from tests.evaluate.runs import SIZE_PX, make_labelled
from tests.makers import make_images


@pytest.fixture
def part(tmp_path: Path) -> Part:
    return find_labelled_images(make_labelled(tmp_path / "images", {"a": 15, "b": 15}), seed=0).train


def _read(part: Part, requests: list[list[Request]], n_threads: int = 2, seed: int = 0) -> list[ViewBatch]:
    bad_images = BadImages(len(part))
    return list(read_views(part, requests, bad_images, size_px=SIZE_PX, n_threads=n_threads, seed=seed))


def test_views_come_in_the_order_asked_for(part: Part) -> None:
    requests = [[Request(3), Request(0, "v007")], [Request(3)]]

    first, second = _read(part, requests)

    paths = [part.root / part.relative_path(row) for row in range(len(part))]
    assert first.rows.tolist() == [3, 0]
    assert (first.places.tolist(), first.n_requests) == ([0, 1], 2)
    assert np.array_equal(first.views[0], centre_view(paths[3], SIZE_PX))
    assert np.array_equal(first.views[1], random_crop_view(paths[0], SIZE_PX, part.key(0), "v007", seed=0))
    assert torch.equal(second.views[0], first.views[0])


@pytest.mark.parametrize("n_threads", [1, 2, 7])
def test_any_number_of_threads_gives_the_same_views(part: Part, n_threads: int) -> None:
    requests = [[Request(row, f"v{number:03d}") for row in range(len(part))] for number in range(3)]

    alone, together = _read(part, requests, n_threads=1), _read(part, requests, n_threads=n_threads)

    for one, other in zip(alone, together, strict=True):
        assert one.rows.tolist() == other.rows.tolist()
        assert torch.equal(one.views, other.views)


def test_crops_differ_by_image_pass_and_seed(part: Part) -> None:
    (views,) = _read(part, [[Request(0, "v000"), Request(0, "v001"), Request(1, "v000")]])
    (other,) = _read(part, [[Request(0, "v000")]], seed=1)

    assert not torch.equal(views.views[0], views.views[1])
    assert not torch.equal(views.views[0], views.views[2])
    assert not torch.equal(views.views[0], other.views[0])


def test_a_crop_is_torchvisions_resized_crop_and_flip(tmp_path: Path) -> None:
    """Nothing else of DeiT's augmentation is in it; boxes are those that training views are drawn with."""
    make_images(tmp_path, 4, n_classes=1)
    flips, areas = 0, []
    for number in range(80):
        path = sorted((tmp_path / "class_0").iterdir())[number % 4]
        image = Image.open(path)
        image.load()
        recipe = draw_recipe(ViewSpec(size_px=SIZE_PX, seed=2), "key", f"v{number:03d}", *image.size)
        box = recipe.crop
        expected = resized_crop(
            image, box.top, box.left, box.height, box.width, [SIZE_PX, SIZE_PX], InterpolationMode.BICUBIC
        )
        expected = hflip(expected) if recipe.flip else expected

        view = random_crop_view(path, SIZE_PX, "key", f"v{number:03d}", seed=2)

        assert np.array_equal(view, np.asarray(expected))
        flips += recipe.flip
        areas.append(box.width * box.height / (image.width * image.height))
    assert 25 < flips < 55
    assert 0.05 < min(areas) < 0.2
    assert max(areas) > 0.8


def test_requests_in_order_leave_no_row_out() -> None:
    assert [[request.row for request in batch] for batch in in_order(np.array([4, 2, 9]), 2)] == [[4, 2], [9]]


def test_a_bad_image_leaves_its_place_empty_and_is_named_once(part: Part) -> None:
    path = part.root / part.relative_path(1)
    path.write_bytes(b"no image")
    bad_images = BadImages(len(part))
    requests = [[Request(0), Request(1), Request(2)], [Request(1, "v001")]]

    first, second = read_views(part, requests, bad_images, size_px=SIZE_PX, n_threads=2)

    assert (first.rows.tolist(), first.places.tolist(), first.n_requests) == ([0, 2], [0, 2], 3)
    assert (len(second.rows), tuple(second.views.shape), second.n_requests) == (0, (0, SIZE_PX, SIZE_PX, 3), 1)
    assert len(bad_images.reasons) == 1
    assert str(path) in bad_images.reasons[0]


def test_more_bad_images_than_are_let_pass_are_an_error() -> None:
    bad_images = BadImages(50)
    for row in range(10):
        bad_images.add(row, f"{row}.jpg: the file is empty")
    bad_images.add(0, "0.jpg: the file is empty")

    with pytest.raises(ProteusCacheError, match="more than 10 of 50 images cannot be used.*the last: 10.jpg"):
        bad_images.add(10, "10.jpg: the file is empty")


def test_closing_ends_the_threads(part: Part) -> None:
    endless = ([Request(row) for row in range(len(part))] for _ in range(10_000))
    reader = read_views(part, endless, BadImages(len(part)), size_px=SIZE_PX, n_threads=3)
    next(reader)

    reader.close()

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-image")]
