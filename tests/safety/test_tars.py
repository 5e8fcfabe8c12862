"""S1: malformed tars, through every way in which a tar is read, by an attacker who makes all digests right."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from proteus_cache import tar
from proteus_cache.cache.reader import open_cache
from proteus_cache.documents import parse_sealed
from proteus_cache.errors import DamageError
from proteus_cache.views.encode import decode_view
from tests.safety import readers
from tests.safety.guarded import Attack, check, run_guarded
from tests.safety.hostile_tars import honest, malformed
from tests.safety.stores import (
    VIEWS_TAR,
    cache_files,
    copied,
    files_of,
    records_of,
    with_cache_files,
    with_records,
    with_tar,
)

N_TARS = 45
"""Malformed tars, at least."""
_MEMBERS = 12


def test_malformed_tars_are_refused_by_every_reader(honest_pack: Path, tmp_path: Path) -> None:
    good = (honest_pack / "v000" / "s00000.tar").read_bytes()
    files = files_of(good)
    assert honest(files) == good
    tars = malformed(files)
    assert len(tars) >= N_TARS
    roots = {name: copied(honest_pack, tmp_path / f"pack{number}") for number, name in enumerate(tars)}
    for name, data in tars.items():
        with_tar(roots[name], data)

    def read_members(data: bytes) -> object:
        found = list(tar.members(io.BytesIO(data), len(data), "hostile.tar", _MEMBERS))
        if [(member.name, member.size) for member in found] != [(name, len(content)) for name, content in files]:
            raise DamageError("hostile.tar: other members than the index says")  # what every caller compares
        return len(found)

    def attacks(way: str, attempt: Callable[[Path], object]) -> list[Attack]:
        return [Attack(f"{way}: {name}", lambda root=root: attempt(root)) for name, root in roots.items()]  # type: ignore[misc]

    def warm_up() -> None:
        for attempt in (readers.read_pack, readers.stream_pack, readers.check_pack):
            attempt(honest_pack)
        read_members(good)

    expected = readers.read_pack(honest_pack)
    strict = [
        *(Attack(f"members: {name}", lambda data=data: read_members(data)) for name, data in tars.items()),  # type: ignore[misc]
        *attacks("stream", readers.stream_pack),
        *attacks("verify", readers.check_pack),
    ]
    trained = attacks("train", readers.read_pack)

    outcomes = run_guarded(tmp_path, [*strict, *trained], warm_up)

    by_index = [one for one in outcomes if one.name.startswith("train: ")]
    check([one for one in outcomes if one not in by_index])
    # Training reads by the index and looks at no tar header: what it accepts is what the honest tar holds.
    check(by_index, may_pass=lambda one: one.value == expected)
    assert sum(one.error is not None for one in by_index) >= N_TARS // 2


def test_malformed_tars_of_a_cache_are_refused(honest_cache: Path, tmp_path: Path) -> None:
    files = cache_files(open_cache(honest_cache))
    tars = malformed(files)
    roots = {name: copied(honest_cache, tmp_path / f"cache{number}") for number, name in enumerate(tars)}
    for name, data in tars.items():
        with_cache_files(roots[name], {VIEWS_TAR: data})

    def attempt(root: Path) -> int:
        cache = open_cache(root)
        views = cache.read_views("v000", 0)
        for view, document in views.values():
            decode_view(view, cache.manifest.views.size_px)
            parse_sealed(document, "sample")
        return len(views)

    attacks = [Attack(name, lambda root=root: attempt(root)) for name, root in roots.items()]  # type: ignore[misc]
    outcomes = run_guarded(tmp_path, attacks, lambda: attempt(honest_cache))

    check(outcomes)


_NEIGHBOURS = {
    "overlapping records": ("codes_offset", 1, 0),
    "a hole": ("codes_offset", 1, 1 << 20),
    "far behind the end": ("codes_offset", 0, (1 << 60) - 512),
    "beyond all files": ("codes_offset", 0, 1 << 63),
    "before the first member": ("codes_offset", 0, 0),
    "a view of 4 GB": ("view_size", 0, (1 << 32) - 1),
    "a view of 60 MB": ("view_size", 0, 60 << 20),
    "a document of 4 GB": ("json_size", 3, (1 << 32) - 1),
    "codes of another length": ("codes_size", 2, 7),
    "another tar": ("tar", 3, 1),
    "no such tar": ("tar", 3, (1 << 32) - 1),
    "rows twice": ("row", 2, 1),
    "rows out of order": ("row", 0, 3),
    "another label": ("label", 1, 77),
    "a view behind the end": ("view_offset", 3, 1 << 40),
    "a document behind the end": ("json_offset", 3, 1 << 40),
}


def test_hostile_index_records_are_refused(honest_pack: Path, tmp_path: Path) -> None:
    roots = {}
    for number, (name, (field, row, value)) in enumerate(_NEIGHBOURS.items()):
        roots[name] = copied(honest_pack, tmp_path / f"pack{number}")
        records = records_of(roots[name])
        records[field][row] = value
        with_records(roots[name], records)
    attacks = [
        Attack(f"{way.__name__} {name}", lambda root=root, way=way: way(root))  # type: ignore[misc]
        for name, root in roots.items()
        for way in (readers.read_pack, readers.check_pack)
    ]

    def warm_up() -> None:
        readers.read_pack(honest_pack)
        readers.check_pack(honest_pack)

    check(run_guarded(tmp_path, attacks, warm_up))
