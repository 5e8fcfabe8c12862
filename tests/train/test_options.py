"""Whole runs with the options that leave the released recipe: block targets, start weights, drop path, cooldown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from proteus_cache.errors import UsageError, WeightsError
from proteus_cache.evaluate.evaluate import evaluate
from proteus_cache.pack.build import build_pack
from proteus_cache.pack.reader import open_pack
from proteus_cache.processes import start_ranks
from proteus_cache.students.registry import STUDENTS, StudentSize, build_student
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.train.config import TrainConfig, config_from_mapping
from proteus_cache.train.loop import train
from proteus_cache.train.model import build_distillation
from proteus_cache.train.planning import added_parameters, plan_training
from proteus_cache.train.progress import Progress
from proteus_cache.train.source import needed_targets, student_blocks
from proteus_cache.train.verify import verify_run
from tests.makers import PATCH_PX, SIZE_PX, WIDTH, make_cache, make_images

DEPTH = 4
SIZE = StudentSize(width=24, depth=DEPTH, heads=3)
RESULTS = ("student.safetensors", "heads.safetensors", "ema.safetensors", "metrics.jsonl")
BLOCKS = ("block.0", "block.1", "block.0.raw")


@pytest.fixture(autouse=True)
def _small_student(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cast(dict[str, StudentSize], STUDENTS), "vit_s14", SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with blocks in `cache`, its packs `pack` (all targets) and `plain` (without blocks)."""
    folder = tmp_path_factory.mktemp("blocks")
    cache = make_cache(folder, targets=("cls", "patch", *BLOCKS), codec="float32")
    build_pack(cache.path, folder / "pack")
    build_pack(cache.path, folder / "plain", targets=["cls", "patch"])
    return folder


def _config(pack: Path, out: Path, **settings: object) -> TrainConfig:
    values: dict[str, object] = {
        "student": "vit_s14",
        "data": pack,
        "out": out,
        "batch_size": 4,
        "max_steps": 6,
        "lr": 1e-3,
        "warmup_lr": 1e-3,
        "checkpoint_every": 2,
        "workers": 0,
        "device": "cpu",
    }
    return config_from_mapping(values | settings)


def _files(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in RESULTS}


def _metrics(out: Path) -> list[dict[str, Any]]:  # numbers, and null for a loss that is off
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if "loss_token" in line]


def _metadata(path: Path) -> Mapping[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


class _KilledError(Exception):
    """Stands for the end of the process."""


def _die_at_five(progress: Progress) -> None:
    if progress.step == 5:
        raise _KilledError


def _check_resume(folder: Path, pack: Path, **settings: object) -> None:
    """A run that died and one that did not end with the same bytes."""
    train(_config(pack, folder / "whole", **settings))
    config = _config(pack, folder / "killed", **settings)
    with pytest.raises(_KilledError):
        train(config, progress=_die_at_five)

    assert train(config, resume=True).first_step == 4

    assert _files(folder / "killed") == _files(folder / "whole")


# Blocks.


@pytest.mark.parametrize("blocks", [None, "block.1, block.0.raw"])
def test_a_run_with_blocks_trains_their_heads_and_resumes_to_the_same_bytes(
    folder: Path, tmp_path: Path, blocks: str | None
) -> None:
    _check_resume(tmp_path, folder / "pack", weight_block=0.5, blocks=blocks)

    names = BLOCKS if blocks is None else ("block.1", "block.0.raw")
    heads = load_file(tmp_path / "whole" / "heads.safetensors")
    found = {name.partition(".")[0] for name in heads} - {"token", "feature", "patch", "mask_token"}
    assert found == {name.replace(".", "_") for name in names}
    for line in _metrics(tmp_path / "whole"):
        assert list(line)[-1] == "loss_block"
        parts = line["loss_token"] + line["loss_feature"] + line["loss_patch"] + 0.5 * line["loss_block"]
        assert line["loss"] == pytest.approx(parts, rel=1e-6)


def test_blocks_are_learned(folder: Path, tmp_path: Path) -> None:
    train(
        _config(
            folder / "pack", tmp_path, weight_token=0, weight_feature=0, weight_patch=0, weight_block=1,
            epochs=100, warmup_epochs=0, lr=5e-3, max_steps=60, checkpoint_every=100,
        )
    )  # fmt: skip

    losses = [line["loss_block"] for line in _metrics(tmp_path)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_block_loss_of_a_run_is_against_the_teachers_own_blocks(folder: Path, tmp_path: Path) -> None:
    config = _config(folder / "pack", tmp_path, weight_block=1, blocks="block.0", max_steps=1)
    pack = open_pack(folder / "pack")
    plan = pack.training_order(seed=0, batch_size=4).batch(0)
    assert plan.view_indices is not None
    entries = zip(plan.view_indices.tolist(), plan.records.tolist(), strict=True)
    samples = [pack.sample(f"v{view:03d}", record) for view, record in entries]
    views = torch.stack([torch.from_numpy(sample.view) for sample in samples])
    teacher = load_teacher("vit", weights=str(folder / "teacher.safetensors"), home=tmp_path, size_px=None)
    target = teacher.targets(views, ["block.0"])["block.0"]

    train(config)

    student = build_student("vit_s14", size_px=SIZE_PX, patch_px=PATCH_PX, mean=(0, 0, 0), std=(1, 1, 1), seed=0)
    mean, std = (torch.tensor(values) for values in (teacher.identity.mean, teacher.identity.std))
    pixels = ((views / 255 - mean) / std).permute(0, 3, 1, 2)
    tokens = student.norm_pre(student._pos_embed(student.patch_embed(pixels)))
    for block in list(student.blocks.children())[
        :2
    ]:  # after half of the four blocks, as block.0 is after half of the teacher's two
        tokens = block(tokens)
    head = build_distillation(
        config, student, teacher_width=WIDTH, mean=(0.0,), std=(1.0,), blocks={"block.0": 1}
    ).heads["block_0"]
    expected = (head(student.norm(tokens)) - target).square().mean()
    assert _metrics(tmp_path)[0]["loss_block"] == pytest.approx(expected.item(), rel=1e-5)


def test_without_a_block_loss_a_pack_with_blocks_trains_as_one_without(folder: Path, tmp_path: Path) -> None:
    train(_config(folder / "pack", tmp_path / "with"))
    train(_config(folder / "plain", tmp_path / "without"))

    assert _metrics(tmp_path / "with") == _metrics(tmp_path / "without")
    assert "loss_block" not in _metrics(tmp_path / "with")[0]


def test_blocks_face_those_at_their_relative_depth(folder: Path, tmp_path: Path) -> None:
    pack = open_pack(folder / "pack")

    assert student_blocks(pack, _config(folder / "pack", tmp_path)) == {}
    assert student_blocks(pack, _config(folder / "pack", tmp_path, weight_block=1)) == {
        "block.0": 1,
        "block.1": 3,
        "block.0.raw": 1,
    }
    assert needed_targets(pack, _config(folder / "pack", tmp_path, weight_block=1, blocks="block.1")) == (
        "cls",
        "patch",
        "block.1",
    )


def test_a_plan_counts_the_heads_of_blocks(folder: Path, tmp_path: Path) -> None:
    config = _config(folder / "pack", tmp_path / "run", weight_block=1, max_steps=2)

    plan = plan_training(config, 1)

    result = train(config)
    added = load_file(result.out / "heads.safetensors")
    assert added_parameters(config, open_pack(folder / "pack")) == sum(tensor.numel() for tensor in added.values())
    checkpoint = result.out / "checkpoints" / "step-00000002"
    tensors = [load_file(file) for file in checkpoint.glob("*.safetensors")]
    numbers = sum(tensor.numel() for file in tensors for tensor in file.values() if tensor.ndim)
    assert plan.checkpoint_bytes == 4 * numbers


@pytest.mark.parametrize(
    ("name", "blocks", "message"),
    [
        (
            "plain",
            None,
            "the block loss needs block targets, and the pack holds only cls, patch; extract with "
            "--targets cls,patch,block.0 (the teacher has block.0 to block.1)",
        ),
        ("plain", "block.1", "needs the target block.1, and the pack holds only cls, patch; extract with --targets"),
        ("pack", "block.0,block.7", "needs the target block.7, and the pack holds only cls, patch, block.0, block.1"),
    ],
)
def test_a_pack_without_the_blocks_is_refused(
    folder: Path, tmp_path: Path, name: str, blocks: str | None, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        train(_config(folder / name, tmp_path / "run", weight_block=1, blocks=blocks))

    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


# Drop path.


def test_a_run_with_drop_path_resumes_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    _check_resume(tmp_path, folder / "plain", drop_path=0.5)
    train(_config(folder / "plain", tmp_path / "off", max_steps=1))

    assert _metrics(tmp_path / "whole")[0]["loss"] != _metrics(tmp_path / "off")[0]["loss"]


def test_drop_path_does_not_depend_on_how_a_batch_is_cut(folder: Path, tmp_path: Path) -> None:
    train(_config(folder / "plain", tmp_path / "whole", drop_path=0.5))
    train(_config(folder / "plain", tmp_path / "parts", drop_path=0.5, accumulate=3))

    for line, other in zip(_metrics(tmp_path / "parts"), _metrics(tmp_path / "whole"), strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def _rank(pack: str, out: str) -> None:
    """One process of a run with everything on; a student of the program's own, for other processes know no other."""
    torch.set_num_threads(1)
    options: dict[str, object] = {"drop_path": 0.4, "weight_block": 0.5, "feature_cls_head": "feature"}
    train(_config(Path(pack), Path(out), student="vit_demo", batch_size=5, max_steps=3, **options))


@pytest.mark.slow
def test_two_processes_compute_what_one_does_with_every_option_on(folder: Path, tmp_path: Path) -> None:
    _rank(str(folder / "pack"), str(tmp_path / "one"))

    assert start_ranks(2, _rank, str(folder / "pack"), str(tmp_path / "two")) == 0

    for line, alone in zip(_metrics(tmp_path / "two"), _metrics(tmp_path / "one"), strict=True):
        assert line == pytest.approx(alone, rel=1e-4)


# Cooldown.


def test_cooldown_epochs_are_run_after_the_schedule(folder: Path, tmp_path: Path) -> None:
    settings: dict[str, object] = {"epochs": 2, "warmup_epochs": 0, "max_steps": None, "schedule_lag_epochs": 0}
    plain = train(_config(folder / "plain", tmp_path / "plain", **settings))

    result = train(_config(folder / "plain", tmp_path / "cooled", cooldown_epochs=1, **settings))

    assert (plain.n_steps, result.n_steps) == (4, 6)
    rates = [line["lr"] for line in _metrics(tmp_path / "cooled")]
    assert rates[4:] == [1e-5, 1e-5]
    assert rates[:4] == [line["lr"] for line in _metrics(tmp_path / "plain")]


# Start weights.


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file with other weights than the seed's."""
    student = build_student("vit_s14", size_px=SIZE_PX, patch_px=PATCH_PX, mean=(0, 0, 0), std=(1, 1, 1), seed=77)
    save_file(student.state_dict() | {"mask_token": torch.full((1, 24), 0.25)}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def _state(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def test_a_run_begins_with_the_weights_it_is_given(folder: Path, tmp_path: Path, weights: Path) -> None:
    out = tmp_path / "run"
    given = _state(weights)

    train(_config(folder / "plain", out, init=weights, max_steps=1, warmup_lr=0, ema_decay=0.5))

    mask_token = given.pop("mask_token")
    for name in ("student", "ema", "start"):
        found = _state(out / f"{name}.safetensors")
        assert found.keys() == given.keys()
        assert all(torch.equal(found[key], given[key]) for key in given)
        assert _metadata(out / f"{name}.safetensors")["init"] == "weights.safetensors"
    assert torch.equal(_state(out / "heads.safetensors")["mask_token"], mask_token)
    settings = yaml.safe_load((out / "config.yaml").read_text())["train"]
    assert settings["init"] == str(weights)
    assert settings["init_sha256"] == _metadata(out / "student.safetensors")["init_sha256"]


def test_a_run_with_start_weights_resumes_to_the_same_bytes(folder: Path, tmp_path: Path, weights: Path) -> None:
    _check_resume(tmp_path, folder / "plain", init=weights)

    starts = [(tmp_path / name / "start.safetensors").read_bytes() for name in ("whole", "killed")]
    assert starts[0] == starts[1]


def test_one_run_can_begin_where_another_ended(folder: Path, tmp_path: Path) -> None:
    train(_config(folder / "plain", tmp_path / "first"))

    train(_config(folder / "plain", tmp_path / "second", init=tmp_path / "first" / "ema.safetensors", max_steps=1))

    first, start = _state(tmp_path / "first" / "ema.safetensors"), _state(tmp_path / "second" / "start.safetensors")
    assert first.keys() == start.keys()
    assert all(torch.equal(first[name], start[name]) for name in first)


def test_the_config_of_a_run_is_tied_to_its_start_weights(folder: Path, tmp_path: Path, weights: Path) -> None:
    train(_config(folder / "plain", tmp_path / "first", init=weights, max_steps=1))
    settings = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())["train"]
    again = config_from_mapping(settings | {"out": tmp_path / "second"})

    train(again)
    save_file({name: tensor + 1 for name, tensor in _state(weights).items()}, weights)

    assert _files(tmp_path / "second") == _files(tmp_path / "first")
    with pytest.raises(UsageError, match="init was a file with SHA-256 .*, and now has .*; give that file again"):
        train(config_from_mapping(settings | {"out": tmp_path / "third"}))


@pytest.mark.parametrize("then", [True, False])
def test_resuming_with_other_start_weights_is_refused(folder: Path, tmp_path: Path, weights: Path, then: bool) -> None:
    out = tmp_path / "run"
    train(_config(folder / "plain", out, init=weights if then else None, max_steps=1))
    save_file({name: tensor + 1 for name, tensor in _state(weights).items()}, weights)

    with pytest.raises(UsageError, match="its checkpoint was made with init "):
        train(_config(folder / "plain", out, init=weights), resume=True)


def test_start_weights_that_do_not_fit_are_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none.pth: no such file; --init names the student's start weights"):
        train(_config(folder / "plain", tmp_path / "run", init=tmp_path / "none.pth"))
    with pytest.raises(UsageError, match="images: is a folder; --init takes a file of weights"):
        train(_config(folder / "plain", tmp_path / "run", init=folder / "images"))
    with pytest.raises(WeightsError, match="teacher.safetensors: it describes a model with num_heads 2"):
        train(_config(folder / "plain", tmp_path / "run", init=folder / "teacher.safetensors"))

    assert not (tmp_path / "run").exists()


def test_damaged_start_weights_are_found(folder: Path, tmp_path: Path, weights: Path) -> None:
    train(_config(folder / "plain", tmp_path / "run", init=weights, max_steps=1))
    start = tmp_path / "run" / "start.safetensors"
    assert verify_run(tmp_path / "run", read_data=True) == []

    start.write_bytes(start.read_bytes()[:-8])

    (finding,) = verify_run(tmp_path / "run", read_data=True)
    assert finding.path == "start.safetensors"
    assert "only eval reads it" in finding.remedy
    start.unlink()
    (finding,) = verify_run(tmp_path / "run", read_data=False)
    assert (finding.path, finding.problem) == ("start.safetensors", "missing")


def test_eval_compares_a_run_with_the_weights_it_began_with(folder: Path, tmp_path: Path, weights: Path) -> None:
    images = make_images(tmp_path / "images", 12)
    train(_config(folder / "plain", tmp_path / "run", init=weights, max_steps=1))
    train(_config(folder / "plain", tmp_path / "random", max_steps=1))

    report, other = (
        evaluate(tmp_path / name, images, home=tmp_path, workers=1, device="cpu") for name in ("run", "random")
    )

    assert [model.model for model in report.models] == ["student", "ema", "start"]
    assert [model.model for model in other.models] == ["student", "ema", "untrained"]
    assert report.models[-1].weights == "start.safetensors"
    assert any(note.startswith("ema still holds 100.0% of the start weights") for note in report.notes)
    (tmp_path / "run" / "start.safetensors").unlink()
    with pytest.raises(UsageError, match="holds no start.safetensors, the weights that it began with"):
        evaluate(tmp_path / "run", images, home=tmp_path, workers=1, device="cpu")
