"""A part of a store's units, for a check that is spread over several nights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from proteus_cache.errors import ConfigError

_TEXT = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")


@dataclass(frozen=True, slots=True)
class Share:
    """The n-th of t shares. Units are dealt in turn by their number, so that every unit is in exactly one share."""

    number: int
    """From 1 to `of`."""
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """ "3/7" to the third of seven shares.

        Raises:
            ConfigError: it is no such pair, or n is not from 1 to t.
        """
        match = _TEXT.fullmatch(text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(
                f"--read-data-subset takes n/t, the n-th of t shares with n from 1 to t (1/7 to 7/7), got {text!r}"
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def next(self) -> Share:
        """The share that a next check should read."""
        return Share(self.number % self.of + 1, self.of)

    def holds(self, unit: int) -> bool:
        """Whether the unit with this number (`layout.unit_number`) is in the share."""
        return unit % self.of == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"
