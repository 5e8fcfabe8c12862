from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from proteus_cache.errors import SpaceError, UsageError
from proteus_cache.pack.reader import open_pack
from proteus_cache.storage import Free
from proteus_cache.students.registry import build_student
from proteus_cache.train.config import TrainConfig, config_from_mapping
from proteus_cache.train.loop import train
from proteus_cache.train.planning import check_space, plan_training, student_parameters
from tests.pack.synthetic import write_pack


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(tmp_path_factory.mktemp("packs") / "pack", held_out=(0,))


def _config(pack: Path, out: Path, **settings: object) -> TrainConfig:
    values: dict[str, object] = {"student": "vit_ti14", "data": pack, "out": out, "batch_size": 4, "device": "cpu"}
    return config_from_mapping(values | {"workers": 0} | settings)


def test_a_plan_counts_what_a_run_does(pack: Path, tmp_path: Path) -> None:
    config = _config(pack, tmp_path / "run", max_steps=2, checkpoint_every=1)
    plan = plan_training(config, 1)

    result = train(config)

    size = plan.size
    assert (size.n_steps, size.steps_per_epoch, size.views_per_epoch, plan.views) == (result.steps, 1, 6, 20)
    checkpoint = result.out / "checkpoints" / "step-00000002"
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) == pytest.approx(plan.checkpoint_bytes, rel=0.01)
    written = sum(file.stat().st_size for file in result.out.rglob("*") if file.is_file())
    assert written == pytest.approx(plan.bytes_to_write - plan.checkpoint_bytes, rel=0.01)
    tars = [tar for view in ("v000", "v001") for tar in (pack / view).iterdir()]
    assert size.bytes_per_step == pytest.approx(4 * sum(tar.stat().st_size for tar in tars) / 20, rel=0.01)


def test_a_plan_can_be_read(pack: Path, tmp_path: Path) -> None:
    lines = plan_training(_config(pack, tmp_path, max_steps=7), 2).lines()

    assert lines[0] == "student   vit_ti14, 5.35 M parameters"
    assert lines[2] == "steps     7 of 4 views on 2 processes, 1 in an epoch"
    assert lines[4] == "writes    300 MB, 85.7 MB a checkpoint"


def test_a_plan_of_the_whole_schedule(pack: Path, tmp_path: Path) -> None:
    size = plan_training(_config(pack, tmp_path), 1).size

    assert size.n_steps == 300
    assert size.bytes_to_read == 300 * size.bytes_per_step


@pytest.mark.parametrize("name", ["vit_ti14", "vit_s14"])
def test_parameters_are_counted_without_building_the_student(pack: Path, name: str) -> None:
    opened = open_pack(pack)
    student = build_student(name, size_px=8, patch_px=4, mean=(0, 0, 0), std=(1, 1, 1), seed=0)

    assert student_parameters(name, opened) == sum(parameter.numel() for parameter in student.parameters())


def test_a_run_that_cannot_fit_is_refused_naming_what_can(pack: Path, tmp_path: Path) -> None:
    config = _config(pack, tmp_path, keep_checkpoints=5)
    plan = plan_training(config, 1)

    def refusal(free_bytes: int) -> str:
        with pytest.raises(SpaceError) as caught:
            check_space(config, dataclasses.replace(plan, free=Free(free_bytes, None)))
        return str(caught.value)

    check_space(config, dataclasses.replace(plan, free=Free(plan.bytes_to_write, None)))
    assert "keep_checkpoints: 4 in --config would fit" in refusal(plan.bytes_to_write - 1)
    assert "keep_checkpoints: 3 in --config would fit" in refusal(plan.bytes_to_write - 2 * plan.checkpoint_bytes)
    assert "choose an --out on another disk" in refusal(0)


def test_a_plan_of_a_pack_without_targets_is_refused(tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "pack", patch_bytes=64)

    with pytest.raises(UsageError, match="need the targets cls, patch"):
        plan_training(_config(pack, tmp_path / "run"), 1)
