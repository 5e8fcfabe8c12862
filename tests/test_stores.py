"""What a folder is, in words."""

from pathlib import Path

import pytest

from proteus_cache.stores import MARKERS, Kind, described, kind_of, occupied, wrong_folder


@pytest.mark.parametrize("kind", ["cache", "pack", "run"])
def test_a_store_is_told_by_its_file(tmp_path: Path, kind: Kind) -> None:
    (tmp_path / MARKERS[kind]).touch()

    assert kind_of(tmp_path) == kind
    assert described(tmp_path) == f"is a {kind}"


def test_other_folders_are_described(tmp_path: Path) -> None:
    for folder in ("empty", "flat", "classes/a", "other", "home/packs/p", "packing/tmp", "planning/tmp"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("flat/x.JPG", "classes/a/x.png", "other/notes.txt", "home/packs/p/pack.json"):
        (tmp_path / file).touch()
    (tmp_path / "packing" / "tmp" / "plan.json").touch()
    (tmp_path / "planning" / "tmp" / "plan-00.parquet").touch()

    assert described(tmp_path / "empty") == "is an empty folder"
    assert described(tmp_path / "flat") == described(tmp_path / "classes") == "is a folder of images"
    assert described(tmp_path / "other") == "is no cache, pack or run"
    assert described(tmp_path / "home") == "is a folder of several caches, packs or runs"
    assert described(tmp_path / "packing") == "is an unfinished pack, which the same `pack` goes on with"
    assert described(tmp_path / "planning") == "is an unfinished cache, which the same `extract` goes on with"
    assert described(tmp_path / "other" / "notes.txt") == "is a file"
    assert described(tmp_path / "nowhere") == "no such folder"


@pytest.mark.parametrize(
    ("kind", "left"), [("cache", "receipts/v000/s00000.json"), ("pack", "v000.idx"), ("run", "checkpoints/step-1/x")]
)
def test_a_store_without_its_first_file_is_told(tmp_path: Path, kind: Kind, left: str) -> None:
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).touch()

    assert (
        described(tmp_path) == f"is a {kind} that has lost its {MARKERS[kind]}, which must be brought back from a copy"
    )


def test_a_home_in_place_of_a_store_names_one_that_would_do(tmp_path: Path) -> None:
    for name in ("caches/c/manifest.json", "runs/r/config.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()

    assert wrong_folder(tmp_path, "run") == (
        f"{tmp_path}: is a folder of several caches, packs or runs; give a run: the folder that `train` wrote, "
        f"for example {tmp_path}/runs/r"
    )
    assert wrong_folder(tmp_path, "pack").endswith("the folder that `pack` wrote")


def test_a_folder_that_is_taken_says_by_what(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).touch()

    assert occupied(tmp_path, ["a", "b", "c", "d"]) == (
        f"{tmp_path}: is no cache, pack or run (it holds a, b, c, ...); give --out a new or empty folder, "
        "nothing was written"
    )
