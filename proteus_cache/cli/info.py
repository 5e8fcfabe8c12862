"""`proteus-cache info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proteus_cache.cli import complete, terminal


@terminal.command("info changes nothing; to repeat it", go_on=())
def info_command(
    path: Annotated[
        Path,
        typer.Argument(help="A cache, pack or run.", autocompletion=complete.stores("cache", "pack", "run")),
    ],
    as_json: terminal.Json = False,
    quiet: terminal.Quiet = False,
) -> None:
    """Say what a cache, pack or run is.

    Example: proteus-cache info proteus/caches/dinov2_vitg14
    """
    from proteus_cache.next_steps import after
    from proteus_cache.report.summary import describe, summarise

    summary = summarise(path)
    terminal.result(as_json, summary, describe(summary), after(summary))
