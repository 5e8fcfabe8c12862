"""The codecs that are fitted, as a user meets them: extract, info, pack, and goals that nothing reaches."""

import json
from pathlib import Path

import pytest

from tests.cli.running import extract_arguments, run
from tests.makers import make_images, make_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a teacher, and caches of them: `cache` in half precision, `klt` at 20 dB."""
    folder = tmp_path_factory.mktemp("codecs")
    make_images(folder / "images", 24)
    make_teacher(folder / "teacher.safetensors")
    run(*extract_arguments(folder), "--codec", "float16")
    run(*extract_arguments(folder), "--codec", "klt:20dB", "--out", folder / "klt")
    return folder


def test_info_says_what_was_fitted(folder: Path) -> None:
    shown = run("info", folder / "klt").stdout
    summary = json.loads(run("info", folder / "klt", "--json").stdout)

    fitted = summary["targets"]["patch"]["fitted"]
    assert f"fitted    patch: {fitted['snr_db']:.1f} dB at {fitted['bits_per_value']:.2f} bits a value" in shown
    assert "from 24 views" in shown
    assert abs(fitted["snr_db"] - 20) < 0.3
    assert summary["targets"]["cls"]["fitted"] is None


def test_fewer_views_than_should_be_are_said_in_one_line_even_when_quiet(folder: Path, tmp_path: Path) -> None:
    outcome = run(*extract_arguments(folder), "--codec", "int4", "--out", tmp_path / "int4", "--plan-only", "--quiet")

    (line,) = outcome.stderr.splitlines()
    assert line.startswith("proteus-cache: codec int4 is fitted to 24 views with ")


def test_pack_says_what_its_codec_adds(folder: Path, tmp_path: Path) -> None:
    outcome = run("pack", folder / "cache", "--out", tmp_path / "pack", "--codec", "klt:20db")
    report = json.loads(run("pack", folder / "cache", "--out", tmp_path / "other", "--codec", "int4", "--json").stdout)
    shown = run("info", tmp_path / "pack").stdout

    assert "recoded   patch from float16 to klt:20dB: 768 B to" in outcome.stdout
    assert "dB of what the cache holds, on 2 other views; the error of float16 comes on top" in outcome.stdout
    assert [(step["target"], step["source"], step["codec"]) for step in report["steps"]] == [
        ("patch", "float16", "int4")
    ]
    assert report["steps"][0]["added_db"] > 15
    assert "fitted    patch: " in shown


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("extract --codec klt:90dB", "target patch: codec klt:90dB: "),
        ("extract --codec klt:9KB", "the largest is klt:0.3"),
        ("extract --codec klt", "klt needs a goal: klt:20dB"),
        ("extract --codec int4 --calibration-images 0", "--calibration-images must be a whole number of at least 1"),
        ("pack {cache} --codec klt:90dB", "target patch: codec klt:90dB: "),
        ("pack {klt} --codec int8", "target patch is stored as klt:20dB, and int8 cannot bring back"),
        ("plan --teacher demo --codec klt:90dB", "the nearest is klt:43dB"),
    ],
)
def test_what_cannot_be_had_is_one_line_and_leaves_nothing(
    command: str, message: str, folder: Path, tmp_path: Path
) -> None:
    name, *words = command.format(cache=folder / "cache", klt=folder / "klt").split()
    extracts = extract_arguments(folder) if name == "extract" else [name]

    outcome = run(*extracts, *words, "--out", tmp_path / "new", code=2)

    (line,) = outcome.stderr.splitlines()
    assert line.startswith("proteus-cache: ")
    assert message in line
    assert not (tmp_path / "new").exists()


def test_plan_knows_sizes_without_a_teacher_and_says_where_it_does_not(tmp_path: Path) -> None:
    by_size = run("plan", "--codec", "klt:64KB", "--out", tmp_path, "--gpu-kind", "a100").stdout
    by_ratio = run("plan", "--codec", "klt:20dB", "--out", tmp_path, "--gpu-kind", "a100").stdout
    values = json.loads(run("plan", "--codec", "klt:20dB", "--out", tmp_path, "--gpu-kind", "a100", "--json").stdout)

    assert "67.1 KB codes" in by_size  # and CLS in half precision
    assert "at most" not in by_size
    assert "at most 237 KB: 199 KB codes" in by_ratio
    assert "known once extract has fitted" in " ".join(by_ratio.split())
    assert values["cache"]["targets"]["patch"]["code_bytes_at_most"] is True
    assert values["cache"]["targets"]["cls"]["code_bytes_at_most"] is False
