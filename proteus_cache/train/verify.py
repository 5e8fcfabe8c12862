"""Does a run still hold what was written: its checkpoints and final weights?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from proteus_cache import storage
from proteus_cache.cache.verify import Finding
from proteus_cache.errors import DamageError, ProteusCacheError, StorageError
from proteus_cache.next_steps import resume_training
from proteus_cache.stores import repair_command
from proteus_cache.train.checkpoint import checkpoint_steps, may_be_whole, verify_checkpoint
from proteus_cache.train.finished import FinalFile, read_finished
from proteus_cache.train.run_folder import CHECKPOINTS, EMA, FINISHED, HEADS, START, STUDENT
from proteus_cache.train.tensors import check_tensors

_UNREADABLE = "nothing is known to be damaged: look at the disk (dmesg) or the file server, then verify again"
_START = "only eval reads it: bring it back from a copy; a new run from the same init writes it anew"


def verify_run(path: Path, read_data: bool, progress: Callable[[int, int, int], None] | None = None) -> list[Finding]:
    """Check a run; an empty list means that nothing is wrong.

    Args:
        path: the RUN folder.
        read_data: check every digest, of checkpoints and of final weights; otherwise what is there, and its size.
        progress: called with (checkpoints and weight files done, in all, bytes read of them).
    """
    findings: list[Finding] = []
    recorded, found = _finished(path)
    findings += found
    folders = [path / CHECKPOINTS / f"step-{step:08d}" for step in checkpoint_steps(path / CHECKPOINTS)]
    weights = [path / name for name in (STUDENT, HEADS, EMA, START)]
    n_bytes = 0
    for done, item in enumerate([*folders, *weights], start=1):
        if item in folders:
            findings += _checkpoint(path, item, read_data)
        else:
            findings += _weights(path, item, recorded.get(item.name), read_data)
        if read_data:
            n_bytes += _bytes_of(item)
        if progress is not None:
            progress(done, len(folders) + len(weights), n_bytes)
    return findings


def next_command(path: Path, findings: list[Finding]) -> str | None:
    """What mends a run in which these were found, as one command; None where only a person can.

    Args:
        path: the RUN folder.
        findings: of `verify_run`.
    """
    for command in (repair_command(path), resume_training(path)):
        if any(f"`{command}`" in finding.remedy for finding in findings):
            return command
    return None


def _bytes_of(item: Path) -> int:
    with suppress(StorageError):
        files = [item / name for name in storage.list_folder(item)] if item.is_dir() else [item]
        return sum(storage.size_of(file) or 0 for file in files)
    return 0


def _finished(run: Path) -> tuple[dict[str, FinalFile], list[Finding]]:
    """What `finished.json` says of each file, and what is wrong with itself."""
    try:
        recorded = read_finished(run)
        there = [name for name in (STUDENT, HEADS, EMA) if storage.size_of(run / name) is not None]
    except (DamageError, StorageError) as error:
        return {}, [_finding(run, run / FINISHED, error, _written_anew(run))]
    if recorded is not None:
        return recorded.files, []
    if not there:
        return {}, []  # not finished yet
    problem = "missing beside final weights: it is lost, or the run was cut off while it wrote them"
    return {}, [Finding(FINISHED, None, problem, _written_anew(run))]


def _checkpoint(run: Path, folder: Path, read_data: bool) -> Iterator[Finding]:
    try:
        verify_checkpoint(folder, digests=read_data)
    except ProteusCacheError as error:
        remedy = f"run `{repair_command(run)}`, which removes it; --resume falls back to the checkpoint before it"
        yield _finding(run, folder, error, remedy)


def _weights(run: Path, file: Path, recorded: FinalFile | None, read_data: bool) -> Iterator[Finding]:
    """Compare a file with `finished.json`; one that is not named there can only be asked about itself."""
    remedy = _START if file.name == START else _written_anew(run)
    try:
        size = storage.size_of(file)
        if recorded is not None and size != recorded.size:
            problem = "missing" if size is None else f"{size:,} bytes instead of {recorded.size:,}"
            yield Finding(file.name, None, problem, remedy)
        elif recorded is not None and read_data and storage.sha256_of(file)[1] != recorded.sha256:
            yield Finding(file.name, None, f"damaged (SHA-256 differs from {FINISHED})", remedy)
        elif recorded is None and read_data and size is not None:
            check_tensors(file)
    except (DamageError, StorageError) as error:
        yield _finding(run, file, error, remedy)


def _written_anew(run: Path) -> str:
    return f"run `{resume_training(run)}`, which writes the final weights anew"


def _finding(run: Path, item: Path, error: ProteusCacheError, remedy: str) -> Finding:
    """An error as a finding, without the path and the remedy that stand beside it there."""
    said = str(error).removeprefix(f"{item}: ").removeprefix(f"{item}/").partition("; ")[0]
    return Finding(str(item.relative_to(run)), None, said, _UNREADABLE if may_be_whole(error) else remedy)
