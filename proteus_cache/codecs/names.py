"""What may be asked for as a codec. Imports no torch, so that a command line can complete and check it at once.

`float32`, `float16`, `int8` and `int4` stand for themselves. `klt` takes a goal: `klt:20dB`, a signal-to-noise ratio
on views that it was not fitted to, or `klt:64KB`, bytes of the patch codes of one view (KB = 1,000 bytes).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from proteus_cache.choices import unknown
from proteus_cache.errors import ConfigError

CODEC_NAMES = ("float32", "float16", "int8", "int4", "klt:20dB")
"""For completion and messages; `klt` takes any goal."""
NAME_PATTERN = (
    r"^(float32|float16|int8|int4|klt:(0|[1-9][0-9]{0,3})(\.[0-9]{1,2})?dB|klt:(0|[1-9][0-9]{0,5})(\.[0-9]{1,3})?KB)$"
)
"""Of a name as it is recorded."""
_GOAL = re.compile(r"klt:([0-9]+(?:\.[0-9]+)?)\s*(db|kb)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CodecChoice:
    """A codec as asked for."""

    family: str
    """`float32`, `float16`, `int8`, `int4` or `klt`."""
    goal_db: float | None = None
    """Of `klt:20dB`: signal-to-noise ratio about the mean, dropped coefficients counted as decoded to theirs."""
    goal_bytes: int | None = None
    """Of `klt:64KB`: codes of all patches of one view."""

    @property
    def name(self) -> str:
        """As it is recorded: one spelling for each choice."""
        if self.goal_db is not None:
            return f"klt:{_plain(self.goal_db, 2)}dB"
        if self.goal_bytes is not None:
            return f"klt:{_plain(self.goal_bytes / 1000, 3)}KB"
        return self.family


def parse_codec(text: str) -> CodecChoice:
    """What a name asks for.

    Raises:
        ConfigError: no codec has this name, or `klt` comes without a goal.
    """
    found = _GOAL.fullmatch(text)
    if found is not None:
        number, is_ratio = float(found[1]), found[2].lower() == "db"
        choice = (
            CodecChoice("klt", goal_db=round(number, 2))
            if is_ratio
            else CodecChoice("klt", goal_bytes=round(number * 1000))
        )
        if not (choice.goal_db or choice.goal_bytes) or re.match(NAME_PATTERN, choice.name) is None:
            raise ConfigError(f"codec {text!r}: this goal is out of range; write for example klt:20dB or klt:64KB")
        return choice
    if text in CODEC_NAMES:
        return CodecChoice(text)
    if text.lower().startswith("klt"):
        raise ConfigError(
            f"codec {text!r}: klt needs a goal: klt:20dB (signal-to-noise ratio) or klt:64KB (patch codes of a view)"
        )
    raise ConfigError(unknown("codec", text, CODEC_NAMES, also="klt:64KB"))


def codec_for_target(codec: str, target: str) -> str:
    """The codec that `target` gets when `codec` was asked for, in its recorded spelling.

    `cls` weighs 130 to 260 times a patch element in the loss and is 0.4 % of the bytes: it is float32 under
    `float32` and float16 under every other codec.

    Raises:
        ConfigError: no codec has this name.
    """
    choice = parse_codec(codec)
    return "float16" if target == "cls" and choice.family != "float32" else choice.name


def wants_many_views(codec: str) -> bool:
    """Whether a codec has tables that are fitted to the distribution of tokens, so that few views would mislead it."""
    return parse_codec(codec).family in ("int4", "klt")


def _plain(number: float, digits: int) -> str:
    return f"{number:.{digits}f}".rstrip("0").rstrip(".")
