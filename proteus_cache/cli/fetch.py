"""`proteus-cache fetch`."""

from __future__ import annotations

from typing import Annotated

import typer

from proteus_cache.cli import settings, terminal


@terminal.command("what was downloaded is dropped: run it again")
def fetch_command(
    teacher: Annotated[str, typer.Argument(help="For example dinov2_vitg14.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Download a teacher's official weights to PROTEUS_HOME, for machines that are offline later.

    Example: proteus-cache fetch dinov2_vitg14
    """
    from proteus_cache.teachers.registry import fetch_weights

    with terminal.progress("fetch", "MB") as update:
        path = fetch_weights(
            teacher,
            home=settings.home(),
            progress=lambda done, total: update(done / 1e6, (total or done) / 1e6, 0),
        )
    terminal.result(as_json, {"teacher": teacher, "weights": str(path)}, [f"weights of {teacher}: {path}"])
