"""What a folder is by the files in it, so that a message about a wrong one can say what was given instead.

No data is opened; the stores' own readers say whether what is there is whole.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Final, Literal, TypeAlias

from proteus_cache.choices import either
from proteus_cache.errors import FormatError, ProteusCacheError

Kind: TypeAlias = Literal["cache", "pack", "run"]

MARKERS: Final[dict[Kind, str]] = {"cache": "manifest.json", "pack": "pack.json", "run": "config.yaml"}
"""The file that makes a folder one of the three."""
_UNFINISHED: Final[dict[Kind, str]] = {"pack": "tmp/plan.json", "cache": "tmp/plan-*.parquet"}
"""What a command that was killed leaves before the file above."""
_WITHOUT_MARKER: Final[dict[Kind, str]] = {"cache": "receipts/*/s*.json", "pack": "*.idx", "run": "checkpoints/step-*"}
"""What is left of a store whose file above is lost."""
WRITTEN_BY: Final[dict[Kind, str]] = {"cache": "extract", "pack": "pack", "run": "train"}
_HOME_FOLDERS: Final = ("caches", "packs", "runs")
_IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")
_DEFAULT_IMAGES = "imagenet/train"
IMAGES_DIR: Final = ["--images", "DIR"]
WEIGHTS_FILE: Final = ["--weights", "FILE"]
"""Flags that a command lacks, each with a word in place of its value."""
_LOOKED_AT = 64
_MOST_NAMED = 3


def kind_of(path: Path) -> Kind | None:
    """Which of the three a folder is, or None."""
    return next((kind for kind, marker in MARKERS.items() if (path / marker).is_file()), None)


def wrong_folder(path: Path, wanted: Kind, *more: Kind) -> str:
    """Why `path` is not what was asked for, and what to give: the text of a `UsageError`."""
    return f"{path}: {described(path)}; give {_wanted((wanted, *more))}{_instead(path, (wanted, *more))}"


def occupied(path: Path, names: list[str]) -> str:
    """Why nothing new can be made at `path`, which holds `names`: the text of a `UsageError`."""
    more = ", ..." if len(names) > _MOST_NAMED else ""
    held = ", ".join(names[:_MOST_NAMED]) + more
    return f"{path}: {described(path)} (it holds {held}); give --out a new or empty folder, nothing was written"


def described(path: Path) -> str:
    """What is at `path`, in a few words: "is a pack", "no such folder", "is a folder of images"."""
    if not path.is_dir():
        return "is a file" if os.path.lexists(path) else "no such folder"
    kind = kind_of(path)
    if kind is not None:
        return f"is a {kind}"
    for unfinished, left in _UNFINISHED.items():
        if any(path.glob(left)):
            return f"is an unfinished {unfinished}, which the same `{WRITTEN_BY[unfinished]}` goes on with"
    for lost, left in _WITHOUT_MARKER.items():
        if any(path.glob(left)):
            return f"is a {lost} that has lost its {MARKERS[lost]}, which must be brought back from a copy"
    if holds_images(path):
        return "is a folder of images"
    if _stores_below(path):
        return "is a folder of several caches, packs or runs"
    return "is an empty folder" if not any(os.scandir(path)) else "is no cache, pack or run"


def refuse_links(folders: Iterable[Path]) -> None:
    """Refuse folders of a store that are links: what is written or tidied there would be somewhere else.

    Raises:
        FormatError: names the first.
    """
    for folder in folders:
        if os.path.islink(folder):
            raise FormatError(f"{folder}: is a link, which may lead out of this store; put a folder there instead")


def repair_command(path: Path, *arguments: str) -> str:
    """The command that mends a store, quoted for a shell.

    Where the images or weights of a cache are not found by themselves, `--images DIR` and `--weights FILE` stand there.
    """
    needs: list[str] = []
    if kind_of(path) == "cache":
        finds_images = bool(os.environ.get("PROTEUS_IMAGES")) or os.path.isdir(_DEFAULT_IMAGES)
        needs += [] if finds_images else IMAGES_DIR
        needs += WEIGHTS_FILE if has_weights_of_a_file(path) else []
    return shlex.join(["proteus-cache", "repair", str(path), *arguments, *needs])


def has_weights_of_a_file(cache: Path) -> bool:
    """Whether the teacher of a cache had weights from a local file; False where its manifest does not say so."""
    try:
        status = os.stat(manifest := cache / MARKERS["cache"])
    except OSError:
        return False
    return _is_of_a_file(manifest, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _is_of_a_file(manifest: Path, mtime_ns: int, size: int) -> bool:
    """Read once while time and size stay: `verify` has a command ready for every unit."""
    from proteus_cache import storage
    from proteus_cache.documents import MAX_DOCUMENT_BYTES, parse_sealed

    try:
        teacher = parse_sealed(storage.read_bytes(manifest, MAX_DOCUMENT_BYTES), str(manifest)).get("teacher")
    except ProteusCacheError:
        return False
    if not isinstance(teacher, dict) or teacher.get("name") == "demo":
        return False
    source = str(teacher.get("weights_source"))
    return not source.startswith(("random:", "hf-hub:")) and "://" not in source


def _wanted(kinds: tuple[Kind, ...]) -> str:
    return f"a {either(list(kinds))}: the folder that {either([f'`{WRITTEN_BY[kind]}`' for kind in kinds])} wrote"


def _instead(path: Path, kinds: tuple[Kind, ...]) -> str:
    """Stores below `path` that would do, for example where PROTEUS_HOME itself was given."""
    found = [str(store) for store in _stores_below(path) if kind_of(store) in kinds]
    return f", for example {found[0]}" if found else ""


def _stores_below(path: Path) -> list[Path]:
    """Caches, packs and runs of a PROTEUS_HOME."""
    return [
        store
        for name in _HOME_FOLDERS
        if (path / name).is_dir()
        for store in sorted((path / name).iterdir())
        if kind_of(store) is not None
    ]


def holds_images(path: Path) -> bool:
    """Whether an image is among the first files of a folder or of its first folders."""
    with os.scandir(path) as found:
        entries = list(islice(found, _LOOKED_AT))
    if any(_is_image(entry) for entry in entries):
        return True
    for entry in entries[:8]:
        if not entry.name.startswith(".") and _is_folder(entry):
            with os.scandir(entry.path) as below:
                if any(_is_image(inner) for inner in islice(below, _LOOKED_AT)):
                    return True
    return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(_IMAGE_SUFFIXES)
