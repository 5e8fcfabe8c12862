"""codecs: sizes, error, slope, layout, and what outliers cost."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from proteus_cache.codecs import Int8Codec, codec_for_target, fit_codec, load_codec
from proteus_cache.codecs.codec import relative_mse
from proteus_cache.errors import ChecksumError, ConfigError, FormatError


def _tokens(seed: int, n_views: int, n_tokens: int = 64, width: int = 96, heavy: bool = False) -> Tensor:
    """Correlated channels of very different scale and mean, as teachers have them."""
    rng = np.random.default_rng(seed)
    white = rng.standard_t(5, (n_views, n_tokens, width)) if heavy else rng.standard_normal((n_views, n_tokens, width))
    fixed = np.random.default_rng(99)
    mixing = fixed.standard_normal((width, width)) / np.sqrt(width)
    scale, mean = fixed.uniform(0.2, 5, width), fixed.normal(0, 2, width)
    return torch.from_numpy((white + white @ mixing * 0.5) * scale + mean).float()


@pytest.mark.parametrize("heavy", [False, True])
def test_int8_error_is_small_and_unbiased(heavy: bool) -> None:
    codec = fit_codec("int8", _tokens(0, 32, heavy=heavy))
    held_out = _tokens(1, 64, heavy=heavy)

    decoded = codec.decode(codec.encode(held_out))

    assert relative_mse(held_out, decoded) < 3e-4
    mean = held_out.mean(dim=(0, 1))
    centred, found = (held_out - mean).flatten(0, 1).double(), (decoded - mean).flatten(0, 1).double()
    slope = (centred * found).sum(dim=0) / centred.square().sum(dim=0)
    assert (slope - 1).abs().max() < 1e-3


def test_int8_layout_is_the_documented_one() -> None:
    mean, scale = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])
    codec = Int8Codec((3, 2), mean, scale)
    tokens = torch.tensor([[[1.0, -2.0], [1.5, 2.0], [0.0, 6.0]]])

    codes = codec.encode(tokens)[0].numpy()

    steps = codes[:6].view("<f2").astype(np.float64)
    levels = codes[6:].view(np.int8).reshape(3, 2)
    assert codec.code_bytes == len(codes) == 3 * (2 + 2)
    assert steps[0] == 0
    assert np.all(steps[1:] * 127 >= [1, 2])
    np.testing.assert_array_equal(levels, [[0, 0], [127, 127], [-127, 127]])
    np.testing.assert_allclose(
        codec.decode(codec.encode(tokens))[0],
        mean + scale * torch.from_numpy(steps[:, None] * levels),
        atol=1e-6,
    )


def test_an_outlier_costs_its_own_token_only() -> None:
    clean = _tokens(2, 8)
    codec = fit_codec("int8", _tokens(0, 32))
    planted = clean.clone()
    planted[3, 5, 7] = -500.0

    before, after = codec.decode(codec.encode(clean)), codec.decode(codec.encode(planted))

    others = torch.ones(8, 64, dtype=torch.bool)
    others[3, 5] = False
    assert torch.equal(before[others], after[others])
    assert abs(after[3, 5, 7] + 500) < 500 / 127


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.floats(1e-6, 1e6), st.floats(-1e4, 1e4))
def test_int8_never_clips(seed: int, spread: float, centre: float) -> None:
    codec = Int8Codec.fit(_tokens(0, 4, n_tokens=8, width=6))
    tokens = torch.from_numpy(np.random.default_rng(seed).normal(centre, spread, (2, 8, 6))).float()

    error = (codec.decode(codec.encode(tokens)) - tokens) / codec.scale

    steps = codec.encode(tokens)[:, :16].contiguous().view(torch.float16).float()
    rounding = (tokens.abs() / codec.scale).amax(dim=-1) * 1e-6
    assert (error.abs().amax(dim=-1) <= steps * 0.5001 + rounding + 1e-6).all() or bool(torch.isinf(steps).any())


def test_a_dead_channel_does_not_break_the_fit() -> None:
    tokens = _tokens(0, 8)
    tokens[..., 4] = 3.0

    codec = fit_codec("int8", tokens)

    assert torch.isfinite(codec.decode(codec.encode(tokens))).all()
    assert (codec.decode(codec.encode(tokens))[..., 4] - 3).abs().max() < 0.1


def test_zero_codes_decode_to_the_mean() -> None:
    codec = Int8Codec.fit(_tokens(0, 8))

    decoded = codec.decode(torch.zeros(1, codec.code_bytes, dtype=torch.uint8))

    assert torch.equal(decoded[0, 0], codec.mean)


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("float16", torch.float16)])
@pytest.mark.parametrize("shape", [(96,), (64, 96)])
def test_dense_codes_are_the_bytes_of_the_tokens(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tokens = _tokens(3, 4)[:, 0] if len(shape) == 1 else _tokens(3, 4)
    codec = fit_codec(name, tokens)

    codes = codec.encode(tokens)

    assert codes.shape == (4, codec.code_bytes)
    assert codes.numpy().tobytes() == tokens.to(dtype).numpy().tobytes()
    assert torch.equal(codec.decode(codes), tokens.to(dtype).float())


@pytest.mark.parametrize("name", ["float32", "float16", "int8"])
def test_a_codec_comes_back_from_its_record(name: str) -> None:
    tokens = _tokens(0, 8)
    codec = fit_codec(name, tokens)

    loaded = load_codec(codec.record(), codec.shape, codec.parameters_blob())

    assert torch.equal(loaded.decode(codec.encode(tokens)), codec.decode(codec.encode(tokens)))


def test_parameters_of_another_codec_are_refused() -> None:
    codec, other = fit_codec("int8", _tokens(0, 8)), fit_codec("int8", _tokens(5, 8))

    with pytest.raises(ChecksumError, match="damaged"):
        load_codec(codec.record(), codec.shape, other.parameters_blob())
    with pytest.raises(FormatError, match="do not belong together"):
        load_codec(codec.record(), codec.shape, None)
    with pytest.raises(FormatError, match="not the recorded|not that of tokens|not \\("):
        load_codec(codec.record(), (64, 95), codec.parameters_blob())


def test_odd_parameters_are_refused() -> None:
    record = fit_codec("int8", _tokens(0, 8)).record()
    for tensors in ({"mean": torch.zeros(96)}, {"mean": torch.zeros(96), "scale": torch.zeros(96)}):
        blob = save(tensors)
        with pytest.raises(FormatError):
            load_codec(record.model_copy(update={"parameters": hashlib.sha256(blob).hexdigest()}), (64, 96), blob)


def test_cls_is_float32_under_float32_and_float16_under_all_others() -> None:
    assert [codec_for_target(name, "cls") for name in ("float32", "float16", "int8")] == [
        "float32",
        "float16",
        "float16",
    ]
    assert codec_for_target("int8", "patch") == "int8"
    with pytest.raises(ConfigError, match="int9"):
        codec_for_target("int9", "patch")


def test_encoding_leaves_the_tokens_alone() -> None:
    tokens = _tokens(0, 4)
    copy = tokens.clone()

    fit_codec("int8", tokens).encode(tokens)

    assert torch.equal(tokens, copy)
