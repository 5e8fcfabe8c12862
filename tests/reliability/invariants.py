"""What must hold after every crash, kill, fault or power loss: functions that return what is broken, in words.

I1  what is committed is whole, to the bit         `damage_of_cache`, `damage_of_pack`, `damage_of_run`
I2  nothing reported as committed is lost          `lost`
I3  one more start of the same command finishes    whoever calls that command: it must not raise
I4  keys and view digests are the undisturbed ones `differences_of_cache`, `differences_of_folder`
I5  no unknown file but unfinished ones, and none at the end   `damage_of_cache`, `leftovers`
I6  no more units are redone than were under way   `too_many_redone`
I7  the exit code is a documented one              `wrong_exit`
I8  a message names the file and the next step     `vague_message`

An empty list means that the invariant holds. None of them changes anything.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path

from proteus_cache.cache.reader import is_cache, open_cache
from proteus_cache.cache.verify import verify_cache
from proteus_cache.errors import DamageError, ProteusCacheError
from proteus_cache.pack.reader import is_pack
from proteus_cache.pack.verify import verify_pack
from proteus_cache.train.checkpoint import newest_checkpoint
from tests.makers import identity

EXIT_CODES = (0, 1, 2, 130)
"""The documented exit codes of a command that was not killed."""
_UNIT_FILE = re.compile(r"(?:views/(v\d+|probe)/s(\d+)\.tar|targets\.zarr/(v\d+|probe)/[^/]+/c/(\d+)(?:/0)*)\Z")


def committed(cache: Path) -> dict[str, str]:
    """Unit ("v000/1") to SHA-256 of its receipt, of the units that have one; nothing where there is no cache yet."""
    if not is_cache(cache):
        return {}
    opened = open_cache(cache)
    return {
        f"{view}/{shard}": hashlib.sha256(opened.layout.receipt(view, shard).read_bytes()).hexdigest()
        for view in opened.views()
        for shard in opened.units(view)
    }


def unfinished_units(cache: Path) -> set[str]:
    """Units that have files under their final names and no receipt: a writer was cut off there."""
    done = set(committed(cache))
    return {unit for path in files_below(cache) if (unit := _unit_of(path)) is not None} - done


def damage_of_cache(cache: Path, *, most_unfinished: int = 1) -> list[str]:
    """I1 and I5 before the resume: whole units, and nothing unknown but the files of units that were under way.

    Args:
        cache: its folder. One without a manifest may hold plan files only; one without units may still have them in
            `tmp/`, whence the next start takes them.
        most_unfinished: units that may have files and no receipt: one a killed process.
    """
    if not is_cache(cache):
        foreign = [path for path in files_below(cache) if not path.startswith(("tmp/", "codec/"))]
        return [f"{path} is there before the manifest" for path in foreign]
    try:
        findings = verify_cache(cache, read_data=True)
    except DamageError as error:
        return [str(error)]
    unfinished = {finding.path for finding in findings if _unit_of(finding.path) is not None and finding.unit is None}
    waiting = set() if committed(cache) else _waiting_plan_files(cache)
    wrong = [f"{f.path}: {f.problem}" for f in findings if f.path not in unfinished | waiting]
    units = {_unit_of(path) for path in unfinished}
    if len(units) > most_unfinished:
        wrong.append(f"{len(units)} units are unfinished, more than {most_unfinished}")
    return wrong


def _waiting_plan_files(cache: Path) -> set[str]:
    """Plan files that are missing, and of which `tmp/` has the bytes."""
    manifest = open_cache(cache).manifest
    files = {"images.parquet": f"plan-{manifest.images.sha256}.parquet"}
    for target in manifest.targets:
        if target.codec.parameters is not None:
            name = f"{target.codec.parameters}.safetensors"
            files[f"codec/{name}"] = f"plan-{name}"
    found = digests_below(cache / "tmp")
    return {
        path
        for path, plan in files.items()
        if not (cache / path).exists() and plan.removeprefix("plan-").split(".")[0] == found.get(plan)
    }


def _unit_of(path: str) -> str | None:
    match = _UNIT_FILE.match(path)
    if match is None:
        return None
    view, shard, array_view, array_shard = match.groups()
    return f"{view or array_view}/{int(shard or array_shard)}"


def damage_of_pack(pack: Path) -> list[str]:
    """I1 of a finished pack; of an unfinished one nothing is promised but that it can be finished."""
    if not is_pack(pack):
        return []
    try:
        return [f"{finding.path}: {finding.problem}" for finding in verify_pack(pack, read_data=True)]
    except DamageError as error:
        return [str(error)]


def damage_of_run(checkpoints: Path, least: int, most: int) -> list[str]:
    """I1 and I2 of a run: the newest checkpoint that loads is the last completed one, or the one under way.

    Args:
        checkpoints: the run's folder of checkpoints, as `worlds.save_checkpoint` fills it.
        least: last step whose checkpoint was reported as written; 0 for none.
        most: step that was being written.
    """
    try:
        found = newest_checkpoint(checkpoints)
    except DamageError as error:
        return [str(error)]
    step = found.state.step if found else 0
    if not least <= step <= most:
        return [f"step {step} is found, and not {least} to {most}"]
    if found is None:
        return []
    tensors = [*found.model.values(), *found.ema.values(), *found.optimizer.values()]
    return [] if all((tensor == step).all() for tensor in tensors) else [f"step {step} holds other numbers"]


def lost(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """I2: what was committed (unit or path -> digest) is there afterwards, and the same."""
    return [
        f"{name} is lost" if name not in after else f"{name} was written anew"
        for name, digest in before.items()
        if after.get(name) != digest
    ]


def differences_of_cache(cache: Path, undisturbed: Mapping[str, list[object]]) -> list[str]:
    """I4, and I5 at the end: `makers.identity` of a finished cache is that of an undisturbed one, all of it whole.

    A target's last bits may differ from run to run; keys, rows and view digests may not.
    """
    wrong = [f"{finding.path}: {finding.problem}" for finding in verify_cache(cache, read_data=True)]
    found = identity(open_cache(cache))
    for unit in sorted(found.keys() | undisturbed.keys()):
        if found.get(unit) != undisturbed.get(unit):
            wrong.append(f"unit {unit} is not that of an undisturbed run")
    return wrong + leftovers(cache)


def leftovers(store: Path) -> list[str]:
    """I5 at the end: nothing is left in `tmp/` and under a temporary name."""
    return [f"{path} is left" for path in files_below(store) if path.startswith("tmp/") or "tmp-" in path]


def differences_of_folder(folder: Path, undisturbed: Mapping[str, str]) -> list[str]:
    """I4 of a pack: the same files with the same bytes as `digests_below` found in an undisturbed one."""
    found = digests_below(folder)
    return [
        f"{path}: {'missing' if path not in found else 'unknown' if path not in undisturbed else 'other bytes'}"
        for path in sorted(found.keys() | undisturbed.keys())
        if found.get(path) != undisturbed.get(path)
    ]


def too_many_redone(n_written: int, n_units: int, kills: int, workers: int = 1) -> list[str]:
    """I6: units written in all starts together, against those of an undisturbed run."""
    redone = n_written - n_units
    return [] if redone <= kills * workers else [f"{redone} units were redone after {kills} kills of {workers} workers"]


def wrong_exit(code: int, *, killed: bool = False) -> list[str]:
    """I7: a documented exit code, or SIGKILL where that was sent (as -9, as `subprocess` and `multiprocessing` say)."""
    allowed = (*EXIT_CODES, -signal.SIGKILL) if killed else EXIT_CODES
    return [] if code in allowed else [f"exit code {code} is not documented"]


def vague_message(error: ProteusCacheError, root: Path) -> list[str]:
    """I8: one line that names a path in the store and says what to do after a semicolon."""
    text = str(error)
    wrong = []
    if "\n" in text:
        wrong.append(f"more than one line: {text!r}")
    if str(root) not in text:
        wrong.append(f"names no path below {root}: {text!r}")
    if ";" not in text:
        wrong.append(f"does not say what to do: {text!r}")
    return wrong


def files_below(folder: Path) -> list[str]:
    """Relative paths of all files, sorted."""
    found = []
    for parent, _, names in os.walk(folder):
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in names]
    return sorted(found)


def digests_below(folder: Path) -> dict[str, str]:
    """Relative path to SHA-256 of every file."""
    return {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in files_below(folder)}
