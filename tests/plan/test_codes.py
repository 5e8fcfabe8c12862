"""Sizes of codes before anything is fitted, against codecs that are."""

import pytest
import torch

from proteus_cache.codecs import fit_codec
from proteus_cache.errors import ConfigError
from proteus_cache.plan.codes import is_upper_limit, planned_codec


@pytest.mark.parametrize("codec", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("shape", [(16, 24), (17, 24), (36, 7)])
def test_a_size_without_a_goal_is_that_of_the_fitted_codec(codec: str, shape: tuple[int, ...]) -> None:
    fitted = fit_codec(codec, torch.randn(16, *shape)).record()

    planned = planned_codec(codec, shape)

    assert planned == fitted.model_copy(update={"parameters": planned.parameters})
    assert not is_upper_limit(codec)


@pytest.mark.parametrize("shape", [(16, 24), (17, 24)])
def test_a_goal_in_bytes_is_what_is_planned_and_a_fit_stays_below_it(shape: tuple[int, ...]) -> None:
    tokens = torch.randn(40, *shape) * torch.linspace(2, 0.1, 24)

    planned, fitted = planned_codec("klt:0.2KB", shape), fit_codec("klt:0.2KB", tokens)

    lead = 48 * (shape[0] == 17)
    assert planned.code_bytes == 200 + lead
    assert 0.85 * 200 + lead <= fitted.code_bytes <= planned.code_bytes
    assert not is_upper_limit("klt:0.2KB")


@pytest.mark.parametrize("codec", ["klt:8dB", "klt:14dB", "klt:20dB", "klt:30dB"])
def test_a_ratio_is_planned_with_the_most_that_it_takes(codec: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(150, 16, 24, generator=generator) * torch.logspace(0.5, -1, 24)

    planned = planned_codec(codec, (16, 24)).code_bytes

    assert fit_codec(codec, tokens).code_bytes <= planned
    assert is_upper_limit(codec)


def test_the_most_that_20_db_take_is_about_4_bits_a_value_by_hand() -> None:
    # 4 bits leave 9.592e-3 and 3 bits 3.578e-2: (3.578e-2 - 1e-2) / (3.578e-2 - 9.592e-3) = 98.44 % need 4.
    n_finer = 1513

    planned = planned_codec("klt:20dB", (256, 1536))

    gains = 256 * 5 // 8
    assert planned.code_bytes == gains + 256 * n_finer // 2 + 2 * 256 * 23 // 8 + 256 * 23 // 8
    assert 8 * planned.code_bytes / (256 * 1536) == pytest.approx(4.0, abs=0.03)


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ("klt:50dB", "the nearest is klt:43dB"),
        ("klt:394KB", r"from 192 to 393,376 bytes under klt; the nearest is klt:393.376KB"),
        ("klt:0.1KB", "the nearest is klt:0.192KB"),
        ("klt", "klt needs a goal"),
        ("int5", "did you mean int8 or int4"),
    ],
)
def test_a_goal_that_nothing_reaches_is_refused_without_a_fit(codec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned_codec(codec, (256, 1536))


@pytest.mark.parametrize("codec", ["klt:43dB", "klt:393.376KB", "klt:0.192KB"])
def test_the_nearest_that_is_named_can_be_planned(codec: str) -> None:
    assert 0 < planned_codec(codec, (256, 1536)).code_bytes <= 393_376
