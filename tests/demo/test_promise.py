"""The demo as it ships, whole: what the README says of its student is true here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from proteus_cache.cli.app import app


@pytest.mark.slow
def test_the_student_recovers_nine_tenths_of_the_teachers_gain(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--device", "cpu", "--json", "--quiet"])

    assert outcome.exit_code == 0, outcome.output
    report = json.loads(outcome.stdout)
    assert report["share_of_gain"] >= 0.9
    assert report["accuracies"]["teacher"] > 0.95
    assert report["accuracies"]["untrained"] < 0.4
    assert report["code_bytes"] < 0.55 * report["float16_bytes"]
