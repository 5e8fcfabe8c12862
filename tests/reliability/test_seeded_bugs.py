"""The script with the twelve bugs keeps up with the sources that it puts them into."""

import ast
from pathlib import Path

import pytest

from tests.reliability.seeded_bugs import BUGS, ROOT, Bug, with_bug


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_every_bug_can_still_be_put_in(bug: Bug) -> None:
    source = Path(ROOT, bug.file).read_text()

    changed = with_bug(source, bug)

    assert changed != source
    ast.parse(changed)
    assert all(Path(ROOT, test).exists() for test in bug.tests.split())
