"""Measuring a pack or cache: choose views, read them twice, judge, and write the report beside the store.

The first pass over the exact tokens finds their mean and covariance, the second measures every deviation from these. A
batch is forgotten once it is measured; what is kept grows with the width of a token and, up to a cap, with the number
of images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from proteus_cache import storage
from proteus_cache.codecs import Codec
from proteus_cache.devices import use_device
from proteus_cache.documents import seal
from proteus_cache.errors import UsageError
from proteus_cache.fidelity.curve import Curve, Keeper
from proteus_cache.fidelity.neighbours import FEATURES, FeatureMeter
from proteus_cache.fidelity.reference import (
    Reference,
    StoredReference,
    TeacherReference,
    check_finite,
    load_same_teacher,
)
from proteus_cache.fidelity.report import FidelityReport, ReportedTarget
from proteus_cache.fidelity.sample import DEFAULT_SAMPLES, Sample, check_reference, choose_sample, common_views
from proteus_cache.fidelity.sides import Entry, Side, open_side
from proteus_cache.fidelity.spread import Spread, SpreadMeter
from proteus_cache.fidelity.stream import Stream, StreamMeter, streams_of

_VALUES_AT_ONCE: Final = 4_000_000
_MOST_AT_ONCE: Final = 64
MOST_CURVES: Final = 2
"""Targets whose codecs are compared; the first ones."""


class Progress(Protocol):
    """Says how far the measurement is."""

    def __call__(self, done: float, total: float, n_bytes: int = 0, *, detail: str | None = None) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """Where exact tokens come from: a store, or a teacher."""

    store: Path | None = None
    teacher: str | None = None
    weights: str | None = None
    home: Path = Path()

    def __post_init__(self) -> None:
        if (self.store is None) == (self.teacher is None):
            raise UsageError(
                "say what to measure against: --against CACHE (float16 or float32, with the same views) or --teacher "
                "NAME, and not both"
            )
        if self.weights is not None and self.teacher is None:
            raise UsageError("--weights goes with --teacher")


@dataclass(frozen=True, slots=True)
class Written:
    """Where a report was put."""

    report: Path
    picture: Path | None


def measure_fidelity(
    path: Path,
    against: Against,
    *,
    n_samples: int = DEFAULT_SAMPLES,
    with_curve: bool = True,
    device: str | None = None,
    progress: Progress | None = None,
) -> FidelityReport:
    """Measure what the codecs of a pack or cache keep.

    Args:
        path: the pack or cache.
        against: what is exact.
        n_samples: views, at most.
        with_curve: compare all codecs too.
        device: "cuda", "cpu" or None for the best there is.
        progress: called with views done and in all.

    Raises:
        UsageError: the two do not belong together, or there is nothing to measure.
        DamageError: stored bytes are not what was written.
        ProteusCacheError: a token is not finite.
    """
    if n_samples < 1:
        raise UsageError(f"--samples must be at least 1, got {n_samples}")
    side, chosen_device = open_side(path), use_device(device)
    views: Sequence[str] = side.facts.view_names
    other = open_side(against.store) if against.store is not None else None
    if other is not None:
        check_reference(side.facts, other.facts)
        views = common_views(side.facts, other.facts)
    if not views:
        raise UsageError(f"{path}: holds no view yet, so there is nothing to measure")
    sample = choose_sample(side, views, n_samples)
    reference: Reference
    if other is not None:
        reference = StoredReference(side, other, chosen_device)
    else:
        assert against.teacher is not None
        teacher = load_same_teacher(side, against.teacher, against.weights, against.home, chosen_device)
        reference = TeacherReference(side, teacher, sample.measured)
    with torch.inference_mode():
        return _Measurement(side, reference, sample, chosen_device, with_curve, progress).run()


def write_report(report: FidelityReport, path: Path, out: Path | None) -> Written:
    """Write the document and, where codecs were compared, the picture; each whole or not at all.

    The picture of an older report in this place goes: it would not show what the new one says.

    Args:
        report: what was measured.
        path: of the pack or cache; the files go beside it.
        out: another place: a folder, or the name of the .json file.

    Raises:
        StorageError: they cannot be written.
    """
    place = report_path(path, out)
    picture = place.with_suffix(".png") if report.curves else None
    files = {place: seal(report.to_json())}
    if picture is not None:
        from proteus_cache.fidelity.plot import draw

        files[picture] = draw(report)
    elif storage.size_of(place) is not None:
        storage.remove(place.with_suffix(".png"))
    unfinished: dict[Path, Path] = {}
    try:
        for final, data in files.items():
            unfinished[final], _ = storage.write_durable(final.parent, f".{final.name}", partial(bytes, data))
        for final, temp in unfinished.items():
            storage.publish(temp, final)
    except BaseException:
        for temp in unfinished.values():
            storage.discard(temp)
        raise
    return Written(place, picture)


def report_path(path: Path, out: Path | None) -> Path:
    """Where the report of `path` goes.

    Raises:
        UsageError: `out` is neither a folder that is there nor the name of a .json file.
    """
    store = path if path.name not in ("", "..") else Path(os.path.abspath(path))
    if out is None:
        return store.parent / f"{store.name}.fidelity.json"
    if out.is_dir():
        return out / f"{store.name}.fidelity.json"
    if out.suffix == ".json" and out.parent.is_dir():
        return out
    raise UsageError(f"--out {out}: give a folder that is there, or the name of a .json file in one")


class _Measurement:
    """One measurement: the state that its passes share."""

    def __init__(
        self,
        side: Side,
        reference: Reference,
        sample: Sample,
        device: torch.device,
        with_curve: bool,
        progress: Progress | None,
    ) -> None:
        self._side, self._reference, self._sample, self._device = side, reference, sample, device
        self._progress = progress
        self._codecs = {name: side.codec(name).to(device) for name in side.facts.targets}
        self._streams = {name: streams_of(name, codec) for name, codec in self._codecs.items()}
        compared = [name for name in self._codecs if name != "cls"][:MOST_CURVES]
        self._keepers = {name: Keeper(name) for name in compared} if with_curve else {}
        self._features = {name: FeatureMeter(name) for name in self._codecs if name in FEATURES}
        first_of = {entry.key: entry for entry in reversed(sample.measured)}
        self._queries = [entry for entry in sample.measured if first_of[entry.key] is entry]
        self._images = {key: number for number, key in enumerate(first_of)}
        self._done = 0
        self._total = 2 * len(sample.measured) + len(sample.bank)

    def run(self) -> FidelityReport:
        spreads = self._first_pass()
        self._read_bank()
        targets = tuple(self._second_pass(spreads))
        labels = [[entry.label for entry in part] for part in (self._queries, self._sample.bank)]
        found = [meter.finish(labels[0], labels[1], self._device) for meter in self._features.values()]
        curves = [curve for curve in self._curves(spreads) if curve is not None]
        return FidelityReport(
            side=self._side.facts,
            reference=self._reference.description,
            reference_codecs=self._reference.codecs,
            sample=self._sample,
            device=str(self._device),
            targets=targets,
            neighbours=tuple(each for each in found if each is not None),
            curves=tuple(curves),
        )

    def _first_pass(self) -> dict[str, Spread]:
        meters = {stream.name: SpreadMeter() for streams in self._streams.values() for stream in streams}
        for batch in self._batches(self._sample.measured, "reads exact tokens"):
            for target, streams in self._streams.items():
                exact = self._reference.tokens(batch, target)
                for stream in streams:
                    meters[stream.name].add(stream.of(exact).flatten(0, 1))
                if target in self._keepers:
                    self._keepers[target].add("measured", exact)
        return {name: meter.finish() for name, meter in meters.items()}

    def _read_bank(self) -> None:
        wanted = [name for name in self._codecs if name in self._features or name in self._keepers]
        for batch in self._batches(self._sample.bank, "reads trained views"):
            for target in wanted:
                exact = self._reference.tokens(batch, target)
                if target in self._features:
                    self._features[target].add("bank", exact, self._decoded(batch, target)[0])
                if target in self._keepers:
                    self._keepers[target].add("bank", exact)

    def _second_pass(self, spreads: dict[str, Spread]) -> Iterator[ReportedTarget]:
        meters = {
            target: [StreamMeter(stream, spreads[stream.name], self._images, self._device) for stream in streams]
            for target, streams in self._streams.items()
        }
        asked = {id(entry) for entry in self._queries}
        for batch in self._batches(self._sample.measured, "compares"):
            is_asked = torch.tensor([id(entry) in asked for entry in batch], device=self._device)
            for target, meter_of in meters.items():
                exact = self._reference.tokens(batch, target)
                decoded, codes = self._decoded(batch, target)
                for meter in meter_of:
                    meter.add(exact, decoded, codes, batch)
                if target in self._features and bool(is_asked.any()):
                    self._features[target].add("query", exact[is_asked], decoded[is_asked])
        for target, meter_of in meters.items():
            blob = self._side.blob(target)
            yield ReportedTarget(
                target,
                self._side.facts.targets[target].codec,
                len(blob or b""),
                tuple(meter.finish() for meter in meter_of),
            )

    def _curves(self, spreads: dict[str, Spread]) -> Iterator[Curve | None]:
        for target, keeper in self._keepers.items():
            patches: Stream = self._streams[target][-1]
            yield keeper.curve(spreads[patches.name], self._device, lambda what: self._say(what))

    def _decoded(self, entries: Sequence[Entry], target: str) -> tuple[Tensor, Tensor]:
        codec: Codec = self._codecs[target]
        codes = torch.from_numpy(self._side.codes(entries, target)).to(self._device)
        decoded = codec.decode(codes)
        check_finite(decoded, entries, f"{self._side.facts.path}: decoded target {target}")
        return decoded, codes

    def _batches(self, entries: Sequence[Entry], what: str) -> Iterator[list[Entry]]:
        values = sum(stream.n_tokens * stream.width for streams in self._streams.values() for stream in streams)
        size = max(1, min(_MOST_AT_ONCE, _VALUES_AT_ONCE // values))
        for first in range(0, len(entries), size):
            batch = list(entries[first : first + size])
            yield batch
            self._done += len(batch)
            self._say(what)

    def _say(self, what: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, detail=what)
