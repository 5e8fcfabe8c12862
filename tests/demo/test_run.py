from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from proteus_cache.cache.reader import open_cache
from proteus_cache.cli.app import app
from proteus_cache.demo.run import DemoReport, run_demo
from proteus_cache.errors import UsageError, WeightsError
from proteus_cache.pack.reader import open_pack
from proteus_cache.teachers.dinov2_models import Dinov2Architecture, official_path
from tests.makers import make_images

pytestmark = pytest.mark.usefixtures("small_demo")


class _Shown:
    """Keeps what a demo tells."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.last: dict[str, tuple[float, float]] = {}

    def say(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def progress(self, label: str, unit: str) -> Iterator[Callable[[float, float, int], None]]:
        def update(done: float, total: float, n_bytes: int) -> None:
            self.last[label] = (done, total)

        yield update


def _run(out: Path, images: Path | None = None) -> tuple[DemoReport, _Shown]:
    shown = _Shown()
    return run_demo(out, home=out.parent / "home", images=images, device="cpu", show=shown), shown


def test_the_whole_way_on_images_drawn_here(tmp_path: Path) -> None:
    out = tmp_path / "demo"

    report, shown = _run(out)

    assert report.n_views == len(open_pack(out / "pack")) == 5 * 6 * 4
    assert open_cache(out / "cache").manifest.teacher.name == "demo"
    assert set(report.accuracies) == {"teacher", "student", "untrained"}
    pack = open_pack(out / "pack")
    assert report.code_bytes == pack.code_bytes
    tokens = (pack.side_px // 14) ** 2 + 1
    assert report.float16_bytes == tokens * 128 * 2
    sizes = sum(tar.stat().st_size for tar in (out / "pack").rglob("*.tar"))
    assert report.n_views * (report.code_bytes + report.pixel_bytes) == pytest.approx(sizes, rel=0.01)
    assert report.speed.lowest_ratio <= report.speed.ratio <= report.speed.highest_ratio
    assert all(math.isfinite(value) for value in report.seconds.values())
    assert json.loads((out / "demo.json").read_text()) == json.loads(json.dumps(report.to_json()))
    with Image.open(out / "demo.png") as picture:
        assert picture.width > 1500
    assert all(done == total for done, total in shown.last.values())
    assert set(shown.last) == {"draw", "extract", "pack", "train", "eval"}


def test_a_second_start_keeps_what_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    first, _ = _run(out)
    kept = [*(out / "cache").rglob("*.tar"), *(out / "pack").rglob("*.tar"), *(out / "images").rglob("*.jpg")]
    student = (out / "run" / "student.safetensors").read_bytes()
    before = [path.stat().st_mtime_ns for path in kept]

    second, _ = _run(out)

    assert [path.stat().st_mtime_ns for path in kept] == before
    assert (out / "run" / "student.safetensors").read_bytes() == student
    assert second.accuracies == first.accuracies


def test_the_commands_it_names_find_nothing_left_to_do(tmp_path: Path) -> None:
    """What the demo says that it does is what these commands would do."""
    _, shown = _run(tmp_path / "demo")
    commands = [shlex.split(line.removeprefix("$ proteus-cache ")) for line in shown.lines if line.startswith("$")]
    assert [command[0] for command in commands] == ["extract", "pack", "train", "eval"]

    for command in commands:
        extra = ["--resume"] if command[0] == "train" else []
        result = CliRunner().invoke(app, [*command, *extra])
        assert result.exit_code == 0, result.output
        if command[0] == "extract":
            assert "nothing" in result.output


def test_share_of_gain_is_the_way_from_untrained_to_teacher() -> None:
    from proteus_cache.demo.run import _share_of_gain

    assert _share_of_gain({"teacher": 0.9, "student": 0.8, "untrained": 0.4}) == pytest.approx(0.8)
    assert _share_of_gain({"teacher": 0.4, "student": 0.8, "untrained": 0.4}) is None
    assert _share_of_gain({}) is None


@pytest.mark.parametrize("in_folders", [True, False])
def test_photographs_take_the_teacher_for_photographs(
    tmp_path: Path, tiny_dinov2: Dinov2Architecture, official_state: dict[str, Tensor], in_folders: bool
) -> None:
    weights = official_path("dinov2_vits14", tmp_path / "home")
    weights.parent.mkdir(parents=True)
    save_file(official_state, weights)
    images = make_images(tmp_path / "photographs", 12)
    if not in_folders:
        for path in sorted(images.rglob("*.JPEG")):
            path.rename(images / path.name)
        for folder in images.iterdir():
            if folder.is_dir():
                folder.rmdir()

    report, _ = _run(tmp_path / "demo", images)

    assert report.teacher == "dinov2_vits14"
    assert report.n_views == 12 * 4
    assert bool(report.accuracies) == in_folders
    assert any(("fifth" if in_folders else "nothing was scored") in note for note in report.notes)
    assert (tmp_path / "demo" / "demo.png").is_file()


def test_photographs_without_weights_say_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise WeightsError("dinov2_vits14: no network")

    monkeypatch.setattr("proteus_cache.teachers.dinov2.download", offline)
    images = make_images(tmp_path / "photographs", 3)

    with pytest.raises(WeightsError, match=r"photographs need the teacher dinov2_vits14.*no network"):
        _run(tmp_path / "demo", images)

    assert not (tmp_path / "demo" / "cache").exists()


def test_a_folder_of_another_demo_is_refused(
    tmp_path: Path, tiny_dinov2: Dinov2Architecture, official_state: dict[str, Tensor]
) -> None:
    _run(tmp_path / "demo")
    weights = official_path("dinov2_vits14", tmp_path / "home")
    weights.parent.mkdir(parents=True)
    save_file(official_state, weights)

    with pytest.raises(UsageError, match="demo"):
        _run(tmp_path / "demo", make_images(tmp_path / "photographs", 3))
