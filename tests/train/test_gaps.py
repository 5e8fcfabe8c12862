"""The three losses after an epoch: on which views, with which numbers, and what their gaps ask for."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from proteus_cache.errors import ProteusCacheError
from proteus_cache.pack.build import run_pack
from proteus_cache.pack.plan import plan_pack
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.processes import start_ranks
from proteus_cache.students.registry import STUDENTS, StudentSize, build_student
from proteus_cache.train.advice import THRESHOLD, advise
from proteus_cache.train.config import TrainConfig, config_from_mapping
from proteus_cache.train.loop import train
from proteus_cache.train.masking import draw_masks
from proteus_cache.train.model import build_distillation
from proteus_cache.train.stored import StoredData
from proteus_cache.train.targets import Target
from tests.makers import make_cache

RESULTS = ("student.safetensors", "heads.safetensors", "ema.safetensors")


@pytest.fixture(autouse=True)
def _small_student(monkeypatch: pytest.MonkeyPatch) -> None:
    _make_small(monkeypatch)


def _make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STUDENTS, "vit_s14", StudentSize(width=24, depth=2, heads=3))


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images in shards of 2: one shard is held out, 7 of the others have a probe."""
    root = tmp_path_factory.mktemp("gaps")
    make_cache(root, 24, shard_size=2, probe_images=7, codec="float32")
    run_pack(plan_pack(root / "cache", root / "pack"), workers=1)
    return root / "pack"


def _config(pack: Path, out: Path, **settings: object) -> TrainConfig:
    values: dict[str, object] = {
        "student": "vit_s14",
        "data": pack,
        "out": out,
        "epochs": 3,
        "batch_size": 4,
        "lr": 1e-3,
        "warmup_epochs": 1,
        "checkpoint_every": 2,
        "workers": 0,
        "device": "cpu",
    }
    return config_from_mapping(values | settings)


def _epochs(out: Path) -> list[dict[str, Any]]:  # numbers, and null
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "seen" in line]


def test_every_epoch_ends_with_a_line_of_three_losses(pack: Path, tmp_path: Path) -> None:
    train(_config(pack, tmp_path / "run"))

    lines = _epochs(tmp_path / "run")
    assert [(line["step"], line["epoch"]) for line in lines] == [(5, 0), (10, 1), (15, 2)]
    for line in lines:
        for kind in ("seen", "probe", "held_out"):
            parts = [line[f"{kind}_{name}"] for name in ("token", "feature", "patch")]
            assert line[kind] == pytest.approx(sum(parts), rel=1e-6)


def test_seen_and_probe_are_other_views_of_the_same_images(pack: Path, tmp_path: Path) -> None:
    opened = open_pack(pack)

    orders = StoredData(_config(pack, tmp_path / "run"), opened).evaluation_orders

    keys = {kind: {key for key, _ in _samples(opened, order)} for kind, order in orders.items()}
    assert keys["seen"] == keys["probe"]
    assert len(keys["seen"]) == 7
    assert len(keys["held_out"]) == 2
    assert not keys["seen"] & keys["held_out"]
    pixels = {kind: dict(_samples(opened, order)) for kind, order in orders.items()}
    assert all(not np.array_equal(pixels["seen"][key], pixels["probe"][key]) for key in keys["seen"])
    trained = StoredData(_config(pack, tmp_path / "run"), opened).order
    drawn = {opened.sample("v000", record).key for step in range(5) for record in trained.batch(step).records}
    assert not drawn & keys["held_out"]


def _samples(pack: Pack, order: Any) -> list[tuple[str, Any]]:
    view = "probe" if order.view_index is None else f"v{order.view_index:03d}"
    samples = [pack.sample(view, int(record)) for record in order.records]
    return [(sample.key, sample.view) for sample in samples]


def test_the_numbers_are_those_of_one_forward_over_all_views(pack: Path, tmp_path: Path) -> None:
    config = _config(pack, tmp_path / "run", max_steps=5)

    train(config)

    measured, opened = _epochs(config.out)[0], open_pack(pack)
    teacher = opened.teacher
    mean, std = tuple(teacher.mean), tuple(teacher.std)
    student = build_student("vit_s14", size_px=opened.side_px, patch_px=teacher.patch_px, mean=mean, std=std, seed=0)
    model = build_distillation(config, student, teacher_width=teacher.width, mean=mean, std=std).eval()
    model.student.load_state_dict(load_file(config.out / "student.safetensors"))
    heads = load_file(config.out / "heads.safetensors")
    assert model.mask_token is not None
    model.mask_token.data = heads.pop("mask_token")
    model.heads.load_state_dict(heads)
    step = 0
    for kind, order in StoredData(config, opened).evaluation_orders.items():
        view = "probe" if order.view_index is None else "v000"
        samples = [opened.sample(view, int(record)) for record in order.records]
        views = torch.from_numpy(np.stack([sample.view for sample in samples]))
        targets = {
            name: torch.from_numpy(np.stack([sample.targets[name] for sample in samples])) for name in ("cls", "patch")
        }
        total = torch.zeros(5)
        n_masked = sum(len(range(1, len(views[begin : begin + 4]), 2)) for begin in range(0, len(views), 4))
        for begin in range(0, len(views), 4):
            part = slice(begin, begin + 4)
            n_patches = targets["patch"].shape[1]
            positions = np.arange(len(views[part]))
            masks = draw_masks(0, step, positions, n_patches=n_patches, n_masked=n_patches // 2)
            with torch.no_grad():
                total += model(
                    views[part],
                    {name: tokens[part] for name, tokens in targets.items()},
                    torch.from_numpy(masks),
                    1,
                    (float(len(views)), float(n_masked)),
                )
            step += 1
        assert measured[kind] == pytest.approx(float(total[0]), rel=1e-5), kind
        assert measured[f"{kind}_patch"] == pytest.approx(float(total[3]), rel=1e-5), kind


def test_measuring_does_not_change_what_is_trained(pack: Path, tmp_path: Path) -> None:
    train(_config(pack, tmp_path / "with"))
    train(_config(pack, tmp_path / "without", evaluate_every=None))

    assert _epochs(tmp_path / "without") == []
    for name in RESULTS:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name


def test_the_last_epoch_is_measured_whatever_the_distance(pack: Path, tmp_path: Path) -> None:
    train(_config(pack, tmp_path / "run", evaluate_every=2))

    assert [line["epoch"] for line in _epochs(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("killed_after", [4, 5, 6, 10])
def test_a_resumed_run_has_every_line_once(
    pack: Path, tmp_path: Path, killed_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(_config(pack, tmp_path / "whole"))
    train(_config(pack, tmp_path / "parts", max_steps=killed_after, checkpoint_every=killed_after))

    train(_config(pack, tmp_path / "parts"), resume=True)

    for name in (*RESULTS, "metrics.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def _train_rank(config: TrainConfig) -> None:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        _make_small(patch)
        train(config)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(pack: Path, tmp_path: Path) -> None:
    """Of 2 held-out and 7 seen views the shares differ: a batch of the probe has 3 views for two processes."""
    train(_config(pack, tmp_path / "one"))

    assert start_ranks(2, _train_rank, _config(pack, tmp_path / "two")) == 0

    ours, theirs = _epochs(tmp_path / "one"), _epochs(tmp_path / "two")
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        assert other == pytest.approx(mine, rel=1e-5)


def test_without_probe_and_held_out_images_nothing_is_measured(tmp_path: Path) -> None:
    make_cache(tmp_path, 10)
    run_pack(plan_pack(tmp_path / "cache", tmp_path / "pack"), workers=1)

    train(_config(tmp_path / "pack", tmp_path / "run", epochs=2))

    assert _epochs(tmp_path / "run") == []


def test_a_gap_is_said_once(
    pack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proteus_cache.train.advice.THRESHOLD", -1.0)

    with caplog.at_level(logging.WARNING, "proteus_cache.train.gaps"):
        train(_config(pack, tmp_path / "run"))

    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if line.startswith("more views would help")]) == 1
    assert len([line for line in said if line.startswith("more images would help")]) == 1


@pytest.mark.parametrize(
    ("losses", "remedies"),
    [
        ({"seen": 1.0, "probe": 1.05, "held_out": 1.1}, []),
        ({"seen": 1.0, "probe": 1.2, "held_out": 1.25}, ["more views"]),
        ({"seen": 1.0, "probe": 1.05, "held_out": 1.3}, ["more images"]),
        ({"seen": 1.0, "probe": 1.3, "held_out": 1.6}, ["more views", "more images"]),
        ({"seen": 1.0, "held_out": 1.3}, ["more views or more images"]),
        ({"seen": 1.0, "probe": 1.3}, ["more views"]),
        ({"seen": 1.0, "held_out": 1.0}, []),
        ({"seen": 1.0, "seen_token": 0.1, "probe": 1.03, "probe_token": 0.13, "held_out": None}, ["more views"]),
        ({}, []),
    ],
)
def test_gaps_ask_for_views_or_images(losses: dict[str, float | None], remedies: list[str]) -> None:
    advice = advise(losses)

    assert [one.remedy for one in advice] == remedies
    assert all(one.gap > THRESHOLD and one.text.startswith(one.remedy) for one in advice)


def test_a_student_that_diverged_in_the_last_step_of_an_epoch_is_no_result(pack: Path, tmp_path: Path) -> None:
    config = _config(pack, tmp_path / "run", batch_size=20, lr=1e30, warmup_epochs=0)  # one step an epoch

    with pytest.raises(
        ProteusCacheError, match=r"after epoch 0 \(step 1\) the loss on seen views is not finite: the student"
    ):
        train(config)

    assert not (config.out / "student.safetensors").exists()
    assert _epochs(config.out) == []


@pytest.mark.slow
def test_processes_wait_until_the_samples_of_a_bad_loss_are_kept(
    pack: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = _config(pack, tmp_path / "run", lr=1e30, warmup_epochs=0)

    assert start_ranks(2, _train_rank, config) == 1

    assert len(json.loads((config.out / "not-finite.json").read_text())["samples"]) == 4
    said = [line for line in capfd.readouterr().err.splitlines() if "the loss of step 2 is not finite" in line]
    assert said
    assert all("its 4 samples are named in" in line for line in said)


def test_a_target_that_is_not_finite_is_named(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(pack, tmp_path / "run")
    broken = StoredData(config, open_pack(pack)).order.batch(6)
    key = open_pack(pack).sample(f"v{broken.view_indices[2]:03d}", int(broken.records[2])).key  # type: ignore[index]
    honest, sound = Pack.sample, StoredData.targets_of

    def damaged(self: Pack, view: str, number: int) -> Any:
        sample = honest(self, view, number)
        if sample.key == key:
            sample.targets["patch"][3, 1] = np.inf
        return sample

    def targets_of(self: StoredData, part: Any) -> Mapping[str, Target]:
        targets = sound(self, part)
        patch = targets["patch"]
        if part.step == 6 and isinstance(patch, torch.Tensor):
            patch[2, 3, 1] = torch.inf
        return targets

    monkeypatch.setattr(Pack, "sample", damaged)
    monkeypatch.setattr(StoredData, "targets_of", targets_of)

    with pytest.raises(ProteusCacheError) as caught:
        train(config)

    message = str(caught.value)
    assert message.startswith("the loss of step 7 is not finite (token ")
    assert f"the targets of {key} are not finite" in message
    assert "the newest checkpoint is of step 6, whose weights gave it" in message
    document = json.loads((config.out / "not-finite.json").read_text())
    assert document["step"] == 7
    assert document["samples"][0]["key"] == key
    assert len(document["samples"]) == 4
    assert [sample["is_finite"] for sample in document["samples"]] == [False, True, True, True]
