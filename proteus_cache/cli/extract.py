"""`proteus-cache extract`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proteus_cache.cli import ranks, settings, terminal

if TYPE_CHECKING:
    from proteus_cache.extract.config import ExtractConfig

_FIELDS = (
    *(
        "teacher",
        "weights",
        "images",
        "out",
        "views",
        "targets",
        "codec",
        "augment",
        "size",
        "view_format",
        "seed",
    ),
    *("shard_size", "probe_images", "batch_size", "workers", "precision", "device", "gpus", "limit"),
)
_AGAIN = "finished units are kept: run the same command again to go on"


@terminal.command(_AGAIN)
def extract_command(
    config: Annotated[Path | None, typer.Option(help="YAML file with any of these settings.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="dinov2_vits14, _vitb14, _vitl14, _vitg14 (or _reg), timm:NAME, or vit."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="A .safetensors or .pth file, or random:SEED. Default: the official ones."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Class folders, a flat folder or a .txt list. Default: $PROTEUS_IMAGES, else imagenet/train."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The cache. Default: $PROTEUS_HOME/caches/TEACHER.")] = None,
    views: Annotated[int | None, typer.Option(help="Augmented views of each image. Default: 4.")] = None,
    targets: Annotated[str | None, typer.Option(help="Any of cls, patch, block.N. Default: cls,patch.")] = None,
    codec: Annotated[str | None, typer.Option(help="float32, float16 or int8. Default: int8.")] = None,
    augment: Annotated[str | None, typer.Option(help="deit or none. Default: deit.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of a view in pixels. Default: the teacher's.")] = None,
    view_format: Annotated[str | None, typer.Option(help="jpeg or png. Default: jpeg.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of views, order and shards. Default: 0.")] = None,
    shard_size: Annotated[int | None, typer.Option(help="Images in a shard. Default: 1024.")] = None,
    probe_images: Annotated[
        int | None,
        typer.Option(
            help="Images that get one more view, never trained on. Default: 4096 from 16,384 images on, else 0."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Views in one forward of the teacher. Default: 64 on GPUs, 16 else.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Rendering processes of each process. Default: by the usable cores.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16. Default: fp16 on GPUs, fp32 else.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: the GPUs there are.")] = None,
    gpus: Annotated[
        int | None, typer.Option(help="Processes: GPUs to use (default: all), or CPU processes with --device cpu.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Take this many images, mixed over classes. Default: all.")] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Plan, publish the manifest, and leave.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Agree to removals; extract never removes, so it never asks.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run the teacher over augmented views of images and write a cache. Run it again to resume.

    Example: proteus-cache extract --teacher dinov2_vitg14 --images imagenet/train
    """
    given = settings.read_config(config, _FIELDS)
    flags = {name: value for name, value in locals().items() if name in _FIELDS}
    chosen = settings.merge(flags, given)
    n_processes = chosen.pop("gpus", None)
    ranks.check_asked(n_processes)
    outcome = _run(_config(chosen), n_processes, plan_only)
    terminal.result(as_json, outcome, _lines(outcome))


def _usage(message: str) -> Exception:
    from proteus_cache.errors import UsageError

    return UsageError(message)


def _config(chosen: dict[str, Any]) -> ExtractConfig:
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
    from proteus_cache.processes import Worker, worker_from_environment

    launched = worker_from_environment()
    count = 1 if launched else ranks.count_of(config.device, n_processes)
    shown, processes = launched is None or launched.index == 0, launched.count if launched else count
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

    with terminal.progress("teacher", "MB", shown) as update:
        return plan_cache(
            config,
            processes=processes,
            announce=(lambda plan: terminal.note(plan.lines())) if shown else None,
            download_progress=lambda done, total: update(done / 1e6, (total or done) / 1e6, 0),
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

    label = "extract" if worker.count == 1 else f"extract, process 1 of {worker.count}"
    with terminal.progress(label, "views", shown=worker.index == 0) as update:
        done = extract(config, planned, worker, lambda at: update(at.views_done, at.views_all, at.bytes_written))
    return {"units_committed": done.units_committed, "seconds": round(done.seconds, 3)}


def _summary(config: ExtractConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """How the cache stands now."""
    from proteus_cache.report.summary import summarise_cache

    return summarise_cache(config.out) | measured


def _lines(outcome: dict[str, Any]) -> list[str]:
    if "plan" in outcome:
        return [
            f"planned {outcome['cache']}",
            "next: the same command without --plan-only, on as many machines as you like",
        ]
    n_indices = len(outcome["views"])
    views = f"{outcome['n_stored_views']:,} views in {n_indices} view {'index' if n_indices == 1 else 'indices'}"
    state = "" if outcome["is_complete"] else f", {outcome['units_left']} units left to other processes"
    quarantined = f", {outcome['n_quarantined']} images quarantined" if outcome["n_quarantined"] else ""
    return [
        f"cache {outcome['path']}: {views}{quarantined}{state}",
        f"next: proteus-cache train --student vit_s14 --data {outcome['path']}",
    ]
