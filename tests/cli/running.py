"""Running commands in tests, and the small stores they work on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from proteus_cache.cli.app import app


def run(*arguments: object, code: int = 0) -> Any:  # the runner's result
    """Run a command in this process; the result's stdout and stderr are kept apart."""
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert outcome.exit_code == code, outcome.output + str(outcome.exception)
    assert "Traceback" not in outcome.output
    return outcome


def extract_arguments(folder: Path) -> list[object]:
    """Extracts the small cache."""
    return [
        *("extract", "--teacher", "vit", "--weights", folder / "teacher.safetensors", "--images", folder / "images"),
        *("--out", folder / "cache", "--views", 2, "--shard-size", 8, "--workers", 0, "--device", "cpu"),
    ]


def train_arguments(folder: Path) -> list[object]:
    """Trains two steps on the small pack."""
    return [
        *("train", "--student", "vit_ti14", "--data", folder / "pack", "--max-steps", 2, "--batch-size", 8),
        *("--workers", 0, "--device", "cpu"),
    ]
