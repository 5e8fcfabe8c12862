"""What a plan looks like: every line within 80 columns, every rate with its source."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from proteus_cache.plan import whole
from proteus_cache.plan.config import PlanConfig
from proteus_cache.plan.measure import CPU, Measured
from proteus_cache.plan.rates import GPUS, Rate
from proteus_cache.plan.report import next_step, plan_json, plan_lines
from proteus_cache.plan.whole import WholePlan, make_plan
from tests.makers import make_images


def planned(folder: Path, **settings: Any) -> WholePlan:  # fields of the config
    asked: dict[str, Any] = {"out": Path("proteus/caches/x"), "home": folder, "gpu_kind": "a100", "gpus": 8}
    return make_plan(PlanConfig(**(asked | settings)), lambda what: None)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"gpu_kind": "h200", "gpus": 1, "codec": "float16", "n_images": 100_000_000, "views": 100},
    {"gpu_kind": "rtx3090", "size_px": 518, "teacher": "dinov2_vitl14_reg"},
    {"gpu_kind": "h100", "targets": ("cls", "patch", "block.9", "block.19", "block.29.raw")},
    {"teacher": "timm:vit_large_patch14_clip_224", "targets": ("cls",)},
    {"teacher": "demo", "n_images": 2000},
    {"n_images": 500, "students": ("vit_s14", "vit_l14")},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_lines_fit_80_columns_and_every_mark_is_explained_once(settings: dict[str, Any], tmp_path: Path) -> None:
    lines = plan_lines(planned(tmp_path, **settings))

    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert not any(line != line.rstrip() for line in lines)
    text = "\n".join(lines)
    explained = re.findall(r"^\[(\d+)\] ", text, re.MULTILINE)
    used = set(re.findall(r"\[(\d+)\]", text))
    assert explained == [str(number) for number in range(1, len(explained) + 1)]
    assert used == set(explained)


def test_the_plan_for_eight_a100s_says_all_that_it_should(tmp_path: Path) -> None:
    text = "\n".join(plan_lines(planned(tmp_path)))

    for part in (
        "1,281,167 images x 4 + a probe of 4,096; 13 of 1,252 shards held out",
        "397 KB codes, 37.6 KB pixels (typical",
        "2.23 TB in 20,067 files",
        "46 min (6.1 GPU-hours) at 1,854 views/s [1]",
        "vit_ti14    16,048  6.98 GB/s",
        "together",
        "[1] published by NVIDIA (NeMo): ViT-g/14 trains at 86.6 views/s a GPU",
    ):
        assert part in text


def test_columns_stand_under_their_names(tmp_path: Path) -> None:
    lines = plan_lines(planned(tmp_path))
    top = next(n for n, line in enumerate(lines) if line.startswith("student "))

    for name in ("views/s", "reads", "cores", "cached", "live", "gain", "break-even"):
        end = lines[top].index(name) + len(name)
        for row in lines[top + 1 : top + 5]:
            assert row[end - 1] != " ", (name, row)
            assert row[end : end + 1] in ("", " "), (name, row)


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_json_holds_no_infinity_and_the_same_numbers(settings: dict[str, Any], tmp_path: Path) -> None:
    plan = planned(tmp_path, **settings)

    value = json.loads(json.dumps(plan_json(plan), allow_nan=False))

    assert value["cache"]["bytes"] == plan.cache.size.bytes
    assert value["extraction"]["seconds"] == plan.extraction_s
    assert [student["student"] for student in value["students"]] == [each.student for each in plan.students]
    assert all(student["source"] for student in value["students"])
    assert value["gpu"]["kind"] in GPUS


def test_what_fits_beside_what_is_said(tmp_path: Path) -> None:
    plan = planned(tmp_path)

    def verdict(free_bytes: float) -> str:
        from dataclasses import replace

        from proteus_cache.storage import Free

        cache = replace(plan.cache, free=Free(int(free_bytes), None))
        changed = replace(plan, cache=cache)
        return " ".join(" ".join(plan_lines(changed)).split()).partition("free ")[2].partition("machine")[0]

    assert "cache and pack fit" in verdict(5e12)
    assert "the cache fits, a pack beside it does not: use pack --move" in verdict(3e12)
    assert "does not fit; --views 3 fits" in verdict(2e12)
    assert "--views 1 --n-images" in verdict(1e11)


def test_the_next_step_is_the_extraction_with_what_was_asked_for(tmp_path: Path) -> None:
    make_images(tmp_path / "images", 4)

    fitting = planned(
        tmp_path, out=tmp_path / "my cache", images=tmp_path / "images", views=2, codec="float16", n_images=100
    )
    default = planned(tmp_path, n_images=100, is_out_given=False)

    assert next_step(fitting) == (
        f"proteus-cache extract --teacher dinov2_vitg14 --images {tmp_path}/images --limit 100 --views 2 "
        f"--codec float16 --out '{tmp_path}/my cache'"
    )
    assert next_step(default) == "proteus-cache extract --teacher dinov2_vitg14 --limit 100"
    assert next_step(planned(tmp_path, n_images=10**7)) is None


def test_a_measured_cpu_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Measured(
        device=CPU,
        teacher=Rate(views_per_s=2.0, source="measured here, batch 16"),
        students={"vit_ti14": Rate(views_per_s=4.0, source="measured here, batch 2")},
        renders_per_s=170.0,
        n_renderers=2,
        disk_bytes_per_s=5e8,
    )
    monkeypatch.setattr(whole, "measure", lambda task, say: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    plan = planned(tmp_path, gpu_kind=None, gpus=None, measure=True, n_images=5000, students=("vit_ti14",))

    text = "\n".join(plan_lines(plan))
    assert "machine   the CPU here (measured here)" in text
    assert "decided by the teacher: here 170 views/s are rendered by 2 processes" in text
    assert "GPU" not in text
    assert plan_json(plan)["measured"]["renders_per_s"] == 170


def test_the_documentation_shows_what_is_printed(tmp_path: Path) -> None:
    from dataclasses import replace

    from proteus_cache.storage import Free

    page = (Path(__file__).parents[2] / "docs" / "costs.md").read_text()
    shown = next(block for block in page.split("```") if block.startswith("text\nteacher"))
    plan = planned(tmp_path, out=Path("/data/proteus/caches/dinov2_vitg14"))
    plan = replace(plan, cache=replace(plan.cache, free=Free(6_900_000_000_000, None)))

    assert shown.removeprefix("text\n").splitlines() == [*plan_lines(plan), f"next: {next_step(plan)}"]
