"""proteus-cache: run a vision foundation model once, distil any number of students from what it said.

    import proteus_cache

    cache = proteus_cache.open_cache("proteus/caches/dinov2_vitg14")
    pack = proteus_cache.open_pack("proteus/packs/...")
    sample = pack[0]                     # key, label, view_index, view, targets
    stream = proteus_cache.webdataset("proteus/packs/...")

Importing this package imports nothing heavy; the names below load what they need when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proteus_cache.cache.reader import open_cache as open_cache
    from proteus_cache.pack.reader import open_pack as open_pack
    from proteus_cache.pack.stream import webdataset as webdataset

__version__ = "0.1.0"
__all__ = ["__version__", "open_cache", "open_pack", "webdataset"]

_HOMES = {
    "open_cache": "proteus_cache.cache.reader",
    "open_pack": "proteus_cache.pack.reader",
    "webdataset": "proteus_cache.pack.stream",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
