"""Every file in pipelines/ is right as far as that can be seen without images, weights and a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from proteus_cache.pipeline.dry_run import plan_pipeline
from proteus_cache.pipeline.stages import Stage
from proteus_cache.plan import human_bytes, human_time

FOLDER = Path(__file__).parents[2] / "pipelines"
FILES = sorted(FOLDER.glob("*.yaml"))
_PUBLISHED = {
    # Students of the paper with their teachers, and batch and peak rate by the released rule.
    "proteus-s-ti": ("dinov2_vits14", "vit_ti14", 1024, 1e-3),
    "proteus-b-s": ("dinov2_vitb14", "vit_s14", 1024, 1e-3),
    "proteus-l-b": ("dinov2_vitl14", "vit_b14", 1024, 1e-3),
    "proteus-g-l": ("dinov2_vitg14", "vit_l14", 256, 2.5e-4),
}


def _stages(name: str, kind: str) -> dict[str, Stage]:
    plan = plan_pipeline(FOLDER / f"{name}.yaml", Path("home"))
    return {stage.name: stage for stage in plan.stages if stage.kind == kind}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.stem))
def test_every_file_passes_a_dry_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    plan = plan_pipeline(file, tmp_path / "home")

    assert list(tmp_path.iterdir()) == []
    trained = [known for stage, known in zip(plan.stages, plan.numbers, strict=True) if stage.kind == "train"]
    assert trained
    assert all(known.values["steps"] > 0 for known in trained)
    assert max(map(len, file.read_text().splitlines())) <= 120


@pytest.mark.parametrize("name", _PUBLISHED)
def test_the_published_pairs_have_the_published_settings(name: str) -> None:
    teacher, student, batch, lr = _PUBLISHED[name]

    (run,) = _stages(name, "train").values()
    (cache,) = _stages(name, "extract").values()

    assert cache.extraction is not None
    assert run.training is not None
    assert cache.extraction.teacher == teacher
    assert (run.training.student, run.training.global_batch, run.training.peak_lr) == (student, batch, lr)
    assert run.training.peak_lr == 5e-4 * batch / 512
    assert (run.training.epochs, run.training.weight_decay, run.training.ema_decay) == (300, 0.05, 0.99996)
    assert run.training.targets == ("cls", "patch")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.stem))
def test_the_docs_have_its_costs(file: Path) -> None:
    page = (FOLDER.parent / "docs" / "pipelines.md").read_text()

    plan = plan_pipeline(file, Path("home"))

    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{file.name}` ")]
    cells = [cell.strip() for cell in row.split("|")]
    known = list(zip(plan.stages, plan.numbers, strict=True))
    stored = {
        kind: human_bytes(sum(numbers.stored_bytes for stage, numbers in known if stage.kind == kind))
        for kind in ("extract", "pack")
    }
    seconds = [numbers.seconds for stage, numbers in known if stage.kind == "train" and numbers.seconds is not None]
    assert cells[3:5] == [stored["extract"], stored["pack"]]
    assert cells[5] == (human_time(sum(seconds)) if seconds else "two cores, below")


def test_one_cache_serves_all_four_students_and_is_that_of_the_pair() -> None:
    everyone, pair = _stages("proteus-g-all", "extract"), _stages("proteus-g-l", "extract")
    runs, run = _stages("proteus-g-all", "train"), _stages("proteus-g-l", "train")

    assert [stage.arguments for stage in everyone.values()] == [stage.arguments for stage in pair.values()]
    assert runs["g-l"].config == run["g-l"].config
    students = [stage.training.student for stage in runs.values() if stage.training is not None]
    assert students == ["vit_ti14", "vit_s14", "vit_b14", "vit_l14"]
    assert "UNPUBLISHED" in (FOLDER / "proteus-g-all.yaml").read_text()


def test_the_study_compares_views_and_codecs_on_one_cache() -> None:
    codecs = {"float16": "float16", "int8": "int8", "int4": "int4", "klt20": "klt:20dB"}
    parts = [_stages(f"imagenet100-{name}", "extract") for name in codecs]
    runs = {name: stage for part in codecs for name, stage in _stages(f"imagenet100-{part}", "train").items()}
    packs = {name: stage for part in codecs for name, stage in _stages(f"imagenet100-{part}", "pack").items()}

    assert len({stage.arguments for part in parts for stage in part.values()}) == 1
    wanted = {f"imagenet100-v{views}-{name}": codec for views in (1, 4, 16) for name, codec in codecs.items()}
    assert set(runs) == {*wanted, "imagenet100-fresh"}
    assert {name: stage.arguments[-1] for name, stage in packs.items()} == wanted
    recipes = [
        {key: value for key, value in stage.training.identity().items() if key not in _SOURCES}
        for stage in runs.values()
        if stage.training is not None
    ]
    assert all(recipe == recipes[0] for recipe in recipes)


_SOURCES = ("live", "teacher", "weights", "images", "replay")
"""What tells a run with a live teacher from one with a cache."""
