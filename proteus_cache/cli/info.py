"""`proteus-cache info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proteus_cache.cli import terminal


@terminal.command("info changes nothing: run it again")
def info_command(
    path: Annotated[Path, typer.Argument(help="A cache, pack or run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Say what a cache, pack or run is.

    Example: proteus-cache info proteus/caches/dinov2_vitg14
    """
    from proteus_cache.report.summary import describe, summarise

    summary = summarise(path)
    terminal.result(as_json, summary, describe(summary))
