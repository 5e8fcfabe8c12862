"""Small honest stores, and what an attacker does with them: change anything, then make every digest right again."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from proteus_cache import tar
from proteus_cache.cache.layout import views_tar
from proteus_cache.cache.reader import Cache
from proteus_cache.documents import parse_sealed, seal
from proteus_cache.pack.index import RECORD, Records, crc32c, index_header, seal_records
from proteus_cache.pack.reader import Pack, open_pack
from tests.pack.synthetic import write_pack
from tests.safety import hostile_tars

Document = dict[str, Any]
"""A document's fields: JSON values."""
Change = Callable[[Document], object]
N_IMAGES = 4


def make_pack(root: Path) -> Pack:
    """One tar of four samples."""
    return open_pack(write_pack(root, n_images=N_IMAGES, shard_size=N_IMAGES, views=("v000",), side_px=16))


def reseal(path: Path, change: Change) -> None:
    """Change a document and make its digest right again."""
    document = parse_sealed(path.read_bytes(), str(path))
    change(document)
    path.write_bytes(seal(document))


def records_of(pack: Path) -> Records:
    """A copy of the index records of v000."""
    return np.frombuffer((pack / "v000.idx").read_bytes(), dtype=RECORD, offset=64).copy()


def with_tar(pack: Path, data: bytes) -> None:
    """Put another tar into a pack; checksums in the index and digests in pack.json are those of its bytes."""
    (pack / "v000" / "s00000.tar").write_bytes(data)
    records = records_of(pack)
    for record in records:
        for part in ("codes", "view", "json"):
            start = int(record[f"{part}_offset"])
            record[f"{part}_crc32c"] = crc32c(data[start : start + int(record[f"{part}_size"])])
    with_records(pack, records)


def with_records(pack: Path, records: Records) -> None:
    """Write an index of these records, each with its own checksum, and name it and the tar in pack.json."""
    document = parse_sealed((pack / "pack.json").read_bytes(), "pack.json")
    index = index_header(0, len(records), 1, document["code_bytes"]) + seal_records(records).tobytes()
    (pack / "v000.idx").write_bytes(index)
    trust(pack)


def trust(pack: Path) -> None:
    """Make pack.json right for the tar and index that are there."""

    def change(document: Document) -> None:
        view = document["packed"]["v000"]
        tar, index = (pack / "v000" / "s00000.tar").read_bytes(), (pack / "v000.idx").read_bytes()
        view["tars"][0] |= {"size": len(tar), "sha256": hashlib.sha256(tar).hexdigest()}
        view["index"] = {"size": len(index), "sha256": hashlib.sha256(index).hexdigest()}

    reseal(pack / "pack.json", change)


def copied(store: Path, to: Path) -> Path:
    """A copy for an attack."""
    shutil.copytree(store, to)
    return to


def with_cache_files(cache: Path, files: Mapping[str, bytes | None], shard: int = 0) -> None:
    """Put other files into a unit of v000 (None removes one); its receipt says that they are right."""
    for relative, data in files.items():
        path = cache / relative
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)

    def change(document: Document) -> None:
        for part, digest_alone in (("files", False), ("zarr", True)):
            for relative in document[part]:
                if not (cache / relative).is_file():
                    continue
                data = (cache / relative).read_bytes()
                sha256 = hashlib.sha256(data).hexdigest()
                document[part][relative] = sha256 if digest_alone else {"size": len(data), "sha256": sha256}

    reseal(cache / "receipts" / "v000" / f"s{shard:05d}.json", change)


def cache_files(cache: Cache) -> list[tuple[str, bytes]]:
    """The members of the first unit's views."""
    members = cache.read_views("v000", 0)
    extension = "jpg" if cache.manifest.views.view_format == "jpeg" else "png"
    return [
        (f"{key}.{kind}", data)
        for key, parts in members.items()
        for kind, data in zip((extension, "json"), parts, strict=True)
    ]


VIEWS_TAR = views_tar("v000", 0)


def with_files(pack: Path, files: list[tuple[str, bytes]]) -> None:
    """Put other members into the tar of a pack, three for each sample; index and digests are right for them."""
    records = records_of(pack)
    offset = 0
    for place, (_, data) in enumerate(files):
        part = ("codes", "view", "json")[place % 3]
        records[f"{part}_offset"][place // 3] = offset + 512
        records[f"{part}_size"][place // 3] = len(data)
        offset += 512 + -(-len(data) // 512) * 512
    content = b"".join(hostile_tars.member(name, data) for name, data in files) + bytes(1024)
    (pack / "v000.idx").write_bytes((pack / "v000.idx").read_bytes()[:64] + seal_records(records).tobytes())
    with_tar(pack, content)


def files_of(data: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of an honest tar."""
    members = tar.members(io.BytesIO(data), len(data), "honest", most=1000)
    return [(member.name, data[member.offset : member.offset + member.size]) for member in members]
