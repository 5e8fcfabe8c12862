from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from proteus_cache.demo import features
from proteus_cache.demo.features import principal_colours, shown_pixels
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Teacher
from tests.makers import PATCH_PX, SIZE_PX, make_teacher


@pytest.fixture
def teacher(tmp_path: Path) -> Teacher:
    path = make_teacher(tmp_path / "teacher.safetensors")
    return load_teacher("vit", weights=str(path), home=tmp_path, size_px=None)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_every_place_of_a_stitched_map_is_what_the_model_says_of_that_cut(teacher: Teacher, photo: Path) -> None:
    image = shown_pixels(photo, teacher)

    stitched = features._stitched(teacher, torch.nn.Identity(), [image])

    stride, grid = features._STRIDE_PX, SIZE_PX // PATCH_PX
    n_shifts = PATCH_PX // stride
    assert stitched.shape == (1, grid * n_shifts, grid * n_shifts, teacher.identity.width)
    for shift_y, shift_x in ((0, 0), (1, 3), (3, 2)):
        top, left = shift_y * stride, shift_x * stride
        view = torch.from_numpy(image[None, top : top + SIZE_PX, left : left + SIZE_PX].copy())
        patches = teacher.targets(view, ["patch"])["patch"][0].reshape(grid, grid, -1)
        torch.testing.assert_close(stitched[0, shift_y::n_shifts, shift_x::n_shifts], patches, atol=1e-4, rtol=1e-4)


def test_colours_follow_the_three_directions_of_largest_variance() -> None:
    random = torch.Generator().manual_seed(0)
    latent = torch.randn(500, 3, generator=random) * torch.tensor([9.0, 3.0, 1.0])
    turn = torch.linalg.qr(torch.randn(8, 8, generator=random))[0]
    reference = latent @ turn[:3] + 5

    colours = principal_colours(reference)(reference)

    assert colours.shape == (500, 3)
    assert colours.min() == 0
    assert colours.max() == 1
    for component in range(3):
        correlation = np.corrcoef(colours[:, component], latent[:, component].numpy())[0, 1]
        assert abs(correlation) > 0.95


def test_features_without_variance_are_one_colour() -> None:
    colours = principal_colours(torch.randn(100, 4, generator=torch.Generator().manual_seed(1)))

    assert len(np.unique(colours(torch.ones(50, 4)), axis=0)) == 1
