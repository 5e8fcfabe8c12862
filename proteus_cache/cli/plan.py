"""`proteus-cache plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proteus_cache.cli import complete, settings, terminal


@terminal.command("nothing was written: run it again")
def plan_command(
    teacher: Annotated[
        str, typer.Option(help="dinov2_vits14, _vitb14, _vitl14, _vitg14 (or _reg), demo, timm:NAME, or vit.")
    ] = "dinov2_vitg14",
    weights: Annotated[Path | None, typer.Option(help="The file of teacher vit; others need none here.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Count these images and render a few of them. Default: ImageNet's sizes.")
    ] = None,
    n_images: Annotated[
        int | None, typer.Option(help="Images to extract. Default: those of --images, else ImageNet-1K's 1,281,167.")
    ] = None,
    views: Annotated[int | None, typer.Option(help="Augmented views of each image. Default: 4.")] = None,
    targets: Annotated[str | None, typer.Option(help="Any of cls, patch, block.N. Default: cls,patch.")] = None,
    codec: Annotated[str | None, typer.Option(help=f"{complete.CODECS} Default: int8.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of a view in pixels. Default: the teacher's.")] = None,
    student: Annotated[
        list[str] | None, typer.Option(help="A student to train; may be given again. Default: the four of the paper.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of each student.")] = 300,
    gpus: Annotated[int | None, typer.Option(help="GPUs that share the work. Default: those here, else 1.")] = None,
    gpu_kind: Annotated[
        str | None, typer.Option(help="a100, h100, h200 or rtx3090. Default: the kind found here, else a100.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the cache would be. Default: $PROTEUS_HOME/caches/TEACHER.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the rates here, in about a minute, instead of the table's.")
    ] = False,
    as_json: terminal.Json = False,
    quiet: terminal.Quiet = False,
) -> None:
    """Say what a cache and the students trained from it will cost, before anything is spent.

    Example: proteus-cache plan --teacher dinov2_vitg14 --views 4 --student vit_s14 --gpus 8 --gpu-kind a100
    """
    from proteus_cache.plan.config import PlanConfig
    from proteus_cache.plan.report import next_step, plan_json, plan_lines
    from proteus_cache.plan.whole import make_plan

    home = settings.home()
    place = settings.folder(out, "out")
    config = PlanConfig(
        out=place or home / "caches" / settings.folder_name(teacher),
        is_out_given=place is not None,
        home=home,
        teacher=teacher,
        weights=None if weights is None else str(weights),
        images=settings.folder(images, "images"),
        n_images=n_images,
        views=views,
        targets=settings.names(targets, "targets"),
        codec=codec,
        size_px=size,
        students=tuple(student) if student else None,
        epochs=epochs,
        gpus=gpus,
        gpu_kind=gpu_kind,
        measure=measure,
    )
    plan = make_plan(config, lambda what: terminal.note(f"measures  {what}"))
    terminal.result(as_json, plan_json(plan), plan_lines(plan), next_step(plan))
