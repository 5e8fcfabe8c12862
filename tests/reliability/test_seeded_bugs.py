"""The script with the twelve bugs keeps up with the sources that it puts them into."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.seeded_bugs import BUGS, ROOT, Bug, with_bug


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_every_bug_can_still_be_put_in(bug: Bug) -> None:
    source = Path(ROOT, bug.file).read_text()

    changed = with_bug(source, bug)

    assert changed != source
    assert not undefined_names(changed)
    assert all(Path(ROOT, test).exists() for test in bug.tests.split())


def undefined_names(source: str) -> str:
    """What ruff says of names that are used and never defined; of text that is no Python, too."""
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select",
        "F821",
        "--output-format",
        "concise",
        "-",
    ]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=False).stdout.replace(
        "All checks passed!\n", ""
    )


def test_a_name_that_is_not_there_is_seen() -> None:
    assert "Undefined name `missing`" in undefined_names("missing()\n")
    assert undefined_names("def f(:\n")
