"""A ready WebDataset pipeline over a pack, for trainers that bring their own loop.

The tars are plain WebDataset; this adds decoding, labels, and the split over nodes and workers. It streams,
so it can neither resume nor draw at random over the whole pack, and it checks no checksum: our own loader
does all three. Tars are read by the strict reader that everything here uses, so no member is opened by its name
or decoded by its extension.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from proteus_cache import tar
from proteus_cache.documents import parse_sealed
from proteus_cache.errors import FormatError, StorageError
from proteus_cache.pack.index import MAX_JSON_BYTES, REMEDY
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.pack.samples import open_tar, tar_name
from proteus_cache.views.encode import decode_view, most_view_bytes


def webdataset(path: str | Path) -> Any:  # webdataset ships no types
    """Samples of a pack as a WebDataset pipeline; add `.shuffle(n)`, `.batched(n)` and so on to it.

    Each sample is a dict: `__key__`, `label` (int or None), `view_index` (int), `view` (H, W, 3) uint8
    tensor, and `targets`: name to float32 tensor, `cls` (D,), all others (T, D). Tars come in order, the
    probe's not at all; they are split over nodes and workers by WebDataset's own rules.

    Raises:
        UsageError: there is no pack at `path`.
        DamageError: while it is read: a tar is not one that `pack` writes.
    """
    import webdataset
    from webdataset.compat import FluidWrapper

    pack = open_pack(path)
    places = [(view, number) for view in pack.views for number in range(len(pack.document.packed[view].tars))]

    def samples(sources: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        # Open files, never names: webdataset would run a shell for some names.
        for source in sources:
            yield from _samples(pack, source["view"], source["tar"])

    pipeline = webdataset.DataPipeline(
        _Tars([{"view": view, "tar": number} for view, number in places]),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        samples,
    )
    return FluidWrapper(pipeline)


class _Tars(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The tars: view index and number."""

    def __init__(self, tars: list[dict[str, Any]]) -> None:
        super().__init__()
        self._tars = tars

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([dict(tar) for tar in self._tars])


def _samples(pack: Pack, view: str, number: int) -> Iterator[dict[str, Any]]:
    """The samples of one tar, decoded."""
    entry = pack.document.packed[view].tars[number]
    path = pack.path / tar_name(view, number)
    view_extension = "jpg" if pack.view_spec.view_format == "jpeg" else "png"
    wanted = ["codes", view_extension, "json"]
    limits = [pack.code_bytes, most_view_bytes(pack.side_px), MAX_JSON_BYTES]
    with open(open_tar(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.size:
            raise FormatError(f"{path}: {size:,} bytes instead of {entry.size:,}; {REMEDY}")
        members: list[tar.Member] = []
        for member in _members(file, size, path, 3 * entry.n_samples):
            members.append(member)
            if len(members) < 3:
                continue
            if [m.extension for m in members] != wanted or len({m.key for m in members}) != 1:
                raise FormatError(f"{path}: {member.name} is not the end of a sample; {REMEDY}")
            if any(m.size > limit for m, limit in zip(members, limits, strict=True)):
                raise FormatError(f"{path}: sample {member.key} is larger than a sample can be; {REMEDY}")
            yield _decoded(pack, view, str(path), member.key, [_content(file, m, path) for m in members])
            members = []
    if members:
        raise FormatError(f"{path}: ends within a sample; {REMEDY}")


def _members(file: Any, size: int, path: Path, most: int) -> Iterator[tar.Member]:
    try:
        yield from tar.members(file, size, str(path), most)
    except OSError as error:
        raise StorageError(f"{path}: cannot read: {error.strerror or error}") from error


def _content(file: Any, member: tar.Member, path: Path) -> bytes:
    try:
        file.seek(member.offset)
        data: bytes = file.read(member.size)
    except OSError as error:
        raise StorageError(f"{path}: cannot read: {error.strerror or error}") from error
    if len(data) != member.size:
        raise FormatError(f"{path}: the tar is cut short; {REMEDY}")
    return data


def _decoded(pack: Pack, view: str, path: str, key: str, parts: list[bytes]) -> dict[str, Any]:
    codes, encoded, document = parts
    what = f"{path}: {key}.json"
    if len(codes) != pack.code_bytes:
        raise FormatError(f"{path}: {key}.codes has {len(codes):,} bytes instead of {pack.code_bytes:,}; {REMEDY}")
    stated = parse_sealed(document, what)
    label = stated.get("label")
    is_label = label is None or (type(label) is int and label >= 0)
    if stated.get("key") != key or stated.get("view") != view or not is_label:
        raise FormatError(f"{what} belongs to another sample; {REMEDY}")
    tensor = torch.frombuffer(bytearray(codes), dtype=torch.uint8).unsqueeze(0)
    return {
        "__key__": key,
        "label": label,
        "view_index": int(view[1:]),
        "view": torch.from_numpy(decode_view(encoded, pack.side_px)),
        "targets": {name: tokens[0] for name, tokens in pack.decode(tensor).items()},
    }
