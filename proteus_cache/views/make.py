"""Make one view: read, draw, render, encode, decode again, and write down how.

What comes back is all that a store needs: the view's bytes, the pixels that those bytes decode to (they are
what the teacher sees), their digest, and the sample document that lies beside the view. A fresh view is made by the
same recipe and never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from proteus_cache.documents import Document
from proteus_cache.errors import at
from proteus_cache.views.encode import decode_view, digest_pixels, encode_view
from proteus_cache.views.recipe import Recipe, draw_recipe
from proteus_cache.views.render import Values, render, render_normalised
from proteus_cache.views.source import Source, read_source
from proteus_cache.views.spec import ViewSpec

SAMPLE_FORMAT: Final = "proteus-cache/sample"


class SourceRecord(Document):
    """The image that a view was made from."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    width: Annotated[int, Field(ge=1)]
    height: Annotated[int, Field(ge=1)]


class SampleRecord(Document):
    """The document beside a view, `KEY.json`: what it shows and how it was made."""

    format: Literal["proteus-cache/sample"] = SAMPLE_FORMAT
    version: Literal[1] = 1
    key: str
    path: str
    """The image's path, relative to the image root."""
    label: Annotated[int, Field(ge=0)] | None
    view: str
    view_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    """BLAKE2b, 8 bytes, of the decoded view."""
    source: SourceRecord
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class View:
    """One finished view."""

    data: bytes
    """JPEG or PNG."""
    pixels: NDArray[np.uint8]
    """(H, W, 3), decoded from `data`."""
    digest: str
    """16 hex digits, of `pixels`."""
    source_sha256: str
    """Of the image file."""
    sample_json: bytes
    """A sealed `SampleRecord`."""


def make_view(path: Path, relative_path: str, key: str, label: int | None, view: str, spec: ViewSpec) -> View:
    """Read an image and make one view of it.

    Args:
        path: the file.
        relative_path: its path below the image root, for the sample document.
        key: its sample key.
        label: its class, or None.
        view: `v000`, `v001`, ... or `probe`.
        spec: the views of this cache.

    Raises:
        BadImageError: the image cannot become a view.
        StorageError: the file cannot be read.
    """
    source = read_source(path)
    with at(key=key, view=view):
        recipe = draw_recipe(spec, key, view, source.width, source.height)
        data = encode_view(render(source.image, recipe, spec), spec.view_format)
        pixels = decode_view(data, spec.size_px)
        digest = digest_pixels(pixels)
        sample = SampleRecord(
            key=key,
            path=relative_path,
            label=label,
            view=view,
            view_digest=digest,
            source=_record(source),
            recipe=recipe,
        )
        return View(data, pixels, digest, source.sha256, sample.sealed())


def make_fresh_view(path: Path, key: str, view: str, spec: ViewSpec) -> tuple[Values, int]:
    """Read an image and make one view of it that is not stored: nothing is encoded, and erased after normalising.

    Args:
        path: the file.
        key: its sample key.
        view: `v000`, `v001`, ... or `probe`.
        spec: how views are made; the format does not matter.

    Returns:
        (H, W, 3) float32, normalised, and the bytes read.

    Raises:
        BadImageError: the image cannot become a view.
        StorageError: the file cannot be read.
    """
    source = read_source(path)
    with at(key=key, view=view):
        recipe = draw_recipe(spec, key, view, source.width, source.height)
        return render_normalised(source.image, recipe, spec), source.n_bytes


def _record(source: Source) -> SourceRecord:
    return SourceRecord(sha256=source.sha256, width=source.width, height=source.height)
