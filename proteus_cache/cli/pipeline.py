"""`proteus-cache pipeline`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from proteus_cache.cli import complete, look, settings, terminal


@terminal.command("what is finished is kept; to go on", go_on=())
def pipeline_command(
    file: Annotated[Path, typer.Argument(help="The YAML file.", autocompletion=complete.pipelines)],
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the file, print each stage as a command with its numbers, and leave."),
    ] = False,
    as_json: terminal.Json = False,
    quiet: terminal.Quiet = False,
) -> None:
    """Run a whole pipeline: extract, pack, train, eval, as a YAML file says. Run it again to go on.

    Example: proteus-cache pipeline pipelines/small.yaml --dry-run
    """
    from proteus_cache.pipeline.dry_run import plan_pipeline
    from proteus_cache.pipeline.run import lines_of, run_pipeline

    plan = plan_pipeline(file, settings.home())
    if dry_run:
        terminal.result(as_json, plan.to_json(), plan.lines())
        return
    program = [sys.executable, "-m", "proteus_cache.cli.stage"]
    done = run_pipeline(plan.stages, program, ["--quiet"] if look.is_quiet() else [], _Terminal())
    terminal.result(as_json, {"pipeline": str(file), "stages": [one.to_json() for one in done]}, lines_of(done))


class _Terminal:
    """Shows a pipeline on stderr."""

    def say(self, line: str) -> None:
        terminal.note(line)

    def progress(self, label: str, unit: str) -> AbstractContextManager[Callable[[float, float, int], None]]:
        return terminal.progress(label, unit)
