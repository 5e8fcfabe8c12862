"""S4: a location in a field of a store is a text like any other: nothing is opened, asked or started for it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from proteus_cache.documents import parse_sealed, seal
from tests.safety import readers
from tests.safety.guarded import Attack, check, run_guarded
from tests.safety.stores import copied, files_of, with_files

N_CASES = 200
"""Fields set to a URL, at least."""
_FORMS_A_FIELD = 3
_FORMS = (
    "pipe:touch {mark}",
    "|touch {mark}",
    "$(touch {mark})",
    "file:///etc/passwd",
    "http://127.0.0.1:{port}/x",
    "https://user:secret@127.0.0.1:{port}/x",
    "http://169.254.169.254/latest/meta-data/",
    "s3://127.0.0.1:{port}/bucket",
    "simplecache::http://127.0.0.1:{port}/x",
    "filecache::file:///etc/passwd",
    "hf://datasets/x@http://127.0.0.1:{port}",
    "ftp://127.0.0.1:{port}/{{000..999}}.tar",
)


def _fields(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where texts stand; of a list the first item alone."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, dict):
        for name in value:
            yield from _fields(value[name], (*path, name))
    elif isinstance(value, list) and value:
        yield from _fields(value[0], (*path, 0))


def _set(data: bytes, path: tuple[str | int, ...], text: str) -> bytes:
    document = parse_sealed(data, "honest")
    place: Any = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = text
    return seal(document)


def test_no_field_of_a_store_is_taken_for_a_location(honest_cache: Path, honest_pack: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    port = listener.getsockname()[1]
    cache_ways: tuple[Callable[[Path], object], ...] = (readers.look, readers.check_cache, readers.read_cache)
    pack_ways: tuple[Callable[[Path], object], ...] = (
        readers.look,
        readers.check_pack,
        readers.read_pack,
        readers.stream_pack,
    )
    attacks: list[Attack] = []
    n_cases = 0
    for store, relative, ways in (
        (honest_cache, "manifest.json", cache_ways),
        (honest_cache, "receipts/v000/s00000.json", cache_ways),
        (honest_pack, "pack.json", pack_ways),
        (honest_pack, "v000/s00000.tar", pack_ways),
    ):
        is_sample = relative.endswith(".tar")
        files = files_of((store / relative).read_bytes()) if is_sample else []
        data = files[2][1] if is_sample else (store / relative).read_bytes()
        for path in _fields(parse_sealed(data, relative)):
            for _ in range(_FORMS_A_FIELD):
                text = _FORMS[n_cases % len(_FORMS)].format(mark=mark, port=port)
                root = copied(store, tmp_path / f"store{n_cases}")
                if is_sample:
                    with_files(root, [*files[:2], (files[2][0], _set(data, path, text)), *files[3:]])
                else:
                    (root / relative).write_bytes(_set(data, path, text))
                name = f"{relative}: {'.'.join(map(str, path))} = {text}"
                attacks += [Attack(name, lambda root=root, way=way: way(root)) for way in ways]  # type: ignore[misc]
                n_cases += 1
    assert n_cases >= N_CASES

    def warm_up() -> None:
        for way in cache_ways:
            way(honest_cache)
        for way in pack_ways:
            way(honest_pack)

    outcomes = run_guarded(tmp_path, attacks, warm_up)

    check(outcomes, may_pass=lambda one: True)  # a name may be any text; what matters is that nothing happens
    assert not mark.exists()
    try:
        listener.accept()
    except BlockingIOError:
        listener.close()
    else:
        raise AssertionError("something asked the server")
