"""zarr_arrays: the bytes of zarr-python, and a strict reader of them."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from zarr.storage import LocalStore

from proteus_cache.cache.manifest import TargetRecord
from proteus_cache.cache.zarr_arrays import array_metadata, check_metadata, read_row, read_shard, shard_buffers
from proteus_cache.codecs.record import CodecRecord
from proteus_cache.errors import DamageError, FormatError

_N_ROWS, _SHARD_SIZE = 21, 8


def _target(dtype: str) -> TargetRecord:
    if dtype == "uint8":
        codec = CodecRecord(name="int8", code_bytes=56, parameters="0" * 64, array_dtype="uint8", array_shape=[56])
    else:
        size = 4 * 6 * np.dtype(dtype).itemsize
        codec = CodecRecord(name=dtype, code_bytes=size, parameters=None, array_dtype=dtype, array_shape=[4, 6])  # type: ignore[arg-type]
    return TargetRecord(name="patch", shape=[4, 6], codec=codec)


def _codes(target: TargetRecord, n_rows: int, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    if target.codec.array_dtype == "uint8":
        codes = rng.integers(0, 256, (n_rows, target.codec.code_bytes), dtype=np.uint8)
    else:
        codes = rng.standard_normal((n_rows, 24)).astype(target.codec.array_dtype).view(np.uint8)
    codes[1] = 0  # a row of zeros must be stored like any other
    return codes


def _shard(target: TargetRecord, codes: NDArray[np.uint8]) -> bytes:
    return b"".join(bytes(buffer) for buffer in shard_buffers(target, _SHARD_SIZE, codes))


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("shard", [0, 2])
def test_bytes_are_those_of_zarr_python(tmp_path: Path, dtype: str, shard: int) -> None:
    target = _target(dtype)
    codes = _codes(target, min(_SHARD_SIZE, _N_ROWS - shard * _SHARD_SIZE))
    (tmp_path / "zarr.json").write_bytes(array_metadata(target, _N_ROWS, _SHARD_SIZE))
    rows = codes.view(dtype).reshape(len(codes), *target.codec.array_shape)

    with zarr.config.set({"array.write_empty_chunks": True}):
        array = zarr.open_array(LocalStore(tmp_path), mode="r+", zarr_format=3)
        array[shard * _SHARD_SIZE : shard * _SHARD_SIZE + len(codes)] = rows

    file = tmp_path.joinpath("c", str(shard), *["0"] * len(target.codec.array_shape))
    assert file.read_bytes() == _shard(target, codes)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_zarr_python_reads_our_bytes(tmp_path: Path, dtype: str) -> None:
    target = _target(dtype)
    (tmp_path / "zarr.json").write_bytes(array_metadata(target, _N_ROWS, _SHARD_SIZE))
    everything = _codes(target, _N_ROWS)
    for shard in range(3):
        file = tmp_path.joinpath("c", str(shard), *["0"] * len(target.codec.array_shape))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_shard(target, everything[shard * _SHARD_SIZE : (shard + 1) * _SHARD_SIZE]))

    array = zarr.open_array(tmp_path, mode="r", zarr_format=3)

    assert np.asarray(array[:]).tobytes() == everything.tobytes()


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_codes_come_back(dtype: str) -> None:
    target = _target(dtype)
    codes = _codes(target, 5)

    assert np.array_equal(read_shard(target, 5, _SHARD_SIZE, _shard(target, codes), "c/2"), codes)


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_one_row_comes_back_and_no_other_is_looked_at(tmp_path: Path, dtype: str) -> None:
    target = _target(dtype)
    codes = _codes(target, 5)
    data = bytearray(_shard(target, codes))
    file = tmp_path / "shard"

    file.write_bytes(data)
    assert [read_row(target, row, _SHARD_SIZE, file).tolist() for row in range(5)] == codes.tolist()
    with pytest.raises(FormatError, match="row 5 is not where the index says"):
        read_row(target, 5, _SHARD_SIZE, file)

    data[3] ^= 1  # in the first row
    file.write_bytes(data)
    with pytest.raises(DamageError, match="row 0 is damaged"):
        read_row(target, 0, _SHARD_SIZE, file)
    assert read_row(target, 4, _SHARD_SIZE, file).tolist() == codes[4].tolist()


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_every_flipped_bit_is_found(dtype: str) -> None:
    target = _target(dtype)
    data = _shard(target, _codes(target, 5))

    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(DamageError, match="c/2"):
            read_shard(target, 5, _SHARD_SIZE, bytes(damaged), "c/2")


def test_every_cut_and_extra_row_is_found() -> None:
    target = _target("uint8")
    data = _shard(target, _codes(target, 5))

    for length in range(len(data)):
        with pytest.raises(DamageError):
            read_shard(target, 5, _SHARD_SIZE, data[:length], "c/2")
    for n_rows in (4, 6):
        with pytest.raises(FormatError):
            read_shard(target, n_rows, _SHARD_SIZE, data, "c/2")


def test_a_chunk_that_unpacks_to_another_size_is_refused() -> None:
    target = _target("float16")
    for wrong in (bytes(target.codec.code_bytes - 1), bytes(target.codec.code_bytes + 1), bytes(50_000_000)):
        other = target.model_copy(update={"codec": target.codec.model_copy(update={"array_dtype": "uint8"})})
        packed = np.frombuffer(Zstd(level=1).encode(wrong), dtype=np.uint8).reshape(1, -1)
        data = b"".join(bytes(buffer) for buffer in shard_buffers(other, _SHARD_SIZE, packed))
        with pytest.raises(FormatError, match="row 0"):
            read_shard(target, 1, _SHARD_SIZE, data, "c/0")


def test_metadata_of_another_array_are_refused() -> None:
    target = _target("uint8")
    metadata = array_metadata(target, _N_ROWS, _SHARD_SIZE)

    check_metadata(metadata, array_metadata(target, _N_ROWS, _SHARD_SIZE), "zarr.json")
    for other, reason in (
        (array_metadata(target, _N_ROWS + 1, _SHARD_SIZE), "shape"),
        (array_metadata(target, _N_ROWS, 4), "chunk_grid"),
        (array_metadata(_target("float16"), _N_ROWS, _SHARD_SIZE), "data_type"),
        (metadata.replace(b'"crc32c"', b'"pickle"'), "codecs"),
        (b"{", "not valid JSON"),
        (b"[]", "not a JSON object"),
    ):
        with pytest.raises(FormatError, match=reason):
            check_metadata(other, array_metadata(target, _N_ROWS, _SHARD_SIZE), "zarr.json")
