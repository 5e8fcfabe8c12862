"""S5: secrets in the environment, in addresses and in messages are in nothing that a command shows or writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from proteus_cache.cli.app import app
from proteus_cache.text import printable
from tests.cli.running import extract_arguments, run, train_arguments
from tests.makers import make_images, make_teacher

_MARK = "CanaryQ7"
_ENVIRONMENT = {
    "HF_TOKEN": f"hf_{_MARK}aaaaaaaaaaaaaaaaaaaa",
    "HUGGING_FACE_HUB_TOKEN": f"hf_{_MARK}bbbbbbbbbbbbbbbbbbbb",
    "AWS_ACCESS_KEY_ID": f"AKIA{_MARK.upper()}CCCCCCCC",
    "AWS_SECRET_ACCESS_KEY": f"{_MARK}dddd/ddddddddd",
    "AWS_SESSION_TOKEN": f"{_MARK}eeee",
    "GITHUB_TOKEN": f"ghp_{_MARK}ffffffffffff",
    "WANDB_API_KEY": f"{_MARK}gggg",
    "HTTPS_PROXY": f"http://user:{_MARK}@127.0.0.1:9",
    "SECRET": f"{_MARK}hhhh",
}
_ADDRESSES = (
    f"https://user:{_MARK}@example.invalid/weights.safetensors",
    f"https://example.invalid/weights.safetensors?X-Amz-Signature={_MARK}&X-Amz-Credential=AKIA{_MARK.upper()}",
    f"s3://{_MARK}:{_MARK}@bucket/key?token={_MARK}",
    f"hf://{_MARK}@models/x",
)


def _secrets_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if _MARK.lower() in line.lower()]


@pytest.mark.parametrize("address", _ADDRESSES)
def test_no_address_shows_its_secrets(address: str) -> None:
    for text in (f"{address}: no such file", f"run `proteus-cache train --data '{address}'`", str(Path(address))):
        assert _secrets_in(printable(text)) == []
    assert printable("https://example.org/a/b.pth: gone") == "https://example.org/a/b.pth: gone"


def _refused(*arguments: object) -> Any:  # the runner's result
    """Run a command that cannot do what it is asked for."""
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert outcome.exit_code in (1, 2), outcome.output + str(outcome.exception)
    assert "Traceback" not in outcome.output
    return outcome


def test_no_command_shows_or_writes_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    make_images(tmp_path / "images", 24)
    make_teacher(tmp_path / "teacher.safetensors")
    cache, pack, trained = tmp_path / "cache", tmp_path / "pack", tmp_path / "run"
    said = [
        run(*extract_arguments(tmp_path)),
        run("pack", cache, "--out", pack),
        run(*train_arguments(tmp_path), "--out", trained),
        *(
            run(command, store, *more)
            for store in (cache, pack, trained)
            for command, *more in (("info",), ("verify", "--read-data"))
        ),
        run("info", pack, "--json"),
        run("plan", "--teacher", "dinov2_vits14", "--images", tmp_path / "images", "--out", tmp_path / "planned"),
    ]
    new = ("--out", tmp_path / "new", "--device", "cpu")
    vit = ("extract", "--teacher", "vit", *new)
    for address in _ADDRESSES:
        said += [
            _refused(*vit, "--weights", address, "--images", tmp_path / "images"),
            _refused(*vit, "--weights", tmp_path / "teacher.safetensors", "--images", address),
            _refused("train", "--student", "vit_s14", "--data", address),
            _refused("train", "--student", "vit_ti14", "--data", pack, "--init", address, *new),
            _refused("train", "--student", "vit_ti14", "--data", pack, "--expect-id", address, *new),
            _refused("train", "--student", address),
            _refused("train", "--config", address),
            _refused("eval", trained, "--images", address),
            *(_refused(command, address) for command in ("info", "verify", "pack", "fidelity", "pipeline", "fetch")),
        ]

    for outcome in said:
        assert _secrets_in(outcome.output) == []
    written = 0
    for folder, _, files in os.walk(tmp_path):
        for file in files:
            path = Path(folder, file)
            written += 1
            assert _MARK.lower().encode() not in path.read_bytes().lower(), path
            assert _MARK.lower() not in str(path).lower()
    assert written > 20
