"""Does a run still hold what was written: its checkpoints and final weights?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from proteus_cache import storage
from proteus_cache.cache.verify import Finding
from proteus_cache.errors import ProteusCacheError
from proteus_cache.stores import repair_command
from proteus_cache.train.checkpoint import checkpoint_steps, verify_checkpoint
from proteus_cache.train.run_folder import CHECKPOINTS, EMA, HEADS, START, STUDENT
from proteus_cache.train.tensors import check_tensors


def verify_run(path: Path, read_data: bool, progress: Callable[[int, int, int], None] | None = None) -> list[Finding]:
    """Check a run; an empty list means that nothing is wrong.

    Args:
        path: the RUN folder.
        read_data: check every digest, of checkpoints and of final weights; otherwise the sizes of checkpoints.
        progress: called with (checkpoints and weight files done, in all, bytes read of them).
    """
    findings = []
    folders = [path / CHECKPOINTS / f"step-{step:08d}" for step in checkpoint_steps(path / CHECKPOINTS)]
    names = (STUDENT, HEADS, EMA, START)
    weights = [path / name for name in names if read_data and storage.size_of(path / name) is not None]
    n_bytes = 0
    for done, item in enumerate([*folders, *weights], start=1):
        findings += _checkpoint(path, item, read_data) if item in folders else _weights(item)
        if read_data:
            n_bytes += sum(storage.size_of(file) or 0 for file in (item.iterdir() if item.is_dir() else [item]))
        if progress is not None:
            progress(done, len(folders) + len(weights), n_bytes)
    return findings


def _checkpoint(run: Path, folder: Path, read_data: bool) -> list[Finding]:
    try:
        verify_checkpoint(folder, digests=read_data)
    except ProteusCacheError as error:
        remedy = f"run `{repair_command(run)}`, which removes it; --resume falls back to the checkpoint before it"
        return [Finding(f"{CHECKPOINTS}/{folder.name}", None, _without(error, run), remedy)]
    return []


def _weights(file: Path) -> list[Finding]:
    try:
        check_tensors(file)
    except ProteusCacheError as error:
        remedy = "run the same training with --resume: it writes the final weights anew"
        if file.name == START:
            remedy = "only eval reads it; a new run from the same init, stopped after its first step, writes it anew"
        return [Finding(file.name, None, str(error).removeprefix(f"{file}: "), remedy)]
    return []


def _without(error: ProteusCacheError, path: Path) -> str:
    """The message without the run's own path, which the finding names already."""
    return str(error).replace(f"{path}/", "")
