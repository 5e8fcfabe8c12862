"""Repair of a run: damaged checkpoints go, as long as a whole one remains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from proteus_cache.cache.verify import Finding
from proteus_cache.repair.report import Action, RepairReport, State
from proteus_cache.train.checkpoint import checkpoint_steps, is_damaged, remove_checkpoint
from proteus_cache.train.run_folder import CHECKPOINTS
from proteus_cache.train.verify import verify_run

Phase = Callable[[str, str], Callable[..., None]]


def repair_run(
    path: Path,
    *,
    read_data: bool = True,
    dry_run: bool = False,
    agree: Callable[[str], None] = lambda question: None,
    phase: Phase = lambda label, unit: lambda *counts: None,
) -> RepairReport:
    """Remove damaged checkpoints of a run that has a whole one, older or newer; nothing reads them in any case.

    Args:
        path: the RUN folder.
        read_data: check every digest; otherwise sizes.
        dry_run: say what would be done.
        agree: asked before anything is removed; raises where the answer is no.
        phase: for progress.
    """
    findings = verify_run(path, read_data, phase("verify", "files"))
    steps = {f"{CHECKPOINTS}/step-{step:08d}" for step in checkpoint_steps(path / CHECKPOINTS)}
    found = [finding for finding in findings if finding.path in steps]
    # Looked at twice: a disk that failed once must not cost a checkpoint.
    damaged = [finding for finding in found if is_damaged(path / finding.path, digests=read_data)]
    can = len(found) < len(steps)
    if damaged and can and not dry_run:
        agree(f"{path}: remove {len(damaged)} damaged checkpoint{'s' * (len(damaged) != 1)}? A whole one remains.")
    actions = []
    for finding in findings:
        if finding in found and finding not in damaged:
            remedy = "it is kept, for it may be whole: look at the disk (dmesg) or the file server, then verify again"
            actions.append(_action(finding, "not done", remedy))
        elif finding not in damaged:
            actions.append(_action(finding, "not done", f"repair cannot make it: {finding.remedy}"))
        elif not can:
            remedy = "no checkpoint of this run is whole, so they are kept: look at the disk, then train anew"
            actions.append(_action(finding, "not done", remedy))
        else:
            if not dry_run:
                remove_checkpoint(path / finding.path)
            actions.append(_action(finding, "to do" if dry_run else "done", "remove it: a whole one remains"))
    left = [] if dry_run else verify_run(path, read_data, phase("verify again", "files"))
    return RepairReport(path=path, kind="run", is_dry_run=dry_run, actions=actions, left=left)


def _action(finding: Finding, state: State, remedy: str) -> Action:
    return Action(unit=None, paths=(finding.path,), problem=finding.problem, remedy=remedy, state=state)
