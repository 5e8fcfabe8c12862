"""The linear probe as a whole: its length, its order, its twins, bad images, and a trained teacher's score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proteus_cache.errors import UsageError
from proteus_cache.evaluate.evaluate import evaluate
from proteus_cache.evaluate.features import last_block_features
from proteus_cache.evaluate.heads import HEADS, HeadGrid, Tally, cosine
from proteus_cache.evaluate.labelled import LabelledImages, Part, find_labelled_images, rows_to_ask
from proteus_cache.evaluate.models import load_run
from proteus_cache.evaluate.probe import ProbeLength, _training_requests, probe_length, run_probe
from proteus_cache.evaluate.reading import centre_view, random_crop_view
from proteus_cache.evaluate.report import EvalReport, ProbeScore, ProbeSettings, report_table
from proteus_cache.evaluate.task import Task
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Teacher
from tests.evaluate.runs import SIZE_PX, make_labelled, make_run
from tests.evaluate.test_evaluate import cifar
from tests.makers import make_teacher

CPU = torch.device("cpu")


def _probe(run: Path, images: Path, home: Path, **options: Any) -> EvalReport:  # Any: of several types
    settings = {"workers": 2, "probe_steps": 6, "probe_batch": 8} | options
    return evaluate(run, images, protocol="linear", home=home, device="cpu", **settings)


def _task(models: dict[str, Teacher], labelled: LabelledImages, size_px: int, **options: Any) -> Task:  # likewise
    settings = {"batch_size": 64, "n_threads": 2, "seed": 0} | options
    return Task(
        models=models,
        labelled=labelled,
        size_px=size_px,
        device=CPU,
        start=lambda _: None,
        count=lambda _: None,
        **settings,
    )


# --- length


@pytest.mark.parametrize(
    ("n_train", "n_steps", "batch_size"),
    [
        (1_281_167, 25_020, 512),  # ImageNet-1K: exactly the published length
        (100_000, 1_950, 512),
        (99_999, 975, 512),
        (5_000, 390, 64),
        (1_200, 375, 16),
        (40, 200, 16),
        (3, 200, 3),
    ],
)
def test_the_length_follows_the_number_of_images(n_train: int, n_steps: int, batch_size: int) -> None:
    assert probe_length(n_train, None, None) == ProbeLength(n_steps, batch_size)


def test_a_length_can_be_given() -> None:
    assert probe_length(1_200, 50, 32) == ProbeLength(50, 32)
    assert probe_length(1_200, 50, None) == ProbeLength(50, 16)
    assert probe_length(12_000, None, 100) == ProbeLength(600, 100)


@pytest.mark.parametrize(
    ("n_steps", "batch_size", "message"),
    [
        (0, None, "--probe-steps must be at least 1, got 0"),
        (None, 0, "--probe-batch must be at least 1, got 0"),
        (None, 41, "--probe-batch 41 is larger than the 40 training images; choose a smaller one"),
        (10**7, 16, "--probe-steps 10,000,000: more than 100,000 passes over 40 images"),
    ],
)
def test_a_length_that_cannot_be_is_refused(n_steps: int | None, batch_size: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        probe_length(40, n_steps, batch_size)


# --- order


def test_every_pass_draws_every_image_once_in_an_order_of_its_own() -> None:
    length = ProbeLength(n_steps=9, batch_size=4)

    requests = [request for batch in _training_requests(12, length, seed=1, at_once=1) for request in batch]

    passes = [requests[start : start + 12] for start in range(0, 36, 12)]
    assert [{request.view for request in one} for one in passes] == [{"v000"}, {"v001"}, {"v002"}]
    orders = [[request.row for request in one] for one in passes]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("at_once", [1, 2, 5, 100])
def test_a_step_has_the_same_images_however_many_are_read_at_once(at_once: int) -> None:
    length = ProbeLength(n_steps=7, batch_size=5)

    alone = [request for batch in _training_requests(11, length, seed=1, at_once=1) for request in batch]
    batches = list(_training_requests(11, length, seed=1, at_once=at_once))

    assert [request for batch in batches for request in batch] == alone
    assert len(alone) == 35
    assert max(len(batch) for batch in batches) == 5 * min(at_once, 7)


# --- the whole


def test_a_report_has_the_published_score_and_an_honest_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", student_seed=9)
    images = make_labelled(tmp_path / "images", {"a": 15, "b": 15, "c": 15, "d": 1})
    calls: list[tuple[int, int]] = []

    report = _probe(run, images, tmp_path, progress=lambda done, total: calls.append((done, total)))

    assert report.protocol == "linear"
    assert [model.model for model in report.models] == ["student", "ema", "untrained"]
    assert (report.n_train, report.n_test, report.n_classes) == (37, 9, 4)
    assert report.settings == ProbeSettings(steps=6, batch_size=8, passes=48 / 37, n_held_out=6)
    # 48 crops, 6 held-out images, 9 test images
    assert calls[0] == (0, 63)
    assert calls[-1] == (63, 63)
    for model in report.models:
        on_test, by_held_out = model.scores
        assert isinstance(on_test, ProbeScore)
        assert isinstance(by_held_out, ProbeScore)
        assert [score.head for score in model.heads] == list(HEADS)
        assert on_test.top1 == max(head.top1 or 0 for head in model.heads)
        assert by_held_out.held_out_top1 == max(head.held_out_top1 or 0 for head in model.heads)
        (chosen,) = [head for head in model.heads if head.head == by_held_out.head]
        assert (by_held_out.top1, by_held_out.top5) == (chosen.top1, chosen.top5)
        assert (on_test.top1 or 0) >= (by_held_out.top1 or 0)
    assert "1 of 4 classes have one image, which only trains: d" in report.notes
    assert any(note.startswith("ema still holds 50.0%") for note in report.notes)


def test_the_result_does_not_depend_on_threads(tmp_path: Path) -> None:
    run, images = make_run(tmp_path / "run"), make_labelled(tmp_path / "images", {"a": 12, "b": 12})

    one, three = (_probe(run, images, tmp_path, workers=workers) for workers in (1, 3))

    assert one == three
    assert one != _probe(run, images, tmp_path, seed=1)


@pytest.mark.parametrize("batch_size", [3, 8, 20, 64])
def test_the_probe_equals_a_plain_loop_over_images(batch_size: int, tmp_path: Path) -> None:
    """One image in a forward, one step after the other, twins fed by hand; whatever batch the forwards have."""
    teacher = load_teacher("vit", weights=str(make_teacher(tmp_path / "t.safetensors")), home=tmp_path, size_px=32)
    labelled = find_labelled_images(make_labelled(tmp_path / "images", {"a": 14, "b": 9, "c": 2}), seed=3)
    length = ProbeLength(n_steps=12, batch_size=7)

    task = _task({"student": teacher}, labelled, 32, batch_size=batch_size, seed=3)
    outcome = run_probe(task, length)

    held_out, test = _plain(teacher, labelled, length, seed=3)
    found = outcome.heads["student"]
    assert [head.held_out_top1 for head in found] == [held_out.top1(number) for number in range(52)]
    assert [head.top1 for head in found] == [test.top1(number) for number in range(52)]
    assert len({head.top1 for head in found}) > 2  # the heads differ, so equality says something


def _plain(teacher: Teacher, labelled: LabelledImages, length: ProbeLength, seed: int) -> tuple[Tally, Tally]:
    part, n_classes = labelled.train, len(labelled.classes)
    held_out = set(np.flatnonzero(rows_to_ask(part.keys, part.labels, seed)).tolist())
    assert held_out
    grids = [
        HeadGrid(teacher.identity.width, 2, n_classes, batch_size=length.batch_size, seed=seed, device=CPU)
        for _ in range(2)
    ]

    def look(part: Part, row: int, view: str | None) -> torch.Tensor:
        path = part.root / part.relative_path(row)
        pixels = centre_view(path, 32) if view is None else random_crop_view(path, 32, part.key(row), view, seed)
        return last_block_features(teacher, torch.from_numpy(pixels).unsqueeze(0), 1)[0]

    for step, requests in enumerate(_training_requests(len(part), length, seed, at_once=1)):
        for grid, requested in zip(
            grids, (requests, [request for request in requests if request.row not in held_out]), strict=True
        ):
            features = torch.stack([look(part, request.row, request.view) for request in requested])
            labels = torch.tensor([int(part.labels[request.row]) for request in requested])
            grid.step(features, labels, cosine(step, length.n_steps))
    tallies = Tally(), Tally()
    for row in held_out:
        tallies[0].add(grids[1].logits(look(part, row, None)[None]), torch.tensor([int(part.labels[row])]))
    for row in range(len(labelled.test)):
        said = grids[0].logits(look(labelled.test, row, None)[None])
        tallies[1].add(said, torch.tensor([int(labelled.test.labels[row])]))
    return tallies


def test_bad_images_are_skipped_named_once_and_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    images = tmp_path / "images"
    make_labelled(images / "train", {"a": 8, "b": 8})
    make_labelled(images / "test", {"a": 3, "b": 3}, seed=1)
    (images / "train" / "a" / "0.png").write_bytes(b"no image")
    (images / "test" / "b" / "0.png").write_bytes(b"")

    # One image in a step, so that steps are left out for the bad one; several passes.
    report = _probe(run, images, tmp_path, probe_steps=40, probe_batch=1)

    assert report.n_bad_images == 2
    assert [name in reason for name, reason in zip(("a/0.png", "b/0.png"), report.bad_images, strict=True)]
    assert (report.n_train, report.n_test) == (15, 5)
    assert all(score.top1 is not None for model in report.models for score in model.scores)


def test_a_model_with_fewer_blocks_uses_what_it_has_and_says_so(tmp_path: Path) -> None:
    weights = make_teacher(tmp_path / "teacher.safetensors", size_px=SIZE_PX, patch_px=14)
    run, images = make_run(tmp_path / "run"), make_labelled(tmp_path / "images", {"a": 8, "b": 8})

    report = _probe(run, images, tmp_path, teacher="vit", weights=str(weights))

    assert "teacher has 2 blocks: its heads on 4 blocks read all it has" in report.notes
    assert [model.model for model in report.models] == ["student", "ema", "teacher", "untrained"]


def test_without_a_second_image_of_any_class_nothing_is_held_out(tmp_path: Path) -> None:
    images = tmp_path / "images"
    make_labelled(images / "train", {"a": 1, "b": 1})
    make_labelled(images / "test", {"a": 2, "b": 2}, seed=1)

    report = _probe(make_run(tmp_path / "run"), images, tmp_path, probe_batch=2)

    assert "no class has two training images, so none could be held out to choose a head by" in report.notes
    for model in report.models:
        on_test, by_held_out = model.scores
        assert on_test.top1 is not None
        assert isinstance(by_held_out, ProbeScore)
        assert (by_held_out.head, by_held_out.top1) == (None, None)
    assert report_table(report).splitlines()[6].endswith("  - / -         -  student.safetensors")


def test_what_cannot_be_probed_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    single = make_labelled(tmp_path / "single", {"a": 1, "b": 1})
    alone = make_labelled(tmp_path / "alone", {"a": 9})
    two = make_labelled(tmp_path / "two", {"a": 5, "b": 5})
    (tmp_path / "flat").mkdir()
    (two / "a" / "0.png").rename(tmp_path / "flat" / "0.png")

    for images, message in (
        (single, "single: every class has one image, which only trains; a linear probe needs two of each"),
        (alone, "alone: the training images are of one class only; a linear probe needs two or more"),
        (tmp_path / "flat", "1 of 1 images have no label"),
    ):
        with pytest.raises(UsageError, match=message):
            _probe(run, images, tmp_path)
    with pytest.raises(UsageError, match="--probe-batch 512 is larger than the 7 training images"):
        _probe(run, two, tmp_path, probe_batch=512)


def test_the_table_and_the_json_say_how_it_was_scored(tmp_path: Path) -> None:
    run, images = make_run(tmp_path / "run"), make_labelled(tmp_path / "images", {"a": 10, "b": 10})

    report = _probe(run, images, tmp_path)
    lines = report_table(report).splitlines()
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))

    assert lines[0] == "linear probe accuracy, top-1 / top-5 in percent: vit_ti14 after 4 steps"
    assert lines[3] == "probe: 52 heads, 6 steps of 8 images (3.0 passes); published: 25,020 steps of 512"
    assert " ".join(lines[5].split()) == "model best on test by held-out its head weights"
    assert [line.split()[0] for line in lines[6:9]] == ["student", "ema", "untrained"]
    assert lines[10].startswith("best on test: the best of 52 heads by its score on the test images themselves")
    assert lines[11].startswith("by held-out: the head whose settings did best on one training image in 5 (4)")
    first = value["models"][0]
    assert value["settings"]["published_steps"] == 25_020
    assert [score["chosen_on"] for score in first["scores"]] == ["test", "held_out"]
    assert set(first["scores"][0]["head"]) == {"n_last_blocks", "avgpool", "base_lr"}
    assert len(first["heads"]) == 52


@pytest.mark.parametrize(("n_steps", "is_short"), [(4, True), (25, False)])
def test_a_short_probe_whose_largest_rate_was_best_says_so(n_steps: int, is_short: bool, tmp_path: Path) -> None:
    teacher = load_teacher("vit", weights=str(make_teacher(tmp_path / "t.safetensors")), home=tmp_path, size_px=32)
    images = make_labelled(tmp_path / "images", {"a": 25, "b": 25, "c": 25})

    outcome = run_probe(
        _task({"student": teacher, "untrained": teacher}, find_labelled_images(images, 0), 32), ProbeLength(n_steps, 12)
    )

    _, by_held_out = outcome.scores["student"]
    assert isinstance(by_held_out, ProbeScore)
    assert by_held_out.head is not None
    note = "the largest rate was the best for student: more --probe-steps may score higher"
    assert by_held_out.head.base_lr == 0.1
    assert (note in outcome.notes) == is_short


def test_a_random_student_separates_colours(tmp_path: Path) -> None:
    """Easy images and enough steps: a probe that learns nothing would stay at a third."""
    run, images = make_run(tmp_path / "run", share=0.0), make_labelled(tmp_path / "images", {"a": 20, "b": 20, "c": 20})
    models = {"untrained": load_run(run, tmp_path).by_name["untrained"]}

    outcome = run_probe(_task(models, find_labelled_images(images, 0), SIZE_PX), ProbeLength(40, 16))

    on_test, by_held_out = outcome.scores["untrained"]
    assert on_test.top1 == 1.0
    assert by_held_out.top1 is not None
    assert by_held_out.top1 >= 0.9


def test_a_trained_teachers_probe_is_near_its_own_head(tmp_path: Path, test_data: Path) -> None:
    images = cifar(test_data / "cifar10" / "train.tar", tmp_path / "images", n_of_class=100)
    weights = str(test_data / "teachers" / "cifar10_vit.safetensors")
    teacher = load_teacher("vit", weights=weights, home=tmp_path, size_px=None)

    outcome = run_probe(_task({"teacher": teacher}, find_labelled_images(images, 0), 32), ProbeLength(60, 32))

    _, by_held_out = outcome.scores["teacher"]
    # Its own head, trained on 50,000 images, reaches 62.9 %; here are 800 for training and 200 to ask.
    assert by_held_out.top1 is not None
    assert 0.48 < by_held_out.top1 < 0.75
