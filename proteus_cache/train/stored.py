"""Training from a pack: its stored views with its stored targets, or with those of a live teacher (a replay).

A replay reads the same batches in the same order, so it trains the student that the pack would train if no codec had
touched the targets. That is the proof that a cache can stand for its teacher. It sees whole tokens then, also where
the pack's codec has a basis and its stored targets are components.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from proteus_cache.cache.layout import PROBE, view_index, view_name
from proteus_cache.cache.manifest import TeacherRecord
from proteus_cache.codecs.codec import Basis
from proteus_cache.errors import FormatError, UsageError
from proteus_cache.pack.index import REMEDY
from proteus_cache.pack.loader import Loader, open_loader
from proteus_cache.pack.order import Order, SequentialOrder, TrainingOrder
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Precision, Teacher
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.feed import DeviceBatch
from proteus_cache.train.source import check_targets, mean_sample_bytes, needed_targets, target_decoder
from proteus_cache.train.targets import Target

SEEN_IMAGES: Final = 4096
"""Trained images that the loss on seen views is measured on where there is no probe."""


class StoredData:
    """A pack as training data.

    Args:
        config: of the run; its objectives decide which targets are decoded.
        pack: that is trained from.
        teacher: replays the targets; None decodes the stored ones.
    """

    def __init__(self, config: TrainConfig, pack: Pack, teacher: Teacher | None = None) -> None:
        check_targets(pack, config)
        self._config = config
        self._pack = pack
        self._live = teacher
        self._names = needed_targets(pack, config)
        self._decoder = target_decoder(pack, config)

    @property
    def path(self) -> Path:
        return self._pack.path

    @property
    def teacher(self) -> TeacherRecord:
        return self._pack.teacher

    @property
    def side_px(self) -> int:
        return self._pack.side_px

    @property
    def target_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._pack.target_shapes

    @property
    def identity(self) -> Mapping[str, str]:
        return {"pack digest": self._pack.digest}

    @property
    def provenance(self) -> Mapping[str, str]:
        return {"cache_id": self._pack.cache_id, "pack_digest": self._pack.digest}

    @property
    def description(self) -> Mapping[str, object]:
        teacher = self._pack.teacher
        kept = {name: f"{basis.vectors.shape[1]} of {len(basis.mean)}" for name, basis in self.bases.items()}
        return {
            "pack": {
                "cache_id": self._pack.cache_id,
                "pack_digest": self._pack.digest,
                "pack_json_sha256": self._pack.file_sha256,
                "teacher": teacher.name,
                "teacher_weights_sha256": teacher.weights_sha256,
                "views": len(self._pack.views),
                "targets": {target.name: target.codec.name for target in self._pack.targets},
                **({"components_in_losses": kept} if kept else {}),
            }
        }

    @property
    def bases(self) -> Mapping[str, Basis]:
        if self._live is not None:
            return {}
        found = {name: self._pack.codecs[name].basis for name in self._names}
        return {name: basis for name, basis in found.items() if basis is not None}

    @property
    def n_views(self) -> int | None:
        return len(self._pack)

    @property
    def bytes_per_view(self) -> float:
        return mean_sample_bytes(self._pack)

    @cached_property
    def order(self) -> TrainingOrder:
        config = self._config
        return self._pack.training_order(seed=config.seed, batch_size=config.global_batch, repeats=config.repeats)

    @cached_property
    def evaluation_orders(self) -> Mapping[str, SequentialOrder]:
        """Seen are the probe's images in the first view index; without a probe, images spread over the trained ones."""
        size = self._config.global_batch
        probe, held_out = self._pack.probe_order(batch_size=size), self._pack.held_out_order(batch_size=size)
        if probe is None and held_out is None:
            return {}
        seen = SequentialOrder(view_index(self._pack.views[0]), self._seen_records(), size)
        orders = {"seen": seen, "probe": probe, "held_out": held_out}
        return {name: order for name, order in orders.items() if order is not None}

    def open(self, order: Order, steps: range, *, rank: int, world_size: int, n_workers: int, pin: bool) -> Loader:
        return open_loader(
            self._pack,
            order,
            first_step=steps.start,
            last_step=steps.stop,
            rank=rank,
            world_size=world_size,
            n_workers=n_workers,
            pin=pin,
        )

    def samples_of(self, step: int) -> list[dict[str, object]]:
        plan = self.order.batch(step)
        assert plan.view_indices is not None, "training draws no probe"
        samples: list[dict[str, object]] = []
        for position, (index, record) in enumerate(zip(plan.view_indices.tolist(), plan.records.tolist(), strict=True)):
            sample = self._pack.sample(view_name(index), record)
            tokens = [sample.targets[name] for name in self._names if self._live is None]
            place: dict[str, object] = {
                "position": position,
                "key": sample.key,
                "view": view_name(index),
                "record": record,
            }
            if tokens:
                place["is_finite"] = all(bool(np.isfinite(values).all()) for values in tokens)
                place["largest"] = max(float(np.abs(np.nan_to_num(values)).max()) for values in tokens)
            samples.append(place)
        return samples

    def to(self, device: torch.device, precision: Precision) -> None:
        self._decoder.to(device)
        if self._live is not None:
            # The precision that the stored targets were made in; training's own may be another one.
            self._live.to(device, self._pack.teacher.precision if device.type == "cuda" else "fp32")

    def targets_of(self, part: DeviceBatch) -> Mapping[str, Target]:
        if self._live is not None:
            return self._live.targets(part.views, self._names)
        decoded: dict[str, Target] = self._decoder(part.codes)
        return decoded

    def _seen_records(self) -> NDArray[np.int64]:
        """Record numbers in the first view index of the images that seen views are measured on, ascending."""
        view, document = self._pack.views[0], self._pack.document
        rows = self._rows_of(view)
        trained = np.flatnonzero(~np.isin(rows // document.shard_size, document.held_out))
        if not self._pack.has_probe:
            spread = np.linspace(0, trained.size - 1, min(trained.size, SEEN_IMAGES)).astype(np.int64)
            return trained[spread].astype(np.int64)
        # Row p of the probe is the p-th image that is not held out (extract/listing.py).
        places, size = self._rows_of(PROBE), document.shard_size
        tars = np.setdiff1d(np.arange(self._pack.counts(view).size), document.held_out)
        if places.size and not 0 <= int(places.max()) < tars.size * size:
            raise FormatError(f"{self._pack.path}: its probe has more images than are trained on; {REMEDY}")
        images = tars[places // size] * size + places % size
        return np.flatnonzero(np.isin(rows, images)).astype(np.int64)

    def _rows_of(self, view: str) -> NDArray[np.int64]:
        """(n_samples,) image rows of a whole view index."""
        self._pack.check_index(view)
        return self._pack.sample_reader().index(view).rows(0, int(self._pack.counts(view).sum()))


def open_stored(config: TrainConfig, home: Path) -> StoredData:
    """The pack that a run trains from, with its teacher where targets are to be replayed.

    Raises:
        UsageError: there is no pack, it lacks what the losses need, or the teacher given is not the one that made it.
        WeightsError: the teacher's weights cannot be had.
    """
    pack = open_pack(config.pack_path, expect_id=config.expect_id)
    if not config.live:
        return StoredData(config, pack)
    check_targets(pack, config)
    assert config.teacher is not None  # the config sees to it
    if config.teacher != pack.teacher.name:
        raise UsageError(
            f"{pack.path}: was made by {pack.teacher.name} ({pack.teacher.weights_source}), and the live teacher is "
            f"{config.teacher}; a replay needs the same: give its --teacher and --weights"
        )
    teacher = load_teacher(config.teacher, weights=config.teacher_weights, home=home, size_px=pack.side_px)
    _check_same_teacher(pack, teacher)
    return StoredData(config, pack, teacher)


def _check_same_teacher(pack: Pack, teacher: Teacher) -> None:
    made, given = pack.teacher, teacher.identity
    if made.weights_sha256 == given.weights_sha256 and dict(made.architecture) == dict(given.architecture):
        return
    raise UsageError(
        f"{pack.path}: was made by {made.name} with weights {made.weights_sha256[:12]} ({made.weights_source}), and "
        f"the live teacher is {given.name} with weights {given.weights_sha256[:12]} ({given.weights_source}); a replay "
        "needs the same: give its --teacher and --weights"
    )
