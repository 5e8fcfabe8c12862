"""Four small JPEGs that come with the package, decoded as sources and views are: what this decoder makes of them.

Digests of their pixels stand in the manifest of every new cache. Whoever extracts into that cache must get the same
pixels, or its views would come from another decoder. The files were made once, by `tests/views/make_known_jpegs.py`.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Final

import numpy as np

from proteus_cache.views.encode import decode_view, digest_pixels
from proteus_cache.views.source import decode_source

SOURCES: Final = ("baseline_420", "progressive", "grey_odd")
"""Read as sources: baseline with halved colour and odd sides, progressive, grey."""
VIEW: Final = "view_444"
"""Read as a view: quality 95, 4:4:4, as `encode_view` writes."""
VIEW_SIDE_PX: Final = 48
_FOLDER: Final = "known_jpegs"


def known_jpeg(name: str) -> bytes:
    """The bytes of one of the four."""
    return (files("proteus_cache.views") / _FOLDER / f"{name}.jpg").read_bytes()


def decode_known() -> dict[str, str]:
    """Name to the digest (16 hex digits) of the pixels that each of the four decodes to here.

    Raises:
        BadImageError, FormatError: this decoder cannot read one of them.
    """
    digests = {name: digest_pixels(np.asarray(decode_source(known_jpeg(name), f"{name}.jpg"))) for name in SOURCES}
    return digests | {VIEW: digest_pixels(decode_view(known_jpeg(VIEW), VIEW_SIDE_PX))}
