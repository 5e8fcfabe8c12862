"""Repair of a cache: plan files and `zarr.json` are derived, damaged units are extracted again.

Everything is proved before anything is written: the weights have the recorded digest, the images are there and are
those that were extracted. A unit keeps its files and its receipt until its new files are on disk; a killed repair
leaves at most a unit without a receipt, which the next one redoes.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pyarrow.parquet as pq

from proteus_cache import storage
from proteus_cache.cache.layout import shard_stem
from proteus_cache.cache.reader import open_cache
from proteus_cache.cache.verify import IMAGES, Finding, verify_cache
from proteus_cache.cache.writer import wanted_metadata
from proteus_cache.codecs import Codec, load_codec
from proteus_cache.documents import MAX_DOCUMENT_BYTES
from proteus_cache.errors import CanaryError, DamageError, ProteusCacheError, StorageError, UsageError, WeightsError
from proteus_cache.extract.canary import CANARY_EVERY
from proteus_cache.extract.compatibility import check_image_root, check_settings
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.pipeline import Progress, units_to_do
from proteus_cache.extract.planning import PlannedCache
from proteus_cache.extract.records import spec_of
from proteus_cache.extract.run import empty_temporary, redo_units
from proteus_cache.recompute.teacher import load_recorded_teacher
from proteus_cache.repair.damage import Damage, Unit, parse_units
from proteus_cache.repair.plan_files import find_parameters, image_list_bytes, parameters_of, refit_parameters
from proteus_cache.repair.proof import ImageProof
from proteus_cache.repair.report import NAMED, STOPPED, Action, RepairReport, State, in_repair
from proteus_cache.stores import IMAGES_DIR, WEIGHTS_FILE, has_weights_of_a_file
from proteus_cache.teachers.teacher import Teacher

logger = logging.getLogger(__name__)

Phase = Callable[[str, str], Callable[..., None]]
"""From the label of a phase and what is counted in it to what to call with (done, in all, bytes)."""
_ROUNDS = 3
"""Damage can hide behind damage: so often is looked again."""
_COPY = "copy this file from another copy of the cache"


class _MissingError(ProteusCacheError):
    """Images or weights were not given, and are not where they are looked for; `needs` are the flags."""

    def __init__(self, message: str, needs: Sequence[str]) -> None:
        super().__init__(message)
        self.needs = tuple(needs)


def repair_cache(
    path: Path,
    settings: Callable[[], ExtractConfig | None],
    *,
    home: Path,
    read_data: bool = True,
    units: Sequence[str] = (),
    dry_run: bool = False,
    phase: Phase = lambda label, unit: lambda *counts: None,
) -> RepairReport:
    """Mend a cache.

    Args:
        path: of the cache.
        settings: of its extraction, asked for only when images are needed; `out` must be `path`. None where no images
            were given: then what needs none is mended, and the rest is said.
        home: PROTEUS_HOME, where weights and other stores are.
        read_data: find damage by reading everything; otherwise by structure, names and sizes.
        units: to be redone even if they look whole, such as "v000/s00003".
        dry_run: say what would be done, and prove that it can be.
        phase: for progress.

    Raises:
        UsageError: no cache, no such unit, other images, or settings that the cache was not made with.
        WeightsError: the weights that were given are not the recorded ones; nothing was touched.
        DamageError: the manifest is damaged, so nothing else can be judged.
    """
    return _CacheRepair(path, settings, home, read_data, dry_run, phase).run(units)


class _CacheRepair:
    def __init__(
        self,
        path: Path,
        settings: Callable[[], ExtractConfig | None],
        home: Path,
        read_data: bool,
        dry_run: bool,
        phase: Phase,
    ) -> None:
        self.cache = open_cache(path)
        self.path = path
        self.settings = settings
        self.home = home
        self.read_data = read_data
        self.dry_run = dry_run
        self.phase = phase
        self.actions: list[Action] = []
        self.redone: set[Unit] = set()
        self.doubted: set[Unit] = set()
        """Redone, and taken back: a canary says that this machine cannot be trusted."""
        self.undone: list[Finding] = []
        """Of units that are as they were."""
        self.missing: _MissingError | None = None
        self.error: str | None = None
        self.has_new_list = False

    def run(self, units: Sequence[str]) -> RepairReport:
        forced = parse_units(self.cache, units)
        findings = verify_cache(self.path, self.read_data, self.phase("verify", "units"))
        before = None
        tried: set[object] = set()
        for number in range(_ROUNDS):
            damage = _without(Damage.of(self.cache, findings, forced if number == 0 else ()), tried)
            if damage == Damage():
                break
            if number == 0 and damage.units and {view for view, _ in damage.units} <= set(self.cache.views()):
                before = _identity(self.path)
            try:
                self._mend(damage)
            except ProteusCacheError as error:
                if number == 0:
                    raise
                self.error = in_repair(error)
                break
            if self.dry_run:
                return self._report([], None)
            findings = self._look_again()
            if self.error is not None:
                break
        self._settle(findings)
        if not findings and not self.undone and not units_to_do(self.cache, self.cache.views()):
            empty_temporary(self.cache)
        identity = (before, _identity(self.path)) if self.redone else None
        return self._report(findings, identity)

    def _report(self, left: list[Finding], identity: tuple[str | None, str | None] | None) -> RepairReport:
        said = {(finding.path, finding.unit) for finding in left}
        undone = [] if self.dry_run else [f for f in self.undone if (f.path, f.unit) not in said]
        return RepairReport(
            path=self.path,
            kind="cache",
            is_dry_run=self.dry_run,
            actions=self.actions,
            left=left + undone,
            error=self.error,
            needs=() if self.missing is None else self.missing.needs,
            identity=identity,
        )

    def _look_again(self) -> list[Finding]:
        """What is left: structure of everything, and the data of what was redone."""
        redone = self.redone
        chosen = None if self.has_new_list and self.read_data else lambda view, shard: (view, shard) in redone
        return verify_cache(self.path, True, self.phase("verify again", "units"), chosen=chosen)

    def _settle(self, left: list[Finding]) -> None:
        """What a last look still finds was not done after all."""
        damage = Damage.of(self.cache, left)
        names = {f"{view}/{shard_stem(shard)}" for view, shard in damage.units}
        paths = {finding.path for finding in left}
        self.actions = [
            action.but("not done", "it was made again and is damaged still: look at the disk")
            if action.state == "done" and (action.unit in names or paths & set(action.paths))
            else action
            for action in self.actions
        ]

    def _mend(self, damage: Damage) -> None:
        """Prove what is needed, then write. The order matters: units need the list, the parameters and the arrays."""
        for finding in damage.foreign:
            remedy = "it is not the cache's, so repair leaves it; look at it, and remove it"
            self._note(None, [finding], "not done", remedy)
        self.cache.disbelieved |= {unit: self._receipt_digest(unit) for unit in damage.units}
        self._refuse_what_cannot_be(damage)
        self._mend_image_list(damage.image_list)
        self._mend_parameters(damage.parameters)
        self._mend_metadata(damage.metadata)
        self._mend_units(damage.units)

    def _refuse_what_cannot_be(self, damage: Damage) -> None:
        """Before anything is touched: the images and weights that were given, where units have to be redone.

        Raises:
            UsageError: the images are not those of this cache; settings that it was not made with.
            WeightsError: the weights are other ones.
        """
        if not damage.units:
            return
        with suppress(_MissingError, DamageError):  # said of every unit
            if not damage.image_list:
                check_image_root(self.cache, self.image_root, self.config.images)
            _ = self.teacher  # loaded once; its digest is compared there

    @property
    def config(self) -> ExtractConfig:
        """Raises _MissingError where no images were given."""
        if self._given is None:
            needs = IMAGES_DIR + (WEIGHTS_FILE if has_weights_of_a_file(self.path) else [])
            raise self._misses("it is made from images: give --images DIR, the same as for extract", needs)
        return self._given

    @cached_property
    def _given(self) -> ExtractConfig | None:
        given = self.settings()
        if given is None:
            return None
        check_settings(config := replace(given, out=self.path), self.cache.manifest)
        return config

    @property
    def teacher(self) -> Teacher:
        """Raises _MissingError where no weights were given, and the official ones cannot be had or are not those."""
        if isinstance(self._loaded, ProteusCacheError):
            raise self._loaded
        return self._loaded

    @cached_property
    def _loaded(self) -> Teacher | ProteusCacheError:
        weights = self.config.weights
        try:
            return load_recorded_teacher(
                self.cache.manifest.teacher,
                self.path,
                weights=weights,
                home=self.home,
                progress=lambda done, total: self.phase("teacher", "MB")(done / 1e6, (total or done) / 1e6),
            )
        except (UsageError, WeightsError) as error:
            return error if weights is not None else self._misses(str(error), WEIGHTS_FILE)

    def _misses(self, message: str, needs: Sequence[str]) -> _MissingError:
        self.missing = _MissingError(message, needs)
        return self.missing

    @property
    def image_root(self) -> Path:
        return self.config.images if self.config.images.is_dir() else self.config.images.parent

    def _note(self, unit: str | None, findings: list[Finding], state: State, remedy: str) -> None:
        paths = tuple(dict.fromkeys(finding.path for finding in findings))
        problem = "; ".join(dict.fromkeys(finding.problem for finding in findings))
        if unit is not None and state == "not done":
            self.undone += [finding for finding in findings if finding.problem != NAMED]
        self.actions.append(Action(unit=unit, paths=paths, problem=problem, remedy=remedy, state=state))

    def _mend_image_list(self, findings: list[Finding]) -> None:
        if not findings:
            return
        try:
            data = image_list_bytes(self.cache, self.config)
            self._write(IMAGES, data)
        except ProteusCacheError as error:
            return self._note(None, findings, "not done", f"{in_repair(error)}; {_COPY}")
        self.cache.image_table = pq.read_table(io.BytesIO(data))  # for a dry run, which writes none
        self.has_new_list = True
        return self._note(None, findings, self._state, "list the images again: it has the recorded digest")

    def _mend_parameters(self, findings: list[Finding]) -> None:
        fitted: dict[str, bytes] | None = None
        for finding in findings:
            sha256 = parameters_of(self.cache, finding.path).codec.parameters
            assert sha256 is not None, "only files of recorded parameters come here"
            data, how = find_parameters(self.home, sha256), "copy it from another store: it has the recorded digest"
            if data is None:
                try:
                    if fitted is None:
                        fitted = self._refit()
                    data, how = fitted.get(sha256), "fit it again to the images: it has the recorded digest"
                except ProteusCacheError as error:
                    self._note(None, [finding], "not done", f"{error}; {_COPY}, or from a pack of it")
                    continue
            if data is None:
                remedy = "fitting again here gives other parameters (another device or library); "
                self._note(None, [finding], "not done", f"{remedy}{_COPY}, or from a pack of it")
                continue
            self._write_or_say(finding, data, how)

    def _refit(self) -> dict[str, bytes]:
        check_image_root(self.cache, self.image_root, self.config.images)
        teacher, update = self.teacher, self.phase("calibration", "views")
        return refit_parameters(self.cache, self.config, teacher, lambda done, total: update(done, total))

    def _mend_metadata(self, findings: list[Finding]) -> None:
        for finding in findings:
            view = finding.path.split("/")[1] if finding.path.count("/") > 1 else "v000"
            data = wanted_metadata(self.cache.manifest, view)[finding.path]
            seen = self._digests_of(finding.path)
            if seen and hashlib.sha256(data).hexdigest() not in seen:
                version = self.cache.manifest.libraries.get("zarr", "?")
                remedy = (
                    f"this version of zarr writes another one: install zarr=={version} and repair again, or {_COPY}"
                )
                self._note(None, [finding], "not done", remedy)
                continue
            self._write_or_say(finding, data, "derive it from the manifest: it is the one that receipts name")

    def _digests_of(self, path: str) -> set[str]:
        """What the receipts below a zarr.json say of it."""
        views = [path.split("/")[1]] if path.count("/") > 1 else self.cache.views()
        found = set()
        for view in views:
            for shard in self.cache.units(view):
                try:
                    receipt = self.cache.receipt(view, shard)
                except (DamageError, StorageError):
                    continue
                if receipt is not None and path in receipt.zarr:
                    found.add(receipt.zarr[path])
        return found

    def _mend_units(self, units: dict[Unit, list[Finding]]) -> None:
        if not units:
            return
        why_none = self._why_no_unit()
        proof = ImageProof(self.cache, self.image_root) if why_none is None else None
        can: list[Unit] = []
        update = self.phase("prove", "units")
        for done, (unit, findings) in enumerate(units.items(), start=1):
            why = why_none
            if proof is not None:
                try:
                    why = self._obstacle(unit) or proof.why_not(unit)
                except (DamageError, StorageError) as error:
                    why = str(error)
            if why is None:
                can.append(unit)
            else:
                self._note(_name(unit), findings, "not done", why)
            update(done, len(units))
        if self.dry_run or not can:
            for unit in can:
                self._note(_name(unit), units[unit], "to do", "extract it again from its images")
            return
        before = {unit: _mark(self.cache.layout.receipt(*unit)) for unit in can}
        written = self._redo(can, before)
        for unit in can:
            if unit in written:
                self._note(_name(unit), units[unit], "done", "extract it again from its images")
            else:
                self._note(_name(unit), units[unit], "not done", self._what_it_has(unit, before[unit]))

    def _what_it_has(self, unit: Unit, before: tuple[int, int] | None) -> str:
        """Of a unit that was to be redone, and is not."""
        if unit in self.doubted:
            return "it was made again by a machine that fails, as said below; its receipt was taken away: repair again"
        receipt = self.cache.layout.receipt(*unit)
        if before is not None and _mark(receipt) is None:
            return f"{STOPPED}, and after its receipt was taken away: repair again"
        return f"{STOPPED}; it keeps what it has"

    def _obstacle(self, unit: Unit) -> str | None:
        """What stands in a unit's places and cannot be replaced: it is not ours, and somebody has to look at it."""
        layout = self.cache.layout
        for path in (layout.receipt(*unit), *map(layout.resolve, self.cache.unit_files(*unit))):
            if path.is_dir() and not path.is_symlink():
                return f"a folder stands in the place of {path}; look at it, and move it away"
            for folder in path.relative_to(layout.root).parents:
                if os.path.lexists(place := layout.root / folder) and not place.is_dir():
                    return f"{place}: stands where a folder is needed; look at it, and move it away"
        return None

    def _why_no_unit(self) -> str | None:
        """Why no unit can be redone; None when the plan is whole, and images and weights are there."""
        try:
            _ = self.teacher
            _ = self.cache.image_table
            if not self.dry_run:
                self._codecs()
        except (DamageError, StorageError, _MissingError) as error:
            return str(error)
        return None

    def _redo(self, units: list[Unit], before: dict[Unit, tuple[int, int] | None]) -> set[Unit]:
        """Extract units again; returns those that were committed, and that the canaries let pass.

        As many at a time as one check of the canaries proves, so that those in doubt are known.
        """
        cache, receipts = self.cache, self.cache.layout.receipt
        update = self.phase("repair", "views")
        n_views = sum(len(cache.rows(*unit)) for unit in units)
        done = n_bytes = 0
        last = Progress(0, 0, 0, 0)

        def tell(at: Progress) -> None:
            nonlocal last
            last = at
            update(done + at.views_done, n_views, n_bytes + at.bytes_written)

        written: set[Unit] = set()
        part: list[Unit] = []
        try:
            storage.make_folder(cache.layout.temporary, cache.path)
            planned = PlannedCache(
                cache=cache,
                teacher=self.teacher,
                spec=spec_of(cache.manifest),
                codecs=self._codecs(),
                image_root=self.image_root,
                is_new=False,
                view_bytes=None,
                views_per_s=None,
            )
            for start in range(0, len(units), CANARY_EVERY):
                part = units[start : start + CANARY_EVERY]
                redo_units(self.config, planned, part, tell)
                written |= set(part)
                done, n_bytes = done + last.views_done, n_bytes + last.bytes_written
        except ProteusCacheError as error:
            self.error = in_repair(error)
            made = {unit for unit in part if _mark(receipts(*unit)) not in (None, before[unit])}
            if isinstance(error, CanaryError):
                self._take_back(made)
            else:
                written |= made
        self.redone |= written
        return written

    def _take_back(self, units: set[Unit]) -> None:
        """Remove the receipts of units that must not be trusted, so that the next repair makes them again."""
        self.doubted |= units
        for unit in sorted(units):
            try:
                storage.remove(self.cache.layout.receipt(*unit))
            except StorageError as error:
                self.error = f"{self.error}; {in_repair(error)}"

    def _codecs(self) -> dict[str, Codec]:
        return {
            target.name: load_codec(target.codec, tuple(target.shape), self.cache.parameters_blob(target))
            for target in self.cache.manifest.targets
        }

    @property
    def _state(self) -> State:
        return "to do" if self.dry_run else "done"

    def _write_or_say(self, finding: Finding, data: bytes, how: str) -> None:
        try:
            self._write(finding.path, data)
        except ProteusCacheError as error:
            return self._note(None, [finding], "not done", in_repair(error))
        return self._note(None, [finding], self._state, how)

    def _write(self, relative: str, data: bytes) -> None:
        if self.dry_run:
            return
        layout = self.cache.layout
        storage.make_folder(layout.temporary, layout.root)
        storage.make_folder(layout.resolve(relative).parent, layout.root)
        storage.write_whole(layout.resolve(relative), lambda: data, layout.temporary)
        logger.info("wrote file=%s", relative)

    def _receipt_digest(self, unit: Unit) -> str | None:
        """SHA-256 of the bytes of a receipt, None where they cannot be read."""
        path = self.cache.layout.receipt(*unit)
        try:
            if storage.size_of(path) is None:
                return None
            return hashlib.sha256(storage.read_bytes(path, MAX_DOCUMENT_BYTES)).hexdigest()
        except (DamageError, StorageError):
            return None


def _name(unit: Unit) -> str:
    return f"{unit[0]}/{shard_stem(unit[1])}"


def _mark(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced; the inode alone may be that of a file that is gone."""
    if not os.path.lexists(path):
        return None
    status = os.lstat(path)
    return status.st_ino, status.st_mtime_ns


def _without(damage: Damage, tried: set[object]) -> Damage:
    """What was not tried before; what is returned counts as tried from now on."""

    def fresh(findings: list[Finding]) -> list[Finding]:
        return [finding for finding in findings if finding.path not in tried]

    new = Damage(
        image_list=fresh(damage.image_list),
        parameters=fresh(damage.parameters),
        metadata=fresh(damage.metadata),
        units={unit: findings for unit, findings in damage.units.items() if unit not in tried},
        foreign=fresh(damage.foreign),
    )
    tried.update(new.units)
    tried.update(f.path for part in (new.image_list, new.parameters, new.metadata, new.foreign) for f in part)
    return new


def _identity(path: Path) -> str | None:
    """The cache id, None where a view index lacks units or a receipt cannot be read."""
    try:
        cache = open_cache(path)
        return cache.cache_id() if cache.complete_views() == cache.views() != [] else None
    except ProteusCacheError:
        return None
