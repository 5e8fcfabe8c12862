"""The project's files agree with each other: dependencies, their reasons, constraints and commands."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def _pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    return {_name(name): version for name, version in pairs}


NEEDED = [_name(requirement) for requirement in PROJECT["dependencies"]]
DOCUMENTATION = [_name(requirement) for requirement in PROJECT["optional-dependencies"]["docs"]]
DEVELOPMENT = [_name(text) for text in PROJECT["optional-dependencies"]["dev"] if text != "proteus-cache[docs]"]


def test_every_dependency_has_a_reason() -> None:
    sections = (ROOT / "docs" / "dependencies.md").read_text().split("\n## ")
    tables = [
        re.findall(r"^\| ([A-Za-z0-9][A-Za-z0-9-]*) \|", section, flags=re.MULTILINE) for section in sections[1:4]
    ]

    listed = [sorted(_name(name) for name in names if name != "Package") for names in tables]

    assert listed == [sorted(NEEDED), sorted(DEVELOPMENT), sorted(DOCUMENTATION)]


def test_developing_includes_building_the_documentation() -> None:
    assert "proteus-cache[docs]" in PROJECT["optional-dependencies"]["dev"]


def test_every_dependency_is_pinned_with_what_it_needs_here() -> None:
    pins = _pins()
    unseen, missing = {*NEEDED, *DEVELOPMENT, *DOCUMENTATION}, set()
    seen: set[str] = set()
    while unseen:
        name = unseen.pop()
        seen.add(name)
        if name not in pins:
            missing.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # of another platform
        unseen |= {_name(text) for text in requirements if ";" not in text} - seen

    assert not missing


def test_constraints_are_plain_versions() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt", "justfile", ".ci/run"])
def test_no_package_host_is_named(file: str) -> None:
    text = (ROOT / file).read_text()

    assert not re.search(r"index-url|find-links|https?://\S*/simple", text)


def test_importing_the_package_brings_no_torch() -> None:
    code = "import sys, proteus_cache.cli; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_test_command_of_the_readme_is_the_one_that_ci_runs() -> None:
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if "just test" in line]

    assert commands
    assert "pip install -c constraints.txt -e '.[dev]'" in commands[0]
    assert "grep -m 1 'just test' README.md" in (ROOT / ".ci" / "run").read_text()
