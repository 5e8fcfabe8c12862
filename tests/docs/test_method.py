"""What docs/method.md names is there: every file, symbol and test, every option with its default, all quirks."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Final

import pytest
import yaml

from proteus_cache.train.config import TrainConfig
from proteus_cache.train.schedule import learning_rate
from tests.docs.pages import ROOT

PAGE: Final = ROOT / "docs" / "method.md"
TEXT: Final = PAGE.read_text(encoding="utf-8")
REFERENCES: Final = sorted(set(re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", TEXT)))
_RELEASED: Final = {"main.py", "models_proteus_dinov2.py", "models_dinov2.py", "augmentations.py"}


def _names(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Functions, classes and their members, and what is assigned at the top."""
    names = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            names |= _names(node.body, f"{prefix}{node.name}.")
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(prefix + node.target.id)
        if isinstance(node, ast.Assign):
            names |= {prefix + target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_ours_and_released_files_are_told_apart() -> None:
    ours = [(path, symbol) for path, symbol in REFERENCES if path not in _RELEASED]

    assert len(ours) > 15
    assert {path for path, _ in REFERENCES} >= _RELEASED
    assert all("/" in path for path, _ in ours), ours


@pytest.mark.parametrize(("path", "symbol"), [pair for pair in REFERENCES if pair[0] not in _RELEASED])
def test_every_file_and_symbol_is_there(path: str, symbol: str) -> None:
    assert (ROOT / path).is_file()
    if symbol:
        assert symbol in _names(ast.parse((ROOT / path).read_text(encoding="utf-8")).body)


def test_every_option_has_the_default_that_is_shown() -> None:
    section = TEXT.partition("## Options")[2].partition("###")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", section, re.MULTILINE)
    shown = {name: yaml.safe_load(value) for name, value in rows}

    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert len(shown) > 10
    for name, value in shown.items():
        default = fields[name]
        assert (float(value) if isinstance(default, float) else value) == default, name


def test_every_setting_that_is_shown_in_code_is_a_setting() -> None:
    named = set(re.findall(r"`(\w+): [\w.-]+`", TEXT))

    assert named
    assert named <= {field.name for field in dataclasses.fields(TrainConfig)}


def test_all_sixteen_quirks_are_there() -> None:
    rows = re.findall(r"^\| (\d+) \| .+ \| .+ \|.*\|$", TEXT, re.MULTILINE)

    assert rows == [str(number) for number in range(1, 17)]


def test_the_rates_of_the_table_are_those_of_the_program() -> None:
    table = re.search(r"^\| Epoch \| (.+) \|\n.+\n\| rate \| (.+) \|$", TEXT, re.MULTILINE)
    assert table is not None
    config = TrainConfig(student="vit_s14", data=Path("pack"), out=Path("run"))

    for epoch, rate in zip(table[1].split(" | "), table[2].split(" | "), strict=True):
        digits = len(rate.partition("e")[0].replace(".", "")) - 1
        assert float(f"{learning_rate(config, int(epoch)):.{digits}e}") == float(rate), epoch
