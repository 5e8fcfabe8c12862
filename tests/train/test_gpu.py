from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from proteus_cache.train import feed, steps
from proteus_cache.train.checkpoint import newest_checkpoint
from proteus_cache.train.config import config_from_mapping
from proteus_cache.train.loop import train
from tests.pack.synthetic import write_pack

pytestmark = pytest.mark.gpu


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    return write_pack(tmp_path / "pack")


def _train(pack: Path, out: Path, *, resume: bool = False, **settings: object) -> list[float]:
    """Train and return the loss of every step."""
    values: dict[str, object] = {
        "student": "vit_ti14",
        "data": pack,
        "out": out,
        "batch_size": 4,
        "max_steps": 6,
        "lr": 1e-4,
        "warmup_epochs": 1,
        "warmup_lr": 1e-4,
        "workers": 0,
        "log_every": 3,
    }
    train(config_from_mapping(values | settings), resume=resume)
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.05)])
def test_a_gpu_computes_what_a_cpu_does(pack: Path, tmp_path: Path, precision: str, tolerance: float) -> None:
    exact = _train(pack, tmp_path / "cpu", device="cpu")

    found = _train(pack, tmp_path / "gpu", device="cuda", precision=precision)

    assert found == pytest.approx(exact, rel=tolerance)


def test_fp16_starts_where_a_cpu_does(pack: Path, tmp_path: Path) -> None:
    exact = _train(pack, tmp_path / "cpu", device="cpu", max_steps=1)

    found = _train(pack, tmp_path / "gpu", device="cuda", max_steps=1, precision="fp16")

    # Later steps differ: loss scaling starts too high on purpose and leaves a few out.
    assert found == pytest.approx(exact, rel=0.01)


def test_loss_scaling_survives_a_resume(pack: Path, tmp_path: Path) -> None:
    undisturbed = _train(pack, tmp_path / "whole", precision="fp16")
    _train(pack, tmp_path / "cut", precision="fp16", max_steps=3)

    resumed = _train(pack, tmp_path / "cut", precision="fp16", resume=True)

    states = [newest_checkpoint(tmp_path / run / "checkpoints") for run in ("whole", "cut")]
    scalers = [checkpoint.state.scaler for checkpoint in states if checkpoint is not None]
    assert scalers[0] is not None
    assert scalers[0] == scalers[1]
    assert resumed == pytest.approx(undisturbed, rel=0.01)


def test_no_step_waits_for_the_gpu(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises where the host would wait, in the step itself and in the copies before it."""
    step, copy = steps.take_step, feed.DeviceFeed._next

    def strict_step(
        run: steps.Run, batch: feed.DeviceBatch, targets_of: Callable[[feed.DeviceBatch], dict[str, Tensor]]
    ) -> Tensor:
        with _no_waiting():
            return step(run, batch, targets_of)

    def strict_copy(self: feed.DeviceFeed) -> tuple[feed.DeviceBatch, torch.cuda.Event | None] | None:
        with _no_waiting():
            return copy(self)

    monkeypatch.setattr(steps, "take_step", strict_step)
    monkeypatch.setattr(feed.DeviceFeed, "_next", strict_copy)

    for precision in ("fp32", "fp16", "bf16"):
        assert len(_train(pack, tmp_path / precision, precision=precision, accumulate=2)) == 6
    assert len(_train(pack, tmp_path / "drop_path", drop_path=0.5, accumulate=2)) == 6


@contextmanager
def _no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
