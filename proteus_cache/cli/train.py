"""`proteus-cache train`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proteus_cache.cli import complete, ranks, settings, terminal

if TYPE_CHECKING:
    from proteus_cache.plan.training import TrainPlan
    from proteus_cache.train.config import TrainConfig
    from proteus_cache.train.progress import Progress, Rates

_FIELDS = (
    *("student", "data", "out", "expect_id", "init", "epochs", "max_steps", "batch_size", "repeats", "lr", "seed"),
    *("live", "teacher", "images", "size_px"),
    *("workers", "precision", "device", "compile", "checkpoint_every"),
)
_LIVE_FIELDS = {"weights": "teacher_weights", "size": "size_px"}
"""Flags whose setting has another name in a config file, where it stands beside those of the student."""
_PATIENCE_S = 600.0
"""Several processes stop where they meet: up to `log_every` steps on, or after a measurement; then they save."""
_WHAT = "Student and data"
_RECIPE = "Recipe"
_LIVE = "Live teacher"
_MACHINE = "Machine"
_RUN = "Run"


@dataclass(frozen=True, slots=True)
class _Given:
    """Where settings stood, for messages about them."""

    file: str
    flags: set[str]


@terminal.command("checkpoints are kept; to go on", go_on=("--resume",))
def train_command(
    student: Annotated[
        str | None,
        typer.Option(
            help="vit_ti14, vit_s14, vit_b14 or vit_l14; vit_demo for first tries.",
            autocompletion=complete.students,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A pack or a cache. Default: the only one in PROTEUS_HOME.",
            autocompletion=complete.stores("pack", "cache"),
            rich_help_panel=_WHAT,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run. Default: $PROTEUS_HOME/runs/STUDENT.", rich_help_panel=_WHAT)
    ] = None,
    expect_id: Annotated[
        str | None,
        typer.Option(help="SHA-256 of its pack.json, as `info` shows it; refuse another pack.", rich_help_panel=_WHAT),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of the schedule. Default: 300.", rich_help_panel=_RECIPE)
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(help="Stop after this many steps of the schedule. Default: its end.", rich_help_panel=_RECIPE),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Views in a step, over all processes. Default: 1024, 256 for vit_l14.", rich_help_panel=_RECIPE
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate. Default: 5e-4 x batch / 512.", rich_help_panel=_RECIPE),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Start weights: a student, a DINOv2 or Proteus file, timm's. Default: random.", rich_help_panel=_RECIPE
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            help="Views of an image in an epoch, which draws one image of as many. Default: 1; published: 3.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of initial weights, order and masks. Default: 0.", rich_help_panel=_RECIPE)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with these settings and all others of the recipe.", rich_help_panel=_RECIPE),
    ] = None,
    live: Annotated[
        bool | None,
        typer.Option(
            "--live",
            help="Run the teacher in every step, on fresh views of --images, or on stored ones (--replay).",
            rich_help_panel=_LIVE,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Of a live run.", autocompletion=complete.teachers, rich_help_panel=_LIVE),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Its weights: a file, or random:SEED. Default: published ones.", rich_help_panel=_LIVE),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Photographs. Default: PROTEUS_IMAGES.", rich_help_panel=_LIVE)
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            help="Stored views of this cache or pack, in its order, instead of fresh ones.",
            autocompletion=complete.stores("pack", "cache"),
            rich_help_panel=_LIVE,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Side of fresh views in pixels. Default: the teacher's.", rich_help_panel=_LIVE),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Reader processes of each rank. Default: the usable cores less one.", rich_help_panel=_MACHINE
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16 or bf16. Default: bf16 on GPUs that have it, else fp16; fp32 on CPUs.",
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
    compile_student: Annotated[
        bool | None,
        typer.Option(
            "--compile", help="Compile the student: minutes first, faster steps then.", rich_help_panel=_MACHINE
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: 1000.", rich_help_panel=_RUN)
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the newest checkpoint, or start when there is none.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Replace the logs of a run that has no checkpoint yet.", rich_help_panel=_RUN)
    ] = False,
    as_json: terminal.Json = False,
    quiet: terminal.Quiet = False,
) -> None:
    """Train a student from a pack (a cache is packed first); no teacher runs, unless --live asks for one.

    Example: proteus-cache train --student vit_s14
    """
    flags = {name: value for name, value in locals().items() if name in _FIELDS}
    flags |= {"teacher_weights": weights, "size_px": size, "compile": compile_student}
    given = _config_file(config)
    chosen = settings.merge(flags | {"gpus": gpus}, given)
    asked_gpus = chosen.pop("gpus", None)
    _choose_views(chosen, data, replay)
    on_command_line = {name for name, value in flags.items() if value is not None}
    outcome = _run(chosen, asked_gpus, resume, yes, _Given(str(config or "train"), on_command_line))
    if _is_first():
        terminal.result(as_json, outcome, _lines(outcome), _next_step(outcome))
    # Of ranks that a launcher started the first alone says so: `srun --kill-on-bad-exit` would not let it finish.
    if outcome["stopped_by"] is not None and _is_first():
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
    beside = sorted(given.keys() - {"train", "pack", "live", "versions"})
    if beside:
        raise ConfigError(f"{path}: {beside[0]!r} stands beside the section `train:`; move it into the section")
    return {str(key).replace("-", "_"): value for key, value in section.items()}


def _choose_views(chosen: dict[str, Any], data: Path | None, replay: Path | None) -> None:
    """What a live run looks at: `--replay` fills in the pack, and images are found as `extract` finds them."""
    from proteus_cache.errors import UsageError

    if not chosen.get("live"):
        only = [name for name in ("teacher", "weights", "images", "size") if chosen.get(_LIVE_FIELDS.get(name, name))]
        if replay is not None:
            raise UsageError("--replay is of a live run: add --live and --teacher, or give the pack with --data")
        if only:
            raise UsageError(f"--{only[0]} is of a live run: add --live, or leave it out to train from stored targets")
        return
    if data is not None:
        raise UsageError("--data trains from stored targets; a live run takes --replay PACK, or --images DIR")
    if replay is not None:
        if chosen.get("images") is not None:
            raise UsageError("--replay takes stored views, and --images fresh ones: give one of them")
        chosen["data"] = replay
    elif chosen.get("data") is None:
        given = settings.folder(chosen.get("images"), "images")
        chosen["images"] = settings.images(given, "train on").absolute()


def _is_first() -> bool:
    """Whether this process speaks for the run: launchers start several with one stdout."""
    from proteus_cache.processes import rank_from_environment

    rank = rank_from_environment()
    return rank is None or rank.index == 0


def _run(chosen: dict[str, Any], gpus: Any, resume: bool, yes: bool, where: _Given) -> dict[str, Any]:
    from proteus_cache.errors import UsageError
    from proteus_cache.processes import rank_from_environment
    from proteus_cache.teachers.registry import check_teacher_name
    from proteus_cache.train.config import config_from_mapping
    from proteus_cache.train.start import with_init_digest
    from proteus_cache.workspace import find_training_data

    if chosen.get("student") is None:
        raise UsageError("no student: say which with --student, for example --student vit_s14")
    ranks.check_asked(gpus)
    home = settings.home()
    default_out = home / "runs" / settings.folder_name(str(chosen["student"]))
    chosen["out"] = settings.folder(chosen.get("out"), "out") or default_out
    given_data = settings.folder(chosen.get("data"), "data")
    chosen["init"] = settings.folder(chosen.get("init"), "init")
    # Bad settings are refused before a long packing.
    is_fresh = chosen.get("images") is not None
    first = chosen if is_fresh else chosen | {"data": given_data or "."}
    with_init_digest(config_from_mapping(first, where.file, where.flags))
    if chosen.get("live"):
        check_teacher_name(str(chosen["teacher"]))
    launched = rank_from_environment()
    if not is_fresh:
        data = find_training_data(home, given_data)
        if data.cache is not None:
            if chosen.get("expect_id") is not None:
                raise UsageError(
                    f"{data.cache}: --expect-id names a pack, and this cache would have to be packed first; run "
                    "`proteus-cache pack` on it and give the pack with --data"
                )
            if chosen.get("live"):
                _check_teacher_of(data.cache, str(chosen["teacher"]))
            _pack_first(data.cache, data.pack, launched)
        chosen["data"] = data.pack
    config = config_from_mapping(chosen, where.file, where.flags)
    _ask_to_replace(config, resume, yes)
    count = 1 if launched else ranks.count_of(config.device, gpus)
    if config.global_batch < count:
        raise UsageError(
            f"a batch of {config.global_batch} cannot be shared by {count} processes; "
            "raise --batch-size or lower --gpus"
        )
    if _is_first():
        processes = launched.count if launched else count
        terminal.note([*_plan_lines(config, processes), *_resume_lines(config, resume)])
    if count == 1:
        return _train(config, resume)
    try:
        ranks.start(count, _train_rank, config, resume, patience_s=_PATIENCE_S)
    except KeyboardInterrupt as interruption:
        if not _checkpoint_steps(config):
            raise
        return _outcome(config, str(interruption) or "a signal")
    return _outcome(config, None)


def _check_teacher_of(cache: Path, teacher: str) -> None:
    """Refuse to replay a cache by another teacher before it is packed; its weights are compared later."""
    from proteus_cache.cache.reader import open_cache
    from proteus_cache.errors import UsageError

    made_by = open_cache(cache).manifest.teacher
    if made_by.name != teacher:
        raise UsageError(
            f"{cache}: was made by {made_by.name} ({made_by.weights_source}), and the live teacher is {teacher}; a "
            "replay needs the same: give its --teacher and --weights"
        )


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


def _plan_lines(config: TrainConfig, processes: int) -> list[str]:
    """The plan; that of fresh views is known when the images are listed and the teacher is loaded."""
    from proteus_cache.train.planning import plan_training

    if config.data is None:
        return [f"teacher   {config.teacher}, live, on fresh views of {config.images}"]
    lines = plan_training(config, processes).lines()
    return [*lines, f"teacher   {config.teacher}, live, on the stored views"] if config.live else lines


def _resume_lines(config: TrainConfig, resume: bool) -> list[str]:
    steps = _checkpoint_steps(config) if resume else []
    return [f"resumes   after step {steps[-1]:,}"] if steps else []


def _checkpoint_steps(config: TrainConfig) -> list[int]:
    from proteus_cache.train.checkpoint import checkpoint_steps
    from proteus_cache.train.run_folder import CHECKPOINTS

    return checkpoint_steps(config.out / CHECKPOINTS)


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
            update(at.step, at.n_steps, detail=_detail(at))

        on_plan = _note_plan if config.data is None else None
        done = train(config, resume=resume, replace=True, home=settings.home(), on_plan=on_plan, progress=show)
    if latest:  # in the first process only
        terminal.note(_reading_line(latest[0].rates))
    return _outcome(config, done.stopped_by)


def _note_plan(plan: TrainPlan) -> None:
    terminal.note(plan.lines())


def _detail(at: Progress) -> str:
    """Beside the progress bar: rates, the loss, and those after the last epoch."""
    from proteus_cache.plan.human import human_bytes, human_rate

    read = human_bytes(at.rates.gb_per_s_got * 1e9)
    measured = "".join(f", {kind.replace('_', ' ')} {loss:.4g}" for kind, loss in at.after_epoch.items())
    return f"{human_rate(at.rates.views_per_s)} views/s, {read}/s, loss {at.loss:.4g}{measured}"


def _reading_line(rates: Rates) -> str:
    """Whether the reader kept up, by the last reading of the rates."""
    from proteus_cache.plan.human import human_bytes, human_rate

    got, needed = human_bytes(rates.gb_per_s_got * 1e9), human_bytes(rates.gb_per_s_needed * 1e9)
    return (
        f"read      {got}/s, {needed}/s keep the device busy; it waited {rates.waiting:.0%} of the time "
        f"({human_rate(rates.views_per_s)} views/s)"
    )


def _outcome(config: TrainConfig, stopped_by: str | None) -> dict[str, Any]:
    """How the run stands."""
    from proteus_cache.report.summary import summarise_run

    summary = summarise_run(config.out)
    steps = _checkpoint_steps(config)
    return {
        "run": str(config.out),
        "stopped_by": stopped_by,
        "weights": summary["weights"],
        "last": summary["last_step"],
        "after_epoch": summary["last_epoch"],
        "checkpoint": steps[-1] if steps else None,
    }


def _lines(outcome: dict[str, Any]) -> list[str]:
    last = outcome["last"] or {}
    if outcome["stopped_by"] is not None:
        kept = f"the checkpoint of step {outcome['checkpoint']:,} is kept" if outcome["checkpoint"] else "nothing kept"
        return [f"run {outcome['run']}: stopped by {outcome['stopped_by']}; {kept}"]
    lines = [
        f"run {outcome['run']}: step {last.get('step', 0):,}, loss {last.get('loss', float('nan')):.4g}; "
        f"wrote {', '.join(outcome['weights'])}"
    ]
    return [*lines, *_gap_lines(outcome["after_epoch"])]


def _gap_lines(after_epoch: dict[str, Any] | None) -> list[str]:
    """The three losses and what they ask for."""
    from proteus_cache.train.advice import advise

    losses = {kind: after_epoch[kind] for kind in ("seen", "probe", "held_out") if after_epoch and after_epoch[kind]}
    if not losses:
        return []
    stated = ", ".join(f"{kind.replace('_', '-')} {loss:.4g}" for kind, loss in losses.items())
    return [f"losses after the last epoch: {stated} views", *(advice.text for advice in advise(after_epoch or {}))]


def _next_step(outcome: dict[str, Any]) -> str:
    from proteus_cache.next_steps import command_line

    if outcome["stopped_by"] is not None:
        same = terminal.again_command("--resume")
        return same or "the same command with --resume"
    return f"{command_line('eval', outcome['run'], '--images')} DIR"
