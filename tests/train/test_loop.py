from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from proteus_cache.errors import ChecksumError, ProteusCacheError, UsageError
from proteus_cache.pack.reader import open_pack
from proteus_cache.processes import start_ranks
from proteus_cache.students.heads import build_heads
from proteus_cache.students.registry import STUDENTS, StudentSize, build_student
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.train.config import TrainConfig, config_from_mapping
from proteus_cache.train.loop import n_readers, train
from proteus_cache.train.masking import draw_masks
from proteus_cache.train.model import Distillation
from proteus_cache.train.progress import Progress
from proteus_cache.train.schedule import learning_rate
from tests.pack.synthetic import write_pack

RESULTS = ("student.safetensors", "heads.safetensors", "ema.safetensors", "metrics.jsonl")


@pytest.fixture(autouse=True)
def _small_student(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = cast(dict[str, StudentSize], STUDENTS)
    monkeypatch.setitem(sizes, "vit_s14", StudentSize(width=24, depth=2, heads=3))


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(tmp_path_factory.mktemp("packs") / "pack")


def _config(pack: Path, out: Path, **settings: object) -> TrainConfig:
    values: dict[str, object] = {
        "student": "vit_s14",
        "data": pack,
        "out": out,
        "batch_size": 4,
        "max_steps": 6,
        "lr": 1e-3,
        "warmup_epochs": 1,
        "checkpoint_every": 2,
        "workers": 0,
        "device": "cpu",
    }
    return config_from_mapping(values | settings)


def _files(out: Path, names: tuple[str, ...] = RESULTS) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in names}


def _metrics(out: Path) -> list[dict[str, Any]]:  # numbers, and null for a loss that is off
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _metadata(path: Path) -> Mapping[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


@pytest.fixture(scope="module")
def undisturbed(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Results of a run that nothing stopped, by file name."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cast(dict[str, StudentSize], STUDENTS), "vit_s14", StudentSize(width=24, depth=2, heads=3))
        train(_config(pack, out))
    return _files(out)


def test_a_run_leaves_what_is_promised(pack: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    result = train(_config(pack, out))

    assert (result.first_step, result.steps, result.n_steps, result.is_finished) == (0, 6, 6, True)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*RESULTS, "config.yaml", "timings.jsonl", "tensorboard", "checkpoints", "finished.json"]
    )
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    lines = _metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == [0, 0, 1, 1, 2, 2]
    assert [line["lr"] for line in lines] == [learning_rate(_config(pack, out), epoch) for epoch in (0, 0, 1, 1, 2, 2)]
    for line in lines:
        assert list(line) == ["step", "epoch", "lr", "loss", "loss_token", "loss_feature", "loss_patch"]
        parts = line["loss_token"] + line["loss_feature"] + line["loss_patch"]
        assert line["loss"] == pytest.approx(parts, rel=1e-6)
    assert result.losses["loss"] == lines[-1]["loss"]


def test_a_student_learns_what_it_is_shown(tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "pack", n_images=4, views=("v000",))

    train(_config(pack, tmp_path / "run", lr=3e-3, warmup_epochs=0, epochs=100, max_steps=60, checkpoint_every=60))

    losses = [line["loss"] for line in _metrics(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]


def test_the_student_loads_strictly_into_timms_model(pack: Path, tmp_path: Path) -> None:
    train(_config(pack, tmp_path, max_steps=1))

    for name in ("student.safetensors", "ema.safetensors"):
        arguments = json.loads(_metadata(tmp_path / name)["timm_vision_transformer"])
        VisionTransformer(**arguments).load_state_dict(load_file(tmp_path / name), strict=True)
    heads = load_file(tmp_path / "heads.safetensors")
    assert heads.pop("mask_token").shape == (1, 24)
    build_heads(("token", "feature", "patch"), student_width=24, teacher_width=6, seed=0).load_state_dict(heads)


def test_the_student_can_teach(pack: Path, tmp_path: Path) -> None:
    train(_config(pack, tmp_path, max_steps=1))

    teacher = load_teacher("vit", weights=str(tmp_path / "student.safetensors"), home=tmp_path / "home", size_px=None)

    views = torch.from_numpy(np.stack([open_pack(pack)[0].view]))
    assert teacher.targets(views, ["cls", "patch"])["patch"].shape == (1, 4, 24)
    assert (teacher.identity.size_px, teacher.identity.patch_px) == (8, 4)


def test_the_files_say_what_they_come_from(pack: Path, tmp_path: Path) -> None:
    train(_config(pack, tmp_path, max_steps=3, ema_decay=0.9))

    opened = open_pack(pack)
    for name in RESULTS[:3]:
        metadata = _metadata(tmp_path / name)
        assert metadata["cache_id"] == opened.cache_id
        assert metadata["pack_digest"] == opened.digest
        assert metadata["steps"] == "3"
    assert float(_metadata(tmp_path / "ema.safetensors")["initialisation_share"]) == pytest.approx(0.9**3)
    assert json.loads(_metadata(tmp_path / "student.safetensors")["pixel_mean"]) == opened.teacher.mean
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert settings["pack"]["cache_id"] == opened.cache_id
    assert settings["pack"]["pack_digest"] == opened.digest


def test_the_average_carries_the_share_of_the_initialisation_it_says(pack: Path, tmp_path: Path) -> None:
    config = _config(pack, tmp_path, max_steps=1, ema_decay=0.75, warmup_lr=1e-2)
    teacher = open_pack(pack).teacher

    train(config)

    start = build_student("vit_s14", size_px=8, patch_px=4, mean=teacher.mean, std=teacher.std, seed=0).state_dict()
    student, average = load_file(tmp_path / "student.safetensors"), load_file(tmp_path / "ema.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * student[name], atol=1e-7, rtol=1e-5)


def test_the_config_of_a_run_makes_it_again(pack: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    train(_config(pack, tmp_path / "first", max_steps=2))

    settings = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())["train"]
    train(config_from_mapping(settings | {"out": tmp_path / "second", "max_steps": 6}))

    assert _files(tmp_path / "second") == undisturbed


def test_tensorboard_shows_the_same_numbers(pack: Path, tmp_path: Path) -> None:
    train(_config(pack, tmp_path, max_steps=3))

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in _metrics(tmp_path)]


# One step, done plainly: both passes over all images, one tensor of CLS and patches, a list of tensors.


def _plain_losses(pack: Path, config: TrainConfig, step: int, model: nn.ModuleDict, mask_token: Tensor) -> Tensor:
    opened = open_pack(pack)
    plan = opened.training_order(seed=config.seed, batch_size=config.global_batch).batch(step)
    assert plan.view_indices is not None
    entries = zip(plan.view_indices.tolist(), plan.records.tolist(), strict=True)
    samples = [opened.sample(f"v{view:03d}", record) for view, record in entries]
    mean, std = torch.tensor(opened.teacher.mean), torch.tensor(opened.teacher.std)
    pixels = torch.stack([torch.from_numpy(sample.view) for sample in samples]).float() / 255
    pixels = ((pixels - mean) / std).permute(0, 3, 1, 2)
    cls = torch.stack([torch.from_numpy(sample.targets["cls"]) for sample in samples])
    patch = torch.stack([torch.from_numpy(sample.targets["patch"]) for sample in samples])
    n_images, n_patches = patch.shape[:2]
    hidden = torch.zeros(n_images, n_patches, dtype=torch.bool)
    drawn = draw_masks(
        config.seed, step, plan.records * 0 + range(n_images), n_patches=n_patches, n_masked=n_patches // 2
    )
    for row, patches in zip(range(1, n_images, 2), drawn, strict=True):
        hidden[row, patches] = True
    student = cast(VisionTransformer, model["student"])
    clean = student.forward_features(pixels)
    handle = student.patch_embed.register_forward_hook(
        lambda module, inputs, output: torch.where(hidden.unsqueeze(-1), mask_token, output)
    )
    masked = student.forward_features(pixels)
    handle.remove()
    token = model["token"](clean[:, :1])
    together = torch.cat((token, model["feature"](clean[:, 1:])), dim=1)
    return torch.stack(
        [
            F.mse_loss(token[:, 0], cls),
            F.mse_loss(together, torch.cat((cls.unsqueeze(1), patch), dim=1)),
            F.mse_loss(model["patch"](masked[:, 1:][hidden]), patch[hidden]),
        ]
    )


def test_steps_equal_those_of_a_plain_reading_of_the_method(pack: Path, tmp_path: Path) -> None:
    # A large epsilon: the gradient of a key's bias is rounding alone, and Adam would blow it up.
    config = _config(pack, tmp_path, max_steps=3, warmup_lr=1e-3, weight_patch=0.5, adam_eps=1e-3)
    teacher = open_pack(pack).teacher
    student = build_student("vit_s14", size_px=8, patch_px=4, mean=teacher.mean, std=teacher.std, seed=0)
    heads = build_heads(("token", "feature", "patch"), student_width=24, teacher_width=6, seed=0)
    model = nn.ModuleDict({"student": student, **dict(heads.items())})
    mask_token = nn.Parameter(torch.zeros(1, 24))
    everything = [mask_token, *model.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in everything if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in everything if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-3,
        eps=1e-3,
    )
    expected = []
    for step in range(3):
        losses = _plain_losses(pack, config, step, model, mask_token)
        optimizer.zero_grad()
        (losses * torch.tensor([1, 1, 0.5])).sum().backward()  # type: ignore[no-untyped-call]  # untyped in torch
        optimizer.step()
        expected.append(losses.tolist())

    train(config)

    found = [[line[f"loss_{name}"] for name in ("token", "feature", "patch")] for line in _metrics(tmp_path)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    trained = load_file(tmp_path / "student.safetensors")
    for name, value in student.state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=2e-5, rtol=1e-4)
    assert load_file(tmp_path / "heads.safetensors")["mask_token"].abs().max() > 0


# Resuming.


class _KilledError(Exception):
    """Stands for the end of the process."""


def _die_at(step: int) -> Callable[[Progress], None]:
    def die(progress: Progress) -> None:
        if progress.step == step:
            raise _KilledError

    return die


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_run_that_died_goes_on_to_the_same_bytes(
    pack: Path, tmp_path: Path, undisturbed: dict[str, bytes], step: int
) -> None:
    config = _config(pack, tmp_path)
    with pytest.raises(_KilledError):
        train(config, progress=_die_at(step))

    result = train(config, resume=True)

    assert result.first_step == (step - 1) // 2 * 2
    assert _files(tmp_path) == undisturbed


def test_a_run_that_dies_again_and_again_goes_on_to_the_same_bytes(
    pack: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    config = _config(pack, tmp_path, checkpoint_every=1)
    for step in (2, 3, 4, 6):
        with pytest.raises(_KilledError):
            train(config, resume=True, progress=_die_at(step))

    train(config, resume=True)

    assert _files(tmp_path) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_at_a_step_border_with_a_checkpoint(
    pack: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
) -> None:
    config = _config(pack, tmp_path, checkpoint_every=100)
    before = signal.getsignal(number)

    def interrupt(progress: Progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), number)

    with caplog.at_level(logging.INFO):
        stopped = train(config, progress=interrupt)

    assert stopped.stopped_by == number.name
    assert not stopped.is_finished
    assert stopped.steps in (3, 4)  # it is heard between two bytecodes of the step that comes after
    assert f"stopped by {number.name} after step={stopped.steps}; go on with --resume" in caplog.text
    assert not (tmp_path / "student.safetensors").exists()
    assert signal.getsignal(number) is before
    assert train(config, resume=True).first_step == stopped.steps
    assert _files(tmp_path) == undisturbed


def test_more_steps_go_on_from_a_finished_run(pack: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    train(_config(pack, tmp_path, max_steps=3))

    result = train(_config(pack, tmp_path), resume=True)

    assert result.first_step == 3
    assert _files(tmp_path) == undisturbed


def test_resuming_a_finished_run_changes_nothing(pack: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    train(_config(pack, tmp_path))

    result = train(_config(pack, tmp_path), resume=True)

    assert (result.first_step, result.steps, result.losses) == (6, 6, {})
    assert _files(tmp_path) == undisturbed


def test_a_damaged_checkpoint_costs_two_steps_and_no_more(
    pack: Path, tmp_path: Path, undisturbed: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(pack, tmp_path)
    with pytest.raises(_KilledError):
        train(config, progress=_die_at(5))
    damaged = tmp_path / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])

    result = train(config, resume=True)

    assert result.first_step == 2
    assert "step=4 is damaged" in caplog.text
    assert _files(tmp_path) == undisturbed


def test_readers_change_nothing(pack: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    train(_config(pack, tmp_path, workers=2))

    assert _files(tmp_path) == undisturbed


def test_a_launchers_accumulation_changes_nothing(
    pack: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")

    train(_config(pack, tmp_path))

    assert _files(tmp_path) == undisturbed


def test_cutting_the_batch_into_parts_changes_rounding_alone(
    pack: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    train(_config(pack, tmp_path, accumulate=3))

    expected = [json.loads(line) for line in undisturbed["metrics.jsonl"].splitlines()]
    for line, other in zip(_metrics(tmp_path), expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def test_losses_of_weight_zero_are_left_out(pack: Path, tmp_path: Path) -> None:
    train(_config(pack, tmp_path, max_steps=2, weight_feature=0, weight_patch=0))

    assert [(line["loss_feature"], line["loss_patch"]) for line in _metrics(tmp_path)] == [(None, None)] * 2
    assert all(line["loss"] == line["loss_token"] for line in _metrics(tmp_path))
    heads = load_file(tmp_path / "heads.safetensors")
    assert sorted(heads) == ["token.0.bias", "token.0.weight", "token.1.bias", "token.1.weight"]


def test_bf16_trains(pack: Path, tmp_path: Path) -> None:
    train(_config(pack, tmp_path / "fp32", max_steps=2))

    train(_config(pack, tmp_path / "bf16", max_steps=2, precision="bf16"))

    for line, exact in zip(_metrics(tmp_path / "bf16"), _metrics(tmp_path / "fp32"), strict=True):
        assert line["loss"] == pytest.approx(exact["loss"], rel=0.03)  # bf16 has 8 bits
        assert line["loss"] != exact["loss"]
    assert {tensor.dtype for tensor in load_file(tmp_path / "bf16" / "student.safetensors").values()} == {torch.float32}


def _killed_at_five(pack: str, out: str) -> None:
    def kill(progress: Progress) -> None:
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    train(_config(Path(pack), Path(out), student="vit_ti14", workers=2), progress=kill)


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bytes(pack: Path, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_killed_at_five, args=(str(pack), str(tmp_path / "killed"))
    )
    process.start()
    process.join()

    result = train(_config(pack, tmp_path / "killed", student="vit_ti14"), resume=True)

    train(_config(pack, tmp_path / "whole", student="vit_ti14"))
    assert process.exitcode == -signal.SIGKILL
    assert result.first_step == 4
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")


# Several processes.


def _rank(pack: str, out: str, stop_at: int | None) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)  # the first process alone; the others must hear of it from it

    torch.set_num_threads(1)
    config = _config(Path(pack), Path(out), student="vit_ti14", max_steps=4, accumulate=2, checkpoint_every=100)
    assert train(config, resume=True, progress=stop).is_finished == (stop_at is None)


@pytest.mark.slow
def test_two_processes_stop_and_go_on_and_compute_what_one_does(pack: Path, tmp_path: Path) -> None:
    _rank(str(pack), str(tmp_path / "one"), None)

    statuses = [start_ranks(2, _rank, str(pack), str(tmp_path / "two"), stop_at) for stop_at in (2, None)]

    assert statuses == [0, 0]
    assert len((tmp_path / "two" / "timings.jsonl").read_text().splitlines()) == 4
    for line, alone in zip(_metrics(tmp_path / "two"), _metrics(tmp_path / "one"), strict=True):
        assert line == pytest.approx(alone, rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


def test_readers_are_counted_from_the_cores_of_a_rank(pack: Path, tmp_path: Path) -> None:
    assert n_readers(_config(pack, tmp_path, workers=5), 2) == 5
    assert n_readers(_config(pack, tmp_path, workers=None), 10_000) == 1


# What is refused.


def _refused(config: TrainConfig, message: str, *, resume: bool = False) -> None:
    with pytest.raises(UsageError) as caught:
        train(config, resume=resume)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pack_without_the_targets_is_refused(tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "pack", patch_bytes=64)

    _refused(
        _config(pack, tmp_path / "run"),
        "the token, feature, patch losses need the targets cls, patch, and the pack holds only patch; pack "
        "the cache with --targets cls,patch",
    )
    assert not (tmp_path / "run").exists()


def test_a_mask_ratio_that_hides_no_patch_is_refused(pack: Path, tmp_path: Path) -> None:
    _refused(_config(pack, tmp_path / "run", mask_ratio=0.001), "mask_ratio 0.001 hides no patch of a view")


def test_a_batch_larger_than_the_data_is_refused(pack: Path, tmp_path: Path) -> None:
    _refused(_config(pack, tmp_path, batch_size=11), "batch of 11 is larger than the 10 views")


def test_a_run_with_checkpoints_is_refused_without_resume(pack: Path, tmp_path: Path) -> None:
    train(_config(pack, tmp_path, max_steps=1))

    _refused(_config(pack, tmp_path), "go on with --resume")


def test_replacing_logs_needs_a_yes(pack: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    config = _config(pack, tmp_path)
    with pytest.raises(_KilledError):
        train(config, progress=_die_at(1))

    _refused(config, "starting here replaces config.yaml, metrics.jsonl")
    train(config, replace=True)

    assert _files(tmp_path) == undisturbed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 2e-3}, "its checkpoint was made with lr 0.001, and now it is 0.002"),
        ({"seed": 4}, "made with seed 0, and now it is 4"),
        ({"precision": "bf16"}, "made with precision fp32, and now it is bf16"),
        ({"student": "vit_ti14"}, "made with student vit_s14, and now it is vit_ti14"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    pack: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    train(_config(pack, tmp_path, max_steps=1))

    _refused(_config(pack, tmp_path, **settings), message, resume=True)


def test_resuming_on_another_pack_is_refused(pack: Path, tmp_path: Path) -> None:
    train(_config(pack, tmp_path / "run", max_steps=1))
    other = write_pack(tmp_path / "other", n_images=12)

    _refused(_config(other, tmp_path / "run"), "made with pack digest", resume=True)


def test_fp16_on_a_cpu_is_refused(pack: Path, tmp_path: Path) -> None:
    _refused(_config(pack, tmp_path, precision="fp16"), "--precision fp16 needs a GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(pack: Path, tmp_path: Path) -> None:
    _refused(_config(pack, tmp_path, device="cuda"), "--device cuda: torch finds no GPU here")


def test_a_loss_that_is_not_finite_ends_the_run(pack: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ProteusCacheError, match=r"the loss of step \d is not finite \(token .*the newest checkpoint is of step 1"
    ):
        train(_config(pack, tmp_path, warmup_lr=1e30, checkpoint_every=1))

    lines = _metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert 0 < len(lines) < 6
    assert not (tmp_path / "student.safetensors").exists()


def test_too_little_gpu_memory_is_answered_with_a_remedy(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Distillation.forward

    def has_memory_for_2(self: Distillation, views: Tensor, *others: Any) -> Tensor:
        if len(views) > 2:
            raise torch.cuda.OutOfMemoryError
        return forward(self, views, *others)

    monkeypatch.setattr(Distillation, "forward", has_memory_for_2)

    with pytest.raises(ProteusCacheError, match=r"for 4 views at once, of a batch of 4 .* 2 fit: set `accumulate: 2`"):
        train(_config(pack, tmp_path))
    assert train(_config(pack, tmp_path, accumulate=2), resume=True).is_finished


def test_a_step_that_never_fits_says_so(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(self: Distillation, *others: Any) -> Tensor:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(Distillation, "forward", exhaust)

    with pytest.raises(ProteusCacheError, match=r"and for a single one; end what else uses it .* smaller --student"):
        train(_config(pack, tmp_path))


def test_a_damaged_pack_ends_the_run_naming_the_sample(tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "pack")
    tar = pack / "v000" / "s00001.tar"
    data = bytearray(tar.read_bytes())
    data[520] ^= 1  # behind the first member's header: codes
    tar.write_bytes(data)

    with pytest.raises(ChecksumError, match=r"s00001\.tar"):
        train(_config(pack, tmp_path / "run"))
