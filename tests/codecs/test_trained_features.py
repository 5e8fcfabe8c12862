"""int8 on features of a trained teacher: error and slope on images that the codec was not fitted to."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from proteus_cache.codecs import fit_codec
from proteus_cache.codecs.codec import relative_mse
from proteus_cache.teachers.registry import load_teacher

_N_FITTED, _N_HELD_OUT = 64, 256


@pytest.fixture(scope="module")
def pixels(test_data: Path) -> Tensor:
    """(n, 32, 32, 3) uint8 photographs."""
    with tarfile.open(test_data / "cifar10" / "test.tar") as file:
        names = [member for member in file.getmembers() if member.isfile()][:: 5000 // (_N_FITTED + _N_HELD_OUT)]
        images = [Image.open(io.BytesIO(file.extractfile(name).read())) for name in names]  # type: ignore[union-attr]
        return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))


@pytest.mark.parametrize("target", ["patch", "block.1", "block.2.raw"])
def test_int8_of_a_trained_teacher_is_close_and_unbiased(
    test_data: Path, pixels: Tensor, tmp_path: Path, target: str
) -> None:
    weights = str(test_data / "teachers" / "cifar10_vit.safetensors")
    teacher = load_teacher("vit", weights=weights, home=tmp_path, size_px=None)
    tokens = teacher.targets(pixels, [target])[target]
    held_out = tokens[_N_FITTED:]

    codec = fit_codec("int8", tokens[:_N_FITTED])
    decoded = codec.decode(codec.encode(held_out))

    assert relative_mse(held_out, decoded) < 3e-4
    mean = held_out.mean(dim=(0, 1))
    centred, found = (held_out - mean).flatten(0, 1).double(), (decoded - mean).flatten(0, 1).double()
    slope = (centred * found).sum(dim=0) / centred.square().sum(dim=0)
    assert (slope - 1).abs().max() < 1e-3
