"""Checkpoints: `RUN/checkpoints/step-00000004/`, whole or not there.

    model.safetensors        student, mask token and heads
    ema.safetensors          average of the student
    optimizer.safetensors    AdamW's moments and step counts, by parameter name
    state.json               sealed, written last: the step, what the run is, size and SHA-256 of every file

A checkpoint is written into a folder of its own and synced; every byte is read back from the disk and compared with
what was meant; then the folder gets its name, and only then are older ones removed. No pickle. A folder whose state
or files do not verify is never loaded: the one before it is, with a warning. A full disk ends the run and leaves the
older checkpoints as they were.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from proteus_cache import storage
from proteus_cache.documents import Document
from proteus_cache.errors import ChecksumError, DamageError, FormatError, ProteusCacheError, StorageError
from proteus_cache.train.tensors import read_tensors, tensor_chunks

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-([0-9]{8})\Z")
_TEMPORARY = "tmp-"
_STATE = "state.json"
_MAX_STATE_BYTES = 1 << 20
TENSOR_FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


class CheckpointFile(Document):
    """One file of a checkpoint."""

    size: int
    sha256: str


class CheckpointState(Document):
    """What `state.json` says."""

    format: Literal["proteus-cache/checkpoint"] = "proteus-cache/checkpoint"
    version: Literal[1] = 1
    step: int
    """Steps done."""
    config: dict[str, str | int | float | bool | None]
    """`TrainConfig.identity()`."""
    data: dict[str, str]
    """What was trained on: `TrainingData.identity`."""
    precision: str
    world_size: int
    scaler: dict[str, float | int] | None
    """State of fp16 loss scaling."""
    files: dict[str, CheckpointFile]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that verified, in memory."""

    path: Path
    state: CheckpointState
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder, ascending; nothing is verified."""
    return sorted(int(match[1]) for name in storage.list_folder(folder) if (match := _NAME.match(name)))


def write_checkpoint(
    folder: Path,
    state: CheckpointState,
    tensors: Mapping[str, Mapping[str, Tensor]],
    *,
    keep: int,
    after: int | None = None,
) -> Path:
    """Write one checkpoint durably and remove the oldest above `keep`.

    Those of later steps are left: they were damaged when the run was resumed from an earlier one, and must not
    push out the good ones. The run writes them anew when it gets there.

    Args:
        folder: `RUN/checkpoints`, made when missing.
        state: all but `files`, which is filled in here.
        tensors: file name (`TENSOR_FILES`) -> its tensors.
        keep: checkpoints to keep, this one included.
        after: step of the checkpoint that this run wrote or was resumed from last. Those between it and this one could
            not be loaded then: they are not among those kept, and those that are damaged go.

    Returns:
        The checkpoint's folder. An older folder of the same step is replaced.

    Raises:
        StorageError: it could not be written; older checkpoints are as they were.
        DamageError: the disk did not give back what was written, a second time too; older checkpoints are as they were.
    """
    storage.make_folder(folder, folder.parent)
    final = folder / f"step-{state.step:08d}"
    began = time.perf_counter()
    temp = _written(folder, final.name, state, tensors)
    with _removed_on_failure(temp):
        _give_name(temp, final)
    upto = [step for step in checkpoint_steps(folder) if step <= state.step]
    passed = [step for step in upto if after is not None and after < step < state.step]
    good = [step for step in upto if step not in passed]
    damaged = [step for step in passed if is_damaged(folder / f"step-{step:08d}")]
    for step in damaged + good[:-keep]:
        remove_checkpoint(folder / f"step-{step:08d}")
    log.info("wrote checkpoint=%s seconds=%.1f", final, time.perf_counter() - began)
    return final


def _written(folder: Path, name: str, state: CheckpointState, tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """A temporary folder with a whole checkpoint, synced and read back; what reads back wrong is written once more."""
    for attempt in (1, 2):
        temp = folder / (_TEMPORARY + storage.temp_name(name))
        with _removed_on_failure(temp):
            storage.make_folder(temp)
            files = {file: _write(temp, file, tensors[file]) for file in TENSOR_FILES}
            storage.write_whole(temp / _STATE, state.model_copy(update={"files": files}).sealed)
            storage.sync_folder(temp)
            try:
                _verify_files(temp, from_disk=True)
            except (DamageError, StorageError) as error:
                if attempt == 2:
                    raise
                log.warning("the disk does not give back what was written, which is written once more: %s", error)
            else:
                return temp
        storage.discard(temp)
    raise AssertionError("unreachable")


def _give_name(temp: Path, final: Path) -> None:
    """Rename a checkpoint to its name. One that has it goes out of the way first, and comes back when that fails.

    Between the two renames neither is found, and the run stands on the one before: it was resumed from that, because
    the one in the way could not be loaded.
    """
    if storage.inode_of(final) is None:
        storage.publish(temp, final)
        return
    old = _nameless(final)
    try:
        storage.publish(final, old)
        storage.publish(temp, final)
    except StorageError:
        with suppress(StorageError):  # the first error is told
            if storage.inode_of(final) is None:
                storage.publish(old, final)
            else:
                storage.discard(old)
        raise
    storage.discard(old)


def _nameless(path: Path) -> Path:
    """A name for a checkpoint that is about to go, under which no run finds it."""
    return path.with_name(_TEMPORARY + storage.temp_name(path.name))


@contextmanager
def _removed_on_failure(temp: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        storage.discard(temp)
        raise


def _write(temp: Path, name: str, tensors: Mapping[str, Tensor]) -> CheckpointFile:
    written = storage.write_whole(temp / name, lambda: tensor_chunks(tensors, {}))
    return CheckpointFile(size=written.size, sha256=written.sha256)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None when there is no checkpoint at all.

    One that is damaged or cannot be read is named in a warning, with what is used instead, and left where it is.

    Raises:
        DamageError: there are checkpoints, and none verifies.
        StorageError: none can be loaded, and one of them only because the disk does not give it.
    """
    failed: dict[int, DamageError | StorageError] = {}
    for step in reversed(checkpoint_steps(folder)):
        try:
            found = load_checkpoint(folder, step)
        except (DamageError, StorageError) as error:
            failed[step] = error
            continue
        for other, reason in failed.items():
            what = "cannot be read" if may_be_whole(reason) else "is damaged"
            log.warning("checkpoint step=%d %s and is skipped, step=%d is used instead: %s", other, what, step, reason)
        return found
    if not failed:
        return None
    many = f"none of the {len(failed)} checkpoints"
    for reason in failed.values():
        if may_be_whole(reason):
            raise type(reason)(f"{folder}: {many} can be read, and nothing is changed: {reason}") from reason
    first = next(iter(failed.values()))
    raise DamageError(f"{folder}: {many} is whole; remove them and start again without --resume ({first})") from first


def may_be_whole(error: ProteusCacheError) -> bool:
    """Whether a checkpoint was not loaded because the disk failed, and not because of what is in it."""
    return isinstance(error, StorageError) and not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError)


def is_damaged(path: Path, *, digests: bool = True) -> bool:
    """Whether a checkpoint is known not to be what was written; False where the disk does not give it.

    Args:
        path: of the folder.
        digests: as for `verify_checkpoint`.
    """
    try:
        verify_checkpoint(path, digests=digests)
    except (DamageError, StorageError) as error:
        return not may_be_whole(error)
    return False


def load_checkpoint(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of one step.

    Raises:
        DamageError: it is not what was written.
        StorageError: it cannot be read.
    """
    path = folder / f"step-{step:08d}"
    state = verify_checkpoint(path)
    model, ema, optimizer = (read_tensors(path / name)[0] for name in TENSOR_FILES)
    return Checkpoint(path, state, model, ema, optimizer)


def verify_checkpoint(path: Path, *, digests: bool = True) -> CheckpointState:
    """The state of a checkpoint whose files are those it names.

    Args:
        path: of the folder.
        digests: read all files and compare their SHA-256; otherwise only sizes are compared.

    Raises:
        DamageError: a file is missing, or not what was written.
        StorageError: it cannot be read.
    """
    state = _verify_files(path, digests=digests)
    if path.name != f"step-{state.step:08d}":
        raise FormatError(f"{path}: holds the checkpoint of step {state.step}")
    return state


def _verify_files(path: Path, *, digests: bool = True, from_disk: bool = False) -> CheckpointState:
    """The state in a folder whose files are those it names.

    Args:
        path: of the folder.
        digests: read them, side by side, and compare their SHA-256.
        from_disk: past the system's copy of them in memory.
    """
    state = CheckpointState.parse(storage.read_bytes(path / _STATE, _MAX_STATE_BYTES), str(path / _STATE))
    if sorted(state.files) != sorted(TENSOR_FILES):
        raise FormatError(f"{path / _STATE}: names the files {', '.join(sorted(state.files))}")
    for name, file in state.files.items():
        if storage.size_of(path / name) != file.size:
            raise FormatError(f"{path / name}: not the file that was written (missing, or its size differs)")
    if not digests:
        return state
    with ThreadPoolExecutor(len(TENSOR_FILES), thread_name_prefix="checkpoint") as threads:
        found = threads.map(lambda name: storage.sha256_of(path / name, from_disk=from_disk)[1], TENSOR_FILES)
        for name, digest in zip(TENSOR_FILES, found, strict=True):
            if digest != state.files[name].sha256:
                raise ChecksumError(f"{path / name}: not the file that was written (its digest differs)")
    return state


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; it loses its name first, so that a half-removed one is never found."""
    gone = _nameless(path)
    try:
        storage.publish(path, gone)
    finally:
        storage.discard(gone)


def clear_unfinished(folder: Path, step: int, *, keep: int) -> None:
    """Remove what killed writers left: unfinished checkpoints, and old ones that they did not come to remove.

    Args:
        folder: `RUN/checkpoints`.
        step: of the checkpoint that was loaded just now, 0 for none; later ones are left.
        keep: checkpoints to keep, that one included.
    """
    for name in storage.list_folder(folder):
        if name.startswith(_TEMPORARY):
            storage.discard(folder / name)
            log.info("removed unfinished checkpoint=%s", os.fspath(folder / name))
    for old in [found for found in checkpoint_steps(folder) if found <= step][:-keep]:
        remove_checkpoint(folder / f"step-{old:08d}")
