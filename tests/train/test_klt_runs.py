"""Whole runs from a pack whose codec left components out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from proteus_cache.pack.build import run_pack
from proteus_cache.pack.plan import plan_pack
from proteus_cache.pack.reader import open_pack
from proteus_cache.processes import start_ranks
from proteus_cache.students.registry import build_student
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.loop import train
from proteus_cache.train.masking import draw_masks
from proteus_cache.train.model import build_distillation
from proteus_cache.train.stored import StoredData, open_stored
from proteus_cache.train.targets import ComponentTarget
from tests.makers import WIDTH, make_cache
from tests.train.runs import results, run_config, step_lines, tiny_student

TARGETS = ("cls", "patch", "block.0.raw")
N_STEPS = 6


@pytest.fixture(autouse=True)
def _small_student() -> Iterator[None]:
    with tiny_student():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same views with targets in components and as they were; one shard is held out, 7 images have a probe."""
    root = tmp_path_factory.mktemp("klt")
    for codec, name in (("klt:0.12KB", "klt"), ("float32", "float32")):
        cache = root / f"cache_{name}"
        make_cache(root, 24, out=cache, codec=codec, targets=TARGETS, shard_size=2, probe_images=7)
        run_pack(plan_pack(cache, root / name), workers=1)
    return root


def _config(folder: Path, out: Path, pack: str = "klt", **settings: object) -> TrainConfig:
    values: dict[str, object] = {"epochs": 2, "schedule_lag_epochs": 0, "weight_block": 0.5, "max_steps": N_STEPS}
    return run_config(folder / pack, out, **values | settings)


def _live_config(folder: Path, out: Path, pack: str = "klt") -> TrainConfig:
    weights = str(folder / "teacher.safetensors")
    return _config(folder, out, pack, live=True, teacher="vit", teacher_weights=weights)


def _part(folder: Path, data: Any) -> Any:  # a DeviceBatch, or what stands for one
    """The first views of the pack with their codes."""
    with data.open(data.order, range(1), rank=0, world_size=1, n_workers=0, pin=False) as reader:
        return next(iter(reader))


def test_only_the_kept_components_are_asked_for(folder: Path, tmp_path: Path) -> None:
    data = StoredData(_config(folder, tmp_path), open_pack(folder / "klt"))

    targets = data.targets_of(_part(folder, data))

    assert list(data.bases) == ["patch", "block.0.raw"]
    assert isinstance(targets["cls"], Tensor)
    for name, n_lead in (("patch", 0), ("block.0.raw", 1)):
        target, n_kept = targets[name], data.bases[name].vectors.shape[1]
        assert isinstance(target, ComponentTarget)
        assert 0 < n_kept < WIDTH
        assert target.tokens.lead_BLD.shape == (4, n_lead, WIDTH)
        assert target.tokens.rest_BNK.shape == (4, 16, n_kept)


def test_a_run_says_how_many_components_its_losses_look_at(folder: Path, tmp_path: Path) -> None:
    train(_config(folder, tmp_path / "klt", max_steps=1))
    train(_config(folder, tmp_path / "float32", "float32", max_steps=1))

    described = yaml.safe_load((tmp_path / "klt" / "config.yaml").read_text())["pack"]
    bases = StoredData(_config(folder, tmp_path), open_pack(folder / "klt")).bases
    assert described["targets"] == {"cls": "float16", "patch": "klt:0.12KB", "block.0.raw": "klt:0.12KB"}
    assert described["components_in_losses"] == {
        name: f"{basis.vectors.shape[1]} of {WIDTH}" for name, basis in bases.items()
    }
    assert "components_in_losses" not in yaml.safe_load((tmp_path / "float32" / "config.yaml").read_text())["pack"]


@pytest.mark.parametrize("killed_after", [2, 5])
def test_a_resumed_run_ends_with_the_same_bytes(folder: Path, tmp_path: Path, killed_after: int) -> None:
    train(_config(folder, tmp_path / "whole"))
    train(_config(folder, tmp_path / "parts", max_steps=killed_after, checkpoint_every=killed_after))

    train(_config(folder, tmp_path / "parts"), resume=True)

    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_parts_of_a_batch_add_up_to_it(folder: Path, tmp_path: Path) -> None:
    train(_config(folder, tmp_path / "whole", drop_path=0.3))
    train(_config(folder, tmp_path / "parts", drop_path=0.3, accumulate=3))

    _same_losses(tmp_path / "parts", tmp_path / "whole")


def _train_rank(config: TrainConfig) -> None:
    torch.set_num_threads(1)
    with tiny_student():
        train(config)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(folder: Path, tmp_path: Path) -> None:
    train(_config(folder, tmp_path / "one"))

    assert start_ranks(2, _train_rank, _config(folder, tmp_path / "two")) == 0

    _same_losses(tmp_path / "two", tmp_path / "one")


def _same_losses(ours: Path, theirs: Path) -> None:
    """Of every step and after every epoch, within rounding."""
    lines = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (ours, theirs)]
    assert len(step_lines(ours)) == N_STEPS
    assert any("held_out_block" in line for line in lines[0])
    assert lines[0] == [pytest.approx(line, rel=1e-5) for line in lines[1]]


def test_the_losses_are_those_of_the_written_heads_against_whole_tokens(folder: Path, tmp_path: Path) -> None:
    """What readers of the pack and of the run's files get: heads say the mean where the codec decodes to it."""
    config = _config(folder, tmp_path / "run", weight_block=0, max_steps=5)

    train(config)

    pack = open_pack(folder / "klt")
    mean, std = tuple(pack.teacher.mean), tuple(pack.teacher.std)
    student = build_student("vit_s14", size_px=pack.side_px, patch_px=8, mean=mean, std=std, seed=0)
    model = build_distillation(config, student, teacher_width=WIDTH, mean=mean, std=std).eval()
    model.student.load_state_dict(load_file(config.out / "student.safetensors"))
    heads = load_file(config.out / "heads.safetensors")
    assert model.mask_token is not None
    model.mask_token.data = heads.pop("mask_token")
    model.heads.load_state_dict(heads)
    order = StoredData(config, pack).evaluation_orders["seen"]
    samples = [pack.sample("v000", int(record)) for record in order.records]
    total, n_masked = torch.zeros(5), sum(len(range(1, len(samples[begin : begin + 4]), 2)) for begin in (0, 4))
    for step, begin in enumerate((0, 4)):
        part = samples[begin : begin + 4]
        with torch.no_grad():
            total += model(
                torch.from_numpy(np.stack([sample.view for sample in part])),
                {name: torch.from_numpy(np.stack([sample.targets[name] for sample in part])) for name in TARGETS[:2]},
                torch.from_numpy(draw_masks(0, step, np.arange(len(part)), n_patches=16, n_masked=8)),
                1,
                (float(len(samples)), float(n_masked)),
            )
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    measured = next(line for line in lines if "seen" in line)
    found = [measured["seen"], *(measured[f"seen_{name}"] for name in ("token", "feature", "patch"))]
    assert len(samples) == 7
    assert found == pytest.approx(total[:4].tolist(), rel=1e-5)


def test_a_replay_sees_whole_tokens_whatever_the_codec(folder: Path, tmp_path: Path) -> None:
    """So it trains what a pack would train that no codec had touched: here one of float32."""
    for pack in ("klt", "float32"):
        train(_live_config(folder, tmp_path / pack, pack))
    train(_config(folder, tmp_path / "stored", "float32"))

    replayed = open_stored(_live_config(folder, tmp_path / "klt"), tmp_path / "home")
    assert replayed.bases == {}
    assert all(isinstance(target, Tensor) for target in replayed.targets_of(_part(folder, replayed)).values())
    for name in ("student.safetensors", "heads.safetensors"):
        of_klt, of_float32, stored = (load_file(tmp_path / run / name) for run in ("klt", "float32", "stored"))
        for key, tensor in of_klt.items():
            assert torch.equal(tensor, of_float32[key]), key
            torch.testing.assert_close(tensor, stored[key], atol=1e-4, rtol=1e-4)


def test_samples_of_a_step_are_told_with_their_whole_tokens(folder: Path, tmp_path: Path) -> None:
    data = StoredData(_config(folder, tmp_path), open_pack(folder / "klt"))

    samples = data.samples_of(0)

    view, record = str(samples[0]["view"]), samples[0]["record"]
    assert isinstance(record, int)
    targets = open_pack(folder / "klt").sample(view, record).targets
    assert targets["patch"].shape == (16, WIDTH)
    assert samples[0]["largest"] == pytest.approx(max(float(np.abs(targets[name]).max()) for name in TARGETS))
