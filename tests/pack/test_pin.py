"""A pack that is not the one of `--expect-id`: both digests are told apart by the message."""

import re
from pathlib import Path

import pytest

from proteus_cache.errors import ChecksumError
from proteus_cache.pack.pin import check_pin


@pytest.mark.parametrize(("found", "expected"), [("a" * 63 + "b", "a" * 63 + "c"), ("b" + "a" * 63, "c" + "a" * 63)])
def test_a_difference_is_seen_wherever_it_is(found: str, expected: str) -> None:
    with pytest.raises(ChecksumError) as refused:
        check_pin(Path("pack"), found, expected)

    has, wanted = re.findall(r"\b[abc]{12,64}\b", str(refused.value))
    assert has != wanted
    assert (found.startswith(has), expected.startswith(wanted)) == (True, True)
