"""`proteus-cache eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proteus_cache.cli import complete, settings, terminal

_PROBE = "Linear probe"
_MACHINE = "Machine"


@terminal.command("eval keeps nothing; to repeat it", go_on=())
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="A finished run.", autocompletion=complete.stores("run"))],
    images: Annotated[
        Path | None,
        typer.Option(
            help="Class folders, or train and test (or val) with class folders in them. "
            "Default: $PROTEUS_IMAGES, else imagenet/train."
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            help="As DINOv2 does it. knn: k nearest neighbours on CLS. linear: the best of 52 linear heads on frozen "
            "features, trained on random crops.",
            autocompletion=complete.protocols,
        ),
    ] = "knn",
    teacher: Annotated[
        str | None,
        typer.Option(help="A teacher to compare with. Default: none.", autocompletion=complete.teachers),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Its weights, as for extract.")] = None,
    seed: Annotated[
        int, typer.Option(help="Of the split of images that come without parts, and of a linear probe.")
    ] = 0,
    probe_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps. Default: 5 passes over the training images, 10 from 100,000 on; at least 200 steps.",
            rich_help_panel=_PROBE,
        ),
    ] = None,
    probe_batch: Annotated[
        int | None,
        typer.Option(help="Images in a step. Default: up to 512, by the number of images.", rich_help_panel=_PROBE),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images in a forward.", rich_help_panel=_MACHINE)] = 256,
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that read images. Default: the usable cores.", rich_help_panel=_MACHINE),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cuda or cpu. Default: the best there is.", autocompletion=complete.devices, rich_help_panel=_MACHINE
        ),
    ] = None,
    as_json: terminal.Json = False,
    quiet: terminal.Quiet = False,
) -> None:
    """Score a student on labelled images, beside its average, the untrained student and a teacher.

    Example: proteus-cache eval proteus/runs/vit_s14 --images imagenet
    """
    from proteus_cache.evaluate.evaluate import evaluate
    from proteus_cache.evaluate.report import report_table

    with terminal.progress("eval", "images") as update:
        report = evaluate(
            run,
            settings.images(images, "evaluate on"),
            protocol=protocol,  # type: ignore[arg-type]  # checked there, with the choices in the message
            teacher=teacher,
            weights=weights,
            home=settings.home(),
            seed=seed,
            probe_steps=probe_steps,
            probe_batch=probe_batch,
            batch_size=batch_size,
            workers=workers,
            device=device,
            progress=update,
        )
    terminal.result(as_json, report.to_json(), report_table(report).split("\n"))
