"""How large a cache is, from its settings alone, and the plan that an extraction opens with.

Nothing is measured here: sizes of views and the teacher's rate come from whoever knows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_cache import tar
from proteus_cache.cache.manifest import TargetRecord
from proteus_cache.errors import SpaceError
from proteus_cache.plan.fitted import fitted_json, fitted_lines
from proteus_cache.plan.human import human_bytes, human_rate, human_time
from proteus_cache.plan.rates import Rate
from proteus_cache.storage import Free

if TYPE_CHECKING:
    from proteus_cache.codecs.calibration import CalibrationReport

MARGIN = 1.05
"""Asked for on top of what is counted."""
_RECEIPT_BYTES_PER_VIEW = 160
_ZARR_BYTES_PER_CHUNK = 4 + 16
"""CRC-32C behind a view's codes, and its place in the index of the Zarr shard file."""
_TYPICAL_DOCUMENT_BYTES = 2_220
"""Sample document beside a view, tar headers and padding of both."""
_TYPICAL_ENCODED_BYTES = {"jpeg": (35_400, 1.67), "png": (84_000, 1.8)}
"""Of a view of 224 px, and the power of its side that it grows with; measured, see docs/costs.md."""


def typical_view_bytes(size_px: int, view_format: str = "jpeg") -> float:
    """Bytes of a view of an ImageNet photograph in its tar, with its document, headers and padding.

    Measured on 400 photographs under the `deit` augmentation; within 5 % from 112 to 518 px.
    """
    at_224, power = _TYPICAL_ENCODED_BYTES[view_format]
    return at_224 * math.pow(size_px / 224, power) + _TYPICAL_DOCUMENT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """What a cache takes when all of it is there."""

    n_images: int
    n_views: int
    """View indices; the probe is not one of them."""
    n_probe: int
    """Images with a probe view."""
    shard_size: int
    targets: tuple[TargetRecord, ...]
    """As a manifest holds them: shape, codec, layout of the array."""
    view_bytes: float
    """Mean encoded view in its tar, with its document, headers and padding."""
    fitted: Mapping[str, CalibrationReport] = field(default_factory=dict)
    """Target to what fitting its codec showed, where that is known."""
    at_most: frozenset[str] = frozenset()
    """Targets whose codes may turn out smaller once their codec is fitted."""

    @property
    def code_bytes(self) -> int:
        """Codes of one view, all targets."""
        return sum(target.codec.code_bytes for target in self.targets)

    @property
    def overhead_bytes(self) -> int:
        """What a view takes besides codes and pixels: checksums and places in the Zarr index, and in the receipt."""
        return _ZARR_BYTES_PER_CHUNK * len(self.targets) + _RECEIPT_BYTES_PER_VIEW

    @property
    def bytes_per_view(self) -> float:
        """Everything that one view adds to a cache."""
        return self.code_bytes + self.view_bytes + self.overhead_bytes

    @property
    def packed_bytes_per_view(self) -> float:
        """Everything that training reads of one view: its sample in the tar of a pack."""
        return self.view_bytes + tar.member_bytes(self.code_bytes)

    @property
    def n_shards(self) -> int:
        """Units of one view index."""
        return -(-self.n_images // self.shard_size)

    @property
    def n_units(self) -> int:
        """Units of all view indices and the probe."""
        return self.n_views * self.n_shards + -(-self.n_probe // self.shard_size)

    @property
    def n_stored_views(self) -> int:
        """Views of all view indices and the probe."""
        return self.n_views * self.n_images + self.n_probe

    @property
    def files_per_unit(self) -> int:
        """Tar, receipt, and a Zarr shard file of each target."""
        return 2 + len(self.targets)

    @property
    def folders_per_unit(self) -> int:
        """Zarr keeps the shard file of row block 12 of a matrix as c/12/0, that of higher arrays deeper."""
        return sum(len(target.codec.array_shape) for target in self.targets)

    @property
    def metadata_files(self) -> int:
        """Manifest, image list, parameters of codecs, and the zarr.json of every group and array."""
        n_indices = self.n_views + (self.n_probe > 0)
        n_parameters = sum(target.codec.parameters is not None for target in self.targets)
        return 2 + n_parameters + 1 + n_indices * (1 + len(self.targets))

    @property
    def n_files(self) -> int:
        """All files of the cache."""
        return self.n_units * self.files_per_unit + self.metadata_files

    @property
    def bytes(self) -> float:
        """All bytes of the cache."""
        return self.n_stored_views * self.bytes_per_view

    @property
    def most(self) -> str:
        """Before a number of bytes: "at most " where some codes may turn out smaller."""
        return "at most " if self.at_most else ""

    def bytes_of(self, n_views: int) -> float:
        """Bytes of so many stored views."""
        return n_views * self.bytes_per_view

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "n_images": self.n_images,
            "n_views": self.n_views,
            "n_probe": self.n_probe,
            "shard_size": self.shard_size,
            "n_shards": self.n_shards,
            "targets": {
                t.name: {
                    "shape": list(t.shape),
                    "codec": t.codec.name,
                    "code_bytes": t.codec.code_bytes,
                    "code_bytes_at_most": t.name in self.at_most,
                    "fitted": fitted_json(self.fitted.get(t.name)),
                }
                for t in self.targets
            },
            "code_bytes": self.code_bytes,
            "view_bytes": self.view_bytes,
            "overhead_bytes": self.overhead_bytes,
            "bytes_per_view": self.bytes_per_view,
            "bytes": self.bytes,
            "files": self.n_files,
            "files_per_unit": self.files_per_unit,
        }

    def target_text(self) -> str:
        """The targets for people: "cls 1536 float16, patch 256x1536 int8"."""
        return ", ".join(f"{t.name} {'x'.join(map(str, t.shape))} {t.codec.name}" for t in self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractPlan:
    """An extraction that is about to start or continue."""

    out: Path
    teacher: str
    weights: str
    size: CacheSize
    n_held_out: int
    """Shards that training never draws from."""
    units_todo: int
    views_todo: int
    free: Free
    rate: Rate
    """Of the teacher in one process."""
    processes: int
    is_published: bool
    """Whether the cache is there already, so that its image list cannot shrink any more."""

    @property
    def bytes_todo(self) -> float:
        """Still to be written."""
        return self.size.bytes_of(self.views_todo)

    @property
    def files_todo(self) -> int:
        """Still to be made, the few that describe the cache among them."""
        return self.units_todo * self.size.files_per_unit + self.size.metadata_files if self.units_todo else 0

    @property
    def inodes_todo(self) -> int:
        """Files and the folders they lie in."""
        return self.files_todo + self.units_todo * self.size.folders_per_unit

    @property
    def seconds(self) -> float | None:
        """Of the teacher's forward over what is missing, on all processes; None when its rate is unknown."""
        per_s = self.rate.views_per_s
        return None if per_s is None else self.views_todo / (per_s * self.processes)

    def lines(self) -> list[str]:
        """The plan for people."""
        size = self.size
        extra = f" + probe of {size.n_probe:,}" if size.n_probe else ""
        held_out = f"{self.n_held_out} of {size.n_shards} shards" if self.n_held_out else "none (fewer than 10 shards)"
        lines = [
            f"teacher   {self.teacher} ({self.weights})",
            f"views     {size.n_images:,} images x {size.n_views}{extra}; held out: {held_out}",
            f"targets   {size.target_text()}",
            *fitted_lines(size.fitted),
            f"bytes     {human_bytes(size.bytes_per_view)} a view: {human_bytes(size.code_bytes)} codes, "
            f"{human_bytes(size.view_bytes)} pixels, {human_bytes(size.overhead_bytes)} checksums and receipt",
        ]
        if self.units_todo == 0:
            return [*lines, f"to do     nothing: all {size.n_units} units are there"]
        done = size.n_units - self.units_todo
        present = f" ({done} of {size.n_units} units are there)" if done else ""
        inodes = "" if self.free.inodes is None else f", {self.free.inodes:,} inodes"
        lines += [
            f"to do     {self.views_todo:,} views, {human_bytes(self.bytes_todo)}, {self.files_todo:,} files{present}",
            f"free      {human_bytes(self.free.bytes)}{inodes} at {self.out}",
        ]
        if self.seconds is not None and self.rate.views_per_s is not None:
            processes = f"{self.processes} process{'es' * (self.processes > 1)}"
            lines.append(
                f"time      {human_time(self.seconds)} of teacher forward "
                f"({human_rate(self.rate.views_per_s)} views/s {self.rate.source}, {processes})"
            )
        return lines

    def fits(self) -> bool:
        """Whether bytes and inodes suffice, with 5 % to spare."""
        enough_inodes = self.free.inodes is None or self.inodes_todo * MARGIN <= self.free.inodes
        return self.bytes_todo * MARGIN <= self.free.bytes and enough_inodes

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            SpaceError: names what fits instead.
        """
        needed = self.bytes_todo * MARGIN
        if needed > self.free.bytes:
            raise SpaceError(
                f"{self.out}: {human_bytes(needed)} are needed (with 5 % to spare) and "
                f"{human_bytes(self.free.bytes)} are free; {self.what_fits('--limit')}"
            )
        if self.free.inodes is not None and self.inodes_todo * MARGIN > self.free.inodes:
            raise SpaceError(
                f"{self.out}: {self.inodes_todo:,} files and folders are needed and {self.free.inodes:,} inodes are "
                "free; a larger --shard-size makes fewer files"
            )

    def what_fits(self, images_flag: str) -> str:
        """The largest cache that fits, as the flags that ask for it.

        Args:
            images_flag: the one that takes a number of images.
        """
        size = self.size
        fitting = math.floor(self.free.bytes / (size.bytes_per_view * MARGIN))
        n_done = size.n_stored_views - self.views_todo
        views = (fitting + n_done - size.n_probe) // size.n_images
        if views >= 1 and fitting >= size.n_probe:  # the probe is done last
            return f"--views {views} fits"
        if fitting and not self.is_published:
            # Fewer images than the probe has get none by default.
            images = fitting - size.n_probe if fitting > size.n_probe else fitting
            return f"--views 1 {images_flag} {images} fits"
        return "nothing fits; free space there, or give --out a larger disk"

    def to_json(self) -> dict[str, Any]:
        """The plan for machines."""
        return self.size.to_json() | {
            "out": str(self.out),
            "teacher": self.teacher,
            "weights": self.weights,
            "n_held_out": self.n_held_out,
            "units_todo": self.units_todo,
            "units_all": self.size.n_units,
            "views_todo": self.views_todo,
            "bytes_todo": self.bytes_todo,
            "files_todo": self.files_todo,
            "free_bytes": self.free.bytes,
            "free_inodes": self.free.inodes,
            "views_per_s": self.rate.views_per_s,
            "rate_source": self.rate.source,
            "seconds": self.seconds,
            "processes": self.processes,
            "is_published": self.is_published,
        }
