"""Codecs on features of a trained teacher: error, slope and bias on images that they were not fitted to."""

import io
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from proteus_cache.codecs import Codec, fit_codec
from proteus_cache.codecs.codec import relative_mse
from proteus_cache.teachers.registry import load_teacher

_N_FITTED, _N_HELD_OUT = 64, 256
_N_CALIBRATION = 2000
_N_BINS = 40


@pytest.fixture(scope="module")
def pixels(test_data: Path) -> Tensor:
    """(n, 32, 32, 3) uint8 photographs."""
    return _photographs(test_data, _N_FITTED + _N_HELD_OUT)


@pytest.fixture(scope="module")
def tokens(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Targets of enough photographs to fit tables to, and of half as many again."""
    weights = str(test_data / "teachers" / "cifar10_vit.safetensors")
    teacher = load_teacher("vit", weights=weights, home=tmp_path_factory.mktemp("home"), size_px=None)
    pixels = _photographs(test_data, _N_CALIBRATION * 3 // 2)
    parts = [teacher.targets(part, ["patch", "block.1.raw"]) for part in torch.split(pixels, 100)]
    return {name: torch.cat([part[name] for part in parts]).float() for name in ("patch", "block.1.raw")}


def _photographs(test_data: Path, n: int) -> Tensor:
    with tarfile.open(test_data / "cifar10" / "test.tar") as file:
        members = [member for member in file.getmembers() if member.isfile()]
        names = [members[number] for number in np.random.default_rng(0).permutation(len(members))[:n]]  # classes mixed
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


def _kept(codec: Codec, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(n, T, K) float64 of what a loss looks at: components of the patches, or all channels about their mean."""
    codes = codec.encode(tokens)
    basis = codec.basis
    if basis is None:
        mean = codec.mean
        assert isinstance(mean, Tensor)
        return (tokens - mean).double(), (codec.decode(codes) - mean).double()
    original = (tokens[:, basis.n_lead :] - basis.mean) @ basis.vectors
    return original.double(), codec.components(codes)[1].double()


def _slopes(original: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
    """(K,) slopes of decoded on original, and their standard errors by a bootstrap over images."""
    products, squares = (original * decoded).sum(dim=1), original.square().sum(dim=1)
    weights = torch.from_numpy(np.random.default_rng(0).poisson(1, (200, len(original)))).double()
    found = products.sum(dim=0) / squares.sum(dim=0)
    return found, ((weights @ products) / (weights @ squares)).std(dim=0)


@pytest.mark.parametrize(
    ("name", "target"), [("int4", "patch"), ("klt:14dB", "patch"), ("klt:20dB", "patch"), ("klt:20dB", "block.1.raw")]
)
def test_tables_are_unbiased_for_a_trained_teacher(tokens: dict[str, Tensor], name: str, target: str) -> None:
    calibration, held_out = tokens[target][:_N_CALIBRATION], tokens[target][_N_CALIBRATION:]
    codec = fit_codec(name, calibration)

    slope, _ = _slopes(*_kept(codec, calibration))
    assert (slope - 1).abs().max() < 5e-3

    original, decoded = _kept(codec, held_out)
    slope, error = _slopes(original, decoded)
    assert ((slope - 1).abs() - 3 * error).max() < 5e-3
    assert ((decoded - original).mean(dim=(0, 1)).abs() / original.std(dim=(0, 1))).max() < 0.015


@pytest.mark.parametrize("name", ["int4", "klt:20dB"])
def test_no_direction_is_biased_at_any_value(tokens: dict[str, Tensor], name: str) -> None:
    """Mean error by bins of the original, along random directions of what a loss looks at."""
    calibration, held_out = tokens["patch"][:_N_CALIBRATION], tokens["patch"][_N_CALIBRATION:]
    codec = fit_codec(name, calibration)
    original, decoded = _kept(codec, held_out)
    directions = torch.from_numpy(np.random.default_rng(1).standard_normal((original.shape[-1], 16)))

    values, errors = original @ directions, (decoded - original) @ directions
    spread = values.std(dim=(0, 1))
    bins = torch.bucketize(values / spread, torch.linspace(-3, 3, _N_BINS + 1).double()).reshape(-1)
    count = torch.bincount(bins, minlength=_N_BINS + 2)
    mean = torch.bincount(bins, weights=(errors / spread).reshape(-1), minlength=_N_BINS + 2) / count

    assert int(count.min()) > 100
    # An undithered 2-bit quantiser of one direction would show 0.3 here.
    assert mean.abs().max() < 0.02


@pytest.mark.parametrize(("target", "other"), [("patch", "int4"), ("block.1.raw", "int8")])
def test_klt_keeps_its_goal_with_fewer_bytes(tokens: dict[str, Tensor], target: str, other: str) -> None:
    calibration, held_out = tokens[target][:_N_CALIBRATION], tokens[target][_N_CALIBRATION:]
    n_lead = 0 if target == "patch" else 1

    def snr_db(codec: Codec) -> float:
        decoded = codec.decode(codec.encode(held_out))
        return -10 * math.log10(relative_mse(held_out[:, n_lead:], decoded[:, n_lead:]))

    wide = fit_codec(other, calibration)
    goal = snr_db(wide)
    assert goal > (19.5 if other == "int4" else 38)
    narrow = fit_codec(f"klt:{goal:.1f}dB", calibration)

    assert snr_db(narrow) == pytest.approx(goal, abs=0.3)
    assert narrow.code_bytes < wide.code_bytes
