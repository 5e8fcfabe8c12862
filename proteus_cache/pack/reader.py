"""Reading a pack: what it is, and any of its samples."""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from proteus_cache import storage
from proteus_cache.cache.layout import PROBE, view_index
from proteus_cache.cache.manifest import TeacherRecord, ViewsRecord
from proteus_cache.documents import MAX_DOCUMENT_BYTES, digest_of, parse_sealed
from proteus_cache.errors import ChecksumError, DamageError, FormatError, UsageError
from proteus_cache.pack.document import PackDocument, PackTarget
from proteus_cache.pack.index import NO_LABEL, REMEDY
from proteus_cache.pack.order import SequentialOrder, TrainingOrder, records_of_tars
from proteus_cache.pack.samples import PackLayout, SampleReader

if TYPE_CHECKING:
    from torch import Tensor

    from proteus_cache.codecs import Codec

_MAX_BLOB_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class PackSample:
    """One stored view with its decoded targets."""

    key: str
    label: int | None
    view_index: int | None
    """None for the probe."""
    view: NDArray[np.uint8]
    """(H, W, 3) uint8 RGB."""
    targets: dict[str, NDArray[np.float32]]
    """`cls` (D,), all others (T, D)."""


def is_pack(path: Path) -> bool:
    """Whether `path` holds a finished pack."""
    return storage.size_of(path / "pack.json") is not None


def open_pack(path: str | Path) -> Pack:
    """Open a pack for reading.

    Raises:
        UsageError: there is no pack at `path`; says what is there.
        DamageError: its pack.json is damaged.
    """
    root = Path(path).absolute()
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder; give the folder that `proteus-cache pack` wrote")
    if not is_pack(root):
        what = "a cache; pack it first" if (root / "manifest.json").exists() else "no pack (it has no pack.json)"
        raise UsageError(f"{root}: this is {what}; give the folder that `proteus-cache pack` wrote")
    data = storage.read_bytes(root / "pack.json", MAX_DOCUMENT_BYTES)
    return Pack(root, PackDocument.parse(data, str(root / "pack.json")), digest_of(data))


class Pack:
    """An opened pack. `len()` counts stored views (by view index, then row); the probe never counts."""

    def __init__(self, root: Path, document: PackDocument, digest: str) -> None:
        self.path = root
        self.document = document
        self.digest = digest
        """Of pack.json: the identity of the pack."""
        self.check_index = cache(self._check_index)
        """Compare the index of a view index with its recorded SHA-256, once."""

    @property
    def teacher(self) -> TeacherRecord:
        """Who made the targets."""
        return self.document.teacher

    @property
    def view_spec(self) -> ViewsRecord:
        """How images became views."""
        return self.document.views

    @property
    def targets(self) -> list[PackTarget]:
        """In the order of their codes."""
        return self.document.targets

    @property
    def cache_id(self) -> str:
        """Identity of the cache that was packed."""
        return self.document.cache.cache_id

    @property
    def code_bytes(self) -> int:
        """Of one sample, all targets."""
        return self.document.code_bytes

    @property
    def side_px(self) -> int:
        """Of a view."""
        return self.document.views.size_px

    @cached_property
    def views(self) -> list[str]:
        """Packed view indices, ascending, without the probe."""
        return [view for view in self.document.view_names if view != PROBE]

    @property
    def has_probe(self) -> bool:
        """Whether the never-trained view of some images is there."""
        return PROBE in self.document.packed

    @cached_property
    def layout(self) -> PackLayout:
        """What a reader must know."""
        views = {view: (entry.n_samples, len(entry.tars)) for view, entry in self.document.packed.items()}
        return PackLayout(str(self.path), self.code_bytes, self.side_px, views)

    def counts(self, view: str) -> NDArray[np.int64]:
        """(n_tars,) stored views in every tar of a view index."""
        return np.array([tar.n_samples for tar in self.document.packed[view].tars], dtype=np.int64)

    def training_order(self, *, seed: int, batch_size: int) -> TrainingOrder:
        """The order of training on this pack: held-out tars and the probe are never drawn.

        Raises:
            UsageError: a batch is larger than the data.
        """
        counts = {int(view[1:]): self.counts(view) for view in self.views}
        return TrainingOrder(counts, held_out=self.document.held_out, seed=seed, batch_size=batch_size)

    def held_out_order(self, *, batch_size: int) -> SequentialOrder | None:
        """The held-out views of the first view index, once; None when nothing is held out."""
        tars = np.array(sorted(self.document.held_out), dtype=np.int64)
        records = records_of_tars(self.counts(self.views[0]), tars) if self.views else np.empty(0, dtype=np.int64)
        return SequentialOrder(view_index(self.views[0]), records, batch_size) if records.size else None

    def probe_order(self, *, batch_size: int) -> SequentialOrder | None:
        """The probe's views, once; None without a probe."""
        if not self.has_probe or self.document.packed[PROBE].n_samples == 0:
            return None
        return SequentialOrder(None, np.arange(self.document.packed[PROBE].n_samples, dtype=np.int64), batch_size)

    @cached_property
    def codecs(self) -> dict[str, Codec]:
        """Target name to its codec, on the CPU; `.to(device)` moves one.

        Raises:
            DamageError: fitted parameters are missing or not the recorded ones.
        """
        from proteus_cache.codecs import load_codec

        return {t.name: load_codec(t.codec, tuple(t.shape), self._parameters_blob(t)) for t in self.targets}

    def decode(self, codes: Tensor) -> dict[str, Tensor]:
        """(B, code_bytes) uint8 to target name -> (B, *shape) float32, on the device of codes and codecs."""
        return {
            t.name: self.codecs[t.name].decode(codes[:, t.offset : t.offset + t.codec.code_bytes]) for t in self.targets
        }

    def sample_reader(self) -> SampleReader:
        """A reader of this pack's bytes; one for each thread."""
        return SampleReader(self.layout)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> PackSample:
        """Stored view `index`, decoded; negative indices count from the end."""
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"{self.path}: sample {index} of {len(self)}")
        which = bisect.bisect_right(self._ends, place)
        return self.sample(self.views[which], place - (self._ends[which - 1] if which else 0))

    def sample(self, view: str, number: int) -> PackSample:
        """The sample with record number `number` of a view index, or of the probe.

        Raises:
            DamageError: its bytes are not those that were packed, or its parts do not belong together.
        """
        import torch

        self.check_index(view)
        numbers = np.array([number], dtype=np.int64)
        codes = np.empty((1, self.code_bytes), dtype=np.uint8)
        pixels = np.empty((1, self.side_px, self.side_px, 3), dtype=np.uint8)
        self._reader.read(view, numbers, codes, pixels)
        label = int(self._reader.index(view).read(numbers)["label"][0])
        what = f"{self.path}/{view}: the document of record {number}"
        document = parse_sealed(self._reader.read_json(view, number), what)
        key, stated = document.get("key"), document.get("label")
        if not isinstance(key, str) or document.get("view") != view or stated != (None if label == NO_LABEL else label):
            raise FormatError(f"{what} belongs to another sample; {REMEDY}")
        targets = {name: tokens[0].numpy() for name, tokens in self.decode(torch.from_numpy(codes)).items()}
        return PackSample(key, stated, view_index(view), pixels[0], targets)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.document.packed[view].n_samples for view in self.views))

    @cached_property
    def _reader(self) -> SampleReader:
        return self.sample_reader()

    def _check_index(self, view: str) -> None:
        recorded = self.document.packed[view].index
        path = self.layout.index_path(view)
        if storage.size_of(path) is None:
            raise DamageError(f"{path}: missing; {REMEDY}")
        if storage.sha256_of(path) != (recorded.size, recorded.sha256):
            raise ChecksumError(f"{path}: is not the index that pack.json names; {REMEDY}")

    def _parameters_blob(self, target: PackTarget) -> bytes | None:
        if target.codec.parameters is None:
            return None
        path = self.path / "codec" / f"{target.codec.parameters}.safetensors"
        data = storage.read_bytes(path, _MAX_BLOB_BYTES)
        if hashlib.sha256(data).hexdigest() != target.codec.parameters:
            raise ChecksumError(f"{path}: damaged (SHA-256 differs from its name); {REMEDY}")
        return data
