from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from proteus_cache.cache.layout import shard_stem, view_index
from proteus_cache.cache.manifest import TeacherRecord, ViewsRecord
from proteus_cache.cache.reader import combine_view_ids
from proteus_cache.cache.receipt import FileRecord
from proteus_cache.codecs.record import CodecRecord
from proteus_cache.documents import seal
from proteus_cache.pack.document import CacheIdentity, PackDocument, PackTar, PackTarget, PackView
from proteus_cache.pack.index import Records
from proteus_cache.pack.writer import PackedSample, index_buffers, make_records, tar_buffers
from proteus_cache.storage import write_new
from proteus_cache.views.encode import digest_pixels, encode_view

WIDTH, N_PATCHES = 6, 4


def write_pack(
    root: Path,
    *,
    n_images: int = 10,
    shard_size: int = 4,
    views: tuple[str, ...] = ("v000", "v001"),
    side_px: int = 8,
    view_format: str = "png",
    held_out: tuple[int, ...] = (),
    quarantined: tuple[int, ...] = (),
    missing: Mapping[str, tuple[int, ...]] | None = None,
    patch_bytes: int | None = None,
) -> Path:
    """Write a pack whose codes tell where they belong: see `expected_codes`.

    `quarantined` rows have no stored view at all, `missing` ones none of one view index. `patch_bytes` makes one opaque
    "patch" target of that many codes instead of the small float16 ones.
    """
    targets = _targets(patch_bytes)
    code_bytes = sum(target.codec.code_bytes for target in targets)
    root.mkdir(parents=True, exist_ok=True)
    packed = {}
    for view in views:
        n_rows = n_images if view != "probe" else n_images // 2
        (root / view).mkdir()
        tars, records = [], []
        for shard in range(-(-n_rows // shard_size)):
            rows = range(shard * shard_size, min((shard + 1) * shard_size, n_rows))
            kept = [row for row in rows if row not in (*quarantined, *(missing or {}).get(view, ()))]
            samples = [_sample(view, row, side_px, view_format, targets) for row in kept]
            extension = "png" if view_format == "png" else "jpg"
            written = write_new(root / view / f"{shard_stem(shard)}.tar", tar_buffers(samples, extension))
            tars.append(PackTar(size=written.size, sha256=written.sha256, receipt="f" * 64, n_samples=len(samples)))
            records.append(make_records(samples, shard))
        packed[view] = _packed_view(root, view, code_bytes, tars, records)
    view_ids = {
        view: combine_view_ids(["a" * 64, *(tar.receipt for tar in entry.tars)]) for view, entry in packed.items()
    }
    document = PackDocument(
        cache=CacheIdentity(manifest="a" * 64, cache_id="b" * 64, view_ids=view_ids),
        teacher=_teacher(side_px),
        views=_views(side_px, view_format),
        targets=targets,
        code_bytes=code_bytes,
        shard_size=shard_size,
        n_images=n_images,
        classes=["even", "odd"],
        held_out=list(held_out),
        packed=packed,
        licences={},
    )
    write_new(root / "pack.json", document.sealed())
    return root


def expected_codes(view: str, row: int, targets: list[PackTarget]) -> list[NDArray[np.uint8]]:
    """The codes of one sample, target by target."""
    rng = np.random.default_rng([row, 9999 if view == "probe" else int(view[1:])])
    codes = []
    for target in targets:
        if target.codec.name == "float16":
            codes.append(rng.standard_normal(target.codec.code_bytes // 2).astype("<f2").view(np.uint8))
        else:
            codes.append(rng.integers(0, 256, target.codec.code_bytes, dtype=np.uint8))
    return codes


def expected_view(view: str, row: int, side_px: int) -> NDArray[np.uint8]:
    from PIL import Image

    rng = np.random.default_rng([row, 77, 9999 if view == "probe" else int(view[1:])])
    coarse = rng.integers(0, 256, (max(1, side_px // 7), max(1, side_px // 7), 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((side_px, side_px), Image.Resampling.BICUBIC))


def key_of(row: int) -> str:
    """A sample key."""
    return f"image{row}_{hashlib.sha256(str(row).encode()).hexdigest()[:10]}"


def _sample(view: str, row: int, side_px: int, view_format: str, targets: list[PackTarget]) -> PackedSample:
    pixels = expected_view(view, row, side_px)
    data = encode_view(pixels, "png" if view_format == "png" else "jpeg")
    document = {"key": key_of(row), "label": row % 2, "view": view, "view_digest": digest_pixels(pixels)}
    return PackedSample(key_of(row), row, row % 2, data, seal(document), expected_codes(view, row, targets))


def _packed_view(root: Path, view: str, code_bytes: int, tars: list[PackTar], records: list[Records]) -> PackView:
    n_samples = sum(tar.n_samples for tar in tars)
    written = write_new(
        root / f"{view}.idx", index_buffers(view_index(view), n_samples, len(tars), code_bytes, records)
    )
    index = FileRecord(size=written.size, sha256=written.sha256)
    return PackView(index=index, n_samples=n_samples, tars=tars)


def _targets(patch_bytes: int | None) -> list[PackTarget]:
    if patch_bytes is not None:
        record = CodecRecord(
            name="int8",
            code_bytes=patch_bytes,
            parameters="d" * 64,
            array_dtype="uint8",
            array_shape=[patch_bytes],
        )
        return [PackTarget(name="patch", shape=[N_PATCHES, WIDTH], codec=record, offset=0)]
    cls = _dense([WIDTH])
    return [
        PackTarget(name="cls", shape=[WIDTH], codec=cls, offset=0),
        PackTarget(name="patch", shape=[N_PATCHES, WIDTH], codec=_dense([N_PATCHES, WIDTH]), offset=cls.code_bytes),
    ]


def _dense(shape: list[int]) -> CodecRecord:
    size = 2 * int(np.prod(shape))
    return CodecRecord(name="float16", code_bytes=size, parameters=None, array_dtype="float16", array_shape=shape)


def _teacher(side_px: int) -> TeacherRecord:
    return TeacherRecord(
        name="made-up",
        implementation="none",
        architecture={},
        weights_source="none",
        weights_sha256="e" * 64,
        licence="none",
        size_px=side_px,
        patch_px=max(1, side_px // 2),
        width=WIDTH,
        depth=1,
        n_register_tokens=0,
        mean=[0.5, 0.5, 0.5],
        std=[0.5, 0.5, 0.5],
        precision="fp32",
    )


def _views(side_px: int, view_format: str) -> ViewsRecord:
    return ViewsRecord(
        augment="none",
        size_px=side_px,
        view_format="png" if view_format == "png" else "jpeg",
        jpeg_quality=None if view_format == "png" else 95,
        jpeg_subsampling=None if view_format == "png" else "4:4:4",
        seed=0,
        mean=[0.5, 0.5, 0.5],
        std=[0.5, 0.5, 0.5],
        decoder="Pillow",
    )
