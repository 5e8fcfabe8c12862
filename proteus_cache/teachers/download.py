"""Published weights over the network: fetched once, converted, kept as one safetensors file."""

from __future__ import annotations

import http.client
import logging
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias
from urllib.response import addinfourl

from proteus_cache import storage
from proteus_cache.errors import WeightsError
from proteus_cache.teachers.weights import Fit, convert_pickle

Progress: TypeAlias = Callable[[int, int | None], None]
"""Called with bytes done and bytes in all (None where the server does not say)."""

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20
_CONNECT_S = 10.0
"""For a server to answer at all; a network that is not there should say so soon."""
_READ_S = 60.0
"""For the next bytes."""


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
        f"without network here, run `proteus-cache fetch {name}` where there is one and place the {final.name} that it "
        f"writes at {final}; or download {url.rpartition('/')[2]} from there and give it with --weights"
    )
    try:
        written = storage.write_new(temp, _stream(url, remedy, progress))
        _log.info("downloaded url=%s bytes=%d sha256=%s", url, written.size, written.sha256)
        convert_pickle(temp, final, fit, url)
    finally:
        storage.remove(temp)
    return final


class _Connection(http.client.HTTPSConnection):
    """Gives up soon where nothing answers, and waits for data that is on its way."""

    def connect(self) -> None:
        self.timeout = _CONNECT_S
        super().connect()
        self.sock.settimeout(_READ_S)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, request)


def _open(url: str) -> addinfourl:
    answer: addinfourl = urllib.request.build_opener(_Https).open(url, timeout=_READ_S)
    return answer


def _stream(url: str, remedy: str, progress: Progress | None) -> Iterator[bytes]:
    try:
        with _open(url) as answer:
            promised = answer.headers.get("Content-Length")
            total = int(promised) if promised else None
            done = 0
            while chunk := answer.read(_CHUNK_BYTES):
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
                yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise WeightsError(f"cannot download {url} ({_reason(error)}); {remedy}") from error
    if total is not None and done != total:
        raise WeightsError(f"cannot download {url} (it ended after {done:,} of {total:,} bytes); {remedy}")


def _reason(error: OSError | http.client.HTTPException) -> str:
    """Why, without Python's error numbers."""
    reason = getattr(error, "reason", None) or error
    return str(getattr(reason, "strerror", None) or reason)
