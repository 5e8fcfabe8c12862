"""Every command and snippet that README.md and docs/ show is run, page by page, in the order of the page.

Shell blocks are run by bash, with the real commands; Python blocks as a file of their own. A page gets a folder with a
small data set in `imagenet/` and with what the first command of the README leaves in `proteus/demo/`. What a reader
would do with a large teacher, a large student and many images is done with small ones: `NAMES` and `OPTIONS` are all
that is changed. A block that cannot be run here says so in a comment above it, and is counted in `NOT_RUN`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from proteus_cache.demo.run import RECIPE
from tests.docs.commands import CommandServer
from tests.docs.pages import PAGES, ROOT, Block, blocks_of, name_of
from tests.makers import make_images

NAMES: Final = (
    # Folders of the reader.
    (r"/data/(imagenet|proteus|photos)\b", r"{sandbox}/\1"),
    # A student that two cores can train.
    (r"(student: )vit_\w+", r"\1vit_demo"),
)
"""Regular expression and what it is replaced by, in this order, in every block and in shown output."""

OPTIONS: Final = (
    # Installing is what `.ci/run` does in a fresh copy; here the commands are there.
    (r"python3 -m venv \.venv && \.venv/bin/pip install -c constraints\.txt -e \S+ && ", ""),
    (r"\.venv/bin/just test", "true"),
    (r"\.venv/bin/proteus-cache", "proteus-cache"),
    # Few images, few steps, few processes. Folders keep the names that they get on the page.
    (
        r"proteus-cache extract(.*)--teacher +(dinov2_\w+)",
        r"proteus-cache extract --out ${{PROTEUS_HOME:-proteus}}/caches/\2\1--teacher demo",
    ),
    (r"proteus-cache extract\b", "proteus-cache extract --workers 0 --shard-size 4"),
    (r"--shard-size (?!4 )\d+", "--shard-size 4"),
    (r"--limit \d+", "--limit 40"),
    (r"--gpus 4\b", "--gpus 2"),
    (r"proteus-cache pack\b", "proteus-cache pack --workers 1"),
    (
        r"proteus-cache train(.*)--student +(vit_\w+)",
        r"proteus-cache train --out ${{PROTEUS_HOME:-proteus}}/runs/\2\1--student vit_demo",
    ),
    (r"proteus-cache train\b", "proteus-cache train --max-steps 2 --workers 0 --batch-size 8"),
    (r"--batch-size (?!8 )\d+", "--batch-size 8"),
    (r"proteus-cache eval(.*)--teacher +dinov2_\w+", r"proteus-cache eval\1--teacher demo"),
    (r"proteus-cache eval\b", "proteus-cache eval --workers 1"),
    (r"--protocol linear\b", "--protocol linear --probe-steps 4"),
)
"""The same for commands and Python alone, before `NAMES`."""

SMALL_DEMO: Final = {
    "proteus_cache.demo.run.TRAIN_IMAGES_A_CLASS": 8,
    "proteus_cache.demo.run.TEST_IMAGES_A_CLASS": 3,
    "proteus_cache.demo.run.K": 10,
    "proteus_cache.demo.run.RECIPE": RECIPE | {"batch_size": 8, "epochs": 1},
    "proteus_cache.demo.speed.ROUNDS": 1,
    "proteus_cache.demo.speed.STEPS_A_TURN": 1,
}
"""Constants of the demo, so that it takes seconds: fewer images and steps of everything."""

NOT_RUN: Final = {"docs/demo.md": 1, "docs/guide.md": 4, "docs/pipelines.md": 2, "docs/quickstart.md": 1}
"""Page to the number of blocks that are marked as not run; no page has more."""

_RUN = ("bash", "python")
_SHOWN = ("text", "json", "yaml")
_STATE = ".session"
_BLOCK_S = 540


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    with CommandServer(tmp_path_factory.mktemp("run"), SMALL_DEMO) as running:
        yield running


@pytest.fixture(scope="module")
def given(server: CommandServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every page starts from; do not change it."""
    folder = tmp_path_factory.mktemp("given")
    make_images(folder / "imagenet" / "train", 44)
    make_images(folder / "imagenet" / "val", 12, seed=1)
    make_images(folder / "photos", 44, seed=2)
    Shell(server, folder).run("proteus-cache demo")
    return folder


class CommandError(Exception):
    """A command of a block ended with a status that is not 0."""


@dataclass
class Shell:
    """One shell session of a page: variables and the folder last from block to block."""

    server: CommandServer
    sandbox: Path

    def run(self, text: str) -> str:
        """What the commands print, stdout and stderr as they came.

        Raises:
            CommandError: one of them failed.
        """
        state = self.sandbox / _STATE
        before = f". {state}\n" if state.exists() else ""
        after = f'\n{{ export -p; printf "cd %q\\n" "$PWD"; }} > {state}\n'
        environment = {
            "PATH": f"{self.server.programs}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "HOME": str(self.sandbox),
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", before + text + after],
            cwd=self.sandbox,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_BLOCK_S,
            check=False,
        )
        if done.returncode != 0:
            raise CommandError(f"{text}\nended with {done.returncode}:\n{done.stdout}")
        return done.stdout


def substituted(text: str, table: tuple[tuple[str, str], ...], sandbox: Path) -> str:
    """A block with every entry of a table applied to it."""
    for pattern, replacement in table:
        text = re.sub(pattern, replacement.format(sandbox=sandbox), text)
    return text


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_a_page_runs(page: Path, server: CommandServer, given: Path, tmp_path: Path) -> None:
    blocks = blocks_of(page)
    if not any(block.language in _RUN and block.not_run is None for block in blocks):
        pytest.skip("nothing to run on this page")
    shutil.copytree(given, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_STATE))
    for name in ("docs", "pipelines"):
        (tmp_path / name).symlink_to(ROOT / name)
    shell, printed = Shell(server, tmp_path), ""
    for block in blocks:
        if block.is_output:
            shown = substituted(block.text, NAMES, tmp_path)
            missing = lines_not_printed(shown, printed, is_exact=block.is_exact)
            assert not missing, f"{block.place} shows what is not printed: {missing}\n{printed}"
        elif block.language in _RUN and block.not_run is None:
            try:
                printed = shell.run(as_commands(block, tmp_path))
            except CommandError as error:
                pytest.fail(f"{block.place}: {error}", pytrace=False)
            print(f"--- {block.place}\n{printed}")  # noqa: T201  # seen when a later block fails


def as_commands(block: Block, sandbox: Path) -> str:
    """A block as a shell runs it."""
    text = substituted(block.text.replace("\\\n", " "), OPTIONS + NAMES, sandbox)
    if block.language == "bash":
        return text
    script = sandbox / f".block_{block.line}.py"
    script.write_text(text)
    return f"python {script}"


def lines_not_printed(shown: str, printed: str, *, is_exact: bool = False) -> list[str]:
    """Lines of a shown output that are not among the printed ones, in their order; gaps do not count.

    Numbers and places count only where the output is exact.
    """
    plain = _without_gaps if is_exact else _without_numbers
    there = iter([plain(line) for line in printed.splitlines()])
    wanted = [line for line in shown.splitlines() if line.strip()]
    return [line for line in wanted if plain(line) not in there]


def _without_gaps(line: str) -> str:
    return " ".join(line.split())


def _without_numbers(line: str) -> str:
    """A line with its numbers (and their units), paths, digests and gaps made equal."""
    line = re.sub(r"\S*/\S*", "PATH", line)
    line = re.sub(r"\b\d+(x\d+)+\b", "N", line)
    line = re.sub(r"\b[0-9a-f]{8,}\b", "DIGEST", line)
    line = re.sub(r"-?\b[\d.,]*\d(e-?\d+)?( ?([KMGT]?B|ms|s|min|h|%|M|px)\b)?", "N", line)
    return _without_gaps(line)


def test_numbers_of_shown_output_may_differ_and_words_may_not() -> None:
    printed = "teacher   demo (x.safetensors)\nfree      81.2 GB, 5 inodes at /a/b\nstep 3, loss 4.428\n"

    assert lines_not_printed("free 1.9 TB, 77,123 inodes at /data\n\nstep 100, loss 0.5\n", printed) == []
    assert lines_not_printed("step 3, gain 4.4\n", printed) == ["step 3, gain 4.4"]
    assert lines_not_printed("step 3, loss  4.428\n", printed, is_exact=True) == []
    assert lines_not_printed("step 3, loss 4.429\n", printed, is_exact=True) == ["step 3, loss 4.429"]
    assert lines_not_printed("step 3, loss 4\nteacher demo (x.safetensors)\n", printed) == [
        "teacher demo (x.safetensors)"
    ]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    blocks = blocks_of(page)
    not_run = [block for block in blocks if block.not_run is not None]

    for language_before, block in zip(["", *(block.language for block in blocks)], blocks, strict=False):
        known = block.is_directive or block.language in (*_RUN, *_SHOWN)
        assert known, f"{block.place}: language {block.language!r}; a command is bash or python, all else text"
        is_output = block.is_output or block.not_compared is not None
        assert not (is_output and block.language != "text"), f"{block.place}: output is shown as text"
        assert "" not in (block.not_run, block.not_compared), f"{block.place}: say why not"
        follows_a_command = language_before in _RUN and block.language == "text"
        assert is_output or not follows_a_command, (
            f"{block.place}: the output of the block before, or not? Say so above it"
        )
        is_shown = block.language in _SHOWN and not is_output
        assert not (is_shown and _looks_like_a_command(block.text)), f"{block.place}: a command that is not run"
    assert len(not_run) == NOT_RUN.get(name_of(page), 0), [f"{block.place}: {block.not_run}" for block in not_run]


def _looks_like_a_command(text: str) -> bool:
    return bool(re.search(r"^(\$ |proteus-cache |\.venv/|pip |import )", text, re.MULTILINE))


def test_the_install_commands_are_those_of_a_fresh_clone() -> None:
    commands = [line for block in blocks_of(ROOT / "README.md") for line in block.text.splitlines() if "pip" in line]

    assert commands == [
        "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e . && .venv/bin/proteus-cache demo",
        "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[dev]' && .venv/bin/just test",
    ]


def test_programs_behave_as_without_the_server(server: CommandServer, tmp_path: Path) -> None:
    shell = Shell(server, tmp_path)
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.argv[1:], __name__, sys.stdin.read())\nsys.exit(3)\n")

    plain = subprocess.run(
        [sys.executable, "-m", "proteus_cache", "info", "nowhere"], capture_output=True, text=True, check=False
    )
    printed = shell.run("echo in | python script.py 'a b' c || echo status $?; proteus-cache info nowhere || echo $?")
    kept = shell.run("export NAME=value; mkdir below; cd below") + shell.run(
        "pwd; python -c 'import os; print(os.environ[\"NAME\"])'"
    )

    assert printed == f"['a b', 'c'] __main__ in\n\nstatus 3\n{plain.stderr}{plain.returncode}\n"
    assert kept == f"{tmp_path}/below\nvalue\n"
    with pytest.raises(CommandError, match="ended with 2"):
        shell.run("proteus-cache info nowhere")
