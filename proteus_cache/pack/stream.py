"""A ready WebDataset pipeline over a pack, for trainers that bring their own loop.

The tars are plain WebDataset; this adds decoding, labels, and the split over nodes and workers. It streams,
so it can neither resume nor draw at random over the whole pack, and it checks no checksum: our own loader
does all three.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from proteus_cache.errors import FormatError
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.pack.samples import tar_name
from proteus_cache.views.encode import decode_view


def webdataset(path: str | Path) -> Any:  # webdataset ships no types
    """Samples of a pack as a WebDataset pipeline; add `.shuffle(n)`, `.batched(n)` and so on to it.

    Each sample is a dict: `__key__`, `label` (int or None), `view_index` (int), `view` (H, W, 3) uint8
    tensor, and `targets`: name to float32 tensor, `cls` (D,), all others (T, D). Tars come in order, the
    probe's not at all; they are split over nodes and workers by WebDataset's own rules.

    Raises:
        UsageError: there is no pack at `path`.
    """
    import webdataset
    from webdataset.compat import FluidWrapper

    pack = open_pack(path)
    places = [(view, number) for view in pack.views for number in range(len(pack.document.packed[view].tars))]
    tars = [{"url": tar_name(view, number)} for view, number in places]

    def opened(sources: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        # Open files, never names: webdataset would run a shell for some names.
        for source in sources:
            with open(pack.path / source["url"], "rb") as file:
                yield {**source, "stream": file}

    pipeline = webdataset.DataPipeline(
        _Tars(tars),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        opened,
        webdataset.tariterators.tar_file_expander,
        webdataset.tariterators.group_by_keys,
        webdataset.map(_Decoder(pack)),
    )
    return FluidWrapper(pipeline)


class _Tars(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The tars, by relative path."""

    def __init__(self, tars: list[dict[str, Any]]) -> None:
        super().__init__()
        self._tars = tars

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([dict(tar) for tar in self._tars])


class _Decoder:
    """From the members of one sample to tensors."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._extension = "jpg" if pack.view_spec.view_format == "jpeg" else "png"

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        key = sample["__key__"]
        missing = {"codes", self._extension, "json"} - set(sample)
        if missing or len(sample["codes"]) != self._pack.code_bytes:
            raise FormatError(
                f"{sample.get('__url__')}: sample {key} lacks {', '.join(missing) or 'codes'} or has too few"
            )
        document = json.loads(sample["json"])
        codes = torch.frombuffer(bytearray(sample["codes"]), dtype=torch.uint8).unsqueeze(0)
        return {
            "__key__": key,
            "label": document["label"],
            "view_index": int(document["view"][1:]),
            "view": torch.from_numpy(decode_view(sample[self._extension], self._pack.side_px)),
            "targets": {name: tokens[0] for name, tokens in self._pack.decode(codes).items()},
        }
