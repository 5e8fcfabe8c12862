"""What the shell offers when Tab is pressed. Runs on every press, so nothing here imports torch or reads a store.

An empty answer leaves the word to the shell, which then completes files and folders.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

from proteus_cache.cli import settings
from proteus_cache.stores import MARKERS, Kind

CODECS = "float32, float16, int8, int4, klt:NdB or klt:NKB."
"""For the help of `--codec`."""


def teachers(incomplete: str) -> list[str]:
    """Names for `--teacher`."""
    from proteus_cache.teachers.registry import TEACHERS

    return _starting([*TEACHERS, "timm:"], incomplete)


def official_teachers(incomplete: str) -> list[str]:
    """Names for `fetch`."""
    from proteus_cache.teachers.dinov2_models import DINOV2

    return _starting(DINOV2, incomplete)


def students(incomplete: str) -> list[str]:
    """Names for `--student`; of a list with commas the last is completed."""
    from proteus_cache.students.registry import STUDENTS

    return _last_of_list(STUDENTS, incomplete)


def codecs(incomplete: str) -> list[str]:
    """Names for `--codec`."""
    from proteus_cache.codecs.names import CODEC_NAMES

    return _starting(CODEC_NAMES, incomplete)


def targets(incomplete: str) -> list[str]:
    """A list for `--targets`."""
    return _last_of_list(("cls", "patch", "block."), incomplete)


def augments(incomplete: str) -> list[str]:
    """Names for `--augment`."""
    return _starting(("deit", "none"), incomplete)


def view_formats(incomplete: str) -> list[str]:
    """Names for `--view-format`."""
    return _starting(("jpeg", "png"), incomplete)


def precisions(incomplete: str) -> list[str]:
    """Names for `--precision`."""
    return _starting(("fp32", "fp16", "bf16"), incomplete)


def devices(incomplete: str) -> list[str]:
    """Names for `--device`."""
    return _starting(("cuda", "cpu"), incomplete)


def protocols(incomplete: str) -> list[str]:
    """Names for `--protocol`."""
    return _starting(("knn", "linear"), incomplete)


def pipelines(incomplete: str) -> list[str]:
    """The YAML files of the folder `pipelines`, where there is one; any other file is left to the shell."""
    folder = Path("pipelines")
    try:
        words = sorted(str(path) for path in folder.glob("*.yaml"))
    except OSError:
        return []
    return _starting(words, incomplete)


def stores(*kinds: Kind) -> Callable[[str], list[str]]:
    """Completes folders of these kinds in PROTEUS_HOME."""

    def found(incomplete: str) -> list[str]:
        paths = [path for kind in kinds for path in _folders(settings.home() / f"{kind}s", MARKERS[kind])]
        words = sorted(str(path) for path in paths if shlex.quote(str(path)) == str(path))  # others the shell quotes
        return _starting(words, incomplete)

    return found


def _folders(parent: Path, marker: str) -> list[Path]:
    try:
        return [path for path in parent.iterdir() if (path / marker).is_file()]
    except OSError:
        return []


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _last_of_list(names: Iterable[str], incomplete: str) -> list[str]:
    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    return [before + comma + name for name in _starting(names, last) if name not in taken]
