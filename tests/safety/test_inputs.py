"""Encoded views, image lists, fitted parameters and YAML of a store that somebody sent."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from proteus_cache.cache.image_list import parse_images
from proteus_cache.cache.reader import open_cache
from proteus_cache.codecs import fit_codec, load_codec
from proteus_cache.documents import seal
from proteus_cache.errors import FormatError
from proteus_cache.report.summary import summarise
from proteus_cache.views.encode import decode_view, encode_view
from proteus_cache.yaml_text import read_yaml
from tests.cli.running import run
from tests.safety.guarded import Attack, check, run_guarded

_SIDE = 32
_PIXELS = np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)


def _attack_all(cases: dict[str, bytes], read: Callable[[bytes], object], honest: bytes, folder: Path) -> None:
    attacks = [Attack(name, lambda data=data: read(data)) for name, data in cases.items()]  # type: ignore[misc]
    check(run_guarded(folder, attacks, lambda: read(honest)))


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _ihdr(width: int, height: int, depth: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


def _resized(jpeg: bytes, height: int, width: int) -> bytes:
    """Another size in the frame header."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def _saved(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_PIXELS).save(buffer, kind, **options)
    return buffer.getvalue()


def test_hostile_views_are_refused_before_their_pixels_are_made(tmp_path: Path) -> None:
    jpeg, end = encode_view(_PIXELS, "jpeg"), (b"IEND", b"")
    scan = jpeg[jpeg.index(b"\xff\xda") : -2]
    zeros = zlib.compress(bytes(1 << 28), 9)
    progressive = _saved("JPEG", progressive=True)
    cases = {
        "a PNG of 60,000 x 60,000": _png(_ihdr(60_000, 60_000), (b"IDAT", zeros), end),
        "a PNG of 2^31 x 2^31": _png(_ihdr(2**31 - 1, 2**31 - 1), (b"IDAT", zeros), end),
        "a PNG that unpacks to more": _png(_ihdr(_SIDE, _SIDE + 1), (b"IDAT", zeros), end),
        "a PNG of 16 bits": _png(_ihdr(_SIDE, _SIDE, 16), (b"IDAT", zeros), end),
        "a PNG with text": _png(_ihdr(_SIDE, _SIDE), (b"zTXt", b"k\0\0" + zeros), (b"IDAT", zeros), end),
        "a PNG with a profile": _png(_ihdr(_SIDE, _SIDE), (b"iCCP", b"k\0\0" + zeros), (b"IDAT", zeros), end),
        "a PNG that moves": _png(_ihdr(_SIDE, _SIDE), (b"acTL", bytes(8)), (b"IDAT", zeros), end),
        "a PNG without pixels": _png(_ihdr(_SIDE, _SIDE), end),
        "a PNG without header": _png((b"IDAT", zeros), end),
        "a PNG with damaged pixels": _png(_ihdr(_SIDE, _SIDE), (b"IDAT", b"x" * 100), end),
        "a PNG of many parts": _png(_ihdr(_SIDE, _SIDE), *[(b"IDAT", b"")] * 30_000, end),
        "a JPEG of 65,535 x 65,535": _resized(jpeg, 65_535, 65_535),
        "a JPEG of no height": _resized(jpeg, 0, _SIDE),
        "a JPEG of 10,000 scans": jpeg[:-2] + scan * 10_000 + jpeg[-2:],
        "a JPEG of many scans, progressive": progressive[:-2]
        + progressive[progressive.index(b"\xff\xda") : -2] * 500
        + b"\xff\xd9",
        "a JPEG of 100,000 comments": jpeg[:2] + b"\xff\xfe\0\x02" * 100_000 + jpeg[2:],
        "a JPEG with EXIF of 60 kB": jpeg[:2] + b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527) + jpeg[2:],
        "a JPEG in CMYK": _cmyk(),
        "a JPEG in grey": _grey(),
        "a JPEG without pixels": jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9",
        "a JPEG with a pickle behind it": jpeg + b"cos\nsystem\n(S'x'\ntR.",
        "GIF": _saved("GIF"),
        "TIFF": _saved("TIFF"),
        "BMP": _saved("BMP"),
        "WebP": b"RIFF\x20\0\0\0WEBPVP8 " + bytes(32),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n(x) run\n",
        "PDF": b"%PDF-1.7\n",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "ZIP": b"PK\x03\x04" + bytes(60),
        "nothing": b"",
    }

    _attack_all(cases, lambda data: decode_view(data, _SIDE), jpeg, tmp_path)


def _cmyk() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_PIXELS).convert("CMYK").save(buffer, "JPEG")
    return buffer.getvalue()


def _grey() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_PIXELS).convert("L").save(buffer, "JPEG")
    return buffer.getvalue()


def test_hostile_image_lists_are_refused(honest_cache: Path, tmp_path: Path) -> None:
    cache = open_cache(honest_cache)
    honest = (honest_cache / "images.parquet").read_bytes()
    table = cache.image_table

    def written(changed: pa.Table, **options: object) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(changed, buffer, **options)
        return buffer.getvalue()

    def replaced(name: str, values: list[object], kind: pa.DataType | None = None) -> bytes:
        at = table.schema.get_field_index(name)
        column = pa.array(values, kind or table.schema.field(name).type)
        return written(table.set_column(at, pa.field(name, column.type), column))

    n = len(table)
    paths = table["path"].to_pylist()
    bomb = pa.table(
        {name: pa.array([None if name == "label" else values] * 0) for name, values in {"key": "k"}.items()}
    )
    cases = {
        "empty": b"",
        "cut": honest[: len(honest) // 2],
        "no Parquet": b"PAR1" + bytes(100) + b"PAR1",
        "a footer of 4 GB": honest[:-8] + b"\xff\xff\xff\xffPAR1",
        "an absolute path": replaced("path", ["/etc/passwd", *paths[1:]]),
        "a path upwards": replaced("path", ["a/../../../etc/passwd", *paths[1:]]),
        "a path that is upwards": replaced("path", ["..", *paths[1:]]),
        "a path with NUL": replaced("path", ["a\0b", *paths[1:]]),
        "no path": replaced("path", [None, *paths[1:]]),
        "a key of a path": replaced("key", ["../x", *table["key"].to_pylist()[1:]]),
        "a key with a line break": replaced("key", ["a\n", *table["key"].to_pylist()[1:]]),
        "the same key twice": replaced("key", [table["key"][1].as_py(), *table["key"].to_pylist()[1:]]),
        "more images of the probe": replaced("probe", [True] * n),
        "labels that are texts": replaced("label", ["x"] * n, pa.string()),
        "a row less": written(table.slice(0, n - 1)),
        "a million rows": written(pa.concat_tables([table] * (1_000_000 // n))),
        "a column more": written(table.append_column("evil", pa.array(["x"] * n))),
        "a column less": written(table.drop(["probe"])),
        "other columns": written(bomb),
        "a path of 100 MB": replaced("path", ["x" * (100 << 20), *paths[1:]]),
    }

    _attack_all(cases, lambda data: parse_images(data, cache.manifest, "images.parquet"), honest, tmp_path)


def test_hostile_parameters_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(64, 16, 12)
    for number, name in enumerate(("int8", "int4", "klt:12dB")):
        codec = fit_codec(name, tokens)
        blob = codec.parameters_blob()
        assert blob is not None
        tensors = load(blob)
        first = sorted(tensors)[0]
        header = int.from_bytes(blob[:8], "little")
        cases = {
            "empty": b"",
            "a pickle": b"\x80\x04cos\nsystem\n",
            "a header of 2^63": (1 << 63).to_bytes(8, "little") + blob[8:],
            "a header of 100 MB": (100 << 20).to_bytes(8, "little") + blob[8:],
            "no header": blob[:8] + b"[" * header + blob[8 + header :],
            "a header nested deeply": (100_000).to_bytes(8, "little") + b'{"a":' + b"[" * 99_995,
            "cut": blob[:-1],
            "more behind it": blob + b"x",
            "a tensor more": save(tensors | {"evil": torch.zeros(1)}),
            "a tensor less": save({key: value for key, value in tensors.items() if key != first}),
            "another type": save(tensors | {first: tensors[first].to(torch.complex64)}),
            "another shape": save(tensors | {first: torch.zeros(3, 5, 7).to(tensors[first].dtype)}),
            "empty tensors": save({key: value.reshape(-1)[:0].clone() for key, value in tensors.items()}),
            "huge tensors": save(tensors | {first: torch.zeros(8 << 20).to(tensors[first].dtype)}),
        }
        if tensors[first].is_floating_point():
            cases["not finite"] = save(tensors | {first: torch.full_like(tensors[first], float("nan"))})

        def read(data: bytes, codec: object = codec) -> object:
            record = codec.record().model_copy(update={"parameters": hashlib.sha256(data).hexdigest()})  # type: ignore[attr-defined]
            return load_codec(record, (16, 12), data)

        (tmp_path / str(number)).mkdir()
        _attack_all(cases, read, blob, tmp_path / str(number))


_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(8)
)
_YAML = {
    "an alias bomb": _BOMB,
    "an alias": "train: {student: &a x, out: *a}\n",
    "an anchor alone": "train: &a {student: x}\n",
    "a Python object": "train: !!python/object/apply:os.system ['touch /tmp/x']\n",
    "a tag": "train: !evil x\n",
    "a binary": "train: !!binary eA==\n",
    "a directive": "%YAML 9.9\n---\ntrain: {}\n",
    "a key twice": "train: {}\ntrain: {}\n",
    "nested deeply": "train: " + "[" * 30_000,
    "nested deeply before an anchor": "train: " + "[" * 60_000 + "&a",
    "nested deeply in pairs": "train: " + "[a, " * 15_000 + "*a",
    "nested deeply in braces": "train: " + "{" * 60_000 + "!a",
    "nested by 20": "train: " + "[" * 20 + "]" * 20,
    "a number without end": "train: {seed: 0x" + "f" * 60_000 + "}\n",
    "a number of 5,000 digits": "train: {seed: " + "9" * 5_000 + "}\n",
    "a date that is none": "train: {seed: 2020-99-99}\n",
    "a key that is a list": "? [a]\n: x\n",
    "too long": "train: {}\n" + "#" * (1 << 20),
    "many keys": "".join(f"k{n}: [\n" for n in range(8_000)),
    "not UTF-8": "train: \udcff\n",
    "a control character": "train: \x01\n",
    "two documents": "train: {}\n---\ntrain: {}\n",
}


def test_hostile_yaml_is_refused(tmp_path: Path) -> None:
    cases = {name: text.encode("utf-8", "surrogateescape") for name, text in _YAML.items()}

    _attack_all(
        cases, lambda data: read_yaml(data, "config.yaml"), b"train: {student: vit_s14, lr: 1.5, a: [1, 2]}\n", tmp_path
    )


def test_every_yaml_of_a_run_or_a_command_is_read_so(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text(_BOMB)
    sent = tmp_path / "run"
    sent.mkdir()
    (sent / "config.yaml").write_text(_BOMB)
    for name in ("student.safetensors", "ema.safetensors"):
        (sent / name).write_bytes(save({"x": torch.zeros(1)}))

    assert "aliases are not accepted" in run("info", sent, code=1).stderr
    assert "aliases are not accepted" in run("train", "--config", bomb, code=2).stderr
    assert "aliases are not accepted" in run("extract", "--config", bomb, code=2).stderr
    assert "aliases are not accepted" in run("pipeline", bomb, code=2).stderr


def test_the_last_line_of_a_sent_run_is_numbers_or_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {student: x}\n")
    for line in (b'{"step":"\\u001b[2J","epoch":0,"loss":1}', b"{" * 60_000, b'{"step":NaN,"epoch":0}', b'{"loss":1}'):
        (tmp_path / "metrics.jsonl").write_bytes(line + b"\n")
        with pytest.raises(FormatError, match="its last line is damaged"):
            summarise(tmp_path)


def test_an_honest_document_of_the_largest_kind_is_read() -> None:
    """The limits leave room: a pack of ImageNet in 16 views, and one of 100,000 tars."""
    from proteus_cache.documents import parse_sealed

    tar = {"n_samples": 1024, "receipt": "0" * 64, "sha256": "0" * 64, "size": 1 << 30}
    data = seal(
        {
            "packed": {f"v{view:03d}": {"tars": [tar] * (100_000 // 16)} for view in range(16)},
            "classes": ["c" * 30] * 21_841,
        }
    )

    assert len(parse_sealed(data, "pack.json")["packed"]) == 16
