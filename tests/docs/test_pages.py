"""What README.md and docs/ name is there: files, options, settings, messages, and the fifteen lines."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import torch
import typer
from markdown_it import MarkdownIt
from timm.models.vision_transformer import VisionTransformer

from proteus_cache.cli.app import app
from proteus_cache.codecs.names import CODEC_NAMES, codec_for_target
from proteus_cache.demo.run import OWN_IMAGES, OWN_SIZE_PX, VIEWS
from proteus_cache.demo.run import STUDENT as DEMO_STUDENT
from proteus_cache.demo.scenes import CLASSES
from proteus_cache.plan.codes import planned_codec
from proteus_cache.students.registry import STUDENTS, student_architecture
from tests.docs.pages import PAGES, ROOT, blocks_of, indented_blocks_of, name_of

README: Final = ROOT / "README.md"
GUIDE: Final = ROOT / "docs" / "guide.md"
EXAMPLES: Final = sorted((ROOT / "docs" / "examples").glob("*.py"))
OTHER_OPTIONS: Final = {
    *("--num_processes", "--shm-size", "--ipc"),  # of accelerate and docker
    *("--array", "--gres", "--cpus-per-task", "--mem", "--time"),  # of SLURM
    *("--rounds", "--steps", "--threads", "--part", "--codecs"),  # of the scripts in benchmarks/
}
_MOST_EXAMPLE_LINES = 15
_HOLE = "\0"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_is_fenced_so_that_no_block_is_overlooked(page: Path) -> None:
    assert indented_blocks_of(page) == []


def test_the_links_of_the_readme_lead_somewhere() -> None:
    # Those between the pages of docs/ are checked by Sphinx, which does not see the README.
    targets = re.findall(r"\]\(([^)\s]+)\)", README.read_text())

    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        assert (ROOT / path).is_file(), target
        assert not anchor or anchor in _anchors(ROOT / path), target


def _anchors(page: Path) -> list[str]:
    """Names of the headings of a page, as GitHub and the site make them."""
    tokens = MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8"))
    titles = [tokens[index + 1].content for index, token in enumerate(tokens) if token.type == "heading_open"]
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_option_that_a_page_names_exists(page: Path) -> None:
    known = {option for command in _commands() for parameter in command.params for option in parameter.opts}

    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z](?![\w-])", page.read_text()))

    assert named - known - OTHER_OPTIONS == set()


def _commands() -> Iterator[typer.core.TyperCommand]:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    for command in group.commands.values():
        assert isinstance(command, typer.core.TyperCommand)
        yield command


def test_every_command_is_shown() -> None:
    shown = "".join(block.text for page in PAGES for block in blocks_of(page) if block.language == "bash")

    missing = [command.name for command in _commands() if f"proteus-cache {command.name}" not in shown]

    assert missing == []


def test_every_message_of_troubleshooting_is_one_of_the_program() -> None:
    program = list(_texts())
    cells = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)

    assert len(cells) > 30
    for cell in cells:
        pieces = [piece.strip() for piece in cell.split("…") if len(piece.strip()) > 1]
        assert pieces, cell
        for piece in pieces:
            assert any(piece in text for text in program), f"{cell!r}: no message of the program has {piece!r}"


def _texts() -> Iterator[str]:
    """The texts in the program's source, with a hole for every value that is put into one."""
    for path in (ROOT / "proteus_cache").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else _HOLE for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[.\d,]*[sdfg]", _HOLE, node.value)  # of the logger


def test_the_students_of_the_guide_are_those_of_the_program() -> None:
    cells = re.findall(r"^\| `(vit_\w+)` \| ([\d.]+) M \| ([\d,]+) \|", GUIDE.read_text(), flags=re.MULTILINE)

    expected = []
    for name, size in STUDENTS.items():
        with torch.device("meta"):
            student = VisionTransformer(**student_architecture(name, size_px=224, patch_px=14))  # type: ignore[arg-type]
        millions = sum(parameter.numel() for parameter in student.parameters()) / 1e6
        expected.append((name, f"{millions:.0f}" if millions >= 100 else f"{millions:.1f}", f"{size.batch_size:,}"))
    assert cells == expected


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_the_bytes_of_a_codec_are_those_of_the_program(codec: str) -> None:
    (shown,) = re.findall(rf"^\| `{codec}` \| ([\d,]+) KB \|", GUIDE.read_text(), flags=re.MULTILINE)

    shapes = {"cls": (1536,), "patch": (256, 1536)}
    codecs = [planned_codec(codec_for_target(codec, name), shape) for name, shape in shapes.items()]
    assert shown == f"{sum(each.code_bytes for each in codecs) / 1000:,.0f}"


def test_the_demo_is_as_described() -> None:
    text = " ".join((ROOT / "docs" / "demo.md").read_text().split())

    assert ", ".join(CLASSES[:-1]) + " or " + CLASSES[-1] in text
    assert f"Up to {OWN_IMAGES} photographs are taken, at {OWN_SIZE_PX} pixels" in text
    assert f"the student `{DEMO_STUDENT}`" in text
    assert VIEWS == 4


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_shown_and_run(example: Path) -> None:
    lines = [line for line in example.read_text().splitlines() if line.strip() and not line.startswith('"""')]
    blocks = [block for page in PAGES for block in blocks_of(page)]

    assert len(lines) <= _MOST_EXAMPLE_LINES
    name = example.relative_to(ROOT).as_posix()
    assert [block for block in blocks if block.language == f"{{literalinclude}} {name.removeprefix('docs/')}"]
    assert [block for block in blocks if block.language == "bash" and f"python {name}" in block.text]
