"""The pipeline of the first run: its images, and the whole of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import first_run


def test_images_are_labelled_small_and_the_same_every_time(tmp_path: Path) -> None:
    first_run.draw_images(tmp_path / "first")
    first_run.draw_images(tmp_path / "second")

    paths = sorted((tmp_path / "first").rglob("*.*"))
    assert len(paths) == 200
    assert {path.parent.name for path in paths} == set(first_run.PATTERNS)
    for path in paths:
        same = tmp_path / "second" / path.relative_to(tmp_path / "first")
        assert path.read_bytes() == same.read_bytes()
    with Image.open(paths[0]) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert 96 <= min(image.size) <= max(image.size) <= 160


def test_a_killed_drawing_goes_on_and_keeps_what_is_there(tmp_path: Path) -> None:
    kept = tmp_path / "blob" / "blob_000.jpg"
    kept.parent.mkdir()
    kept.write_bytes(b"kept")

    first_run.draw_images(tmp_path)

    assert kept.read_bytes() == b"kept"
    assert len(list(tmp_path.rglob("*.jpg"))) == 200


def test_every_pattern_has_light_and_dark() -> None:
    for draw in first_run.PATTERNS.values():
        pixels = np.asarray(first_run.draw_image(draw, np.random.default_rng(3)))
        assert pixels.std() > 20


def test_a_failing_command_ends_the_run_with_its_status(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine.txt").write_text("not a cache")

    done = subprocess.run(
        [sys.executable, first_run.__file__, str(tmp_path)], capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "proteus-cache extract ended with status 2; see above" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_whole_first_run_works_and_works_again(tmp_path: Path) -> None:
    command = [sys.executable, first_run.__file__, str(tmp_path)]

    first = subprocess.run(command, capture_output=True, text=True, check=False)
    second = subprocess.run(command, capture_output=True, text=True, check=False)

    assert first.returncode == 0, first.stdout + first.stderr
    assert second.returncode == 0, second.stdout + second.stderr
    assert "Everything ran" in first.stdout
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, first_run.TRAIN_STEPS + 1))
