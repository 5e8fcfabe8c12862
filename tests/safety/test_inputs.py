"""Encoded views, image lists, fitted parameters and YAML of a store that somebody sent."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from proteus_cache.cache.image_list import parse_images
from proteus_cache.cache.manifest import Manifest
from proteus_cache.cache.reader import open_cache
from proteus_cache.codecs import fit_codec, load_codec
from proteus_cache.documents import seal
from proteus_cache.errors import FormatError
from proteus_cache.report.summary import describe, summarise
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.weights import read_state
from proteus_cache.text import printable
from proteus_cache.train.tensors import check_tensors, read_tensors
from proteus_cache.views.encode import decode_view, encode_view
from proteus_cache.views.source import decode_source
from proteus_cache.yaml_text import read_yaml
from tests.cli.running import run
from tests.makers import make_teacher
from tests.safety.guarded import CASE_CPU_S, Attack, check, run_guarded

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
        "a PNG of a million parts": _png(_ihdr(_SIDE, _SIDE), *[(b"IDAT", b"")] * 1_000_000, end),
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

    def same_rows(count: int, path: str) -> tuple[bytes, Manifest]:
        """Rows that a dictionary makes small, and a manifest that asks for as many."""
        rows = np.zeros(count, dtype=np.int32)
        columns = {
            "key": pa.DictionaryArray.from_arrays(pa.array(rows), ["k"]),
            "path": pa.DictionaryArray.from_arrays(pa.array(rows), [path]),
            "label": pa.array(rows),
            "probe": pa.array(rows != 0),
        }
        data = written(pa.table(columns), compression="zstd", store_schema=False)
        images = cache.manifest.images.model_copy(update={"n_images": count, "n_probe": 0})
        return data, cache.manifest.model_copy(update={"images": images})

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
        "a path of 300 MB in a page that its footer makes small": _made_small(
            written(
                table.set_column(1, "path", pa.array(["x" * (300 << 20), *paths[1:]])),
                compression="zstd",
                write_statistics=False,
            )
        ),
        "an encoding that repeats texts": written(
            table, use_dictionary=False, column_encoding={"path": "DELTA_BYTE_ARRAY"}
        ),
        "metadata of 20 MB": written(table.replace_schema_metadata({"x": "y" * (20 << 20)})),
    }

    _attack_all(cases, lambda data: parse_images(data, cache.manifest, "images.parquet"), honest, tmp_path)

    (tmp_path / "claims").mkdir()
    sent = {"20 million equal rows": same_rows(20_000_000, "p"), "long paths": same_rows(100_000, "p" * 8000)}
    padded = same_rows(100_000, "p" * 8000)
    sent["long paths in a file of an honest size"] = (_with_gap(padded[0], 1 << 20), padded[1])
    attacks = [Attack(name, partial(parse_images, *one, "images.parquet")) for name, one in sent.items()]
    check(run_guarded(tmp_path / "claims", attacks, lambda: parse_images(honest, cache.manifest, "images.parquet")))


def _made_small(data: bytes) -> bytes:
    """A Parquet file whose footer says of each column and row group that it unpacks to little."""
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    sizes = {*(chunk.total_uncompressed_size for chunk in chunks), *(group.total_byte_size for group in groups)}
    large = [size for size in sizes if size > 1 << 20]
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
    assert large
    changed = footer
    for size in large:
        number = _varint(2 * size)
        assert number in changed
        changed = changed.replace(number, _varint(64, length=len(number)))
    return data[: -8 - len(footer)] + changed + data[-8:]


def _varint(value: int, length: int = 0) -> bytes:
    """As Thrift writes it, or longer."""
    digits = [value >> place & 127 for place in range(0, max(7 * length, value.bit_length()), 7)]
    return bytes([*(digit | 128 for digit in digits[:-1]), digits[-1]])


def _with_gap(data: bytes, size: int) -> bytes:
    """A Parquet file with zeros between its columns and its footer."""
    at = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return data[:at] + bytes(size) + data[at:]


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
    "a number in base 60 beyond a float": "train: {lr: " + "1:" * 300 + "1.0}\n",
    "a number in base 60": "train: {seed: 1" + ":1" * 30_000 + "}\n",
    "a character beyond Unicode": 'train: {student: "\\UFFFFFFFF"}\n',
    "no number": "train: {lr: .nan}\n",
    "an endless number": "train: {lr: -.inf}\n",
    "30,000 blanks": "train:\n" + "-\n" * 30_000,
    "20,000 lists": "train: [" + "[]," * 20_000 + "]\n",
    "20,000 maps": "train: [" + "{}," * 20_000 + "]\n",
    "20,000 pairs": "train: [" + ":," * 20_000 + "]\n",
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
    for line in (
        b'{"step":"\\u001b[2J","epoch":0,"loss":1}',
        b"{" * 60_000,
        b'{"step":NaN,"epoch":0}',
        b'{"loss":1}',
        b'{"step":1,"epoch":0}',
        b'{"step":null,"epoch":0,"loss":1}',
        b'{"step":1e308,"epoch":0,"loss":1}',
        b'{"step":1,"epoch":null,"seen":1}',
        b'{"step":1,"epoch":true,"seen":1}',
    ):
        (tmp_path / "metrics.jsonl").write_bytes(line + b"\n")
        with pytest.raises(FormatError, match="its last line is damaged"):
            summarise(tmp_path)


def test_runs_that_are_sent_are_described_or_refused_soon(tmp_path: Path) -> None:
    def sparse(path: Path) -> None:
        path.touch()
        os.truncate(path, 1 << 40)

    def tell(root: Path) -> None:
        summary = summarise(root)
        json.dumps(summary, sort_keys=True, allow_nan=False, default=str)
        assert all(map(printable, describe(summary)))

    config = b"train: {student: x}\n"
    makers: dict[str, Callable[[Path], object]] = {
        "a name of 60 kB": lambda run: (run / "config.yaml").write_bytes(b"train: {student: " + b"a" * 60_000 + b"}\n"),
        "20,000 addresses": lambda run: (run / "config.yaml").write_bytes(
            b'train: {data: "' + b"a:/" * 20_000 + b'"}\n'
        ),
        "keys that are dates": lambda run: (run / "config.yaml").write_bytes(b"train: {2020-01-01: x, 1: y, a: z}\n"),
        "a terabyte of metrics": lambda run: sparse(run / "metrics.jsonl"),
        "60 MB of empty lines": lambda run: (run / "metrics.jsonl").write_bytes(b"\n" * (60 << 20)),
        "30 MB of marks": lambda run: (run / "metrics.jsonl").write_bytes(b'"seen"\n' * (4 << 20)),
        "one line of 60 MB": lambda run: (run / "metrics.jsonl").write_bytes(b"{" * (60 << 20)),
        "metrics as a pipe": lambda run: os.mkfifo(run / "metrics.jsonl"),
        "metrics as a folder": lambda run: (run / "metrics.jsonl").mkdir(),
    }
    attacks = []
    for number, (name, make) in enumerate({"nothing": lambda run: None, **makers}.items()):
        run_folder = tmp_path / f"run{number}"
        run_folder.mkdir()
        (run_folder / "config.yaml").write_bytes(config)
        make(run_folder)
        attacks.append(Attack(name, lambda root=run_folder: tell(root)))  # type: ignore[misc]

    check(run_guarded(tmp_path, attacks, attacks[0].run), may_pass=lambda one: True)


def test_the_last_lines_of_a_run_are_found_however_far_apart(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {student: x}\n")
    steps = [json.dumps({"step": step, "epoch": 1, "loss": 0.5}) for step in range(2, 5_000)]
    epoch = json.dumps({"step": 1, "epoch": 0, "seen": 0.25})
    (tmp_path / "metrics.jsonl").write_text("\n".join([epoch, *steps, '{"step": 5000, "cut']))

    summary = summarise(tmp_path)

    assert summary["last_step"]["step"] == 4_999
    assert summary["last_epoch"] == {"step": 1, "epoch": 0, "seen": 0.25}


def test_weights_of_a_run_that_cannot_be_are_refused(tmp_path: Path) -> None:
    def file(header: object, body: bytes = b"") -> bytes:
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + body

    described = {
        "timm_vision_transformer": json.dumps(
            {"img_size": 32, "patch_size": 16, "embed_dim": 8, "depth": 3000, "num_heads": 2}
        ),
        "pixel_mean": "[0.5,0.5,0.5]",
        "pixel_std": "[0.5,0.5,0.5]",
    }
    cases = {
        "a shape of 2^63": file({"a": {"dtype": "F32", "shape": [0, 1 << 63], "data_offsets": [0, 0]}}),
        "100,000 tensors": file(
            {f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(100_000)}
        ),
        "3,000 blocks": save({f"blocks.{number}.x": torch.zeros(1) for number in range(3000)}, described),
    }
    ways: tuple[Callable[[Path], object], ...] = (read_tensors, check_tensors, read_state, _as_teacher)
    attacks = []
    for name, data in cases.items():
        path = tmp_path / f"{name.replace(' ', '_')}.safetensors"
        path.write_bytes(data)
        attacks += [Attack(f"{name}: {way.__name__}", lambda path=path, way=way: way(path)) for way in ways]  # type: ignore[misc]
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    attacks += [Attack(f"a pipe: {way.__name__}", lambda way=way: way(pipe)) for way in ways]  # type: ignore[misc]
    honest = make_teacher(tmp_path / "honest.safetensors")

    outcomes = run_guarded(tmp_path, attacks, lambda: [way(honest) for way in (read_tensors, read_state, _as_teacher)])

    plain = ("3,000 blocks: read_tensors", "3,000 blocks: read_state")
    # A wrong file of weights has an error of its own kind.
    assert all("ProteusCacheError" in one.kinds for one in outcomes if one.name not in plain), outcomes
    assert all(not one.forbidden and one.cpu_s < CASE_CPU_S for one in outcomes), outcomes


def _as_teacher(path: Path) -> None:
    load_teacher("vit", weights=str(path), home=path.parent, size_px=None)


def test_sources_that_cost_hours_are_bad_images(tmp_path: Path) -> None:
    jpeg, end = encode_view(_PIXELS, "jpeg"), (b"IEND", b"")
    start, rest = jpeg[:2], jpeg[2:]
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in _PIXELS))
    cases = {
        "fill bytes": start + b"\xff" * (30 << 20) + rest,
        "bytes between segments": start + b"\xff\xfe\0\2" + bytes(30 << 20) + rest,
        "segments of length 0": start + b"\xff\xfe\0\0" * (4 << 20) + rest,
        "a million comments": start + b"\xff\xfe\0\2" * 1_000_000 + rest,
        "20,000 EXIF": start + (b"\xff\xe1\3\x20Exif\0\0" + bytes(792)) * 20_000 + rest,
        "a million chunks": _png(_ihdr(_SIDE, _SIDE), *[(b"aaAa", b"")] * 1_000_000, (b"IDAT", rows), end),
    }
    attacks = [Attack(name, lambda data=data: decode_source(data, "x")) for name, data in cases.items()]  # type: ignore[misc]

    outcomes = run_guarded(tmp_path, attacks, lambda: decode_source(jpeg, "x"))

    assert [(one.name, one.error) for one in outcomes] == [(name, "BadImageError") for name in cases]
    assert all(one.cpu_s < CASE_CPU_S for one in outcomes), outcomes


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
