"""The main job on 64 real photographs, through the command line, and what plain zarr and webdataset see of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import zarr
from typer.testing import CliRunner

from proteus_cache import open_pack
from proteus_cache.cli.app import app


def _run(*arguments: object) -> dict[str, Any]:
    outcome = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert outcome.exit_code == 0, outcome.output + str(outcome.exception)
    return dict(json.loads(outcome.stdout))


@pytest.mark.slow
def test_photographs_become_a_cache_a_pack_and_a_student(test_data: Path, tmp_path: Path) -> None:
    photographs = sorted((test_data / "imagenet-sample").rglob("*.JPEG"))[:64]
    for number, path in enumerate(photographs):
        folder = tmp_path / "images" / f"class_{number % 8}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    cache, pack, run = (tmp_path / name for name in ("cache", "pack", "run"))

    extracted = _run(
        *("extract", "--teacher", "dinov2_vits14", "--weights", "random:0", "--views", 2, "--codec", "int8"),
        *("--images", tmp_path / "images", "--out", cache, "--shard-size", 24),
    )
    packed = _run("pack", cache, "--out", pack)
    trained = _run(
        *("train", "--student", "vit_ti14", "--max-steps", 4, "--batch-size", 16, "--data", pack, "--out", run)
    )
    scored = _run("eval", run, "--images", tmp_path / "images")

    assert (extracted["n_stored_views"], extracted["is_complete"]) == (128, True)
    assert packed["n_samples"] == 128
    assert trained["last"]["step"] == 4
    assert [model["model"] for model in scored["models"]] == ["student", "ema", "untrained"]
    assert all(_run("info", path)["kind"] == path.name for path in (cache, pack, run))
    assert all(_run("verify", path, "--read-data")["is_whole"] for path in (cache, pack, run))
    _check_with_plain_readers(cache, pack)


def _check_with_plain_readers(cache: Path, pack: Path) -> None:
    group: Any = zarr.open_group(cache / "targets.zarr", mode="r", zarr_format=3)  # its items are arrays
    assert group["v001/patch"].shape == (64, 256 * (2 + 384))
    opened = open_pack(pack)
    expected = {(opened[i].key, opened[i].view_index): opened[i] for i in (0, 63, 64, 127)}
    seen = set()
    for path in sorted(pack.glob("v*/*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            document = json.loads(sample["json"])
            view_index = int(document["view"][1:])
            seen.add((sample["__key__"], view_index))
            assert sample["jpg"].startswith(b"\xff\xd8")
            assert len(sample["codes"]) == opened.code_bytes
            same = expected.get((sample["__key__"], view_index))
            if same is not None:
                cls = np.frombuffer(sample["codes"][: 2 * 384], "<f2").astype(np.float32)
                assert np.array_equal(same.targets["cls"], cls)
    assert len(seen) == 128
