"""`verify` and `repair` as typed: exit codes, what comes next, machine-readable lists, and what is misuse."""

from __future__ import annotations

import errno
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from proteus_cache import open_cache
from proteus_cache.cache.verify import verify_cache
from proteus_cache.stores import repair_command
from tests.cli.running import run
from tests.makers import identity
from tests.repair.stores import Stores, flip, refuse, tree
from tests.repair.test_run_folder import make_run

TAR = "views/v000/s00001.tar"


def next_step(outcome: Any) -> list[str]:
    """The arguments of the command that an outcome suggests."""
    last = outcome.stdout.splitlines()[-1]
    assert last.startswith("next: proteus-cache ")
    return shlex.split(last)[2:]


@pytest.fixture
def flags(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `repair` of the cache needs: its weights are not official ones."""
    monkeypatch.setenv("PROTEUS_IMAGES", str(stores.config.images))
    return ["--weights", str(stores.config.weights), "--workers", "0", "--device", "cpu", "--batch-size", "3"]


def test_the_way_from_damage_to_training(whole: Stores, stores: Stores, flags: list[str]) -> None:
    flip(stores.cache / TAR)

    found = run("verify", stores.cache, "--read-data", code=1)
    command = [str(stores.config.weights) if word == "FILE" else word for word in next_step(found)]
    promised = run(*command, *flags[2:], "--dry-run", code=1)
    mended = run(*command, *flags[2:])
    checked = run("verify", stores.cache, "--read-data")

    assert f"{TAR}: damaged (SHA-256 differs from the receipt)" in found.stdout
    assert next_step(found) == ["repair", str(stores.cache), "--weights", "FILE"]
    assert "unit v000/s00001: damaged" in promised.stdout
    assert "    to do: extract it again from its images" in promised.stdout.splitlines()
    assert "    done: extract it again from its images" in mended.stdout.splitlines()
    assert mended.stdout.splitlines()[-2] == f"cache {stores.cache}: 1 done; whole"
    assert next_step(mended)[0] == "train"
    assert "whole; checked every digest and checksum" in checked.stdout
    assert tree(stores.cache) == tree(whole.cache)


@pytest.fixture
def no_images(stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Where no images are found by themselves; what to put in place of the words in printed commands."""
    monkeypatch.delenv("PROTEUS_IMAGES", raising=False)
    monkeypatch.chdir(tmp_path)
    return {"DIR": str(stores.config.images), "FILE": str(stores.config.weights)}


def test_printed_commands_lead_from_damage_to_a_whole_cache(
    whole: Stores, stores: Stores, no_images: dict[str, str]
) -> None:
    """Nothing is added to them, but what stands for the images and the weights."""
    flip(stores.cache / TAR)
    (stores.cache / "targets.zarr/v001/cls/zarr.json").unlink()

    first = run("repair", stores.cache, code=1)
    command = next_step(first)

    assert "    done: derive it from the manifest: it is the one that receipts name" in first.stdout.splitlines()
    assert "    not done: it is made from images: give --images DIR, the same as for extract" in first.stdout
    assert command == ["repair", str(stores.cache), "--images", "DIR", "--weights", "FILE"]
    assert run(*[no_images.get(word, word) for word in command]).stdout.splitlines()[-2].endswith("1 done; whole")
    assert verify_cache(stores.cache, read_data=True) == []
    assert identity(open_cache(stores.cache)) == identity(open_cache(whole.cache))


def test_a_lack_of_weights_alone_keeps_what_was_given(stores: Stores, no_images: dict[str, str]) -> None:
    flip(stores.cache / TAR)
    given = ["repair", str(stores.cache), "--images", no_images["DIR"], "--workers", "0"]

    outcome = run(*given, code=1)

    assert "vit needs --weights" in outcome.stdout
    assert next_step(outcome) == [*given, "--weights", "FILE"]


def test_what_a_cache_needs_stands_in_the_command_that_mends_it(
    stores: Stores, no_images: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"proteus-cache repair {stores.cache}"

    assert repair_command(stores.cache) == f"{command} --images DIR --weights FILE"
    assert repair_command(stores.pack) == f"proteus-cache repair {stores.pack}"
    monkeypatch.setenv("PROTEUS_IMAGES", no_images["DIR"])
    assert repair_command(stores.cache, "--unit", "v000/s00001") == f"{command} --unit v000/s00001 --weights FILE"
    flip(stores.cache / "manifest.json")
    assert repair_command(stores.cache) == command


def test_a_failed_repair_is_followed_by_the_same_repair(
    stores: Stores, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(stores.cache / TAR)
    with monkeypatch.context() as patch:
        refuse(patch, "create", errno.ENOSPC, lambda path: path.parent.name == "tmp")
        outcome = run("repair", stores.cache, *flags, code=1)

    assert outcome.stdout.count("No space left on device") == 1
    assert next_step(outcome) == ["repair", str(stores.cache), *flags]


def test_a_whole_unit_of_a_pack_that_cannot_be_made_again_ends_with_1(whole: Stores, stores: Stores) -> None:
    shutil.rmtree(stores.cache)

    outcome = run("repair", stores.pack, "--unit", "v000/s00001", code=1)

    assert outcome.stdout.splitlines()[-2] == f"pack {stores.pack}: 1 not done; whole"


def test_a_pack_whose_cache_is_not_here_names_the_repair_that_is_told_where(whole: Stores, stores: Stores) -> None:
    elsewhere = stores.cache.rename(stores.cache.parent.parent / "else where")
    flip(stores.pack / "v000/s00001.tar")

    alone = run("repair", stores.pack, code=1)
    again = run("repair", stores.pack, "--fast", "--unit", "v000/s00001", "--dry-run", "--json", code=1)
    together = run(*[str(elsewhere) if word == "DIR" else word for word in next_step(alone)])

    assert next_step(alone) == ["repair", str(stores.pack), "--cache", "DIR"]
    assert json.loads(again.stdout)["next"].endswith("--dry-run --json --cache DIR")
    assert together.stdout.splitlines()[-2] == f"pack {stores.pack}: 1 done; whole"
    assert tree(stores.pack) == tree(whole.pack)


def test_a_pack_finds_its_cache_by_itself(whole: Stores, stores: Stores) -> None:
    flip(stores.pack / "v000/s00001.tar")

    assert run("repair", stores.pack, "--fast").stdout.splitlines()[0].endswith("there was nothing to repair")
    mended = json.loads(run("repair", stores.pack, "--json").stdout)

    assert (mended["kind"], mended["is_whole"], mended["dry_run"]) == ("pack", True, False)
    assert mended["next"].startswith("proteus-cache train --student")
    assert tree(stores.pack) == tree(whole.pack)


def test_a_dry_run_names_the_same_command_without_it(stores: Stores, flags: list[str]) -> None:
    flip(stores.cache / TAR)

    outcome = run("repair", stores.cache, *flags, "--dry-run", "--json", code=1)

    report = json.loads(outcome.stdout)
    assert report["next"] == shlex.join(["proteus-cache", "repair", str(stores.cache), *flags, "--json"])
    assert [(action["unit"], action["state"]) for action in report["actions"]] == [("v000/s00001", "to do")]


def test_recompute_prints_its_seed_and_names_the_views_that_fail(stores: Stores, tmp_path: Path) -> None:
    weights = ["--weights", str(stores.config.weights), "--device", "cpu"]
    first = run("verify", stores.cache, "--recompute", 4, *weights)
    (seed,) = re.findall(r"^recomputed 4 views in fp32 on cpu, seed (\d+)$", first.stdout, re.MULTILINE)

    again = run("verify", stores.cache, "--recompute", 4, *weights, "--seed", seed, "--json")

    report = json.loads(again.stdout)
    assert report["recompute"]["seed"] == int(seed)
    assert set(report["recompute"]["targets"]["patch"]) == {
        *("lowest_cosine", "mean_cosine", "largest_error", "tolerance", "between_views", "n_failed")
    }
    assert report["is_whole"]
    assert next_step(first)[0] == "train"


def test_recompute_needs_the_weights(stores: Stores) -> None:
    outcome = run("verify", stores.cache, "--recompute", 4, code=2)

    assert "vit needs --weights" in outcome.stderr


def test_what_comes_after_a_share(stores: Stores) -> None:
    assert next_step(run("verify", stores.pack, "--read-data-subset", "2/3"))[-1] == "3/3"
    assert next_step(run("verify", stores.pack, "--read-data-subset", "3/3"))[0] == "train"


def test_removing_checkpoints_is_asked_for(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    flip(folder / "checkpoints/step-00000006/model.safetensors")

    refused = run("repair", folder, code=2)
    mended = run("repair", folder, "--yes", "--json")

    assert "remove 1 damaged checkpoint? A whole one remains." in refused.stderr
    report = json.loads(mended.stdout)
    assert [action["state"] for action in report["actions"]] == ["done"]
    assert report["is_whole"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "PACK", "--read-data", "--read-data-subset", "1/2"], "--read-data reads everything"),
        (["verify", "PACK", "--read-data-subset", "3/2"], "--read-data-subset takes n/t"),
        (["verify", "PACK", "--recompute", "0"], "--recompute must be at least 1"),
        (["verify", "PACK", "--recompute", "2", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["verify", "PACK", "--seed", "1"], "--seed goes with --recompute"),
        (["verify", "RUN", "--recompute", "1"], "is a run, and has no units"),
        (["verify", "RUN", "--read-data-subset", "1/2"], "is a run, and has no units"),
        (["repair", "PACK", "--images", "x"], "--images: of no use for a pack"),
        (["repair", "RUN", "--unit", "v000/s00000"], "--unit: of no use for a run"),
        (["repair", "CACHE", "--cache", "x"], "--cache: of no use for a cache"),
        (["repair", "CACHE", "--unit", "v000/s99999"], "has no such unit; it has view indices v000, v001, probe"),
        (["repair", "CACHE", "--unit", "../../etc"], "has no such unit"),
        (["repair", "nowhere"], "no such folder"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(stores: Stores, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"PACK": stores.pack, "CACHE": stores.cache, "RUN": tmp_path / "run"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("train: {}\n")

    outcome = run(*[places.get(argument, argument) for argument in arguments], code=2)

    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_settings_that_the_cache_was_not_made_with_are_refused(
    stores: Stores, flags: list[str], tmp_path: Path
) -> None:
    flip(stores.cache / TAR)
    (tmp_path / "extract.yaml").write_text("codec: float16\n")
    before = tree(stores.cache)

    outcome = run("repair", stores.cache, *flags, "--config", tmp_path / "extract.yaml", code=2)

    assert "this cache was made with other settings: --codec is" in outcome.stderr
    assert tree(stores.cache) == before
