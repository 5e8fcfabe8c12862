"""The names of codecs. Imports no torch, so that a command line can complete and check them at once."""

from __future__ import annotations

from proteus_cache.choices import unknown
from proteus_cache.errors import ConfigError

CODEC_NAMES = ("float32", "float16", "int8")


def codec_for_target(codec: str, target: str) -> str:
    """The codec that `target` gets when `codec` was asked for.

    `cls` weighs 130 to 260 times a patch element in the loss and is 0.4 % of the bytes: it is float32 under
    `float32` and float16 under every other codec.

    Raises:
        ConfigError: no codec has this name.
    """
    if codec not in CODEC_NAMES:
        raise ConfigError(unknown("codec", codec, CODEC_NAMES))
    return "float16" if target == "cls" and codec != "float32" else codec
