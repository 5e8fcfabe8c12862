"""The demo: the whole way from images to a scored student, with what it proves in numbers and in a picture.

Every step is what the command named beside it does with the same settings, and goes on where an interrupted
demo ended.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, Protocol

import yaml

from proteus_cache import storage
from proteus_cache.demo.features import dense_features, principal_colours, shown_pixels
from proteus_cache.demo.picture import Picture, draw_picture
from proteus_cache.demo.scenes import CLASSES, write_scenes
from proteus_cache.demo.speed import StepSpeed, compare_steps
from proteus_cache.errors import WeightsError
from proteus_cache.evaluate.evaluate import evaluate
from proteus_cache.evaluate.knn import KnnScore
from proteus_cache.evaluate.models import STUDENT_MODEL, TEACHER_MODEL, UNTRAINED_MODEL, load_run
from proteus_cache.evaluate.report import EvalReport
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.planning import plan_cache
from proteus_cache.extract.run import describe_plan, extract
from proteus_cache.images import list_images
from proteus_cache.pack.build import run_pack, workers_that_fit
from proteus_cache.pack.plan import plan_pack
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.plan import human_bytes, human_rate, human_time
from proteus_cache.processes import Worker
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.loop import train
from proteus_cache.train.run_folder import METRICS

STUDENT: Final = "vit_demo"
VIEWS: Final = 4
TRAIN_IMAGES_A_CLASS: Final = 200
TEST_IMAGES_A_CLASS: Final = 60
TRAIN_SEED: Final = 0
TEST_SEED: Final = 1
K: Final = 20
"""Neighbours of the accuracy that is shown."""
N_SHOWN: Final = 8
RECIPE: Final = {
    "student": STUDENT,
    "epochs": 25,
    "batch_size": 16,
    "lr": 1.4e-3,
    "beta2": 0.95,
    "warmup_epochs": 0,
    "schedule_lag_epochs": 0,
    "ema_decay": 0.99,
    "checkpoint_every": 500,
}
"""A short run's training settings; what is not named is the released recipe."""
OWN_TEACHER: Final = "dinov2_vits14"
OWN_IMAGES: Final = 800
OWN_SIZE_PX: Final = 112
"""For the user's photographs: views that a CPU can afford."""


class Show(Protocol):
    """Where a demo tells what it does."""

    def say(self, line: str) -> None:
        """One line."""

    def progress(self, label: str, unit: str) -> AbstractContextManager[Callable[[float, float, int], None]]:
        """A bar that takes (done, all, bytes so far)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What a demo found; written to `demo.json`."""

    out: Path
    teacher: str
    student: str
    n_views: int
    code_bytes: int
    """Codes of one view."""
    pixel_bytes: int
    """Its picture, recipe and tar headers."""
    float16_bytes: int
    """The same targets as half-precision numbers."""
    accuracies: dict[str, float]
    """k-NN accuracy by model, on images that nothing was trained on; empty without labels."""
    share_of_gain: float | None
    """How much of the way from the untrained student to the teacher the student went."""
    speed: StepSpeed
    seconds: dict[str, float]
    """By step."""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """Plain values."""
        return {"format": "proteus-cache/demo", "version": 1, **asdict(self), "out": str(self.out)}

    def lines(self) -> list[str]:
        """For people."""
        stored = self.code_bytes + self.pixel_bytes
        plain = self.float16_bytes + self.pixel_bytes
        lines = [
            f"bytes     {human_bytes(stored)} a view ({human_bytes(self.code_bytes)} codes, "
            f"{human_bytes(self.pixel_bytes)} pixels); with float16 targets {human_bytes(plain)}",
            f"speed     a step from the cache is {self.speed.ratio:.2f} x as fast as with the teacher in it "
            f"({human_rate(self.speed.cached_views_per_s)} and {human_rate(self.speed.live_views_per_s)} views/s)",
        ]
        if self.accuracies:
            by_model = ", ".join(f"{name} {share:.1%}" for name, share in self.accuracies.items())
            lines.append(f"k-NN      {by_model} (k = {K}, held-out images)")
        if self.share_of_gain is not None:
            lines.append(f"gain      the student went {self.share_of_gain:.0%} of the way from untrained to teacher")
        lines.append(f"time      {human_time(sum(self.seconds.values()))}")
        return [*lines, *(f"note      {note}" for note in self.notes)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Which images and which teacher."""

    teacher: str
    train: Path
    """Extracted from."""
    labelled: Path | None
    """Scored on; None without labels."""
    options: dict[str, Any]
    """Of the extraction, beside the defaults."""
    notes: tuple[str, ...] = ()


def run_demo(out: Path, *, home: Path, images: Path | None, device: str | None, show: Show) -> DemoReport:
    """Draw or take images, extract, pack, train, evaluate, compare, and draw the picture.

    Args:
        out: everything is written here; what an earlier demo finished is kept.
        home: PROTEUS_HOME, for downloaded weights.
        images: the user's photographs; None draws scenes for the teacher `demo`.
        device: `cpu` or `cuda`; None takes the best.
        show: told what goes on.

    Raises:
        UsageError: `out` holds a demo of other images.
        WeightsError: the teacher for photographs is out of reach; says how to get it.
        ProteusCacheError: as the commands that it stands for.
    """
    seconds: dict[str, float] = {}
    storage.make_folder(out)
    with _timed(seconds, "images"):
        source = _drawn(out, show) if images is None else _own(images, home)
    config = TrainConfig(**RECIPE, data=out / "pack", out=out / "run", device=device)  # type: ignore[arg-type]
    with _timed(seconds, "extract"):
        _extract(source, out, home, device, show)
    with _timed(seconds, "pack"):
        _pack(out, show)
    with _timed(seconds, "train"):
        _train(config, out, show)
    report = None
    with _timed(seconds, "eval"):
        if source.labelled is not None:
            report = _evaluate(source, out, home, device, show)
    with _timed(seconds, "compare"):
        pack = open_pack(out / "pack")
        teacher = load_teacher(source.teacher, weights=None, home=home, size_px=pack.side_px)
        show.say("comparing a step from the cache with a step with the teacher in it")
        speed = compare_steps(config, teacher)
    accuracies = _accuracies(report) if report is not None else {}
    with _timed(seconds, "picture"):
        _picture(source, config, out, home, accuracies)
    result = DemoReport(
        out=out,
        teacher=source.teacher,
        student=config.student,
        n_views=len(pack),
        accuracies=accuracies,
        share_of_gain=_share_of_gain(accuracies),
        speed=speed,
        seconds=seconds,
        notes=(*source.notes, *(report.notes if report is not None else ())),
        **_bytes(pack),
    )
    _write_report(result)
    return result


def _drawn(out: Path, show: Show) -> _Source:
    """Scenes for the teacher that comes with the package."""
    n_train, n_test = (len(CLASSES) * count for count in (TRAIN_IMAGES_A_CLASS, TEST_IMAGES_A_CLASS))
    show.say(f"drawing {n_train:,} images to learn from and {n_test:,} to test with, {len(CLASSES)} classes")
    images = out / "images"
    with show.progress("draw", "images") as update:
        for part, count, seed, before in (
            ("train", TRAIN_IMAGES_A_CLASS, TRAIN_SEED, 0),
            ("test", TEST_IMAGES_A_CLASS, TEST_SEED, n_train),
        ):
            write_scenes(
                images / part,
                per_class=count,
                seed=seed,
                progress=lambda done, _, before=before: update(before + done, n_train + n_test, 0),  # type: ignore[misc]
            )
    return _Source(teacher="demo", train=images / "train", labelled=images, options={})


def _own(images: Path, home: Path) -> _Source:
    """The user's photographs, for a teacher that knows photographs."""
    train_part = images / "train"
    folder = train_part if train_part.is_dir() else images
    listing = list_images(folder)
    try:
        load_teacher(OWN_TEACHER, weights=None, home=home, size_px=OWN_SIZE_PX)
    except WeightsError as error:
        raise WeightsError(
            f"{images}: photographs need the teacher {OWN_TEACHER} (88 MB), and its weights cannot be had: {error}"
        ) from error
    notes = []
    if listing.classes is None:
        notes.append("the photographs are not in class folders, so nothing was scored")
    elif folder is images:
        notes.append(
            "a fifth of the photographs was asked for its class; the student saw their views, not their labels"
        )
    if len(listing.table) > OWN_IMAGES:
        notes.append(f"{OWN_IMAGES:,} of the {len(listing.table):,} photographs were extracted, mixed over classes")
    return _Source(
        teacher=OWN_TEACHER,
        train=folder,
        labelled=images if listing.classes is not None else None,
        options={"size_px": OWN_SIZE_PX, "limit": min(OWN_IMAGES, len(listing.table))},
        notes=tuple(notes),
    )


def _extract(source: _Source, out: Path, home: Path, device: str | None, show: Show) -> None:
    options = {"size": source.options.get("size_px"), "limit": source.options.get("limit")}
    flags = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    _say_command(show, "extract", "--teacher", source.teacher, "--images", source.train, "--out", out / "cache", *flags)
    config = ExtractConfig(
        images=source.train,
        out=out / "cache",
        home=home,
        teacher=source.teacher,
        views=VIEWS,
        device=device,
        **source.options,
    )
    planned = plan_cache(config, processes=1)
    describe_plan(config, planned, 1).check()
    with show.progress("extract", "views") as update:
        extract(config, planned, Worker(0, 1), lambda at: update(at.views_done, at.views_all, at.bytes_written))


def _pack(out: Path, show: Show) -> None:
    _say_command(show, "pack", out / "cache", "--out", out / "pack")
    plan = plan_pack(out / "cache", out / "pack")
    workers = workers_that_fit(plan, None)
    plan.check(workers)
    with show.progress("pack", "units") as update:
        run_pack(plan, workers=workers, progress=update)


def _train(config: TrainConfig, out: Path, show: Show) -> None:
    recipe = out / "train.yaml"
    settings = {**RECIPE, "data": str(config.data), "out": str(config.out)}
    storage.write_whole(recipe, lambda: yaml.safe_dump(settings, sort_keys=False).encode())
    _say_command(show, "train", "--config", recipe)
    with show.progress("train", "steps") as update:
        done = train(config, resume=True, replace=True, progress=lambda at: update(at.step, at.n_steps, 0))
    if done.stopped_by is not None:
        raise KeyboardInterrupt


def _evaluate(source: _Source, out: Path, home: Path, device: str | None, show: Show) -> EvalReport:
    assert source.labelled is not None
    _say_command(show, "eval", out / "run", "--images", source.labelled, "--teacher", source.teacher)
    with show.progress("eval", "images") as update:
        return evaluate(
            out / "run",
            source.labelled,
            teacher=source.teacher,
            home=home,
            device=device,
            progress=lambda done, total: update(done, total, 0),
        )


def _accuracies(report: EvalReport) -> dict[str, float]:
    """Top-1 at `K` neighbours of teacher, student and untrained student; empty when nothing could be scored."""
    by_model = {
        model.model: score.top1
        for model in report.models
        for score in model.scores
        if isinstance(score, KnnScore) and score.k == K
    }
    chosen = {name: by_model[name] for name in (TEACHER_MODEL, STUDENT_MODEL, UNTRAINED_MODEL)}
    return {name: share for name, share in chosen.items() if share is not None}


def _share_of_gain(accuracies: dict[str, float]) -> float | None:
    if not accuracies:
        return None
    gain = accuracies[TEACHER_MODEL] - accuracies[UNTRAINED_MODEL]
    return (accuracies[STUDENT_MODEL] - accuracies[UNTRAINED_MODEL]) / gain if gain > 0 else None


def _bytes(pack: Pack) -> dict[str, int]:
    n_samples = sum(tar.n_samples for view in pack.views for tar in pack.document.packed[view].tars)
    n_bytes = sum(tar.size for view in pack.views for tar in pack.document.packed[view].tars)
    n_values = sum(math.prod(target.shape) for target in pack.targets)
    return {
        "code_bytes": pack.code_bytes,
        "pixel_bytes": round(n_bytes / n_samples) - pack.code_bytes,
        "float16_bytes": 2 * n_values,
    }


def _picture(source: _Source, config: TrainConfig, out: Path, home: Path, accuracies: dict[str, float]) -> None:
    models = load_run(config.out, home)
    teacher = load_teacher(source.teacher, weights=None, home=home, size_px=models.size_px)
    folder = out / "images" / "test" if source.teacher == "demo" else source.train
    shown = _shown_images(folder)
    features = dense_features(models, config.out, teacher, shown, config.seed)
    colours = principal_colours(features[TEACHER_MODEL])
    share = _share_of_gain(accuracies)
    went = f", {share:.0%} of the way from untrained to its teacher" if share is not None else ""
    picture = Picture(
        title=f"{config.student} after a short training from cached targets{went}",
        metrics=config.out / METRICS,
        accuracies=accuracies,
        images=[shown_pixels(path, teacher) for path in shown],
        maps={name: colours(features[name]) for name in (TEACHER_MODEL, STUDENT_MODEL, UNTRAINED_MODEL)},
        margin=teacher.identity.patch_px / 2 / (teacher.identity.size_px + teacher.identity.patch_px),
    )
    draw_picture(picture, out / "demo.png")


def _shown_images(folder: Path) -> list[Path]:
    """Images of different classes, as far as there are so many, in a fixed order."""
    listing = list_images(folder)
    paths, labels = listing.table["path"].to_pylist(), listing.table["label"].to_pylist()
    by_class: dict[int | None, list[str]] = {}
    for path, label in zip(paths, labels, strict=True):
        by_class.setdefault(label, []).append(path)
    in_turn = [path for group in zip_longest(*by_class.values()) for path in group if path is not None]
    return [listing.root / path for path in in_turn[:N_SHOWN]]


def _write_report(report: DemoReport) -> None:
    text = json.dumps(report.to_json(), indent=1, sort_keys=True, allow_nan=False)
    storage.write_whole(report.out / "demo.json", lambda: (text + "\n").encode())


def _say_command(show: Show, *parts: str | Path) -> None:
    show.say(f"$ proteus-cache {shlex.join(map(str, parts))}")


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - began, 2)
