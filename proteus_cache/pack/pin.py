"""Pinning a pack: a run names the pack that it means by the SHA-256 of its `pack.json`, as `sha256sum` prints it.

`pack.json` holds the SHA-256 of every index, tar and codec file, so its own is the root of all of them. Training checks
the indexes and codecs against it when it starts, and each sample by the CRC-32C of its index record;
`verify --read-data` checks the tars against it.
"""

from __future__ import annotations

import re
from pathlib import Path

from proteus_cache.errors import ChecksumError, UsageError

_SHA256 = re.compile(r"(?:sha256:)?([0-9a-f]{64})")


def parse_pin(text: str, flag: str = "--expect-id") -> str:
    """The 64 hex digits of a pin, without the `sha256:` that may stand before them.

    Raises:
        UsageError: it is no whole SHA-256.
    """
    found = _SHA256.fullmatch(text.strip().lower())
    if found is None:
        raise UsageError(
            f"{flag} takes the whole SHA-256 of a pack.json, 64 hexadecimal digits, got {text[:80]!a}; "
            "`proteus-cache info` on the pack shows it"
        )
    return found[1]


def check_pin(path: Path, found: str, expected: str) -> None:
    """Refuse a pack that is not the expected one.

    Args:
        path: of the pack.
        found: SHA-256 of the bytes of its pack.json.
        expected: 64 hex digits.

    Raises:
        ChecksumError: they differ.
    """
    if found != expected:
        digits = 12 if found[:12] != expected[:12] else 64
        raise ChecksumError(
            f"{path}: is not the pack that --expect-id names (its pack.json has sha256 {found[:digits]}, expected is "
            f"{expected[:digits]}); nothing was started: bring the right pack, or name this one if you trust it"
        )
