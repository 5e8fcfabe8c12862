"""Does a run still hold what was written: its checkpoints and final weights?"""

from __future__ import annotations

from pathlib import Path

from proteus_cache import storage
from proteus_cache.cache.verify import Finding
from proteus_cache.errors import ProteusCacheError
from proteus_cache.train.checkpoint import checkpoint_steps, verify_checkpoint
from proteus_cache.train.run_folder import CHECKPOINTS, EMA, HEADS, STUDENT
from proteus_cache.train.tensors import read_tensors


def verify_run(path: Path, read_data: bool) -> list[Finding]:
    """Check a run; an empty list means that nothing is wrong.

    Args:
        path: the RUN folder.
        read_data: check every checkpoint's digests and read the final weights; otherwise sizes.
    """
    findings = []
    for step in checkpoint_steps(path / CHECKPOINTS):
        folder = path / CHECKPOINTS / f"step-{step:08d}"
        try:
            verify_checkpoint(folder, digests=read_data)
        except ProteusCacheError as error:
            remedy = "remove that folder; --resume falls back to the checkpoint before it"
            findings.append(Finding(f"{CHECKPOINTS}/{folder.name}", None, _without(error, path), remedy))
    for name in (STUDENT, HEADS, EMA):
        if storage.size_of(path / name) is not None and read_data:
            try:
                read_tensors(path / name)
            except ProteusCacheError as error:
                remedy = "run the same training with --resume: it writes the final weights anew"
                findings.append(Finding(name, None, _without(error, path), remedy))
    return findings


def _without(error: ProteusCacheError, path: Path) -> str:
    """The message without the run's own path, which the finding names already."""
    return str(error).replace(f"{path}/", "")
