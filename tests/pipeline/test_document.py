"""What stands in a file, and what is said of one that is wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from proteus_cache.errors import ConfigError, UsageError
from proteus_cache.pipeline.document import read_pipeline
from proteus_cache.pipeline.dry_run import plan_pipeline
from tests.pipeline.makers import small, write


def _changed(path: tuple[str, ...], value: object) -> dict[str, Any]:
    """The small pipeline with one value set; None removes it."""
    document = copy.deepcopy(small())
    place: dict[str, Any] = document
    for key in path[:-1]:
        place = place.setdefault(key, {})
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return document


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    pipeline = read_pipeline(write(tmp_path / "p.yaml", small()))

    assert pipeline.extract["c"].views == 2
    assert pipeline.extract["c"].targets is None
    assert pipeline.train["r"].pack == "c-float16"
    assert pipeline.train["r"].settings["max_steps"] == 6
    assert pipeline.eval["knn"].run is None


def test_a_pack_cannot_bring_back_what_its_cache_has_left_out(tmp_path: Path) -> None:
    document = _changed(("extract", "c", "codec"), "klt:20dB")
    document["pack"]["c-float16"]["codec"] = "klt:20db"  # the same

    plan_pipeline(write(tmp_path / "p.yaml", document), tmp_path / "home")
    document["pack"]["c-float16"]["codec"] = "float16"
    with pytest.raises(UsageError, match="pack.c-float16: the cache c is extracted as klt:20dB, and float16 cannot"):
        plan_pipeline(write(tmp_path / "p.yaml", document), tmp_path / "home")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("extrct",), {}, "unknown key 'extrct'; did you mean extract?"),
        (("extract", "c", "view"), 3, r"extract.c: unknown key 'view'; did you mean views"),
        (("extract", "c", "batch-size"), 3, "extract.c: unknown key 'batch-size'; did you mean batch_size?"),
        (("pack", "c-float16", "codecs"), "int8", "pack.c-float16: unknown key 'codecs'; did you mean codec?"),
        (("train", "r", "epoch"), 3, "train.r: unknown key 'epoch'; did you mean epochs?"),
        (("train", "r", "pak"), "x", "train.r: unknown key 'pak'; did you mean pack"),
        (("train", "r", "out"), "x", "train.r: out is not set here: the run's name says it"),
        (("eval", "knn", "protocl"), "knn", "eval.knn: unknown key 'protocl'; did you mean protocol?"),
        (("draw", "scenes/train", "per_clas"), 3, "draw.scenes/train: unknown key 'per_clas'; did you mean per_class?"),
        (("plan", "gpu"), 3, "plan: unknown key 'gpu'; did you mean gpus"),
        (("extract", "c", "views"), "four", "extract.c.views must be a whole number, got 'four'"),
        (("extract", "c", "views"), True, "extract.c.views must be a whole number, got True"),
        (("extract", "c", "views"), 0, "extract.c: --views must be a whole number of at least 1, got 0"),
        (("extract", "c"), "demo", "extract.c must be `name: value` lines, got 'demo'"),
        (("extract", "c", "teacher"), None, "extract.c.teacher is missing"),
        (
            ("extract", "c", "teacher"),
            "dinov2_vitg",
            "extract.c: unknown teacher 'dinov2_vitg'; did you mean dinov2_vitg14",
        ),
        (("extract", "c", "codec"), "int9", "extract.c: .*int8"),
        (("extract", "c", "codec"), "klt", "extract.c: .*klt needs a goal"),
        (("extract", "c", "calibration_images"), 0, "extract.c: --calibration-images must be .* at least 1, got 0"),
        (("extract", "c", "targets"), [], r"extract.c.targets must be a list of names, got \[\]"),
        (("extract", "c", "targets"), "cls,patch,block.99", "extract.c: .*block.99"),
        (("extract", "c", "size"), 85, "extract.c: .*85"),
        (("pack", "c-float16", "cache"), "d", "pack.c-float16.cache: unknown cache 'd'; choose c"),
        (("pack", "c-float16", "views"), 3, "pack.c-float16: 3 views of c, which has 2; raise its `views`"),
        (("pack", "c-float16", "views"), 0, "pack.c-float16.views must be a whole number of at least 1, or a list"),
        (("pack", "c-float16", "targets"), "block.3", "pack.c-float16: the cache c does not keep 'block.3'"),
        (("pack", "c-float16", "targets"), "cls", "train.r: its losses need patch, and the pack c-float16 holds cls"),
        (("pack", "c-float16", "move"), "yes", "pack.c-float16.move must be true or false, got 'yes'"),
        (("train", "r", "pack"), "c-float", "train.r.pack: unknown pack 'c-float'; did you mean c-float16?"),
        (("train", "r", "pack"), None, "train.r: needs `pack`, the pack to train from, or `live: true`"),
        (("train", "r", "student"), "vit_s", "train.r: unknown student 'vit_s'; did you mean vit_s14"),
        (("train", "r", "student"), None, "train.r: student is not set"),
        (("train", "r", "lr"), "fast", "train.r: lr must be a number, got 'fast'"),
        (("train", "r", "batch_size"), 64, "train.r: an epoch of 12 images is smaller than a batch of 64"),
        (("train", "r", "mask_ratio"), 0.001, "train.r: mask_ratio 0.001 hides none of the 36 patches"),
        (("train", "r", "gpus"), 0, "train.r.gpus must be at least 1, got 0"),
        (("train", "r", "gpus"), 8, "train.r: a batch of 4 cannot be shared by 8 processes"),
        (("eval", "knn", "run"), "q", "eval.knn.run: unknown run 'q'; choose r"),
        (("eval", "knn", "protocol"), "kn", "eval.knn: unknown protocol 'kn'; did you mean knn?"),
        (("eval", "knn", "weights"), "x.pth", "eval.knn: `weights` are those of a teacher"),
        (("plan", "gpu_kind"), "a10", "plan.gpu_kind: unknown kind of GPU 'a10'; did you mean a100?"),
        (("version",), 2, "version must be 1, got 2"),
        (("version",), None, r"version is missing \(the only version is 1\)"),
        (("train", "a/b"), {"pack": "c-float16"}, "train: 'a/b' is no name of a folder"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, path: tuple[str, ...], value: object, message: str) -> None:
    file = write(tmp_path / "p.yaml", _changed(path, value))

    with pytest.raises(UsageError, match=message) as caught:
        plan_pipeline(file, tmp_path / "home")

    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\n", "has no stage; the sections are draw, extract, pack, train, eval"),
        ("- a\n", "a pipeline is a list of `name: value` lines"),
        ("", "a pipeline is a list of `name: value` lines"),
        ("version: [1\n", "not valid YAML"),
        ("version: 1\nversion: 1\n", "line 2: the key 'version' stands there twice"),
        ("version: 1\nextract: &a {}\npack: *a\n", "YAML aliases are not accepted"),
        ("version: 1\nextract: {1: {teacher: demo}}\n", "extract.1 must be a text, got 1"),
        ("version: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("\x00\n", "not valid YAML"),
        ("version: 1\n? [a]\n: 1\n", "not valid YAML"),
        ("version: " + "[" * 5000, "not valid YAML"),
    ],
)
def test_what_is_no_pipeline_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(text)

    with pytest.raises(ConfigError, match=message):
        read_pipeline(tmp_path / "p.yaml")


def test_a_file_that_is_not_there_or_is_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml: no such file; give the YAML file of a pipeline"):
        read_pipeline(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="is a folder; give the YAML file of a pipeline"):
        read_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"live": True, "teacher": "demo"}, "fresh views of images"),
        ({"live": True, "images": "scenes/train"}, "teacher"),
        ({"teacher": "demo", "pack": "c-float16"}, "the run is not live"),
        ({"live": True, "teacher": "dinov2_vits14", "pack": "c-float16"}, "a replay needs the teacher of its pack"),
        ({"pack": "c-float16", "repeats": 3}, "repeats 3 shows as many different views"),
    ],
)
def test_a_live_run_needs_a_teacher_and_views(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    document = small()
    document["train"]["r"] = {"student": "vit_demo", "batch_size": 4} | settings

    with pytest.raises(UsageError, match=f"train.r: .*{message}"):
        plan_pipeline(write(tmp_path / "p.yaml", document), tmp_path)


def test_two_stages_must_not_write_to_one_place(tmp_path: Path) -> None:
    document = small()
    document["train"]["r.yaml"] = dict(document["train"]["r"])

    with pytest.raises(ConfigError, match=r"train r and train r.yaml would both write .*runs/r.yaml; rename one"):
        plan_pipeline(write(tmp_path / "p.yaml", document), tmp_path)


def test_only_the_last_pack_of_a_cache_may_move_it(tmp_path: Path) -> None:
    document = small()
    document["pack"] = {"first": {"cache": "c", "move": True}, "c-float16": {"cache": "c"}}

    with pytest.raises(ConfigError, match=r"pack.c-float16: pack.first has moved the units of c away by then"):
        plan_pipeline(write(tmp_path / "p.yaml", document), tmp_path)

    document["pack"] = {"c-float16": {"cache": "c"}, "last": {"cache": "c", "move": True}}
    plan = plan_pipeline(write(tmp_path / "p.yaml", document), tmp_path)
    assert [stage.title for stage in plan.stages][3:5] == ["pack c-float16", "pack last"]
