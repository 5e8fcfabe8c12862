"""A whole evaluation of a small run: models, bad images, notes, errors."""

from __future__ import annotations

import json
import tarfile
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from proteus_cache.errors import FormatError, ProteusCacheError, StorageError, UsageError
from proteus_cache.evaluate.evaluate import evaluate
from proteus_cache.evaluate.features import extract_features
from proteus_cache.evaluate.knn import KnnScore
from proteus_cache.evaluate.labelled import find_labelled_images
from proteus_cache.evaluate.models import load_run, place
from proteus_cache.evaluate.reading import centre_view
from proteus_cache.evaluate.report import EvalReport, report_table
from proteus_cache.students.registry import build_student
from proteus_cache.train.run_folder import CONFIG, STUDENT
from tests.evaluate.runs import MEAN, SEED, SIZE_PX, STD, make_labelled, make_run


def _evaluate(run: Path, images: Path, home: Path, **options: Any) -> EvalReport:  # Any: of several types
    return evaluate(run, images, home=home, device="cpu", workers=2, batch_size=8, **options)


def test_an_evaluation_scores_every_model_of_a_run(tmp_path: Path) -> None:
    run, images = (
        make_run(tmp_path / "run", student_seed=9),
        make_labelled(tmp_path / "images", {"a": 10, "b": 10, "c": 10}),
    )
    calls: list[tuple[int, int]] = []

    report = _evaluate(run, images, tmp_path, progress=lambda done, total: calls.append((done, total)))

    assert [model.model for model in report.models] == ["student", "ema", "untrained"]
    assert (report.n_train, report.n_test, report.n_classes) == (24, 6, 3)
    for model in report.models:
        scores = [score for score in model.scores if isinstance(score, KnnScore)]
        assert [score.k for score in scores] == [10, 20, 100, 200]
        assert [score.n_neighbours for score in scores] == [10, 20, 24, 24]
        assert all(score.top1 is not None and 0 <= score.top1 <= 1 for score in model.scores)
        assert all(score.top5 == 1.0 for score in model.scores[1:])
    assert len({model.weights_sha256 for model in report.models}) == 3
    assert calls[-1] == (30, 30)
    assert "all 24 training images vote for k = 100, 200, there are no more" in report.notes
    assert any(note.startswith("ema still holds 50.0% of the untrained weights") for note in report.notes)


def test_evaluating_twice_gives_the_same_report(tmp_path: Path) -> None:
    run, images = make_run(tmp_path / "run", share=0.0), make_labelled(tmp_path / "images", {"a": 8, "b": 8})

    assert _evaluate(run, images, tmp_path) == _evaluate(run, images, tmp_path)


def test_the_untrained_student_is_the_one_that_the_seed_gives(tmp_path: Path) -> None:
    run, images = make_run(tmp_path / "run"), make_labelled(tmp_path / "images", {"a": 8, "b": 8})

    report = _evaluate(run, images, tmp_path)

    student, _, untrained = report.models
    assert student.weights_sha256 == untrained.weights_sha256
    assert student.scores == untrained.scores
    assert untrained.weights == "initialisation, seed 5"


def test_a_teacher_is_scored_beside_the_students(tmp_path: Path) -> None:
    run, images = make_run(tmp_path / "run"), make_labelled(tmp_path / "images", {"a": 8, "b": 8})

    report = _evaluate(run, images, tmp_path, teacher="dinov2_vits14", weights="random:0")

    teacher = report.models[2]
    assert (teacher.model, teacher.weights, teacher.width) == ("teacher", "random:0", 384)
    assert any("is not the one that taught the run (dinov2_vits14, weights 000000000000)" in n for n in report.notes)


def test_features_are_the_normed_cls_of_the_centre_view(tmp_path: Path) -> None:
    run, images = make_run(tmp_path / "run"), make_labelled(tmp_path / "images", {"a": 5, "b": 5})
    models = load_run(run, tmp_path).by_name
    place(models, torch.device("cpu"))
    part = find_labelled_images(images, seed=0).train

    features = extract_features(
        {"student": models["student"]},
        part,
        size_px=SIZE_PX,
        batch_size=3,
        n_threads=2,
        progress=lambda _: None,
    )

    student = build_student("vit_ti14", size_px=SIZE_PX, patch_px=14, mean=MEAN, std=STD, seed=SEED).eval()
    for row in range(len(part)):
        pixels = centre_view(images / part.relative_path(row), SIZE_PX)
        normal = (torch.from_numpy(pixels) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        with torch.inference_mode():
            cls = student.forward_features(normal.permute(2, 0, 1).unsqueeze(0))[0, 0]
        torch.testing.assert_close(features.by_model["student"][row], cls / cls.norm(), atol=1e-5, rtol=0)
    assert features.labels.tolist() == part.labels.tolist()


def test_the_centre_view_is_torchvisions(tmp_path: Path) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    folder = make_labelled(tmp_path / "images", {"a": 1})
    image = Image.open(folder / "a" / "0.png")
    expected = Compose([Resize(32, interpolation=InterpolationMode.BICUBIC), CenterCrop(SIZE_PX)])(image)

    pixels = centre_view(folder / "a" / "0.png", SIZE_PX)

    assert np.array_equal(pixels, np.asarray(expected))


def test_bad_images_are_skipped_counted_and_named(tmp_path: Path) -> None:
    run, images = make_run(tmp_path / "run"), make_labelled(tmp_path / "images", {"a": 6, "b": 6})
    (images / "a" / "bad.jpg").write_bytes(b"no image")
    (images / "b" / "empty.png").touch()

    report = _evaluate(run, images, tmp_path)

    assert report.n_bad_images == 2
    assert report.n_train + report.n_test == 12
    assert "bad.jpg" in " ".join(report.bad_images)
    assert "empty.png: the file is empty" in report_table(report)


def test_too_many_bad_images_end_the_evaluation(tmp_path: Path) -> None:
    run, images = make_run(tmp_path / "run"), make_labelled(tmp_path / "images", {"a": 2})
    for number in range(30):
        (images / "a" / f"bad{number}.jpg").write_bytes(b"no image")

    with pytest.raises(ProteusCacheError, match=r"more than 10 of .* images cannot be used"):
        _evaluate(run, images, tmp_path)


def test_an_image_that_vanished_is_an_error_of_the_file_system(tmp_path: Path) -> None:
    run, images = make_run(tmp_path / "run"), make_labelled(tmp_path / "images", {"a": 5, "b": 5})
    models = load_run(run, tmp_path).by_name
    part = find_labelled_images(images, seed=0).train
    (images / part.relative_path(0)).unlink()

    with pytest.raises(StorageError, match="cannot be read"):
        extract_features(models, part, size_px=SIZE_PX, batch_size=3, n_threads=2, progress=lambda _: None)


def test_one_image_of_each_class_gives_no_score_and_says_why(tmp_path: Path) -> None:
    run, images = make_run(tmp_path / "run"), make_labelled(tmp_path / "images", {"a": 1, "b": 1, "c": 1})

    report = _evaluate(run, images, tmp_path)

    assert report.n_test == 0
    assert all(score.top1 is None and score.top5 is None for model in report.models for score in model.scores)
    assert "3 of 3 classes have one image, which only trains: a, b, c" in report.notes
    assert any(note.startswith("there is no test image") for note in report.notes)
    assert report_table(report).splitlines()[5].split()[1:4] == ["-", "/", "-"]


def test_unknown_test_classes_cannot_be_right_and_the_report_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    images = tmp_path / "images"
    make_labelled(images / "train", {"a": 3, "b": 3})
    make_labelled(images / "test", {"c": 2})

    report = _evaluate(run, images, tmp_path)

    assert all(score.top1 == 0.0 for model in report.models for score in model.scores)
    assert any(note.startswith("no test image can be right") for note in report.notes)


def test_some_unknown_test_classes_are_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    images = tmp_path / "images"
    make_labelled(images / "train", {"a": 3, "b": 3})
    make_labelled(images / "val", {"a": 2, "c": 3})

    report = _evaluate(run, images, tmp_path)

    assert any(note.startswith("3 of 5 test images cannot be right") for note in report.notes)


def test_the_report_is_json_and_frozen(tmp_path: Path) -> None:
    run, images = make_run(tmp_path / "run"), make_labelled(tmp_path / "images", {"a": 5, "b": 5})

    report = _evaluate(run, images, tmp_path)
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))

    assert value["models"][0]["scores"][0]["k"] == 10
    assert value["images"] == str(images)
    with pytest.raises(FrozenInstanceError):
        report.seed = 1  # type: ignore[misc]  # that is the point


def test_the_table_has_a_line_for_each_model_in_percent(tmp_path: Path) -> None:
    run, images = make_run(tmp_path / "run"), make_labelled(tmp_path / "images", {"a": 5, "b": 5})

    report = _evaluate(run, images, tmp_path)
    lines = report_table(report).splitlines()

    assert lines[0] == "k-NN accuracy, top-1 / top-5 in percent: vit_ti14 after 4 steps"
    assert lines[1] == f"2 test images among 8 training images of 2 classes, 28 px: {images}"
    assert lines[2] == "parts: one image in 5 of each class, split by seed 0"
    assert lines[4].split() == ["model", "k=10", "k=20", "k=100", "k=200", "weights"]
    assert [line.split()[0] for line in lines[5:8]] == ["student", "ema", "untrained"]
    first = report.models[0].scores[0].top1
    assert first is not None
    assert lines[5].split()[1:4] == [f"{100 * first:.2f}", "/", "100.00"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "liner"}, r"unknown protocol 'liner'; did you mean linear\?"),
        ({"protocol": "logistic"}, "unknown protocol 'logistic'; choose knn or linear"),
        ({"seed": -1}, r"--seed must be from 0 to 2\*\*63 - 1, got -1"),
        ({"probe_steps": 10}, "--probe-steps is of a linear probe; give --protocol linear with it"),
        ({"probe_batch": 10}, "--probe-batch is of a linear probe"),
        ({"weights": "random:0"}, "give --teacher with it"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"workers": 0}, "--workers must be at least 1"),
        ({"teacher": "dinov2_vits15"}, "unknown teacher"),
        ({"device": "tpu"}, "--device"),
    ],
)
def test_misuse_is_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    run, images = make_run(tmp_path / "run"), make_labelled(tmp_path / "images", {"a": 2})

    with pytest.raises(UsageError, match=message):
        evaluate(run, images, **({"home": tmp_path} | options))  # type: ignore[arg-type]  # wrong on purpose


def test_what_is_not_a_finished_run_is_refused(tmp_path: Path) -> None:
    images = make_labelled(tmp_path / "images", {"a": 2})
    run = make_run(tmp_path / "run")

    with pytest.raises(UsageError, match="no such folder"):
        _evaluate(tmp_path / "nowhere", images, tmp_path)
    with pytest.raises(UsageError, match="is a folder of images; give a run"):
        _evaluate(images, images, tmp_path)
    (run / STUDENT).unlink()
    with pytest.raises(UsageError, match=r"finish the run first: proteus-cache train --config \S+config.yaml --resume"):
        _evaluate(run, images, tmp_path)


def test_a_config_without_its_pack_is_refused(tmp_path: Path) -> None:
    images, run = make_labelled(tmp_path / "images", {"a": 2}), make_run(tmp_path / "run")
    (run / CONFIG).write_text("train: {}\n")

    with pytest.raises(FormatError, match="does not say which pack"):
        _evaluate(run, images, tmp_path)


def test_features_that_are_not_finite_name_the_weights(tmp_path: Path) -> None:
    images, run = make_labelled(tmp_path / "images", {"a": 2}), make_run(tmp_path / "run")
    model = load_run(run, tmp_path).by_name["student"]
    norm = model._model.norm
    assert isinstance(norm, torch.nn.LayerNorm)
    torch.nn.init.constant_(norm.weight, torch.nan)
    part = find_labelled_images(images, seed=0).train

    with pytest.raises(ProteusCacheError, match=r"student.safetensors.*not finite"):
        extract_features({"student": model}, part, size_px=SIZE_PX, batch_size=2, n_threads=1, progress=lambda _: None)


def test_a_trained_teacher_is_far_better_than_an_untrained_student(tmp_path: Path, test_data: Path) -> None:
    images = cifar(test_data / "cifar10" / "train.tar", tmp_path / "images", n_of_class=60)
    weights = str(test_data / "teachers" / "cifar10_vit.safetensors")

    report = _evaluate(make_run(tmp_path / "run"), images, tmp_path, teacher="vit", weights=weights)

    by_name = {model.model: model.scores[1].top1 for model in report.models}
    teacher, untrained = by_name["teacher"], by_name["untrained"]
    assert teacher is not None
    assert untrained is not None
    # Three times chance: it reaches 61 % among 5,000 whole images; here are 480 and a smaller crop.
    assert teacher > 0.30
    assert teacher > untrained


def cifar(archive: Path, folder: Path, *, n_of_class: int) -> Path:
    """The first images of each class of an archive, as class folders."""
    counts: dict[str, int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = Path(member.name)
            if member.isfile() and counts.get(name.parent.name, 0) < n_of_class:
                counts[name.parent.name] = counts.get(name.parent.name, 0) + 1
                file = tar.extractfile(member)
                assert file is not None
                (folder / name.parent.name).mkdir(parents=True, exist_ok=True)
                (folder / name.parent.name / name.name).write_bytes(file.read())
    return folder


def test_the_sample_of_imagenet_is_read_whole(tmp_path: Path, test_data: Path) -> None:
    """Grey and odd-sized photographs are among them; the classes are made up."""
    source = test_data / "imagenet-sample"
    for number, folder in enumerate(sorted(path for path in source.iterdir() if path.is_dir())[:40]):
        target = tmp_path / "images" / f"class{number % 4}"
        target.mkdir(parents=True, exist_ok=True)
        for image in folder.iterdir():
            (target / image.name).symlink_to(image)

    report = _evaluate(make_run(tmp_path / "run"), tmp_path / "images", tmp_path)

    assert report.n_bad_images == 0
    assert report.n_train + report.n_test == 40
