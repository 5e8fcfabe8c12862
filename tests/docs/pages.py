"""The pages of the documentation and their fenced blocks, with the comment that stands directly above each.

<!-- not run: needs a SLURM cluster -->      above a block that cannot be run here
<!-- output -->                              above the text that the block before it prints
<!-- output not compared: REASON -->         likewise, where the block is not run here or prints otherwise
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from markdown_it import MarkdownIt

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_COMMENT = re.compile(r"<!--\s*(not run|output not compared|output|exact output)(?::\s*(.+?))?\s*-->\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    page: str
    """`README.md` or `docs/guide.md`."""
    line: int
    """Of its opening fence, counted from 1."""
    language: str
    """What stands after the fence; directives of the site begin with a brace."""
    text: str
    not_run: str | None = None
    """Why it cannot be run here."""
    is_output: bool = False
    """It shows what the block before it prints."""
    is_exact: bool = False
    """Its numbers are the same everywhere."""
    not_compared: str | None = None
    """Why what it shows is not what is printed here."""

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}"

    @property
    def is_directive(self) -> bool:
        """Whether it speaks to the site's builder."""
        return self.language.startswith("{")


def name_of(page: Path) -> str:
    """Path of a page from the root of the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    blocks, comment = [], None
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            kind, reason = comment.groups() if comment else (None, None)
            assert token.map is not None
            blocks.append(
                Block(
                    page=name_of(page),
                    line=token.map[0] + 1,
                    language=token.info.strip(),
                    text=token.content,
                    not_run=(reason or "") if kind == "not run" else None,
                    is_output=kind in ("output", "exact output"),
                    is_exact=kind == "exact output",
                    not_compared=(reason or "") if kind == "output not compared" else None,
                )
            )
        comment = _COMMENT.fullmatch(token.content) if token.type == "html_block" else None
    return blocks


def indented_blocks_of(page: Path) -> list[int]:
    """Lines at which code begins that is indented instead of fenced, so that no reader of blocks sees it."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return [token.map[0] + 1 for token in tokens if token.type == "code_block" and token.map]
