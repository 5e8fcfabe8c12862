"""The small DINOv2 of the teachers' tests, and a demo that takes seconds."""

from __future__ import annotations

import pytest

from proteus_cache.demo import run, speed
from tests.teachers.conftest import official_state, tiny_dinov2  # noqa: F401  # fixtures


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer images, fewer steps; everything else is as in the real one."""
    monkeypatch.setattr(run, "TRAIN_IMAGES_A_CLASS", 5)
    monkeypatch.setattr(run, "TEST_IMAGES_A_CLASS", 2)
    monkeypatch.setattr(run, "RECIPE", run.RECIPE | {"epochs": 2, "batch_size": 8})
    monkeypatch.setattr(speed, "ROUNDS", 2)
    monkeypatch.setattr(speed, "STEPS_A_TURN", 2)
