"""`proteus-cache fetch`."""

from __future__ import annotations

from typing import Annotated

import typer

from proteus_cache.cli import complete, settings, terminal


@terminal.command("what was downloaded is dropped; to start again", go_on=())
def fetch_command(
    teacher: Annotated[
        str, typer.Argument(help="For example dinov2_vitg14.", autocompletion=complete.official_teachers)
    ],
    as_json: terminal.Json = False,
    quiet: terminal.Quiet = False,
) -> None:
    """Download a teacher's official weights to PROTEUS_HOME, for machines that are offline later.

    Example: proteus-cache fetch dinov2_vitg14
    """
    from proteus_cache.next_steps import command_line
    from proteus_cache.teachers.registry import fetch_weights

    with terminal.progress("fetch", "MB") as update:
        path = fetch_weights(
            teacher,
            home=settings.home(),
            progress=lambda done, total: update(done / 1e6, (total or done) / 1e6),
        )
    outcome = {"teacher": teacher, "weights": str(path)}
    next_step = f"{command_line('extract', '--teacher', teacher, '--images')} DIR"
    terminal.result(as_json, outcome, [f"weights of {teacher}: {path}"], next_step)
