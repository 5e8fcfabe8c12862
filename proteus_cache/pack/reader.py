"""Reading a pack: what it is, and any of its samples."""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from proteus_cache import storage, stores
from proteus_cache.cache.layout import PROBE, view_index, view_name
from proteus_cache.cache.manifest import TeacherRecord, ViewsRecord
from proteus_cache.documents import MAX_DOCUMENT_BYTES, digest_of, parse_sealed
from proteus_cache.errors import ChecksumError, DamageError, FormatError, UsageError
from proteus_cache.pack.document import PackDocument, PackTarget
from proteus_cache.pack.index import NO_LABEL, REMEDY
from proteus_cache.pack.order import SequentialOrder, TrainingOrder, records_of_tars
from proteus_cache.pack.pin import check_pin, parse_pin
from proteus_cache.pack.samples import PackLayout, Part, SampleReader

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from proteus_cache.codecs import Codec
    from proteus_cache.pack.batches import DecodedBatch

_MAX_BLOB_BYTES = 1 << 30
_KEY = re.compile(r"[a-z0-9_]{1,64}")


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
    return path.is_dir() and storage.size_of(path / "pack.json") is not None


def open_pack(path: str | Path, *, expect_id: str | None = None) -> Pack:
    """Open a pack for reading.

    Args:
        path: the pack's folder.
        expect_id: SHA-256 of its pack.json, with or without `sha256:` before it; None takes any pack.

    Raises:
        UsageError: there is no pack at `path`; says what is there. Or `expect_id` is no SHA-256.
        DamageError: its pack.json is damaged, or not the expected one.
    """
    expected = None if expect_id is None else parse_pin(expect_id)
    root = Path(path).absolute()
    if not is_pack(root):
        raise UsageError(stores.wrong_folder(root, "pack"))
    data = storage.read_bytes(root / "pack.json", MAX_DOCUMENT_BYTES)
    file_sha256 = hashlib.sha256(data).hexdigest()
    if expected is not None:
        check_pin(root, file_sha256, expected)
    return Pack(root, PackDocument.parse(data, str(root / "pack.json")), digest_of(data), file_sha256)


class Pack:
    """An opened pack. `len()` counts stored views (by view index, then row); the probe never counts."""

    def __init__(self, root: Path, document: PackDocument, digest: str, file_sha256: str) -> None:
        self.path = root
        self.document = document
        self.digest = digest
        """Of what pack.json says, as it says itself at its end: the identity of the pack."""
        self.file_sha256 = file_sha256
        """Of the bytes of pack.json, as `sha256sum` prints it: what `expect_id` names."""
        self.check_index = cache(self._check_index)
        """Compare the index of a view index with its recorded SHA-256, once."""
        self._codecs_on = cache(self._load_codecs)
        self._statistics_on = cache(self._load_statistics)

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
    def target_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every target for one view."""
        return {target.name: tuple(target.shape) for target in self.targets}

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

    def training_order(self, *, seed: int, batch_size: int, repeats: int = 1) -> TrainingOrder:
        """The order of training on this pack: held-out tars and the probe are never drawn.

        Args:
            seed: of the run.
            batch_size: over all processes.
            repeats: views of an image in one epoch, which then draws one image of as many.

        Raises:
            UsageError: a batch is larger than the data, or the pack holds fewer view indices than repeats.
            DamageError: an index that tells which images have no stored view is damaged.
        """
        counts = {int(view[1:]): self.counts(view) for view in self.views}
        n_tars = next((count.size for count in counts.values()), 0)
        starts = np.arange(n_tars) * self.document.shard_size
        return TrainingOrder(
            counts,
            held_out=self.document.held_out,
            seed=seed,
            batch_size=batch_size,
            repeats=repeats,
            images=np.minimum(self.document.n_images - starts, self.document.shard_size),
            places=partial(self._places, counts),
        )

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
        """Target name to its codec, on the CPU; `.to(device)` moves one, and `decode` does not use them.

        Raises:
            DamageError: fitted parameters are missing or not the recorded ones.
        """
        return self._load_codecs("cpu")

    def decode(self, codes: Tensor) -> dict[str, Tensor]:
        """Codes to targets, on the device of the codes.

        Args:
            codes: (B, code_bytes) uint8.

        Returns:
            Tokens by target name, float32; `cls` (B, D), all others (B, T, D).

        Raises:
            DamageError: fitted parameters are missing or not the recorded ones.
        """
        codecs = self._codecs_on(codes.device)
        return {t.name: codecs[t.name].decode(codes[:, t.offset : t.offset + t.codec.code_bytes]) for t in self.targets}

    def normalise(self, views: Tensor) -> Tensor:
        """Stored views to the pixels that a student is fed, on their device: minus the teacher's mean, over its std.

        Args:
            views: (B, H, W, 3) uint8.

        Returns:
            (B, 3, H, W) float32.
        """
        from proteus_cache.pixels import normalise

        mean, std = self._statistics_on(views.device)
        return normalise(views, mean, std)

    def batches(
        self,
        *,
        batch_size: int,
        n_steps: int,
        first_step: int = 0,
        seed: int = 0,
        repeats: int = 1,
        device: str | torch.device = "cpu",
        workers: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[DecodedBatch]:
        """Batches for a training loop of one's own, decoded, in the order that `proteus-cache train` takes.

        Every epoch takes one view index (`repeats` of them); held-out images and the probe are never drawn. What step s
        holds depends on the pack, `seed`, `batch_size`, `repeats` and s alone, so a loop that was stopped goes on with
        `first_step`.

        Args:
            batch_size: over all processes.
            n_steps: the last step is `n_steps` - 1.
            first_step: steps that are done already.
            seed: of the order.
            repeats: views of an image in one epoch, which then draws one image of as many.
            device: where the tensors are put.
            workers: reader processes; None takes the usable cores less one, 0 reads in this process.
            rank: of this process; each gets its part of every batch.
            world_size: processes that share a batch.

        Returns:
            A `DecodedBatch` for each step, in their order; the readers end with the iterator.

        Raises:
            UsageError: a batch is larger than the data, or too small for the processes.
            DamageError: while it is read: bytes are not those that were packed.
        """
        from proteus_cache.pack.batches import decoded_batches

        return decoded_batches(
            self,
            batch_size=batch_size,
            n_steps=n_steps,
            first_step=first_step,
            seed=seed,
            repeats=repeats,
            device=device,
            workers=workers,
            rank=rank,
            world_size=world_size,
        )

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
        self._reader.read(Part(view, numbers, np.zeros(1, dtype=np.int64)), codes, pixels)
        label = int(self._reader.index(view).read(numbers)["label"][0])
        what = f"{self.path}/{view}: the document of record {number}"
        document = parse_sealed(self._reader.read_json(view, number), what)
        key, stated = document.get("key"), document.get("label")
        belongs = document.get("view") == view and stated == (None if label == NO_LABEL else label)
        if not belongs or not isinstance(key, str) or _KEY.fullmatch(key) is None:
            raise FormatError(f"{what} belongs to another sample; {REMEDY}")
        targets = {name: tokens[0].numpy() for name, tokens in self.decode(torch.from_numpy(codes)).items()}
        return PackSample(key, stated, view_index(view), pixels[0], targets)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.document.packed[view].n_samples for view in self.views))

    @cached_property
    def _reader(self) -> SampleReader:
        return self.sample_reader()

    def _places(self, counts: Mapping[int, NDArray[np.int64]], number: int, tar: int) -> NDArray[np.int64]:
        """Which images of a tar have a stored view of this view index, counted from the tar's first image."""
        view, size = view_name(number), self.document.shard_size
        self.check_index(view)
        first = int(counts[number][:tar].sum())
        places = self._reader.index(view).rows(first, first + int(counts[number][tar])) - tar * size
        if places.size and not (places[0] >= 0 and (np.diff(places) > 0).all() and places[-1] < size):
            raise FormatError(f"{self.layout.index_path(view)}: the images of tar {tar} are not in its order; {REMEDY}")
        return places

    def _check_index(self, view: str) -> None:
        recorded = self.document.packed[view].index
        path = self.layout.index_path(view)
        if storage.size_of(path) is None:
            raise DamageError(f"{path}: missing; {REMEDY}")
        if storage.size_of(path) != recorded.size or storage.sha256_of(path)[1] != recorded.sha256:
            raise ChecksumError(f"{path}: is not the index that pack.json names; {REMEDY}")
        self._reader.index(view).check_places([tar.size for tar in self.document.packed[view].tars])

    def _load_codecs(self, device: str | torch.device) -> dict[str, Codec]:
        from proteus_cache.codecs import load_codec

        loaded = {t.name: load_codec(t.codec, tuple(t.shape), self.parameters_blob(t)) for t in self.targets}
        return {name: codec.to(device) for name, codec in loaded.items()}

    def _load_statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of pixels in 0 to 1."""
        from proteus_cache.pixels import channel_values

        return channel_values(self.teacher.mean, device), channel_values(self.teacher.std, device)

    def parameters_blob(self, target: PackTarget) -> bytes | None:
        """Fitted parameters of a target's codec, digest checked; None for a codec without any."""
        if target.codec.parameters is None:
            return None
        path = self.path / "codec" / f"{target.codec.parameters}.safetensors"
        if storage.size_of(path) is None:
            raise FormatError(f"{path}: missing, or no plain file; {REMEDY}")
        data = storage.read_bytes(path, _MAX_BLOB_BYTES)
        if hashlib.sha256(data).hexdigest() != target.codec.parameters:
            raise ChecksumError(f"{path}: damaged (SHA-256 differs from its name); {REMEDY}")
        return data
