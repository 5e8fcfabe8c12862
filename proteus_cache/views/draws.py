"""Random numbers that depend on (seed, view index, key) alone, not on machines or library versions.

The generators of Python, numpy and torch are global state, or their distributions change between versions;
this one is a hash of a counter.
"""

from __future__ import annotations

import hashlib
import struct
from statistics import NormalDist

_NORMAL = NormalDist()


class Draws:
    """The stream of random numbers of one view.

    Word i is word i mod 8 (little-endian, 64 bits) of BLAKE2b-512, personalised `proteus-cache`, of the UTF-8
    text `SEED/VIEW/KEY` followed by i div 8 as 8 little-endian bytes. Each call below takes the next word.
    """

    __slots__ = ("_block", "_state", "_words")

    def __init__(self, seed: int, key: str, view: str) -> None:
        self._state = hashlib.blake2b(f"{seed}/{view}/{key}".encode(), person=b"proteus-cache")
        self._block = 0
        self._words: list[int] = []

    def _word(self) -> int:
        if not self._words:
            state = self._state.copy()
            state.update(self._block.to_bytes(8, "little"))
            self._words = list(reversed(struct.unpack("<8Q", state.digest())))
            self._block += 1
        return self._words.pop()

    def uniform(self) -> float:
        """A number in the open interval (0, 1): (upper 52 bits + 1/2) / 2**52."""
        return ((self._word() >> 12) + 0.5) * 2.0**-52

    def between(self, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        return low + (high - low) * self.uniform()

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1: the word times n, divided by 2**64."""
        return (self._word() * n) >> 64

    def normal(self) -> float:
        """A standard normal number, by the inverse of the distribution function."""
        return _NORMAL.inv_cdf(self.uniform())
