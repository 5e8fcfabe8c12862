"""Shell completion, asked as bash asks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proteus_cache.codecs.names import CODEC_NAMES
from proteus_cache.students.registry import STUDENTS
from proteus_cache.teachers.registry import TEACHERS

_ASK = "from proteus_cache.cli import main; main()"


def complete(line: str, **environment: str) -> list[str]:
    """What is offered for the last word of a command line."""
    words = line.split(" ")
    asked = {
        "_PROTEUS_CACHE_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    outcome = subprocess.run(
        [sys.executable, "-c", _ASK], env=os.environ | asked | environment, capture_output=True, text=True, check=True
    )
    assert outcome.stderr == ""
    return outcome.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("proteus-cache ext", ["extract"]),
        ("proteus-cache extract --teach", ["--teacher"]),
        ("proteus-cache extract --teacher ", [*TEACHERS, "timm:"]),
        ("proteus-cache extract --teacher dinov2_vitg", ["dinov2_vitg14", "dinov2_vitg14_reg"]),
        ("proteus-cache extract --codec ", list(CODEC_NAMES)),
        ("proteus-cache extract --targets cls,", ["cls,patch", "cls,block."]),
        ("proteus-cache extract --augment d", ["deit"]),
        ("proteus-cache extract --view-format ", ["jpeg", "png"]),
        ("proteus-cache extract --precision fp", ["fp32", "fp16"]),
        ("proteus-cache train --student ", list(STUDENTS)),
        ("proteus-cache pack x --codec i", ["int8", "int4"]),
        ("proteus-cache pack x --codec k", ["klt:20dB"]),
        ("proteus-cache fetch dinov2_vits", ["dinov2_vits14", "dinov2_vits14_reg"]),
        ("proteus-cache extract --images ", []),  # left to the shell, which knows files
    ],
)
def test_names_are_completed(line: str, offered: list[str]) -> None:
    assert complete(line) == offered


def test_stores_of_the_home_are_completed_by_their_kind(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for place in ("caches/c/manifest.json", "packs/p/pack.json", "runs/r/config.yaml", "packs/q r/pack.json"):
        (home / place).parent.mkdir(parents=True)
        (home / place).touch()
    cache, pack, run = (str(home / place) for place in ("caches/c", "packs/p", "runs/r"))

    assert complete("proteus-cache pack ", PROTEUS_HOME=str(home)) == [cache]
    assert complete("proteus-cache eval ", PROTEUS_HOME=str(home)) == [run]
    assert complete("proteus-cache info ", PROTEUS_HOME=str(home)) == [cache, pack, run]
    assert complete(f"proteus-cache train --data {home}/p", PROTEUS_HOME=str(home)) == [pack]
    assert complete("proteus-cache info ./", PROTEUS_HOME=str(home)) == []


def test_an_answer_comes_at_once_and_without_torch() -> None:
    code = (
        "import os, sys; os.environ |= {'_PROTEUS_CACHE_COMPLETE': 'complete_bash', 'COMP_CWORD': '3',"
        " 'COMP_WORDS': 'proteus-cache train --student vit_s'}\n"
        "try:\n    from proteus_cache.cli import main; main()\n"
        "finally:\n    assert not {'torch', 'numpy', 'zarr', 'pyarrow'} & sys.modules.keys()"
    )
    began = time.monotonic()

    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "vit_s14\n", "")
    assert time.monotonic() - began < 5  # 0.4 s on a quiet machine; torch alone takes more than 1 s of work there


def test_a_script_for_the_shell_is_offered() -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'proteus-cache'; " + _ASK],
        env=os.environ | {"_PROTEUS_CACHE_COMPLETE": "source_bash"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert "_proteus_cache_completion()" in outcome.stdout
    assert "-F _proteus_cache_completion proteus-cache" in outcome.stdout
