"""What a pack is going to hold, decided before anything is written, and what of it is there already.

The plan is kept in `PACK/tmp/plan.json` while a pack is made: with `--move` the cache shrinks under it, and a
run that goes on later must still know which receipts the pack was made from.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from proteus_cache import storage, stores, tar
from proteus_cache.cache.layout import PROBE, is_view, view_name
from proteus_cache.cache.reader import Cache, combine_view_ids, open_cache
from proteus_cache.cache.writer import rows_of_view
from proteus_cache.codecs import codec_for_target
from proteus_cache.documents import MAX_DOCUMENT_BYTES, Document, digest_of
from proteus_cache.errors import DamageError, SpaceError, UsageError
from proteus_cache.pack.document import CacheIdentity, PackDocument, PackTarget
from proteus_cache.pack.index import RECORD_BYTES
from proteus_cache.pack.reader import is_pack
from proteus_cache.pack.recode import KnownStep, Recoding, SecondStep, plan_recodings
from proteus_cache.pack.samples import tar_name
from proteus_cache.plan import human_bytes

_MARGIN = 1.02
_MAX_BLOB_BYTES = 1 << 30


class PlanDocument(Document):
    """`tmp/plan.json`."""

    format: Literal["proteus-cache/pack-plan"] = "proteus-cache/pack-plan"
    version: Literal[1] = 1
    cache: CacheIdentity
    targets: list[PackTarget]
    receipts: dict[str, list[str]]
    """View index to the digests of its receipts, by shard."""
    steps: list[SecondStep] = Field(default_factory=list)
    """What encoding again adds to each target that is."""


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """A pack that is about to be made, continued, or found complete."""

    cache: Cache
    out: Path
    document: PlanDocument
    recodings: list[Recoding]
    move: bool
    finished: PackDocument | None
    """The pack that is there, when nothing is left to pack."""
    bytes_all: int
    """Of all tars and indices."""
    bytes_there: int
    free: storage.Free
    left_out: tuple[str, ...] = ()
    """View indices of the cache that were begun and are not complete, with their units, for people."""

    @property
    def views(self) -> list[str]:
        """View indices to pack, ascending, the probe last."""
        return sorted(self.document.receipts, key=lambda view: (view == PROBE, len(view), view))

    @property
    def n_units(self) -> int:
        """Tars of the pack."""
        return sum(map(len, self.document.receipts.values()))

    @property
    def bytes_todo(self) -> int:
        """About what is still to be written."""
        return 0 if self.finished else max(0, self.bytes_all - self.bytes_there)

    @property
    def code_bytes(self) -> int:
        """Of one sample."""
        return sum(target.codec.code_bytes for target in self.document.targets)

    @property
    def recoding_bytes(self) -> int:
        """Held while a unit is encoded again, besides the unit: the cache's codes twice, and tokens on their way."""
        encoded = [recoding for recoding in self.recodings if recoding.step is not None]
        codes = sum(recoding.step.source_bytes for recoding in encoded if recoding.step is not None)
        return 2 * codes * self.cache.manifest.shard_size + max((r.working_bytes for r in encoded), default=0)

    def lines(self) -> list[str]:
        """The plan for people."""
        targets = ", ".join(f"{t.name} {'x'.join(map(str, t.shape))} {t.codec.name}" for t in self.document.targets)
        lines = [
            f"cache     {self.cache.path}",
            f"views     {', '.join(self.views)}: {self.n_units} tars",
            *([f"left out  {', '.join(self.left_out)}: not complete in the cache"] if self.left_out else []),
            f"targets   {targets}: {human_bytes(self.code_bytes)} codes a view",
        ]
        for step in self.document.steps:
            lines += step.lines()
        if self.finished is not None:
            lines.append("to do     nothing: the pack is there")
        else:
            lines.append(f"to do     {human_bytes(self.bytes_todo)} of {human_bytes(self.bytes_all)}")
            lines.append(f"free      {human_bytes(self.free.bytes)} at {self.out}")
        if self.move:
            lines.append("move      each unit is removed from the cache once its tar reads back whole")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The plan for machines."""
        return {
            "cache": str(self.cache.path),
            "out": str(self.out),
            "views": self.views,
            "targets": {t.name: {"shape": t.shape, "codec": t.codec.name} for t in self.document.targets},
            "code_bytes": self.code_bytes,
            "steps": [step.to_json() for step in self.document.steps],
            "units": self.n_units,
            "bytes": self.bytes_all,
            "bytes_todo": self.bytes_todo,
            "free_bytes": self.free.bytes,
            "move": self.move,
        }

    def check(self, n_at_once: int = 1) -> None:
        """Refuse what cannot fit.

        Args:
            n_at_once: units packed at the same time; a move on one file system needs room for these only.

        Raises:
            SpaceError: names what fits instead.
        """
        needed = math.ceil(self.bytes_todo * _MARGIN)
        if self.move and _same_file_system(self.cache.path, self.out):
            needed = min(needed, math.ceil(self.bytes_all / max(1, self.n_units) * _MARGIN) * (1 + n_at_once))
        if needed > self.free.bytes:
            raise SpaceError(
                f"{self.out}: {human_bytes(needed)} are needed and {human_bytes(self.free.bytes)} are free; "
                f"{self._what_fits()}"
            )
        n_files = self.n_units + len(self.views) + 8
        if self.free.inodes is not None and not self.finished and n_files > self.free.inodes:
            raise SpaceError(f"{self.out}: {n_files:,} files are needed and {self.free.inodes:,} inodes are free")

    def _what_fits(self) -> str:
        n_views = sum(view != PROBE for view in self.views)
        fitting = int(self.free.bytes / _MARGIN / (self.bytes_all / max(1, len(self.views))))
        if 0 < fitting < n_views:
            chosen = ",".join([view for view in self.views if view != PROBE][:fitting])
            return f"--views {chosen} fits; so may --move, a smaller --codec, or another --out"
        return "--move needs no second copy on the same disk; else use a smaller --codec or another --out"


def plan_pack(
    cache: str | Path,
    out: str | Path,
    *,
    views: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    codec: str | None = None,
    move: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PackPlan:
    """Decide what a pack will hold; writes nothing.

    Args:
        cache: the cache's folder.
        out: the pack's folder: missing, empty, or holding this pack, finished or not.
        views: view indices to take, such as ["v000", "probe"]; None takes every complete one.
        targets: to take; None takes all.
        codec: to encode with; None keeps the cache's.
        move: remove each unit from the cache once it is packed.
        progress: called with views read and in all, while those are read that a codec is fitted to.

    Raises:
        UsageError: the cache lacks what is asked for, `out` holds something else, or a move would lose data.
        ConfigError: no codec of this kind reaches its goal; names the nearest that does.
    """
    opened, root = open_cache(cache), Path(out).absolute()
    _check_place(opened, root)
    wanted = _wanted_codecs(opened, targets, codec)
    if move and wanted != {target.name: target.codec.name for target in opened.manifest.targets}:
        raise UsageError(
            f"{opened.path}: --move would lose targets or precision, because this pack is not a whole copy; "
            "pack without --targets and --codec, or without --move"
        )
    finished = _finished_pack(root)
    left_out: tuple[str, ...] = ()
    basis = _receipts_of(finished) if finished is not None else _moved_from(opened, root)
    if basis is not None:
        _refuse_difference(basis, opened, root, views, wanted)
        recodings = [Recoding(target, _blob(opened, target), None, None) for target in basis.targets]
    else:
        chosen = _chosen_views(opened, views)
        left_out = _incomplete_views(opened) if views is None else ()
        known = _known_steps(opened, root, chosen[0])
        recodings = plan_recodings(opened, targets, codec, chosen[0], known=known, progress=progress)
        basis = _fresh(opened, chosen, recodings)
    bytes_all, bytes_there = _sizes(opened, basis, root)
    return PackPlan(
        cache=opened,
        out=root,
        document=basis,
        recodings=[] if finished is not None else recodings,
        move=move,
        finished=finished,
        bytes_all=bytes_all,
        bytes_there=bytes_there,
        free=storage.free_space(root),
        left_out=left_out,
    )


def plan_path(out: Path) -> Path:
    """Where the plan of an unfinished pack is."""
    return out / "tmp" / "plan.json"


def first_views(cache: Cache, count: int) -> list[str]:
    """Names of the first so many view indices, and of the probe where there is one."""
    probe = [PROBE] if cache.manifest.images.n_probe else []
    return [view_name(index) for index in range(count)] + probe


def _wanted_codecs(cache: Cache, targets: Sequence[str] | None, codec: str | None) -> dict[str, str]:
    """Target name to codec name, as asked for, in the cache's order."""
    names = {cache.target(name).name for name in targets} if targets is not None else None
    return {
        target.name: target.codec.name if codec is None else codec_for_target(codec, target.name)
        for target in cache.manifest.targets
        if names is None or target.name in names
    }


def _chosen_views(cache: Cache, views: Sequence[str] | None) -> list[str]:
    """View indices to pack, checked: ascending, the probe last."""
    complete = cache.complete_views()
    if not any(view != PROBE for view in complete):
        raise UsageError(f"{cache.path}: no view index is complete yet; run the same extract again to finish it")
    if views is None:
        return complete
    missing = [view for view in views if view not in complete]
    if missing or not views:
        state = "is not complete, or not there" if missing else "is needed"
        raise UsageError(
            f"{cache.path}: view index {', '.join(missing) or 'of some kind'} {state}; "
            f"complete are {', '.join(complete)}"
        )
    return [view for view in complete if view in set(views)]


def _incomplete_views(cache: Cache) -> tuple[str, ...]:
    complete = cache.complete_views()
    units = {view: (len(cache.units(view)), rows_of_view(cache.manifest, view)[1]) for view in cache.views()}
    return tuple(f"{view} ({done} of {n} units)" for view, (done, n) in units.items() if view not in complete)


def _fresh(cache: Cache, views: list[str], recodings: list[Recoding]) -> PlanDocument:
    ids = {view: cache.view_id(view) for view in cache.complete_views()}
    receipts = {
        view: [_receipt_digest(cache, view, shard) for shard in range(rows_of_view(cache.manifest, view)[1])]
        for view in views
    }
    identity = CacheIdentity(
        manifest=cache.manifest_digest,
        cache_id=combine_view_ids([ids[view] for view in ids if view != PROBE]),
        view_ids={view: ids[view] for view in views},
    )
    return PlanDocument(
        cache=identity,
        targets=[recoding.target for recoding in recodings],
        receipts=receipts,
        steps=[recoding.step for recoding in recodings if recoding.step is not None],
    )


def _known_steps(cache: Cache, out: Path, view: str) -> dict[str, KnownStep]:
    """Codecs that an earlier start of this pack has fitted: fitting takes time, and other ones would be other bytes."""
    path = plan_path(out)
    if storage.size_of(path) is None:
        return {}
    try:
        plan = PlanDocument.parse(storage.read_bytes(path, MAX_DOCUMENT_BYTES), str(path))
    except DamageError:
        return {}
    if plan.cache.manifest != cache.manifest_digest or view not in plan.receipts:
        return {}
    steps = {step.target: step for step in plan.steps}
    known = {}
    for target in plan.targets:
        parameters = target.codec.parameters
        blob = None if parameters is None else _whole_blob(out / "codec" / f"{parameters}.safetensors", parameters)
        if target.name in steps and (parameters is None or blob is not None):
            known[target.name] = KnownStep(target, blob, steps[target.name])
    return known


def _whole_blob(path: Path, sha256: str) -> bytes | None:
    """The bytes of a file, if they are those that its name says."""
    if not storage.size_of(path):
        return None
    data = storage.read_bytes(path, _MAX_BLOB_BYTES)
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def _receipt_digest(cache: Cache, view: str, shard: int) -> str:
    return digest_of(storage.read_bytes(cache.layout.receipt(view, shard), MAX_DOCUMENT_BYTES))


def _check_place(cache: Cache, out: Path) -> None:
    """Refuse a place where no pack can be."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; give --out a new or empty folder")
    if out.resolve().is_relative_to(cache.path.resolve()):
        raise UsageError(f"{out}: is inside the cache; give --out a folder of its own")


def _finished_pack(out: Path) -> PackDocument | None:
    """The pack that `out` holds, or None where a new one can be made.

    Raises:
        UsageError: `out` holds something else.
    """
    if is_pack(out):
        return PackDocument.parse(storage.read_bytes(out / "pack.json", MAX_DOCUMENT_BYTES), str(out / "pack.json"))
    names, begun = storage.list_folder(out), storage.list_folder(out / "tmp")
    if "plan.json" in begun:
        own = ("tmp", "codec")
        foreign = [name for name in names if name not in own and not is_view(name.removesuffix(".idx"))]
    else:
        foreign = [name for name in names if name != "tmp"]
        foreign += [f"tmp/{name}" for name in begun if not name.startswith("plan.json.")]
    if foreign:
        raise UsageError(stores.occupied(out, foreign))
    return None


def _receipts_of(pack: PackDocument) -> PlanDocument:
    """The plan that a finished pack was made by."""
    receipts = {view: [tar.receipt for tar in pack.packed[view].tars] for view in pack.view_names}
    return PlanDocument(cache=pack.cache, targets=pack.targets, receipts=receipts)


def _moved_from(cache: Cache, out: Path) -> PlanDocument | None:
    """The saved plan, when a move has begun to take units out of this cache; None otherwise: plan anew."""
    path = plan_path(out)
    if storage.size_of(path) is None:
        return None
    plan = PlanDocument.parse(storage.read_bytes(path, MAX_DOCUMENT_BYTES), str(path))
    if plan.cache.manifest != cache.manifest_digest:
        return None
    moved = any(len(cache.units(view)) < len(receipts) for view, receipts in plan.receipts.items())
    return plan if moved else None


def _refuse_difference(
    basis: PlanDocument, cache: Cache, out: Path, views: Sequence[str] | None, wanted: dict[str, str]
) -> None:
    """A pack that is there, or half moved, can be continued as what it is and as nothing else."""
    found = {target.name: target.codec.name for target in basis.targets}
    packed = set(basis.receipts)
    if basis.cache.manifest != cache.manifest_digest:
        difference = "it is of another cache"
    elif found != wanted:
        described = [", ".join(f"{name} {codec}" for name, codec in targets.items()) for targets in (found, wanted)]
        difference = f"its targets are {described[0]}, not {described[1]}"
    elif (set(views) if views is not None else packed | set(cache.complete_views())) != packed:
        difference = f"its view indices are {', '.join(sorted(basis.receipts))}"
    else:
        return
    raise UsageError(f"{out}: holds another pack ({difference}); give another --out, or remove that pack")


def _blob(cache: Cache, target: PackTarget) -> bytes | None:
    """Parameters of a codec that pack and cache share; a finished pack holds its own."""
    held = {record.name: record for record in cache.manifest.targets}.get(target.name)
    return cache.parameters_blob(held) if held is not None and held.codec == target.codec else None


def _sizes(cache: Cache, plan: PlanDocument, out: Path) -> tuple[int, int]:
    """Bytes of all tars and indices, and of the tars that are there already."""
    added = tar.member_bytes(sum(target.codec.code_bytes for target in plan.targets))
    total = there = 0
    for view, receipts in plan.receipts.items():
        for shard in range(len(receipts)):
            packed = storage.size_of(out / tar_name(view, shard)) or 0
            cached = storage.size_of(cache.tar_path(view, shard))
            n_rows = len(cache.rows(view, shard))
            total += n_rows * RECORD_BYTES + (packed if cached is None else cached + n_rows * added)
            there += packed
    return total, there


def _same_file_system(first: Path, second: Path) -> bool:
    while not second.exists() and second != second.parent:
        second = second.parent
    return os.stat(first).st_dev == os.stat(second).st_dev
