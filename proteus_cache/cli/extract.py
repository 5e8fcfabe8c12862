"""`proteus-cache extract`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proteus_cache.cli import complete, ranks, settings, terminal

if TYPE_CHECKING:
    from proteus_cache.extract.config import ExtractConfig

FIELDS = (
    *("teacher", "weights", "images", "out", "views", "targets", "codec", "augment", "size", "view_format", "seed"),
    *(
        "calibration_images",
        "shard_size",
        "probe_images",
        "batch_size",
        "workers",
        "precision",
        "device",
        "gpus",
        "limit",
    ),
)
_WHAT = "Teacher and images"
_VIEWS = "Views"
_CACHE = "Cache"
_MACHINE = "Machine"


@terminal.command("finished units are kept; to go on", go_on=())
def extract_command(
    teacher: Annotated[
        str | None,
        typer.Option(
            help="dinov2_vits14, _vitb14, _vitl14, _vitg14 (or _reg), demo, timm:NAME, or vit.",
            autocompletion=complete.teachers,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="A .safetensors or .pth file, or random:SEED. Default: the official ones.", rich_help_panel=_WHAT
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Class folders, a flat folder or a .txt list. Default: $PROTEUS_IMAGES, else imagenet/train.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="Any of cls, patch, block.N. Default: cls,patch.",
            autocompletion=complete.targets,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Take this many images, mixed over classes. Default: all.", rich_help_panel=_WHAT),
    ] = None,
    views: Annotated[
        int | None, typer.Option(help="Augmented views of each image. Default: 4.", rich_help_panel=_VIEWS)
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(help="deit or none. Default: deit.", autocompletion=complete.augments, rich_help_panel=_VIEWS),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of a view in pixels. Default: the teacher's.", rich_help_panel=_VIEWS)
    ] = None,
    view_format: Annotated[
        str | None,
        typer.Option(help="jpeg or png. Default: jpeg.", autocompletion=complete.view_formats, rich_help_panel=_VIEWS),
    ] = None,
    probe_images: Annotated[
        int | None,
        typer.Option(
            help="Images that get one more view, never trained on. Default: 4096 from 16,384 images on, else 0.",
            rich_help_panel=_VIEWS,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of views, order and shards. Default: 0.", rich_help_panel=_VIEWS)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The cache. Default: $PROTEUS_HOME/caches/TEACHER, where PROTEUS_HOME is ./proteus unless set.",
            rich_help_panel=_CACHE,
        ),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(help=f"{complete.CODECS} Default: int8.", autocompletion=complete.codecs, rich_help_panel=_CACHE),
    ] = None,
    calibration_images: Annotated[
        int | None,
        typer.Option(help="Images that int4 or klt is fitted to. Default: 2000.", rich_help_panel=_CACHE),
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option(help="Images in a shard. Default: 1024.", rich_help_panel=_CACHE)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Views in one forward of the teacher. Default: 64 on GPUs, 16 else.", rich_help_panel=_MACHINE
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Rendering processes of each process. Default: by the usable cores.", rich_help_panel=_MACHINE
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16 or bf16. Default: fp16 on GPUs, fp32 else.",
            autocompletion=complete.precisions,
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cuda or cpu. Default: the GPUs there are.", autocompletion=complete.devices, rich_help_panel=_MACHINE
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            help="Processes: GPUs to use (default: all), or CPU processes with --device cpu.", rich_help_panel=_MACHINE
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of these settings; flags win over it.")
    ] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Plan, publish the manifest, and leave.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Agree to removals; extract never removes, so it never asks.")
    ] = False,
    as_json: terminal.Json = False,
    quiet: terminal.Quiet = False,
) -> None:
    """Run the teacher over augmented views of images and write a cache. Run it again to resume.

    Example: proteus-cache extract --teacher dinov2_vitg14 --images imagenet/train
    """
    given = settings.read_config(config, FIELDS)
    flags = {name: value for name, value in locals().items() if name in FIELDS}
    chosen = settings.merge(flags, given)
    n_processes = chosen.pop("gpus", None)
    ranks.check_asked(n_processes)
    outcome = _run(extract_config(chosen), n_processes, plan_only)
    terminal.result(as_json, outcome, _lines(outcome), _next_step(outcome))


def _usage(message: str) -> Exception:
    from proteus_cache.errors import UsageError

    return UsageError(message)


def extract_config(chosen: dict[str, Any]) -> ExtractConfig:
    """The settings of an extraction from flags and config file."""
    from proteus_cache.extract.config import ExtractConfig

    home = settings.home()
    teacher = chosen.get("teacher")
    out = settings.folder(chosen.pop("out", None), "out")
    if out is None:
        if teacher is None:
            raise _usage("no teacher: say which with --teacher, for example --teacher dinov2_vitg14")
        out = home / "caches" / settings.folder_name(str(teacher))
    images = settings.folder(chosen.pop("images", None), "images")
    return ExtractConfig(
        images=settings.images(images),
        out=out,
        home=home,
        targets=settings.names(chosen.pop("targets", None), "targets"),
        size_px=chosen.pop("size", None),
        **chosen,
    )


def _run(config: ExtractConfig, n_processes: int | None, plan_only: bool) -> dict[str, Any]:
    from proteus_cache.extract.run import describe_plan
    from proteus_cache.processes import Worker, speaks, worker_from_environment

    launched = worker_from_environment()
    count = 1 if launched else ranks.count_of(config.device, n_processes)
    shown, processes = speaks(launched), launched.count if launched else count
    planned = _plan(config, shown, processes)
    plan = describe_plan(config, planned, processes)
    if shown and not planned.is_new:
        terminal.note(plan.lines())
    plan.check()
    if plan_only:
        return {"cache": str(config.out), "manifest": planned.cache.manifest_digest, "plan": plan.to_json()}
    if count == 1:
        return _summary(config, _extract(config, planned, launched or Worker(0, 1)))
    del planned
    ranks.start(count, _extract_rank, config)
    return _summary(config, {})


def _plan(config: ExtractConfig, shown: bool, processes: int) -> Any:
    from proteus_cache.extract.planning import plan_cache

    with terminal.phases(shown) as phase:
        return plan_cache(
            config,
            processes=processes,
            announce=(lambda plan: terminal.note(plan.lines())) if shown else None,
            download_progress=lambda done, total: phase("teacher", "MB")(done / 1e6, (total or done) / 1e6),
            calibration_progress=lambda done, total: phase("calibration", "views")(done, total),
        )


def _extract_rank(config: ExtractConfig) -> None:
    """One of several processes that this command started."""
    import sys

    try:
        _extract_rank_command(config)
    except typer.Exit as leaving:
        sys.exit(leaving.exit_code)


@terminal.command(None)
def _extract_rank_command(config: ExtractConfig) -> None:
    from proteus_cache.processes import worker_from_environment

    worker = worker_from_environment()
    assert worker is not None, "start_ranks sets RANK and WORLD_SIZE"
    _extract(config, _plan(config, worker.index == 0, worker.count), worker)


def _extract(config: ExtractConfig, planned: Any, worker: Any) -> dict[str, Any]:
    from proteus_cache.extract.run import extract
    from proteus_cache.processes import speaks

    label = "extract" if worker.count == 1 else f"extract, process {worker.index + 1} of {worker.count}"
    with terminal.progress(label, "views", shown=speaks(worker)) as update:
        done = extract(config, planned, worker, lambda at: update(at.views_done, at.views_all, at.bytes_written))
    return {"units_committed": done.units_committed, "seconds": round(done.seconds, 3)}


def _summary(config: ExtractConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """How the cache stands now."""
    from proteus_cache.report.summary import summarise_cache

    return summarise_cache(config.out) | measured


def _lines(outcome: dict[str, Any]) -> list[str]:
    if "plan" in outcome:
        return [f"planned {outcome['cache']}"]
    n_indices = len(outcome["views"])
    n_views, n_bad = outcome["n_stored_views"], outcome["n_quarantined"]
    views = f"{n_views:,} view{'s' * (n_views != 1)} in {n_indices} view {'index' if n_indices == 1 else 'indices'}"
    state = "" if outcome["is_complete"] else f", {outcome['units_left']} units left to other processes"
    quarantined = f", {n_bad} image{'s' * (n_bad != 1)} quarantined" if n_bad else ""
    return [f"cache {outcome['path']}: {views}{quarantined}{state}"]


def _next_step(outcome: dict[str, Any]) -> str | None:
    from proteus_cache.next_steps import train_on

    if "plan" in outcome:
        same = terminal.again_command(without="--plan-only")
        return same or "the same command without --plan-only, on as many machines as you like"
    return train_on(outcome) if outcome["is_complete"] else None
