"""A replay: the teacher runs again on the stored views. It must train the student that the stored targets train."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from proteus_cache.errors import UsageError
from proteus_cache.pack.build import run_pack
from proteus_cache.pack.plan import plan_pack
from proteus_cache.students.registry import STUDENTS, StudentSize
from proteus_cache.train.config import TrainConfig, config_from_mapping
from proteus_cache.train.loop import train
from tests.makers import make_cache, make_teacher

N_STEPS = 50


@pytest.fixture(autouse=True)
def _small_student(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STUDENTS, "vit_s14", StudentSize(width=24, depth=2, heads=3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of each codec from the same images and teacher, packed."""
    root = tmp_path_factory.mktemp("replay")
    for codec in ("float32", "float16", "int8"):
        make_cache(root, 14, out=root / f"cache_{codec}", codec=codec, targets=("cls", "patch", "block.0"))
        run_pack(plan_pack(root / f"cache_{codec}", root / codec), workers=1, progress=lambda *_: None)
    return root


def _config(folder: Path, codec: str, out: Path, **settings: object) -> TrainConfig:
    values: dict[str, object] = {
        "student": "vit_s14",
        "data": folder / codec,
        "out": out,
        "epochs": 100,
        "max_steps": N_STEPS,
        "batch_size": 5,
        "lr": 1e-3,
        "warmup_epochs": 1,
        "schedule_lag_epochs": 0,
        "weight_block": 0.5,
        "workers": 0,
        "device": "cpu",
    }
    return config_from_mapping(values | settings)


def _live(folder: Path) -> dict[str, object]:
    return {"live": True, "teacher": "vit", "teacher_weights": str(folder / "teacher.safetensors")}


def _lines(out: Path) -> list[dict[str, Any]]:  # numbers
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _deviation(folder: Path, codec: str, out: Path) -> tuple[float, float]:
    """Largest relative difference of a loss at any step, and of a weight after all, between stored and live targets."""
    train(_config(folder, codec, out / "cached"))
    train(_config(folder, codec, out / "live", **_live(folder)))
    cached, live = _lines(out / "cached"), _lines(out / "live")
    assert len(cached) == N_STEPS
    losses = max(
        abs(ours[name] - theirs[name]) / theirs[name]
        for ours, theirs in zip(cached, live, strict=True)
        for name in theirs
        if name.startswith("loss")
    )
    weights = load_file(out / "cached" / "student.safetensors"), load_file(out / "live" / "student.safetensors")
    assert not torch.equal(weights[0]["pos_embed"], load_file(_start(folder, out))["pos_embed"])
    return losses, max(float((weights[0][name] - tensor).abs().max()) for name, tensor in weights[1].items())


def _start(folder: Path, out: Path) -> Path:
    """The student after its first step at a rate of next to nothing."""
    train(_config(folder, "float32", out / "start", max_steps=1, lr=1e-12))
    return out / "start" / "student.safetensors"


def test_stored_float32_targets_train_the_student_of_the_live_teacher(folder: Path, tmp_path: Path) -> None:
    losses, weights = _deviation(folder, "float32", tmp_path)

    assert losses < 1e-5
    assert weights < 1e-4


def test_a_codec_adds_its_error_and_no_more(folder: Path, tmp_path: Path) -> None:
    half, eight = (_deviation(folder, codec, tmp_path / codec) for codec in ("float16", "int8"))

    assert 1e-8 < half[0] < 1e-3
    assert half[0] < eight[0] < 3e-2


def test_a_replay_can_be_stopped_and_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    whole = _config(folder, "int8", tmp_path / "whole", max_steps=6, **_live(folder))
    train(whole)

    train(_config(folder, "int8", tmp_path / "parts", max_steps=3, **_live(folder)))
    train(_config(folder, "int8", tmp_path / "parts", max_steps=6, **_live(folder)), resume=True)

    for name in ("student.safetensors", "ema.safetensors", "metrics.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_cached_run_is_not_gone_on_with_live(folder: Path, tmp_path: Path) -> None:
    train(_config(folder, "int8", tmp_path / "run", max_steps=2))

    with pytest.raises(UsageError, match="its checkpoint was made with live False, and now it is True"):
        train(_config(folder, "int8", tmp_path / "run", max_steps=4, **_live(folder)), resume=True)


def test_another_teacher_than_the_one_that_made_the_pack_is_refused(folder: Path, tmp_path: Path) -> None:
    other = make_teacher(tmp_path / "other.safetensors", seed=1)

    with pytest.raises(UsageError, match="was made by vit with weights .* needs the same"):
        train(_config(folder, "int8", tmp_path / "run", **_live(folder) | {"teacher_weights": str(other)}))

    assert not (tmp_path / "run").exists()


def test_another_teachers_name_is_refused_before_its_weights_are_looked_for(folder: Path, tmp_path: Path) -> None:
    live = {"live": True, "teacher": "dinov2_vits14"}

    with pytest.raises(UsageError, match="was made by vit .*, and the live teacher is dinov2_vits14; a replay needs"):
        train(_config(folder, "int8", tmp_path / "run", **live))


def test_masks_and_batches_do_not_depend_on_where_targets_come_from(folder: Path, tmp_path: Path) -> None:
    """The first loss of the patch objective is computed from the same patches."""
    train(_config(folder, "float32", tmp_path / "cached", max_steps=1))
    train(_config(folder, "float32", tmp_path / "live", max_steps=1, **_live(folder)))

    ours, theirs = _lines(tmp_path / "cached")[0], _lines(tmp_path / "live")[0]
    assert np.isclose(ours["loss_patch"], theirs["loss_patch"], rtol=1e-5)
