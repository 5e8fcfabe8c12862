"""Training with a live teacher on fresh views of images, as published: every epoch draws each image anew.

Images are listed, mixed and held out as `extract` does with the same seed. Epoch e shows view index e (with r repeats
of an image r e to r e + r - 1), made by the very recipe that a cache has for it: the first V epochs see the crops of a
cache of V views. Nothing is stored, so nothing is encoded as JPEG, and a box is erased after normalising, with noise
that nothing rounds or clips.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from proteus_cache.cache.layout import PROBE, view_name
from proteus_cache.cache.manifest import TeacherRecord
from proteus_cache.codecs.codec import Basis
from proteus_cache.errors import BadImageError, UsageError
from proteus_cache.extract.config import DEFAULT_SHARD_SIZE, ExtractConfig
from proteus_cache.extract.listing import held_out_shards, image_table
from proteus_cache.extract.records import teacher_record
from proteus_cache.pack.order import (
    BatchPlan,
    Order,
    SequentialOrder,
    TrainingOrder,
    check_shares,
    records_of_tars,
    share_of,
)
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Precision, Teacher
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.feed import DeviceBatch
from proteus_cache.train.source import check_targets, needed_targets
from proteus_cache.train.stored import SEEN_IMAGES
from proteus_cache.views.make import make_fresh_view
from proteus_cache.views.spec import ViewSpec
from proteus_cache.workers import AHEAD, answers, is_piped, shared, shared_memory_suffices, warn_of_pipes

JOB_VIEWS: Final = 32
"""Views that a worker renders at once: a job of a whole batch would make the first step wait, and hold gigabytes."""
_SIZED_IMAGES: Final = 256
_BYTES_PER_VALUE: Final = 4
_LIST_AT_ONCE: Final = 1 << 16


class FreshImages:
    """Images of a run, mixed and set apart as those of a cache.

    Args:
        source: folder or .txt list.
        seed: of the run, and of the cache that would have the same views.
        shard_size: images that are mixed and held out together.
        n_probe: trained images that the loss on unseen views is measured on; None: as many as `extract` takes.

    Raises:
        ImageListError: the images cannot be listed.
        StorageError: a folder or the list cannot be read.
        UsageError: more probe images are asked for than are trained on.
    """

    def __init__(
        self, source: Path, *, seed: int, shard_size: int = DEFAULT_SHARD_SIZE, n_probe: int | None = None
    ) -> None:
        config = ExtractConfig(
            images=source, out=source, home=source, seed=seed, shard_size=shard_size, probe_images=n_probe
        )
        table, _ = image_table(config)
        self.source = source
        self.root = source if source.is_dir() else source.parent
        self.n_images = len(table)
        self.held_out = tuple(held_out_shards(self.n_images, shard_size, seed))
        self.counts: NDArray[np.int64] = np.minimum(
            self.n_images - np.arange(-(-self.n_images // shard_size)) * shard_size, shard_size
        )
        """(n_shards,) images of each shard."""
        self.probe: NDArray[np.int64] = np.flatnonzero(table["probe"].to_numpy())
        """Rows of the probe's images, ascending."""
        self._keys, self._paths = (table[name].combine_chunks() for name in ("key", "path"))

    @property
    def n_trained(self) -> int:
        """Images that are not held out."""
        return self.n_images - int(self.counts[list(self.held_out)].sum())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all keys in their mixed order, a line each."""
        sha256 = hashlib.sha256()
        for start in range(0, self.n_images, _LIST_AT_ONCE):
            keys: list[str] = self._keys.slice(start, _LIST_AT_ONCE).to_pylist()
            sha256.update("".join(f"{key}\n" for key in keys).encode())
        return sha256.hexdigest()

    def rows_of_shards(self, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of their images, shard by shard."""
        return records_of_tars(self.counts, shards)

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """Sample keys."""
        found: list[str] = self._keys.take(pa.array(rows)).to_pylist()
        return found

    def paths(self, rows: NDArray[np.int64]) -> list[str]:
        """Paths below the root."""
        found: list[str] = self._paths.take(pa.array(rows)).to_pylist()
        return found

    def mean_bytes(self) -> float:
        """Of a file, as the first ones of the mixed list tell; those that are gone count for nothing."""
        sizes = []
        for path in self.paths(np.arange(min(self.n_images, _SIZED_IMAGES))):
            try:
                sizes.append(os.stat(self.root / path).st_size)
            except OSError:
                continue  # training says so, if it gets there
        return float(np.mean(sizes)) if sizes else 0.0


class FreshOrder:
    """Every image that is not held out once an epoch, in the order of a cache with the same images and seed.

    Args:
        images: of the run.
        seed: of the run.
        batch_size: global.
        repeats: views of an image in an epoch, which draws one image of as many.

    Raises:
        UsageError: a batch is larger than the images.
    """

    def __init__(self, images: FreshImages, *, seed: int, batch_size: int, repeats: int = 1) -> None:
        n_samples = repeats * (images.n_trained // repeats)
        if batch_size > n_samples:
            raise UsageError(
                f"{images.source}: a batch of {batch_size:,} is larger than the {n_samples:,} views that an epoch "
                "draws; choose a smaller --batch-size, or give more images"
            )
        self.batch_size = batch_size
        self._repeats = repeats
        self._of_one_epoch = TrainingOrder(
            dict.fromkeys(range(repeats), images.counts),
            held_out=images.held_out,
            seed=seed,
            batch_size=batch_size,
            repeats=repeats,
            images=images.counts,
            places=_all_places,
        )
        self.n_samples = self._of_one_epoch.n_samples
        self.steps_per_epoch = self._of_one_epoch.steps_per_epoch

    def batch(self, step: int) -> BatchPlan:
        """Rows of the images of this step, in view indices that no epoch before had."""
        plan = self._of_one_epoch.batch(step)
        assert plan.view_indices is not None
        return plan._replace(view_indices=plan.epoch * self._repeats + plan.view_indices)


def _all_places(view_index: int, shard: int) -> NDArray[np.int64]:
    """An order asks which images of a shard have a stored view where some have none."""
    raise AssertionError(f"every image has a fresh view {view_index} (shard {shard})")


@dataclass(frozen=True, slots=True)
class FreshBatch:
    """This process's part of one global batch."""

    step: int
    epoch: int
    positions: Tensor
    """(b,) int64, within the global batch."""
    views: Tensor
    """(b, H, W, 3) float32, normalised."""
    codes: Tensor
    """(b, 0) uint8: nothing is stored."""


@dataclass(frozen=True, slots=True)
class _Job:
    """Views that one worker renders together: a piece of this process's part of a batch."""

    step: int
    epoch: int
    positions: range
    """Of the whole part."""
    first: int
    """Place of the piece in the part."""
    keys: list[str]
    paths: list[str]
    views: list[str]


@dataclass(slots=True)
class _Rendered:
    job: _Job
    values: Tensor | NDArray[np.float32]
    """(n, H, W, 3) float32; an array only between processes that share no memory, or in this one."""
    n_bytes: int
    """Read from the disk."""


class _RenderFresh:
    """What a worker does with a job."""

    def __init__(self, root: Path, spec: ViewSpec, share_memory: bool) -> None:
        self.root = root
        self.spec = spec
        self.share_memory = share_memory

    def __call__(self, job: _Job) -> _Rendered:
        side, n_bytes = self.spec.size_px, 0
        values = np.empty((len(job.keys), side, side, 3), dtype=np.float32)
        for place, (key, path, view) in enumerate(zip(job.keys, job.paths, job.views, strict=True)):
            try:
                values[place], n_read = make_fresh_view(self.root / path, key, view, self.spec)
            except BadImageError as error:
                raise BadImageError(
                    f"{error}; put a good copy in its place and go on with --resume, or take it out of the images and "
                    "start a new run"
                ) from error
            n_bytes += n_read
        return _Rendered(job, shared(values) if self.share_memory else values, n_bytes)


class FreshReader(Iterator[FreshBatch]):
    """Batches in the order of their steps, rendered ahead by worker processes.

    Args:
        images: of the run.
        spec: how views are made.
        order: rows of images, or of the probe's where it gives no view index.
        steps: of it.
        rank: of this process.
        world_size: processes that share a batch.
        n_workers: rendering processes; 0 renders in this process when a batch is asked for.
        pin: hand out pinned memory.
    """

    def __init__(
        self,
        images: FreshImages,
        spec: ViewSpec,
        order: Order,
        steps: range,
        *,
        rank: int,
        world_size: int,
        n_workers: int,
        pin: bool,
    ) -> None:
        check_shares(order.batch_size, rank, world_size)
        self.bytes_read = 0
        """Of image files, handed out so far."""
        self.waited_s = 0.0
        """Time that the consumer has waited for views."""
        self._images = images
        self._spec = spec
        self._order = order
        self._steps = steps
        self._rank = rank
        self._world_size = world_size
        self._n_workers = n_workers
        self._pin = pin
        self._batches = self._assemble()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> FreshBatch:
        started = time.perf_counter()
        batch = next(self._batches)
        self.waited_s += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """End the workers."""
        self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _jobs(self) -> Iterator[_Job]:
        """The pieces of this process's part of every batch; of an empty part there are none."""
        for step in self._steps:
            plan = self._order.batch(step)
            positions = share_of(plan.records.size, self._rank, self._world_size)
            for first in range(0, len(positions), JOB_VIEWS):
                mine = slice(positions.start + first, min(positions.start + first + JOB_VIEWS, positions.stop))
                rows = plan.records[mine]
                views = [PROBE] * rows.size
                if plan.view_indices is not None:
                    views = [view_name(index) for index in plan.view_indices[mine].tolist()]
                yield _Job(step, plan.epoch, positions, first, self._images.keys(rows), self._images.paths(rows), views)

    def _assemble(self) -> Generator[FreshBatch]:
        """Batches from the pieces that were rendered."""
        side = self._spec.size_px
        needed_bytes = self._n_workers * AHEAD * JOB_VIEWS * side**2 * 3 * _BYTES_PER_VALUE
        share_memory = self._n_workers > 0 and shared_memory_suffices(needed_bytes)
        work = _RenderFresh(self._images.root, self._spec, share_memory)
        again, kept = "add --resume to the same command", "checkpoints are kept"
        warned = False
        with closing(answers(work, self._jobs(), workers=self._n_workers, again=again, kept=kept)) as pieces:
            for piece in pieces:
                if self._n_workers > 0 and not warned and is_piped(piece.values):
                    warned = True
                    warn_of_pipes(needed_bytes)
                job, n_pieces = piece.job, len(piece.job.keys)
                if job.first == 0:
                    views = torch.empty((len(job.positions), side, side, 3), pin_memory=self._pin)
                views[job.first : job.first + n_pieces] = torch.as_tensor(piece.values)
                self.bytes_read += piece.n_bytes
                if job.first + n_pieces == len(job.positions):
                    yield _batch(job, views)


def _batch(job: _Job, views: Tensor) -> FreshBatch:
    positions = torch.arange(job.positions.start, job.positions.stop, dtype=torch.int64)
    return FreshBatch(job.step, job.epoch, positions, views, torch.empty((len(positions), 0), dtype=torch.uint8))


class FreshData:
    """Fresh views of images, with what a live teacher says of them.

    Args:
        config: of the run; its objectives decide which targets are asked for.
        images: that are trained on.
        teacher: who says the targets.

    Raises:
        UsageError: the block loss has no blocks to compare, or the teacher lacks what the losses need.
    """

    def __init__(self, config: TrainConfig, images: FreshImages, teacher: Teacher) -> None:
        self._config = config
        self._images = images
        self._teacher = teacher
        identity = teacher.identity
        self._spec = ViewSpec(size_px=identity.size_px, seed=config.seed, mean=identity.mean, std=identity.std)
        check_targets(self, config)
        self._names = needed_targets(self, config)

    @property
    def path(self) -> Path:
        return self._images.source

    @property
    def teacher(self) -> TeacherRecord:
        return teacher_record(self._teacher, self._teacher.precision)

    @property
    def side_px(self) -> int:
        return self._spec.size_px

    @cached_property
    def target_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """CLS, patches and the blocks that are asked for: a teacher has too many to take all, as of a pack."""
        blocks, depth = self._config.block_targets, self._teacher.identity.depth
        if blocks is None:
            raise UsageError(
                f"weight_block needs to know which blocks: set blocks, such as `blocks: block.{depth // 2}` "
                f"({self._teacher.identity.name} has block.0 to block.{depth - 1})"
            )
        return {name: self._teacher.target_shape(name) for name in ("cls", "patch", *blocks)}

    @property
    def identity(self) -> Mapping[str, str]:
        identity = self._teacher.identity
        return {
            "images digest": self._images.digest,
            "teacher weights": identity.weights_sha256,
            "view size": str(identity.size_px),
        }

    @property
    def provenance(self) -> Mapping[str, str]:
        return {"images_digest": self._images.digest, "teacher_weights_sha256": self._teacher.identity.weights_sha256}

    @property
    def description(self) -> Mapping[str, object]:
        images, identity = self._images, self._teacher.identity
        return {
            "live": {
                "teacher": identity.name,
                "teacher_weights_sha256": identity.weights_sha256,
                "images": images.n_images,
                "images_digest": images.digest,
                "held_out_images": images.n_images - images.n_trained,
                "probe_images": int(images.probe.size),
                "size_px": identity.size_px,
                "targets": list(self._names),
            }
        }

    @property
    def bases(self) -> Mapping[str, Basis]:
        return {}

    @property
    def n_views(self) -> int | None:
        return None

    @cached_property
    def bytes_per_view(self) -> float:
        return self._images.mean_bytes()

    @cached_property
    def order(self) -> FreshOrder:
        config = self._config
        return FreshOrder(self._images, seed=config.seed, batch_size=config.global_batch, repeats=config.repeats)

    @cached_property
    def evaluation_orders(self) -> Mapping[str, SequentialOrder]:
        """Seen are the probe's images in view index 0, which epoch 0 shows and no other does; without a probe, images
        spread over the trained ones."""
        images, size = self._images, self._config.global_batch
        if not images.held_out and not images.probe.size:
            return {}
        held_out = np.array(images.held_out, dtype=np.int64)
        seen = images.probe
        if not seen.size:
            trained = images.rows_of_shards(np.setdiff1d(np.arange(images.counts.size), held_out))
            seen = trained[np.linspace(0, trained.size - 1, min(trained.size, SEEN_IMAGES)).astype(np.int64)]
        orders = {
            "seen": SequentialOrder(0, seen, size),
            "probe": SequentialOrder(None, images.probe, size),
            "held_out": SequentialOrder(0, images.rows_of_shards(held_out), size),
        }
        return {name: order for name, order in orders.items() if order.records.size}

    def open(self, order: Order, steps: range, *, rank: int, world_size: int, n_workers: int, pin: bool) -> FreshReader:
        return FreshReader(
            self._images,
            self._spec,
            order,
            steps,
            rank=rank,
            world_size=world_size,
            n_workers=n_workers,
            pin=pin,
        )

    def samples_of(self, step: int) -> list[dict[str, object]]:
        plan = self.order.batch(step)
        assert plan.view_indices is not None
        keys, paths = self._images.keys(plan.records), self._images.paths(plan.records)
        return [
            {"position": position, "key": key, "view": view_name(index), "path": path}
            for position, (key, path, index) in enumerate(zip(keys, paths, plan.view_indices.tolist(), strict=True))
        ]

    def to(self, device: torch.device, precision: Precision) -> None:
        self._teacher.to(device, precision)

    def targets_of(self, part: DeviceBatch) -> dict[str, Tensor]:
        return self._teacher.targets(part.views, self._names)


def open_fresh(config: TrainConfig, home: Path) -> FreshData:
    """The images that a run draws fresh views of, with its teacher.

    Raises:
        UsageError: the images cannot be listed, or the teacher lacks what the losses need.
        WeightsError: the teacher's weights cannot be had.
    """
    assert config.images is not None  # the config sees to it
    assert config.teacher is not None
    images = FreshImages(config.images, seed=config.seed)
    teacher = load_teacher(config.teacher, weights=config.teacher_weights, home=home, size_px=config.size_px)
    return FreshData(config, images, teacher)
