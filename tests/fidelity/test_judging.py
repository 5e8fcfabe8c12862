"""Verdicts, neighbours and the comparison of codecs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from proteus_cache.codecs.codec import fit_codec
from proteus_cache.fidelity.curve import Keeper, bound_curve
from proteus_cache.fidelity.neighbours import FeatureMeter
from proteus_cache.fidelity.spread import SpreadMeter
from proteus_cache.fidelity.verdict import judge
from tests.fidelity.test_stream import SIDE, WIDTH, make_tokens, measure

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["int8", "int4", "klt:14dB", "klt:0.1KB"])
def test_codecs_pass(name: str) -> None:
    (found,) = measure("patch", fit_codec(name, make_tokens(seed=1)), make_tokens())

    verdict = judge(found)

    assert verdict.is_good, verdict.reasons


def test_one_shrunken_component_of_many_fails_and_is_named() -> None:
    codec = fit_codec("klt:20dB", make_tokens(seed=1))
    assert codec.basis is not None
    direction = codec.basis.vectors[:, 2]
    usual = codec.decode

    def shrunken(codes: Tensor) -> Tensor:
        decoded = usual(codes)
        assert codec.basis is not None
        along = (decoded - codec.basis.mean) @ direction
        return decoded - 0.05 * along.unsqueeze(-1) * direction

    codec.decode = shrunken  # type: ignore[method-assign]  # the bug
    (found,) = measure("patch", codec, make_tokens())

    verdict = judge(found)

    assert verdict.is_good is False
    assert any("along component 2, and 1 of" in reason and "slope 0.95" in reason for reason in verdict.reasons)


def test_a_shifted_channel_fails() -> None:
    codec = fit_codec("int8", make_tokens(seed=1))
    usual = codec.decode
    sd = make_tokens().reshape(-1, WIDTH).std(dim=0)
    shift = torch.zeros(WIDTH)
    shift[7] = 0.03 * sd[7]
    codec.decode = lambda codes: usual(codes) + shift  # type: ignore[method-assign]  # the bug
    (found,) = measure("patch", codec, make_tokens())

    verdict = judge(found)

    assert verdict.is_good is False
    assert verdict.reasons[0].startswith("mean error 0.0299")
    assert "along channel 7, and 1 of 24" in verdict.reasons[0]


def test_a_goal_that_is_missed_on_other_views_fails() -> None:
    codec = fit_codec("klt:14dB", make_tokens(seed=1))
    codec.name = "klt:20dB"
    (found,) = measure("patch", codec, make_tokens())

    verdict = judge(found)

    assert verdict.is_good is False
    assert verdict.reasons[-1].endswith("dB, and klt:20dB promises 20")


def make_features(n: int, seed: int) -> tuple[Tensor, list[int | None]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = 3 * torch.eye(3, 8)
    return centres[labels] + torch.randn(n, 8, generator=generator), list(labels.tolist())


def test_neighbours_of_equal_features_are_equal_and_noise_loses_some() -> None:
    (query, asked), (bank, known) = make_features(60, 0), make_features(300, 1)
    equal, noisy = FeatureMeter("cls"), FeatureMeter("cls")
    generator = torch.Generator().manual_seed(2)
    for part, features in (("query", query), ("bank", bank)):
        for first in range(0, len(features), 32):
            batch = features[first : first + 32]
            equal.add(part, batch, batch)
            noisy.add(part, batch, batch + 2 * torch.randn(batch.shape, generator=generator))

    same, other = equal.finish(asked, known, CPU), noisy.finish(asked, known, CPU)

    assert same is not None
    assert other is not None
    assert (same.shared, same.same_first, same.exact) == (1.0, 1.0, same.decoded)
    assert same.exact == other.exact
    assert same.exact is not None
    assert other.decoded is not None
    assert same.exact > 0.9
    assert other.decoded < same.exact
    assert 0.1 < other.shared < 0.9
    cosine = torch.nn.functional.normalize(query, dim=1) @ torch.nn.functional.normalize(bank, dim=1).T
    votes = cosine.topk(20).indices % 3  # the label of bank row i is i % 3
    plain = np.mean([np.bincount(row, minlength=3).argmax() == number % 3 for number, row in enumerate(votes.numpy())])
    assert same.exact == pytest.approx(plain, abs=0.04)  # which weighs no votes


def test_the_mean_patch_is_the_feature_of_patches() -> None:
    exact = make_tokens()
    meter = FeatureMeter("patch")
    meter.add("query", exact[:10], exact[:10])
    meter.add("bank", exact[10:], exact[10:].flip(1))  # another order of the same patches

    found = meter.finish([None] * 10, [None] * (len(exact) - 10), CPU)

    assert found is not None
    assert (found.feature, found.exact, found.shared) == ("mean patch", None, 1.0)


def test_without_a_bank_there_are_no_neighbours() -> None:
    meter = FeatureMeter("cls")
    meter.add("query", torch.ones(2, 4), torch.ones(2, 4))

    assert meter.finish([0, 1], [], CPU) is None


def test_codecs_are_compared_on_other_views_than_they_were_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proteus_cache.fidelity.curve.CODECS", ("float16", "int8", "int4", "klt:10dB", "klt:90dB"))
    bank, tested = make_tokens(seed=1), make_tokens()
    keeper, spread = Keeper("patch"), SpreadMeter()
    keeper.add("bank", bank)
    for part in torch.split(tested, 10):
        keeper.add("measured", part)
        spread.add(part.flatten(0, 1))
    said: list[str] = []

    curve = keeper.curve(spread.finish(), CPU, said.append)

    assert curve is not None
    assert "tries int4" in said
    (int4,) = (point for point in curve.points if point.codec == "int4")
    codec = fit_codec("int4", bank)
    (alone,) = measure("patch", codec, tested)
    assert int4.snr_db == pytest.approx(alone.snr_db, abs=1e-4)
    assert int4.bits_per_value == 8 * codec.code_bytes / (SIDE**2 * WIDTH)
    assert (curve.n_fitted, curve.n_measured) == (96, 96)
    assert [point.codec for point in curve.points] == ["float16", "int8", "int4", "klt:10dB"]
    assert [missing.split(":")[:2] for missing in curve.missing] == [["klt", "90dB"]]
    bits = {decibel: rate for rate, decibel in curve.bound}
    for point in curve.points:
        if point.snr_db is not None and point.snr_db < 70:
            assert point.bits_per_value > bits[int(point.snr_db)]  # no codec beats the bound of Gaussian tokens


def test_tokens_that_are_all_the_same_have_no_comparison() -> None:
    tokens = torch.full((40, SIDE**2, WIDTH), 1.0001)
    keeper, spread = Keeper("patch"), SpreadMeter()
    keeper.add("bank", make_tokens())
    keeper.add("measured", tokens)
    spread.add(tokens.flatten(0, 1))

    assert keeper.curve(spread.finish(), CPU, lambda _: None) is None


def test_what_is_kept_for_a_comparison_has_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proteus_cache.fidelity.curve.MOST_VALUES", 10 * SIDE**2 * WIDTH + 5)
    keeper = Keeper("patch")

    for part in torch.split(make_tokens(), 7):
        keeper.add("bank", part)

    assert sum(len(part) for part in keeper._parts["bank"]) == 10


def test_the_bound_of_white_tokens_is_six_decibels_a_bit() -> None:
    spread = SpreadMeter()
    spread.add(torch.linalg.qr(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))[0] * 8)

    for bits, decibel in bound_curve(spread.finish()):
        assert bits == pytest.approx(decibel / 6.0206, abs=0.05)
