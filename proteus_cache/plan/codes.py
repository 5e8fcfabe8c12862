"""Sizes of codes before any codec is fitted.

Most follow from the shape of the tokens. How many bytes reach a ratio, `klt:20dB`, depends on what the teacher says;
before anybody knows, the most is planned: the bytes for components that all vary alike, so that no transform helps.
"""

from __future__ import annotations

import math

import torch

from proteus_cache.codecs.dense import DenseCodec
from proteus_cache.codecs.klt import code_bytes_of, grid_of
from proteus_cache.codecs.names import CodecChoice, parse_codec
from proteus_cache.codecs.record import CodecRecord
from proteus_cache.codecs.waterfill import MAX_BITS, UNBIASED_ERROR
from proteus_cache.errors import ConfigError

_UNFITTED = "0" * 64
"""Stands for the digest of parameters that are not there yet."""


def planned_codec(codec: str, shape: tuple[int, ...]) -> CodecRecord:
    """The record that a fitted codec would have, but for the digest of its parameters.

    Args:
        codec: of one target, with its goal.
        shape: of one view's tokens.

    Raises:
        ConfigError: no codec has this name, or none reaches its goal, whatever it is fitted to.
    """
    choice = parse_codec(codec)
    if choice.family in ("float32", "float16"):
        return DenseCodec(choice.name, shape).record()
    n_tokens, width = math.prod(shape[:-1]), shape[-1]
    if choice.family == "int8":
        n_bytes = n_tokens * (2 + width)
    elif choice.family == "int4":
        n_bytes = n_tokens * (2 + -(-width // 2))
    else:
        n_lead = grid_of(n_tokens)[0]
        n_bytes = 2 * n_lead * width + _patch_bytes(choice, n_tokens - n_lead, width)
    return CodecRecord(
        name=choice.name, code_bytes=n_bytes, parameters=_UNFITTED, array_dtype="uint8", array_shape=[n_bytes]
    )


def is_upper_limit(codec: str) -> bool:
    """Whether `planned_codec` only says how large the codes are at most."""
    return parse_codec(codec).goal_db is not None


def _patch_bytes(choice: CodecChoice, n_patches: int, width: int) -> int:
    """Codes of the patches of one view under `klt`."""
    if choice.goal_bytes is None:
        return _white_bytes(choice, n_patches, width)
    least = code_bytes_of(torch.ones(1, 1, dtype=torch.int64), n_patches)
    most = code_bytes_of(torch.full((width, 1), MAX_BITS), n_patches)
    if not least <= choice.goal_bytes <= most:
        nearest = least if choice.goal_bytes < least else most
        raise ConfigError(
            f"codec {choice.name}: patches of {n_patches} x {width} take from {least:,} to {most:,} bytes under klt; "
            f"the nearest is klt:{nearest / 1000:g}KB"
        )
    return choice.goal_bytes


def _white_bytes(choice: CodecChoice, n_patches: int, width: int) -> int:
    """Bytes with which components of equal variance reach the ratio: some have a bit more than the others."""
    assert choice.goal_db is not None
    error = 10 ** (-choice.goal_db / 10)
    if error < UNBIASED_ERROR[MAX_BITS]:
        most_db = -10 * math.log10(UNBIASED_ERROR[MAX_BITS])
        raise ConfigError(
            f"codec {choice.name}: klt has at most {MAX_BITS} bits a value, which are about {most_db:.1f} dB; the "
            f"nearest is klt:{math.floor(most_db)}dB, and float16 keeps more"
        )
    bits = next(bits for bits in range(MAX_BITS) if UNBIASED_ERROR[bits + 1] <= error)
    step = UNBIASED_ERROR[bits] - UNBIASED_ERROR[bits + 1]
    n_finer = max(1, math.ceil(width * (UNBIASED_ERROR[bits] - error) / step))
    each = torch.full((width, 1), bits)
    each[:n_finer] += 1
    return code_bytes_of(each[each[:, 0] > 0], n_patches)
