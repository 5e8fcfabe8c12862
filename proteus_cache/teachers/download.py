"""Published weights over the network: fetched once, converted, kept as one safetensors file."""

from __future__ import annotations

import http.client
import logging
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from proteus_cache import storage
from proteus_cache.errors import WeightsError
from proteus_cache.teachers.weights import Fit, convert_pickle

Progress: TypeAlias = Callable[[int, int | None], None]
"""Called with bytes done and bytes in all (None where the server does not say)."""

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 60.0


def download(name: str, url: str, final: Path, fit: Fit, progress: Progress | None) -> Path:
    """Fetch the `.pth` of teacher `name` once, and publish it as the safetensors file `final`; returns that.

    The download is streamed to a temporary file beside `final`, synced, read under restrictions and removed.

    Raises:
        WeightsError: the network or server does not give it, or it is not what the URL promises.
    """
    if final.is_file():
        return final
    storage.make_folder(final.parent)
    temp = final.parent / f"{storage.temp_name(final.stem)}.pth"
    remedy = (
        f"run `proteus-cache fetch {name}` on a connected machine that shares this PROTEUS_HOME "
        f"(it writes {final}), or pass --weights FILE"
    )
    try:
        written = storage.write_new(temp, _stream(url, remedy, progress))
        _log.info("downloaded url=%s bytes=%d sha256=%s", url, written.size, written.sha256)
        convert_pickle(temp, final, fit, url)
    finally:
        storage.remove(temp)
    return final


def _stream(url: str, remedy: str, progress: Progress | None) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            promised = answer.headers.get("Content-Length")
            total = int(promised) if promised else None
            done = 0
            while chunk := answer.read(_CHUNK_BYTES):
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
                yield chunk
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise WeightsError(f"cannot download {url} ({reason}); {remedy}") from error
    if total is not None and done != total:
        raise WeightsError(f"cannot download {url} (it ended after {done:,} of {total:,} bytes); {remedy}")
