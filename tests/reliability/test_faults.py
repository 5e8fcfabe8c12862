"""R4: every operation of every protocol fails in turn, once or from then on, and nothing is lost or silently wrong."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from proteus_cache import storage
from proteus_cache.errors import SpaceError, StorageError
from tests.reliability.disks import CHANGES, Failing, Operation, using
from tests.reliability.invariants import files_below, vague_message
from tests.reliability.scenes import Scene, all_scenes
from tests.reliability.worlds import prepare

ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EINTR)
FULL = (errno.ENOSPC, errno.EDQUOT)
OPERATIONS = (
    *("create", "write", "sync", "sync folder", "close", "close folder", "rename", "link", "unlink"),
    *("make folder", "remove folder", "open", "read", "names", "status"),
)
"""All operations of a disk; a folder is synced and closed by the same calls as a file."""
SCENES = (
    *("planning", "the first unit", "the last unit and the end", "a unit that another worker has committed"),
    *("packing", "packing and moving"),
    *("moving out of a finished pack", "saving a checkpoint", "saving a damaged checkpoint anew"),
)
LEAST_FAULTS = dict(zip(SCENES, (70, 230, 145, 70, 195, 275, 54, 100, 100), strict=True))
"""In each scene by `just test`; the error numbers take turns."""
EVERY_READING = 8
"""Of the operations that only read, every eighth fails in `just test`; of the others, every one."""
EVERY_LAST = 17
"""Of all operations, every seventeenth is the last that is carried out on a disk that is gone for good."""
_TRIED_AGAIN = ("create", "write", "sync", "close")
"""Operations of `write_new`: after one failure that is no full disk the file is written once more under a new name."""
_CLEANING = ("unlink", "remove folder", "names", "status")
"""Operations that clean up: one that fails may leave an unfinished file."""


class Probe(Failing):
    """Also remembers what was done after the first failure."""

    def __init__(self, nth: int, number: int, **how: object) -> None:
        super().__init__(nth, number, **how)  # type: ignore[arg-type]  # the options of Failing
        self.later: list[Operation] = []
        self.is_full, self.is_short = number in FULL, bool(how.get("short"))
        self.is_dead = bool(how.get("sticky")) and how.get("only") is None  # so that nothing can be removed either

    def around(self, operation, call):  # type: ignore[no-untyped-def]  # as the toolbox has it
        if self.fired:
            self.later.append(operation)
        return super().around(operation, call)


@pytest.fixture(scope="module", autouse=True)
def _no_warnings_of_skipped_checkpoints() -> Iterator[None]:
    logger = logging.getLogger("proteus_cache")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="module")
def scenes(folder: Path) -> dict[str, Scene]:
    """Every scene by name, with its template."""
    found = {scene.name: scene for scene in all_scenes(prepare(folder / "prepared"), folder)}
    assert tuple(found) == SCENES
    return found


class Stage:
    """Where one scene fails again and again."""

    def __init__(self, scene: Scene, template: Path, world: Path) -> None:
        self.scene, self.template, self.world = scene, template, world
        self.wrong: list[str] = []
        """What did not hold, in words."""

    def fail(self, disk: Probe, how: str, *, succeeds: bool | None = None) -> None:
        """Start on a disk that fails, check all that must hold afterwards, start again, and compare the result.

        Args:
            disk: under the first start.
            how: it fails, for messages.
            succeeds: whether the first start must, or must not; None leaves that open.
        """
        shutil.rmtree(self.world, ignore_errors=True)
        shutil.copytree(self.template, self.world)
        error: Exception | None = None
        with using(disk):
            try:
                self.scene.start(self.world)
            except Exception as caught:  # whatever it is: _check says whether it may be
                error = caught
        if disk.at is None:
            assert error is None
            return
        wrong = [*self._check(disk, error), *self.scene.wrong_between(self.world)]
        if succeeds is not None and succeeds is not (error is None):
            wrong.append(f"ends with {error!r}")
        try:
            with using(storage.Disk()):
                self.scene.again(self.world)
        except Exception as caught:
            wrong.append(f"cannot be resumed: {caught!r}")
        else:
            wrong += self.scene.wrong_at_the_end(self.world)
        self.wrong += [f"{self.scene.name}: {disk.at.label} {how}: {text}" for text in wrong]

    def _check(self, disk: Probe, error: Exception | None) -> list[str]:
        """The error is the right one, its message helps, and nothing unfinished is left."""
        assert disk.at is not None
        wrong = []
        if error is not None:
            if type(error) is not (SpaceError if disk.is_full else StorageError):
                return [f"raises {error!r}"]
            assert isinstance(error, StorageError)
            wrong += vague_message(error, self.world)
        is_writing = disk.at.name in _TRIED_AGAIN
        made = [operation.label for operation in disk.later if operation.name == "create"]
        if is_writing and disk.is_full and made:
            wrong.append(f"writes on a full disk again: {made}")
        if is_writing and error is None and not disk.is_short:
            anew = "create " + disk.at.label.partition(" ")[2]
            if made[:1] != [anew] or len({op.path for op in disk.later if op.label == anew} | {disk.at.path}) < 2:
                wrong.append(f"is not written anew under a new name at once; made are {made[:1]}")
        # What went out of the way of a new checkpoint is not removed where neither of them gets the name.
        is_aside = disk.at.label == "rename step-N" and self.scene.not_promised != "-"
        if disk.at.name not in _CLEANING and not (disk.is_dead or is_aside) and (left := self._unfinished()):
            wrong.append(f"leaves {left}")
        return wrong

    def _unfinished(self) -> list[str]:
        """Files of this process under a temporary name."""
        ours = re.compile(rf"\.{os.getpid()}\.[0-9a-f]{{16}}(/|\Z)")
        return [path for path in files_below(self.world) if ours.search(path)]


@pytest.fixture
def stage(scenes: dict[str, Scene], folder: Path, fast_folder: Path, request: pytest.FixtureRequest) -> Stage:
    name = request.param
    template = fast_folder / "template"
    shutil.copytree(folder / f"template {SCENES.index(name)}", template)
    return Stage(scenes[name], template, fast_folder / "world")


def _fail_everywhere(stage: Stage, errors: dict[bool, tuple[int, ...]], every_reading: int = 1) -> int:
    """Fail at the n-th operation of each kind, n = 1, 2, ... until nothing fails; returns how many faults there were.

    Args:
        stage: of the scene.
        errors: by whether every later operation of this kind fails too: error numbers, which take turns.
        every_reading: of as many operations that only read one fails.
    """
    n_faults = 0
    for kind in OPERATIONS:
        for sticky, numbers in errors.items():
            for n in itertools.count(1, 1 if kind in CHANGES else every_reading):
                number = numbers[n % len(numbers)]
                disk = Probe(n, number, sticky=sticky, only=frozenset({kind}))
                how = f"({n}) fails {'from then on' if sticky else 'once'} with {errno.errorcode[number]}"
                is_final = sticky or number in FULL
                stage.fail(disk, how, succeeds=not is_final if kind in _TRIED_AGAIN else None)
                if not disk.fired:
                    break
                n_faults += 1
    return n_faults


@pytest.mark.parametrize("stage", SCENES, indirect=True)
def test_every_operation_fails_once_and_from_then_on(stage: Stage) -> None:
    turns: dict[bool, tuple[int, ...]] = {False: ERRORS, True: (*ERRORS[2:], *ERRORS[:2])}

    n_faults = _fail_everywhere(stage, turns, EVERY_READING)

    assert "\n".join(stage.wrong) == ""
    assert n_faults >= LEAST_FAULTS[stage.scene.name], n_faults


@pytest.mark.nightly
@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("stage", SCENES, indirect=True)
def test_every_operation_fails_with_every_error(stage: Stage, number: int) -> None:
    n_faults = _fail_everywhere(stage, {False: (number,), True: (number,)})

    assert "\n".join(stage.wrong) == ""
    assert n_faults >= LEAST_FAULTS[stage.scene.name], n_faults


@pytest.mark.parametrize("stage", SCENES, indirect=True)
def test_a_lost_answer_is_told_from_a_failure(stage: Stage) -> None:
    """A file server renames, links or removes, and says that it did not."""
    for kind in ("rename", "link", "unlink", "make folder", "remove folder"):
        for number in (errno.EIO, errno.EEXIST if kind in ("link", "make folder") else errno.ENOENT):
            for n in itertools.count(1):
                disk = Probe(n, number, only=frozenset({kind}), afterwards=True)
                succeeds = True if kind in ("rename", "link") else None
                stage.fail(disk, f"({n}) is done and reported as {errno.errorcode[number]}", succeeds=succeeds)
                if not disk.fired:
                    break
    assert "\n".join(stage.wrong) == ""


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("stage", SCENES, indirect=True)
def test_a_short_write_is_continued(stage: Stage, sticky: bool) -> None:
    for n in itertools.count(1):
        disk = Probe(n, 0, sticky=sticky, short=True)
        stage.fail(disk, f"({n}) is short", succeeds=True)
        if not disk.fired or (sticky and n > 3):
            break
    assert "\n".join(stage.wrong) == ""


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
@pytest.mark.parametrize("stage", SCENES, indirect=True)
def test_a_disk_that_is_gone_for_good(stage: Stage, number: int) -> None:
    """From the n-th operation on everything fails, cleaning up included."""
    for n in itertools.count(1, EVERY_LAST):
        disk = Probe(n, number, sticky=True)
        stage.fail(disk, f"({n}) and all after it fail with {errno.errorcode[number]}")
        if not disk.fired:
            break
    assert "\n".join(stage.wrong) == ""
