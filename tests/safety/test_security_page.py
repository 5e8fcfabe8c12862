"""SECURITY.md: the commands that it quotes run, and the tests that it names exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from proteus_cache.yaml_text import MAX_BYTES
from tests.cli.running import extract_arguments, run
from tests.makers import make_images, make_teacher
from tests.safety.guarded import CASE_BYTES, CASE_CPU_S

_PAGE = (Path(__file__).parents[2] / "SECURITY.md").read_text()


def test_the_commands_run(tmp_path: Path) -> None:
    make_images(tmp_path / "images", 24)
    make_teacher(tmp_path / "teacher.safetensors")
    run(*extract_arguments(tmp_path))
    pack = tmp_path / "pack"
    run("pack", tmp_path / "cache", "--out", pack)
    (block,) = re.findall(r"```bash\n(.*?)```", _PAGE, re.DOTALL)
    commands = [shlex.split(line) for line in block.splitlines()]
    pin = ""

    for command in commands:
        words = [word.replace("PACK", str(pack)).replace("PIN", pin) for word in command]
        if words[0] == "sha256sum":
            pin = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0]
            continue
        assert words[0] == "proteus-cache"
        more = ["--max-steps", 1, "--batch-size", 8, "--workers", 0, "--device", "cpu"] if words[1] == "train" else []
        outcome = run(*words[1:], *more)
        if words[1] == "info":
            assert f"sha256:{pin}" in outcome.stdout
    assert len(commands) == 4


def test_the_page_says_what_is_there() -> None:
    for name in re.findall(r"`(?:tests/safety/)?((?:test_)?\w+\.py)`", _PAGE):
        assert (Path(__file__).parent / name).is_file(), name
    assert f"{CASE_CPU_S:.0f} s of CPU and {CASE_BYTES >> 20} MiB" in _PAGE
    assert f"at most {MAX_BYTES >> 10} KiB" in _PAGE
