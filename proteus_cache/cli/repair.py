"""`proteus-cache repair`."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proteus_cache.cli import complete, settings, terminal
from proteus_cache.cli.extract import FIELDS, extract_config
from proteus_cache.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from proteus_cache.extract.config import ExtractConfig
    from proteus_cache.repair.report import RepairReport
    from proteus_cache.stores import Kind

_CACHE = "A cache: as for its extract"
_EXTRACT_FLAGS = ("weights", "images", "batch_size", "workers", "precision", "device", "calibration_images")


@terminal.command("a unit keeps what it has until its replacement is written; to go on", go_on=())
def repair_command(
    path: Annotated[
        Path,
        typer.Argument(help="A cache, pack or run.", autocompletion=complete.stores("cache", "pack", "run")),
    ],
    fast: Annotated[
        bool, typer.Option("--fast", help="Look for damage by structure, names and sizes only; read no data.")
    ] = False,
    unit: Annotated[
        list[str] | None,
        typer.Option(help="Make this unit again even if it looks whole, such as v000/s00003. May be given again."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")] = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="A pack: the cache that it was made from. Default: the one in $PROTEUS_HOME/caches.",
            autocompletion=complete.stores("cache"),
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="The same images. Default: $PROTEUS_IMAGES, else imagenet/train.", rich_help_panel=_CACHE),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="The same weights. Default: the official ones.", rich_help_panel=_CACHE)
    ] = None,
    calibration_images: Annotated[
        int | None,
        typer.Option(help="Images that int4 or klt was fitted to. Default: 2000.", rich_help_panel=_CACHE),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Views in one forward. Default: 64 on GPUs, 16 else.", rich_help_panel=_CACHE)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Rendering processes. Default: by the usable cores.", rich_help_panel=_CACHE)
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16 or bf16. Default: as planned on GPUs, fp32 else.",
            autocompletion=complete.precisions,
            rich_help_panel=_CACHE,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cuda or cpu. Default: the best there is.", autocompletion=complete.devices, rich_help_panel=_CACHE
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the extract; flags win over it.", rich_help_panel=_CACHE)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to the removal of damaged checkpoints.")] = False,
    as_json: terminal.Json = False,
    quiet: terminal.Quiet = False,
) -> None:
    """Make again exactly what verify finds damaged. Ends with 0 only when the store is whole.

    Example: proteus-cache repair proteus/caches/dinov2_vitg14 --images imagenet/train
    """
    from proteus_cache.report.summary import kind_of

    given = settings.read_config(config, FIELDS)
    flags = {name: value for name, value in locals().items() if name in _EXTRACT_FLAGS}
    kind, out = kind_of(path), settings.folder(path, "path")
    chosen = settings.merge(flags, given)
    assert out is not None, "typer asks for PATH"
    _refuse_foreign_flags(kind, flags, given, cache, unit)
    with terminal.phases() as phase:
        report = _repair(
            kind,
            out,
            config=partial(_settings, out, chosen),
            cache=settings.folder(cache, "cache"),
            yes=yes,
            shared={"read_data": not fast, "dry_run": dry_run, "phase": phase},
            units=tuple(unit or ()),
        )
    step = _next_step(report, fast, [name for name, value in chosen.items() if value is not None])
    terminal.result(as_json, report.to_json() | {"next": step}, report.lines(), step)
    if not report.is_done:
        raise typer.Exit(1)


def _refuse_foreign_flags(
    kind: Kind, flags: dict[str, Any], given: dict[str, Any], cache: Path | None, unit: list[str] | None
) -> None:
    """Flags that say nothing about a store of this kind are a mistake."""
    wrong = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value is not None and kind != "cache"]
    wrong += ["--config"] if given and kind != "cache" else []
    wrong += ["--cache"] if cache is not None and kind != "pack" else []
    wrong += ["--unit"] if unit and kind == "run" else []
    if wrong:
        raise UsageError(
            f"{' and '.join(wrong)}: of no use for a {kind}; leave {'it' if len(wrong) == 1 else 'them'} out"
        )


def _settings(path: Path, chosen: dict[str, Any]) -> ExtractConfig | None:
    """Asked for once a unit has to be extracted again; None where no images are given or found."""
    has_images = chosen.get("images") is not None or bool(os.environ.get("PROTEUS_IMAGES"))
    try:
        return extract_config({name: value for name, value in chosen.items() if name != "gpus"} | {"out": path})
    except ConfigError:
        raise
    except UsageError:
        if has_images:
            raise
        return None


def _repair(
    kind: Kind,
    path: Path,
    *,
    config: Any,
    cache: Path | None,
    yes: bool,
    shared: dict[str, Any],
    units: tuple[str, ...],
) -> RepairReport:
    if kind == "cache":
        from proteus_cache.repair.cache import repair_cache

        return repair_cache(path, config, home=settings.home(), units=units, **shared)
    if kind == "pack":
        from proteus_cache.repair.pack import repair_pack

        return repair_pack(path, cache=cache, home=settings.home(), units=units, **shared)
    from proteus_cache.repair.run_folder import repair_run

    return repair_run(path, agree=lambda question: terminal.confirm(question, yes), **shared)


def _next_step(report: RepairReport, fast: bool, given: list[str]) -> str | None:
    """The command to run next; flags that this one lacked stand there with a word in place of their value."""
    from proteus_cache.next_steps import after, command_line, resume_training
    from proteus_cache.report.summary import summarise
    from proteus_cache.stores import repair_command

    if (report.is_dry_run and report.actions) or report.needs or report.error is not None:
        pairs = zip(report.needs[::2], report.needs[1::2], strict=True)
        needs = [part for flag, word in pairs if flag.removeprefix("--") not in given for part in (flag, word)]
        without = "--dry-run" if report.is_dry_run and not needs else None
        return terminal.again_command(*needs, without=without) or repair_command(report.path)
    if not report.is_whole or fast:
        if report.kind == "run" and any("final weights" in action.remedy for action in report.actions):
            return resume_training(report.path)
        return command_line("verify", report.path, "--read-data")
    return after(summarise(report.path))
