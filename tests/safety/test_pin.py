"""`--expect-id` names the pack that is meant: another one is refused before anything is started or written."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from proteus_cache.errors import ChecksumError, ConfigError, UsageError
from proteus_cache.pack.pin import parse_pin
from proteus_cache.pack.reader import open_pack
from proteus_cache.pipeline.document import training_keys
from proteus_cache.train.config import config_from_mapping
from tests.cli.running import extract_arguments, run
from tests.makers import make_images, make_teacher
from tests.safety.stores import copied, reseal

_OTHER = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache and its pack, made by the commands."""
    folder = tmp_path_factory.mktemp("pins")
    make_images(folder / "images", 24)
    make_teacher(folder / "teacher.safetensors")
    run(*extract_arguments(folder))
    packed = run("pack", folder / "cache", "--out", folder / "pack")
    (folder / "said.txt").write_text(packed.stdout)
    return folder


def _id_of(pack: Path) -> str:
    return hashlib.sha256((pack / "pack.json").read_bytes()).hexdigest()


def _train(folder: Path, out: Path, *more: object) -> list[object]:
    return [
        *("train", "--student", "vit_ti14", "--data", folder / "pack", "--max-steps", 1, "--batch-size", 8),
        *("--workers", 0, "--device", "cpu", "--out", out, *more),
    ]


def test_the_pin_is_what_sha256sum_prints_and_is_shown(folder: Path) -> None:
    pin = _id_of(folder / "pack")
    printed = subprocess.run(["sha256sum", folder / "pack" / "pack.json"], capture_output=True, text=True, check=True)

    assert printed.stdout.split()[0] == pin
    assert open_pack(folder / "pack").file_sha256 == pin
    assert f"pin       sha256:{pin} " in run("info", folder / "pack").stdout
    assert json.loads(run("info", folder / "pack", "--json").stdout)["pack_json_sha256"] == pin
    assert f"pin       sha256:{pin} " in (folder / "said.txt").read_text()
    assert (
        json.loads(run("pack", folder / "cache", "--out", folder / "pack", "--json").stdout)["pack_json_sha256"] == pin
    )


def test_the_right_pin_trains_is_written_down_and_kept_by_resume(folder: Path, tmp_path: Path) -> None:
    pin = _id_of(folder / "pack")

    run(*_train(folder, tmp_path / "run", "--expect-id", f"sha256:{pin}"))

    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["train"]["expect_id"] == f"sha256:{pin}"
    assert written["pack"]["pack_json_sha256"] == pin
    run("train", "--config", tmp_path / "run" / "config.yaml", "--resume", "--max-steps", 2)
    other = copied(folder / "pack", tmp_path / "other")
    reseal(other / "pack.json", lambda document: document.update(classes=["x", "y", "z"]))
    changed = (tmp_path / "run" / "config.yaml").read_text().replace(str(folder / "pack"), str(other))
    (tmp_path / "config.yaml").write_text(changed)
    refused = run("train", "--config", tmp_path / "config.yaml", "--resume", "--max-steps", 3, code=1)
    assert f"expected is {pin[:12]}" in refused.stderr


def test_another_pack_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    found = _id_of(folder / "pack")[:12]

    for arguments in (
        _train(folder, tmp_path / "run", "--expect-id", _OTHER),
        ["verify", folder / "pack", "--expect-id", _OTHER],
        ["verify", folder / "pack", "--read-data", "--expect-id", f"sha256:{_OTHER}"],
    ):
        outcome = run(*arguments, code=1)
        assert f"pack.json has sha256 {found}, expected is {_OTHER[:12]}" in outcome.stderr
        assert outcome.stderr.count("\n") == 1
        assert outcome.stdout == ""
    assert not (tmp_path / "run").exists()
    with pytest.raises(ChecksumError, match="bring the right pack"):
        open_pack(folder / "pack", expect_id=_OTHER)


@pytest.mark.parametrize(
    "text", ["", "0123", "0" * 63, "0" * 65, "sha512:" + "0" * 64, "x" * 64, "https://h/" + "0" * 64]
)
def test_what_is_no_whole_digest_is_misuse(text: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        parse_pin(text)
    assert "64 hexadecimal digits" in run(*_train(folder, tmp_path / "run", "--expect-id", text), code=2).stderr
    assert "64 hexadecimal digits" in run("verify", folder / "pack", "--expect-id", text, code=2).stderr


def test_a_pin_in_capitals_or_with_its_algorithm_is_the_same() -> None:
    assert parse_pin(f" SHA256:{_OTHER.upper()} ") == parse_pin(f"sha256:{_OTHER}") == parse_pin(_OTHER) == _OTHER


def test_a_pin_goes_with_a_pack_alone(folder: Path, tmp_path: Path) -> None:
    assert "is of a pack" in run("verify", folder / "cache", "--expect-id", _OTHER, code=2).stderr
    cached = run(
        *("train", "--student", "vit_ti14", "--data", folder / "cache", "--out", tmp_path / "run", "--device", "cpu"),
        *("--batch-size", 8, "--expect-id", _OTHER),
        code=2,
    )
    assert "would have to be packed first" in cached.stderr
    with pytest.raises(ConfigError, match="fresh views"):
        config_from_mapping(
            {
                "student": "vit_ti14",
                "out": tmp_path,
                "live": True,
                "teacher": "vit",
                "images": tmp_path,
                "expect_id": _OTHER,
            }
        )


def test_a_pipeline_may_pin_its_pack() -> None:
    assert "expect_id" in training_keys()


def test_training_refuses_an_index_that_is_not_the_pinned_one(folder: Path, tmp_path: Path) -> None:
    pack = copied(folder / "pack", tmp_path / "pack")
    index = bytearray((pack / "v000.idx").read_bytes())
    index[100] ^= 1
    (pack / "v000.idx").write_bytes(index)

    outcome = run(*_train(tmp_path, tmp_path / "run", "--expect-id", _id_of(pack)), code=1)

    assert "v000.idx: is not the index that pack.json names" in outcome.stderr
