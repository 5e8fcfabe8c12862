"""`proteus-cache verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proteus_cache.cli import complete, settings, terminal
from proteus_cache.errors import UsageError

if TYPE_CHECKING:
    from proteus_cache.cache.share import Share
    from proteus_cache.cache.verify import Finding
    from proteus_cache.recompute.run import RecomputeReport
    from proteus_cache.stores import Kind

_TEACHER = "With --recompute"
_SUGGESTED = 64
"""Views to compute again."""


@terminal.command("verify changes nothing; to repeat it", go_on=())
def verify_command(
    path: Annotated[
        Path,
        typer.Argument(help="A cache, pack or run.", autocompletion=complete.stores("cache", "pack", "run")),
    ],
    read_data: Annotated[
        bool, typer.Option("--read-data", help="Read everything and check every digest and checksum.")
    ] = False,
    read_data_subset: Annotated[
        str | None,
        typer.Option(metavar="N/T", help="Read the data of every T-th unit only, the N-th share; 1/7 to 7/7 read all."),
    ] = None,
    expect_id: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="SHA-256 of a pack's pack.json, as `info` shows it; refuse another pack."),
    ] = None,
    recompute: Annotated[
        int | None,
        typer.Option(metavar="K", help="Run the teacher again on K random stored views and compare."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the choice of views. Default: a new one.", rich_help_panel=_TEACHER)
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="The teacher's weights, as for extract. Default: as there.", rich_help_panel=_TEACHER),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cuda or cpu. Default: the best there is.", autocompletion=complete.devices, rich_help_panel=_TEACHER
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Views in one forward. Default: 64 on GPUs, 16 else.", rich_help_panel=_TEACHER)
    ] = None,
    as_json: terminal.Json = False,
    quiet: terminal.Quiet = False,
) -> None:
    """Check structure and sizes, or with --read-data every byte. Ends with 1 when something is wrong.

    Example: proteus-cache verify proteus/caches/dinov2_vitg14 --read-data
    """
    from proteus_cache.cache.share import Share
    from proteus_cache.report.summary import kind_of

    share = Share.parse(read_data_subset) if read_data_subset is not None else None
    if read_data and share is not None:
        raise UsageError("--read-data reads everything: leave it or --read-data-subset out")
    kind = kind_of(path)
    if kind == "run" and (share is not None or recompute is not None):
        flag = "--read-data-subset" if share is not None else "--recompute"
        raise UsageError(f"{flag}: {path} is a run, and has no units; check it with --read-data")
    if expect_id is not None:
        _check_pin(kind, path, expect_id)
    _refuse_alone(recompute, {"seed": seed, "weights": weights, "device": device, "batch-size": batch_size})
    lost = _lost(kind, path)
    with terminal.phases() as phase:
        update = phase("verify", "files" if kind == "run" else "units")
        findings = [lost] if lost is not None else _verify(kind, path, read_data, share, update)
        computed = None
        if recompute is not None and lost is None:
            computed = _recompute(path, recompute, seed, weights, device, batch_size, phase)
    findings += computed.findings if computed is not None else []
    incomplete = _incomplete(path) if kind == "cache" and lost is None else {}
    step = None if lost is not None else _next_step(kind, path, findings, incomplete, read_data, share, computed)
    outcome = {
        "path": str(path),
        "kind": kind,
        "read_data": read_data,
        "read_data_subset": None if share is None else str(share),
        "recompute": None if computed is None else computed.to_json(),
        "is_whole": not findings,
        "findings": [asdict(finding) for finding in findings],
        "incomplete": {view: {"units": n, "units_all": n_all} for view, (n, n_all) in incomplete.items()},
        "next": step,
    }
    terminal.result(as_json, outcome, _lines(kind, path, findings, incomplete, read_data, share, computed), step)
    if findings:
        raise typer.Exit(1)


def _lost(kind: Kind, path: Path) -> Finding | None:
    """What is wrong with a cache or pack of which nothing can be judged; None when it can be opened."""
    from proteus_cache.cache.reader import open_cache
    from proteus_cache.cache.verify import Finding
    from proteus_cache.errors import DamageError
    from proteus_cache.pack.reader import open_pack
    from proteus_cache.stores import MARKERS

    if kind == "run":
        return None
    root = path if kind == "cache" else path.absolute()
    try:
        open_cache(path) if kind == "cache" else open_pack(path)
    except DamageError as error:
        name, _, said = str(error).removeprefix(f"{root}/").partition(": ")
        problem, _, remedy = said.partition("; ")
        if name == MARKERS[kind]:
            remedy = "nothing else can be judged without it: copy it from another copy"
        return Finding(name, None, problem, remedy)
    return None


def _incomplete(path: Path) -> dict[str, tuple[int, int]]:
    from proteus_cache.cache.reader import open_cache
    from proteus_cache.cache.verify import incomplete_views

    return incomplete_views(open_cache(path))


def _check_pin(kind: Kind, path: Path, expect_id: str) -> None:
    """Refuse another pack before anything of it is read."""
    from proteus_cache.pack.reader import open_pack

    if kind != "pack":
        raise UsageError(f"--expect-id is of a pack, and {path} is a {kind}")
    open_pack(path, expect_id=expect_id)


def _refuse_alone(recompute: int | None, given: dict[str, Any]) -> None:
    """Refuse options of --recompute without it, and numbers that cannot be."""
    from proteus_cache.errors import ConfigError

    for name, value in given.items():
        if value is not None and recompute is None:
            raise UsageError(f"--{name} goes with --recompute")
    for name, value in {"recompute": recompute, "batch-size": given["batch-size"]}.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}")


def _lines(
    kind: Kind,
    path: Path,
    findings: list[Finding],
    incomplete: dict[str, tuple[int, int]],
    read_data: bool,
    share: Share | None,
    computed: RecomputeReport | None,
) -> list[str]:
    depth = "every digest and checksum" if read_data else "structure and sizes"
    depth += f", and every digest and checksum of share {share}" if share is not None else ""
    depth += f", and {computed.n_views:,} views against the teacher" if computed is not None else ""
    lines = [line for f in findings for line in (f"{f.path}: {f.problem}", f"    {f.remedy}")]
    lines += computed.lines() if computed is not None else []
    missing = incomplete.items()
    where = "not extracted, lost, or moved into a pack"
    lines += [f"{view}: {n:,} of {n_all:,} units; the others are {where}" for view, (n, n_all) in missing]
    count = f"{len(findings):,} finding{'s' * (len(findings) != 1)}"
    state = "what is there is whole" if incomplete else "whole"
    return [*lines, f"{kind} {path}: {count if findings else f'{state}; checked {depth}'}"]


def _next_step(
    kind: Kind,
    path: Path,
    findings: list[Finding],
    incomplete: dict[str, tuple[int, int]],
    read_data: bool,
    share: Share | None,
    computed: RecomputeReport | None,
) -> str | None:
    """The command to run next: a repair, a deeper check, or what follows a whole store."""
    from proteus_cache.next_steps import after, command_line
    from proteus_cache.report.summary import summarise
    from proteus_cache.stores import repair_command

    same_extract = f"the same `proteus-cache extract` again, for units of {', '.join(incomplete)} that no pack has"
    if kind == "run" and findings:
        from proteus_cache.train.verify import next_command

        return next_command(path, findings)
    if findings:
        from proteus_cache.cache.verify import GO_ON

        if all(finding.remedy == GO_ON for finding in findings):
            return same_extract
        wrong = {finding.unit for finding in computed.findings} if computed is not None and kind == "cache" else set()
        named = [part for unit in sorted(filter(None, wrong)) for part in ("--unit", unit)]
        return repair_command(path, *named)
    if share is not None and share.number < share.of:
        return command_line("verify", path, "--read-data-subset", share.next)
    if not read_data and share is None and computed is None:
        return command_line("verify", path, "--read-data")
    if incomplete:
        return same_extract
    summary = summarise(path)
    if computed is None and kind != "run" and _finds_weights(summary["teacher"]):
        return command_line("verify", path, "--recompute", _SUGGESTED)
    return after(summary)


def _finds_weights(teacher: dict[str, Any]) -> bool:
    """Whether --recompute finds the weights without being told where they are."""
    from proteus_cache.teachers.dinov2_models import DINOV2

    return teacher["name"] in (*DINOV2, "demo") or str(teacher["weights_source"]).startswith("random:")


def _verify(kind: Kind, path: Path, read_data: bool, share: Share | None, update: terminal.Update) -> list[Finding]:
    if kind == "run":
        from proteus_cache.train.verify import verify_run

        return verify_run(path, read_data, update)
    from proteus_cache.cache.layout import unit_number

    if kind == "cache":
        from proteus_cache.cache.reader import open_cache
        from proteus_cache.cache.verify import verify_cache as verify_store

        n_shards = open_cache(path).manifest.n_shards
    else:
        from proteus_cache.pack.reader import open_pack
        from proteus_cache.pack.verify import verify_pack as verify_store

        document = open_pack(path).document
        n_shards = -(-document.n_images // document.shard_size)
    if share is None:
        return verify_store(path, read_data, update)
    return verify_store(path, True, update, chosen=lambda view, shard: share.holds(unit_number(view, shard, n_shards)))


def _recompute(
    path: Path,
    n_views: int,
    seed: int | None,
    weights: str | None,
    device: str | None,
    batch_size: int | None,
    phase: Any,  # of terminal.phases
) -> RecomputeReport:
    from proteus_cache.recompute.choice import fresh_seed
    from proteus_cache.recompute.run import recompute

    return recompute(
        path,
        n_views,
        seed=fresh_seed() if seed is None else seed,
        weights=weights,
        home=settings.home(),
        device=device,
        batch_size=batch_size,
        progress=lambda *counts: phase("recompute", "views")(*counts),
        download_progress=lambda done, total: phase("teacher", "MB")(done / 1e6, (total or done) / 1e6),
    )
