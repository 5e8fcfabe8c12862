"""`proteus-cache demo`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proteus_cache.cli import complete, settings, terminal

if TYPE_CHECKING:
    from proteus_cache.demo.run import DemoReport


@terminal.command("what is finished is kept; to go on", go_on=())
def demo_command(
    out: Annotated[Path | None, typer.Option(help="Everything goes here. Default: $PROTEUS_HOME/demo.")] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Photographs of yours, for the teacher dinov2_vits14. Default: images drawn here."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cuda or cpu. Default: the best there is.", autocompletion=complete.devices),
    ] = None,
    as_json: terminal.Json = False,
    quiet: terminal.Quiet = False,
) -> None:
    """Show the whole way in a few minutes: images, teacher, cache, pack, student, scores and a picture.

    Example: proteus-cache demo
    """
    from proteus_cache.demo.run import run_demo

    home = settings.home()
    place = settings.folder(out, "out") or home / ("demo" if images is None else "demo-photographs")
    report = run_demo(place, home=home, images=settings.folder(images, "images"), device=device, show=_Terminal())
    terminal.result(as_json, report.to_json(), _lines(report), "proteus-cache plan --teacher dinov2_vitg14")


class _Terminal:
    """Shows a demo on stderr."""

    def say(self, line: str) -> None:
        terminal.note(line)

    def progress(self, label: str, unit: str) -> AbstractContextManager[Callable[[float, float, int], None]]:
        return terminal.progress(label, unit)


def _lines(report: DemoReport) -> list[str]:
    return [
        *report.lines(),
        f"picture   {report.out / 'demo.png'}",
        f"files     images, cache, pack, run, train.yaml and demo.json in {report.out}",
    ]
