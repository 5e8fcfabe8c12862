"""`proteus-cache train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proteus_cache.cli import ranks, settings, terminal

if TYPE_CHECKING:
    from proteus_cache.train.config import TrainConfig
    from proteus_cache.train.progress import Progress, Rates

_FIELDS = (
    *(
        "student",
        "data",
        "out",
        "epochs",
        "max_steps",
        "batch_size",
        "lr",
        "workers",
        "precision",
        "device",
        "seed",
    ),
    "checkpoint_every",
)
_AGAIN = "add --resume to the same command to go on from the newest checkpoint"


@terminal.command(_AGAIN)
def train_command(
    student: Annotated[str | None, typer.Option(help="vit_ti14, vit_s14, vit_b14 or vit_l14.")] = None,
    data: Annotated[Path | None, typer.Option(help="A pack or a cache. Default: the only one in PROTEUS_HOME.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run. Default: $PROTEUS_HOME/runs/STUDENT.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the schedule. Default: 300.")] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Stop after this many steps of the schedule. Default: its end.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Views in a step, over all processes. Default: 1024, 256 for vit_l14.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: 5e-4 x batch / 512.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Reader processes of each rank. Default: the usable cores less one.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, fp16 or bf16. Default: bf16 on GPUs that have it, else fp16; fp32 on CPUs."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: the GPUs there are.")] = None,
    gpus: Annotated[
        int | None, typer.Option(help="Processes: GPUs to use (default: all), or CPU processes with --device cpu.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of initial weights, order and masks. Default: 0.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: 1000.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, or start when there is none.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with these settings and all others of the recipe.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Replace the logs of a run that has no checkpoint yet.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a student from a pack (a cache is packed first); no teacher runs.

    Example: proteus-cache train --student vit_s14 --data proteus/packs/3f0c91d2a4b8e677
    """
    flags = {name: value for name, value in locals().items() if name in _FIELDS}
    given = _config_file(config)
    chosen = settings.merge(flags | {"gpus": gpus}, given)
    asked_gpus = chosen.pop("gpus", None)
    outcome = _run(chosen, asked_gpus, resume, yes, str(config) if config else "train")
    if _is_first():
        terminal.result(as_json, outcome, _lines(outcome))
    if outcome["stopped_by"] is not None:
        raise typer.Exit(1)


def _config_file(path: Path | None) -> dict[str, Any]:
    """Settings of a config file: its `train` section where it has one (as a run's config.yaml does)."""
    from proteus_cache.errors import ConfigError

    given = settings.read_config(path)
    if "train" not in given:
        return given
    section = given["train"]
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: `train:` must hold `name: value` lines")
    beside = sorted(given.keys() - {"train", "pack", "versions"})
    if beside:
        raise ConfigError(f"{path}: {beside[0]!r} stands beside the section `train:`; move it into the section")
    return {str(key).replace("-", "_"): value for key, value in section.items()}


def _is_first() -> bool:
    """Whether this process speaks for the run: launchers start several with one stdout."""
    from proteus_cache.processes import rank_from_environment

    rank = rank_from_environment()
    return rank is None or rank.index == 0


def _run(chosen: dict[str, Any], gpus: Any, resume: bool, yes: bool, what: str) -> dict[str, Any]:
    from proteus_cache.errors import UsageError
    from proteus_cache.processes import rank_from_environment
    from proteus_cache.train.config import config_from_mapping
    from proteus_cache.workspace import find_training_data

    if chosen.get("student") is None:
        raise UsageError("no student: say which with --student, for example --student vit_s14")
    ranks.check_asked(gpus)
    home = settings.home()
    default_out = home / "runs" / settings.folder_name(str(chosen["student"]))
    chosen["out"] = settings.folder(chosen.get("out"), "out") or default_out
    given_data = settings.folder(chosen.get("data"), "data")
    config_from_mapping(chosen | {"data": given_data or "."}, what)  # refuse bad settings before a long packing
    launched = rank_from_environment()
    data = find_training_data(home, given_data)
    if data.cache is not None:
        _pack_first(data.cache, data.pack, launched)
    config = config_from_mapping(chosen | {"data": data.pack}, what)
    _ask_to_replace(config, resume, yes)
    count = 1 if launched else ranks.count_of(config.device, gpus)
    if config.global_batch < count:
        raise UsageError(
            f"a batch of {config.global_batch} cannot be shared by {count} processes; "
            "raise --batch-size or lower --gpus"
        )
    if _is_first():
        terminal.note(_plan_lines(config, launched.count if launched else count, resume))
    if count == 1:
        return _train(config, resume)
    ranks.start(count, _train_rank, config, resume)
    return _outcome(config, None)


def _pack_first(cache: Path, pack: Path, launched: Any) -> None:
    """`train --data CACHE`: make the pack before any rank starts."""
    from proteus_cache.errors import UsageError

    if launched is not None and launched.count > 1:
        raise UsageError(
            f"{cache}: pack it before a launcher starts {launched.count} processes: "
            f"proteus-cache pack {cache} --out {pack}"
        )
    from proteus_cache.cli.pack import pack_with_progress

    terminal.note(f"packing {cache} to {pack} first")
    pack_with_progress(cache, pack)


def _ask_to_replace(config: TrainConfig, resume: bool, yes: bool) -> None:
    from proteus_cache.train.run_folder import check_run_folder, files_to_replace

    check_run_folder(config.out, resume=resume)
    replaced = files_to_replace(config.out, resume=resume)
    if replaced:
        terminal.confirm(f"{config.out}: replace {', '.join(replaced)} of a run that has no checkpoint?", yes)


def _plan_lines(config: TrainConfig, processes: int, resume: bool) -> list[str]:
    from proteus_cache.train.checkpoint import checkpoint_steps
    from proteus_cache.train.planning import plan_training
    from proteus_cache.train.run_folder import CHECKPOINTS

    lines = plan_training(config, processes).lines()
    steps = checkpoint_steps(config.out / CHECKPOINTS) if resume else []
    return [*lines, f"resumes   after step {steps[-1]:,}"] if steps else lines


def _train_rank(config: TrainConfig, resume: bool) -> None:
    """One of several processes that this command started."""
    try:
        outcome = _train_rank_command(config, resume)
    except typer.Exit as leaving:
        sys.exit(leaving.exit_code)
    if outcome["stopped_by"] is not None:
        sys.exit(1)


@terminal.command(None)
def _train_rank_command(config: TrainConfig, resume: bool) -> dict[str, Any]:
    return _train(config, resume)


def _train(config: TrainConfig, resume: bool) -> dict[str, Any]:
    from proteus_cache.train.loop import train

    latest: list[Progress] = []
    with terminal.progress("train", "steps", shown=_is_first()) as update:

        def show(at: Progress) -> None:
            latest[:] = [at]
            update(at.step, at.n_steps, 0)

        done = train(config, resume=resume, replace=True, progress=show)
    if latest:  # in the first process only
        terminal.note(_reading_line(latest[0].rates))
    return _outcome(config, done)


def _reading_line(rates: Rates) -> str:
    """Whether the reader kept up, by the last reading of the rates."""
    return (
        f"read      {rates.gb_per_s_got:.3g} GB/s, {rates.gb_per_s_needed:.3g} GB/s keep the device busy; "
        f"it waited {rates.waiting:.0%} of the time ({rates.views_per_s:,.0f} views/s)"
    )


def _outcome(config: TrainConfig, done: Any) -> dict[str, Any]:
    """How the run stands."""
    from proteus_cache.report.summary import summarise_run

    summary = summarise_run(config.out)
    stopped_by = done.stopped_by if done is not None else None
    return {
        "run": str(config.out),
        "stopped_by": stopped_by,
        "weights": summary["weights"],
        "last": summary["last_step"],
    }


def _lines(outcome: dict[str, Any]) -> list[str]:
    last = outcome["last"] or {}
    if outcome["stopped_by"] is not None:
        return [
            f"run {outcome['run']}: stopped by {outcome['stopped_by']} after step {last.get('step', 0):,}; {_AGAIN}"
        ]
    return [
        f"run {outcome['run']}: step {last.get('step', 0):,}, loss {last.get('loss', float('nan')):.4g}; "
        f"wrote {', '.join(outcome['weights'])}",
        f"next: proteus-cache eval {outcome['run']} --images DIR",
    ]
