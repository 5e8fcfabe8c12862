"""`proteus-cache pack`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proteus_cache.cli import complete, settings, terminal
from proteus_cache.errors import UsageError
from proteus_cache.plan import human_bytes

if TYPE_CHECKING:
    from proteus_cache.pack.build import PackReport

_MOST_VIEWS = 10_000


@terminal.command("finished tars are kept; to go on", go_on=())
def pack_command(
    cache: Annotated[Path, typer.Argument(help="The cache.", autocompletion=complete.stores("cache"))],
    out: Annotated[Path | None, typer.Option(help="The pack. Default: $PROTEUS_HOME/packs/CACHE_ID.")] = None,
    views: Annotated[
        str | None,
        typer.Option(help="A number (the first so many view indices) or names: v000,v002. Default: all."),
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Which to keep. Default: all.", autocompletion=complete.targets)
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(help=f"Encode anew: {complete.CODECS} Default: the cache's.", autocompletion=complete.codecs),
    ] = None,
    move: Annotated[bool, typer.Option("--move", help="Remove each unit from the cache once it is packed.")] = False,
    workers: Annotated[int | None, typer.Option(help="Units packed at a time. Default: the usable cores.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to --move without being asked.")] = False,
    as_json: terminal.Json = False,
    quiet: terminal.Quiet = False,
) -> None:
    """Pack a cache into WebDataset tars with an index, for training and for other people.

    Example: proteus-cache pack proteus/caches/dinov2_vitg14
    """
    from proteus_cache.next_steps import train_on
    from proteus_cache.report.summary import summarise_pack
    from proteus_cache.workspace import default_pack

    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, got {workers}")
    report = pack_with_progress(
        cache,
        out or default_pack(settings.home(), cache),
        yes=yes,
        views=_views(views, cache),
        targets=settings.names(targets, "targets"),
        codec=codec,
        move=move,
        workers=workers,
    )
    moved = f", {report.units_moved} units moved out of the cache" if report.units_moved else ""
    packed = f"pack {report.path}: {report.n_samples:,} views, {human_bytes(report.bytes)}{moved}"
    summary = summarise_pack(report.path)
    pin = f"pin       sha256:{summary['pack_json_sha256']} (of pack.json; train --expect-id takes it)"
    outcome = report.to_json() | {"pack_json_sha256": summary["pack_json_sha256"]}
    terminal.result(as_json, outcome, [packed, *report.step_lines(), pin], train_on(summary))


def _views(value: str | None, cache: Path) -> list[str] | None:
    """Names of view indices; a number means the first so many, and the probe where there is one."""
    from proteus_cache.cache.reader import open_cache
    from proteus_cache.pack.plan import first_views

    chosen = settings.names(value, "views")
    if chosen is None:
        return None
    if len(chosen) == 1 and chosen[0].lstrip("-").isdecimal():
        count = int(chosen[0])
        if not 1 <= count <= _MOST_VIEWS:
            raise UsageError(f"--views must be from 1 to {_MOST_VIEWS:,}, or names such as v000,v002, got {count}")
        return first_views(open_cache(cache), count)
    return list(chosen)


def pack_with_progress(
    cache: Path, out: Path, *, workers: int | None = None, yes: bool = False, **choices: Any
) -> PackReport:
    """Plan, print the plan, check the space, ask before a move, pack. `choices` as for `plan_pack`."""
    from proteus_cache.pack.build import run_pack, workers_that_fit
    from proteus_cache.pack.plan import plan_pack

    with terminal.phases() as phase:
        plan = plan_pack(cache, out, progress=lambda done, total: phase("calibration", "views")(done, total), **choices)
    terminal.note(plan.lines())
    n_workers = workers_that_fit(plan, workers)
    plan.check(n_workers)
    if plan.move:
        terminal.confirm(f"{cache}: remove every unit from the cache once it is packed?", yes)
    with terminal.progress("pack", "units") as update:
        return run_pack(plan, workers=n_workers, progress=update)
