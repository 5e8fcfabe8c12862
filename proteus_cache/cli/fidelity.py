"""`proteus-cache fidelity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proteus_cache.cli import complete, settings, terminal

_MACHINE = "Machine"


@terminal.command("the store is as it was; to measure again", go_on=())
def fidelity_command(
    path: Annotated[
        Path,
        typer.Argument(help="A pack or cache, with any codec.", autocompletion=complete.stores("pack", "cache")),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            help="A float16 or float32 cache or pack with the same views.",
            autocompletion=complete.stores("cache", "pack"),
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Instead of --against: run the teacher again over the stored views.", autocompletion=complete.teachers
        ),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Its weights, as for extract.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Held-out views to measure; all where there are fewer. Default: 2,000.")
    ] = None,
    no_plot: Annotated[
        bool, typer.Option("--no-plot", help="Leave out the picture, and with it the comparison of all codecs.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="A folder, or the .json file. Default: PATH.fidelity.json beside PATH.")
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
    """Measure what a codec keeps of the teacher, and what that means for use. Ends with 1 when it is biased.

    Example: proteus-cache fidelity proteus/packs/klt --against proteus/caches/dinov2_vitg14
    """
    from proteus_cache.fidelity.run import Against, measure_fidelity, report_path, write_report
    from proteus_cache.fidelity.sample import DEFAULT_SAMPLES
    from proteus_cache.fidelity.table import report_lines

    source = Against(store=settings.folder(against, "against"), teacher=teacher, weights=weights, home=settings.home())
    place = settings.folder(out, "out")
    report_path(path, place)
    with terminal.progress("fidelity", "views") as update:
        report = measure_fidelity(
            path,
            source,
            n_samples=DEFAULT_SAMPLES if samples is None else samples,
            with_curve=not no_plot,
            device=device,
            progress=update,
        )
    written = write_report(report, path, place)
    files = [f"wrote     {file}" for file in (written.report, written.picture) if file is not None]
    outcome = report.to_json() | {"report": str(written.report), "picture": written.picture and str(written.picture)}
    terminal.result(as_json, outcome, [*report_lines(report), *files])
    if not report.is_good:
        raise typer.Exit(1)
