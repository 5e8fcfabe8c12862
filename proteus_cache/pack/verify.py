"""Does a pack still hold what was packed? Structure and sizes, or every digest and checksum."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c
import numpy as np

from proteus_cache import storage, stores, tar
from proteus_cache.cache.layout import shard_stem
from proteus_cache.cache.reader import combine_view_ids
from proteus_cache.cache.verify import Finding
from proteus_cache.documents import parse_sealed
from proteus_cache.errors import DamageError, StorageError
from proteus_cache.pack.index import NO_LABEL, REMEDY, Index, Records
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.pack.samples import tar_name
from proteus_cache.views.encode import decode_view, digest_pixels


def verify_pack(
    path: str | Path,
    read_data: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
    *,
    chosen: Callable[[str, int], bool] | None = None,
) -> list[Finding]:
    """Check a pack; an empty list means that nothing is wrong.

    Args:
        path: the pack's folder.
        read_data: read every file and check every digest and checksum, the pixels of views included;
            otherwise structure, names and sizes.
        progress: called with (tars done, tars in all, bytes read of them).
        chosen: with `read_data`, whether a tar (view index, number) is read; None reads all. Indices and codec
            parameters are read, and sizes and names checked, all the same.

    Raises:
        UsageError: there is no pack at `path`.
        DamageError: pack.json itself is damaged, so nothing else can be judged.
    """
    pack = open_pack(path)
    findings = [*_identity(pack), *_codec_files(pack)]
    n_tars = sum(len(entry.tars) for entry in pack.document.packed.values())
    done = n_bytes = 0
    for view, entry in pack.document.packed.items():
        records, found = _index(pack, view, read_data)
        findings += found
        for number in range(len(entry.tars)):
            is_read = read_data and (chosen is None or chosen(view, number))
            findings += _tar(pack, view, number, records, is_read)
            done += 1
            n_bytes += entry.tars[number].size if is_read else 0
            if progress is not None:
                progress(done, n_tars, n_bytes)
    return findings + list(_unknown_files(pack))


def _identity(pack: Pack) -> Iterator[Finding]:
    """Every view id follows from the receipts that its tars name."""
    for view, entry in pack.document.packed.items():
        receipts = [tar.receipt for tar in entry.tars]
        if combine_view_ids([pack.document.cache.manifest, *receipts]) != pack.document.cache.view_ids[view]:
            yield Finding("pack.json", None, f"the identity of {view} is not that of its receipts", _repair(pack))


def _repair(pack: Pack) -> str:
    return f"run `{stores.repair_command(pack.path)}`, which packs anew what is damaged"


def _problem(pack: Pack, relative: str, error: Exception) -> str:
    """What an error says, without the path and the remedy that stand beside it in a finding."""
    said = str(error).replace(f"{pack.path}/", "").removeprefix(f"{relative}: ")
    return said.removesuffix(f"; {REMEDY}")


def _codec_files(pack: Pack) -> Iterator[Finding]:
    for target in pack.targets:
        if target.codec.parameters is not None:
            relative = f"codec/{target.codec.parameters}.safetensors"
            try:
                if storage.size_of(pack.path / relative) is None:
                    yield Finding(relative, None, "missing", _repair(pack))
                    continue
                data = storage.read_bytes(pack.path / relative, 1 << 30)
            except (DamageError, StorageError) as error:
                yield Finding(relative, None, _problem(pack, relative, error), _repair(pack))
                continue
            if hashlib.sha256(data).hexdigest() != target.codec.parameters:
                yield Finding(relative, None, "damaged (its SHA-256 is not its name)", _repair(pack))


def _index(pack: Pack, view: str, read_data: bool) -> tuple[Records | None, list[Finding]]:
    """The records of a view index, None when they cannot be trusted, and what is wrong with its file."""
    relative = f"{view}.idx"
    entry = pack.document.packed[view]
    size = storage.size_of(pack.path / relative)
    if size != entry.index.size:
        problem = "missing" if size is None else f"{size:,} bytes instead of {entry.index.size:,}"
        return None, [Finding(relative, None, problem, _repair(pack))]
    if not read_data:
        return None, []
    try:
        pack.check_index(view)
        index: Index = pack.sample_reader().index(view)
        return index.read(np.arange(entry.n_samples)), []
    except (DamageError, StorageError) as error:
        return None, [Finding(relative, None, _problem(pack, relative, error), _repair(pack))]


def _tar(pack: Pack, view: str, number: int, records: Records | None, read_data: bool) -> list[Finding]:
    relative = tar_name(view, number)
    unit = f"{view}/{shard_stem(number)}"
    entry = pack.document.packed[view].tars[number]
    size = storage.size_of(pack.path / relative)
    if size != entry.size:
        problem = "missing" if size is None else f"{size:,} bytes instead of {entry.size:,}"
        return [Finding(relative, unit, problem, _repair(pack))]
    if not read_data:
        return []
    try:
        if storage.sha256_of(pack.path / relative)[1] != entry.sha256:
            problem = "damaged (SHA-256 differs from pack.json)"
            problem += _damaged_samples(pack, relative, number, records)
            return [Finding(relative, unit, problem, _repair(pack))]
        if records is not None:
            _check_tar(pack, view, number, records[records["tar"] == number])
    except (DamageError, StorageError) as error:
        return [Finding(relative, unit, _problem(pack, relative, error), _repair(pack))]
    return []


def _check_tar(pack: Pack, view: str, number: int, records: Records) -> None:
    """Members, index and documents of one tar agree; raises DamageError with the first that does not."""
    path = pack.path / tar_name(view, number)
    extension = "jpg" if pack.view_spec.view_format == "jpeg" else "png"
    # Not mapped into memory: a disk that fails there ends the process instead of raising an error.
    with storage.reported("read", path), open(path, "rb") as file:
        members = list(tar.members(file, os.fstat(file.fileno()).st_size, str(path), 3 * len(records)))
        if len(members) != 3 * len(records) or len(records) != pack.document.packed[view].tars[number].n_samples:
            raise DamageError(f"{path}: holds {len(members)} members for {len(records)} index records")
        for place, record in enumerate(records):
            sample = members[3 * place : 3 * place + 3]
            if [m.extension for m in sample] != ["codes", extension, "json"] or len({m.key for m in sample}) != 1:
                raise DamageError(f"{path}: the members of record {place} are not one sample")
            contents = [os.pread(file.fileno(), member.size, member.offset) for member in sample]
            for member, content, name in zip(sample, contents, ("codes", "view", "json"), strict=True):
                found = member.offset, member.size, google_crc32c.value(content)
                if found != tuple(int(record[f"{name}_{field}"]) for field in ("offset", "size", "crc32c")):
                    raise DamageError(f"{path}: {member.name} is not what the index says")
            _, view_member, json_member = sample
            document = parse_sealed(contents[2], json_member.name)
            pixels = decode_view(contents[1], pack.side_px)
            label = None if record["label"] == NO_LABEL else int(record["label"])
            stated = [document.get(field) for field in ("key", "view", "label")]
            if stated != [view_member.key, view, label]:
                raise DamageError(f"{path}: {json_member.name} belongs to another sample")
            if document.get("view_digest") != digest_pixels(pixels):
                raise DamageError(
                    f"{path}: {view_member.name} decodes to other pixels than the teacher saw "
                    f"({pack.view_spec.decoder}); another decoder, or damage"
                )


def _damaged_samples(pack: Pack, relative: str, number: int, records: Records | None) -> str:
    """Which samples of a damaged tar fail their checksum, for the message."""
    if records is None:
        return ""
    damaged = []
    for record in records[records["tar"] == number]:
        for name in ("codes", "view", "json"):
            start, size = int(record[f"{name}_offset"]), int(record[f"{name}_size"])
            content = storage.read_part(pack.path / relative, start, size)
            if google_crc32c.value(content) != int(record[f"{name}_crc32c"]):
                damaged.append(f"{name} of image row {int(record['row'])}")
    return (
        f": {', '.join(damaged[:5])}" + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "") if damaged else ""
    )


def _unknown_files(pack: Pack) -> Iterator[Finding]:
    known = {"pack.json", *(f"{view}.idx" for view in pack.document.packed)}
    known |= {f"codec/{t.codec.parameters}.safetensors" for t in pack.targets if t.codec.parameters is not None}
    for view, entry in pack.document.packed.items():
        known |= {tar_name(view, number) for number in range(len(entry.tars))}
    for folder, names, files in os.walk(pack.path):
        relative = Path(folder).relative_to(pack.path)
        if relative == Path("."):
            names[:] = [name for name in names if name != "tmp"]
        links = [name for name in names if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*files, *links]):
            path = (relative / name).as_posix()
            if path not in known:
                yield Finding(path, None, "does not belong to the pack", "remove it")
