from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from proteus_cache.errors import ChecksumError, UsageError, WeightsError
from proteus_cache.teachers.weights import (
    RandomWeights,
    fit_state,
    load_weights,
    parse_weights,
    state_digest,
)


def as_they_are(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    return fit_state(raw, {name: tuple(value.shape) for name, value in raw.items()}, "anything")


class RunsCode:
    """Unpickled without restrictions, this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_random_weights_are_asked_for_by_seed(seed: int) -> None:
    assert parse_weights(f"random:{seed}") == RandomWeights(seed)


@pytest.mark.parametrize("text", ["random:", "random:-1", "random:x", "random:1.0", "random: 1", f"random:{2**64}"])
def test_seeds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="whole number from 0"):
        parse_weights(text)


def test_everything_else_is_a_file() -> None:
    assert parse_weights("folder/x.pth") == Path("folder/x.pth")
    assert parse_weights("random") == Path("random")


def test_digest_covers_names_shapes_types_and_values() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)}
    changed = [
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"].reshape(3, 2), "b": state["b"]},
        {"a": state["a"].half(), "b": state["b"]},
        {"a": state["a"] + 1e-6, "b": state["b"]},
        {"a": state["a"]},
    ]

    digests = {state_digest(other) for other in [state, *changed]}

    assert len(digests) == 6


def test_digest_does_not_depend_on_order_or_strides() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)

    first = state_digest({"a": tensor, "b": torch.ones(())})
    second = state_digest({"b": torch.ones(()), "a": tensor.T.contiguous().T})

    assert first == second


def test_digest_is_pinned() -> None:
    # It stands in manifests: a change here makes every cache another cache.
    assert (
        state_digest({"w": torch.arange(4.0), "b": torch.zeros(1)})
        == "0039208fd84afdbd87b785b779157e4706db06c2dcc809020d6400f7cc63ca5e"
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_pth_is_converted_once(tmp_path: Path, zipped: bool) -> None:
    state = {"w": torch.randn(3, 4), "half": torch.randn(5).half()}
    path = tmp_path / "weights.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)

    first = load_weights(path, tmp_path, as_they_are)
    converted = list((tmp_path / "weights").iterdir())
    second = load_weights(path, tmp_path, as_they_are)
    third = load_weights(converted[0], tmp_path, as_they_are)

    assert [file.suffix for file in converted] == [".safetensors"]
    assert list((tmp_path / "weights").iterdir()) == converted
    assert first.sha256 == second.sha256 == third.sha256
    assert all(torch.equal(second.state[name], state[name].float()) for name in state)
    assert load_file(converted[0]).keys() == state.keys()


def test_a_damaged_conversion_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.randn(64)}, path)
    load_weights(path, tmp_path, as_they_are)
    (converted,) = (tmp_path / "weights").iterdir()
    data = bytearray(converted.read_bytes())
    data[-9] ^= 4
    converted.write_bytes(data)

    with pytest.raises(ChecksumError, match=r"damaged.*remove it and run again"):
        load_weights(path, tmp_path, as_they_are)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    path, folder = tmp_path / "evil.pth", tmp_path / "made-by-code"
    torch.save({"w": torch.zeros(1), "x": RunsCode(folder)}, path, _use_new_zipfile_serialization=zipped)

    with pytest.raises(WeightsError, match=r"evil\.pth: refused.*possibly code") as caught:
        load_weights(path, tmp_path, as_they_are)

    assert not folder.exists()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "weights").exists()


def test_a_plain_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path, folder = tmp_path / "evil.pth", tmp_path / "made-by-code"
    path.write_bytes(pickle.dumps({"x": RunsCode(folder)}))

    with pytest.raises(WeightsError, match=r"evil\.pth"):
        load_weights(path, tmp_path, as_they_are)

    assert not folder.exists()


def pth_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(8.0)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data", [b"", b"x", b"<html>", b"PK\x03\x04", pth_bytes()[:200], pth_bytes()[:-10], b"\x80\x02."]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
def test_damaged_files_give_one_clear_line(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data)

    with pytest.raises(WeightsError) as caught:
        load_weights(path, tmp_path, as_they_are)

    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.integers(0, len(pth_bytes()) - 1), st.integers(1, 255))
def test_a_changed_byte_never_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, where: int, flip: int
) -> None:
    data = bytearray(pth_bytes())
    data[where] ^= flip
    folder = tmp_path_factory.mktemp("flipped")
    (folder / "weights.pth").write_bytes(data)

    try:
        loaded = load_weights(folder / "weights.pth", folder, as_they_are)
    except WeightsError:
        return
    assert all(value.dtype == torch.float32 for value in loaded.state.values())


def test_a_whole_checkpoint_is_no_state_dict(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1)}, "epoch": 3}, tmp_path / "checkpoint.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")

    with pytest.raises(WeightsError, match="not a plain state dict: 'epoch' is no tensor"):
        load_weights(tmp_path / "checkpoint.pth", tmp_path, as_they_are)
    with pytest.raises(WeightsError, match="holds a list, not a state dict"):
        load_weights(tmp_path / "list.pth", tmp_path, as_they_are)


def test_a_missing_file_and_an_unknown_kind_are_named(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").write_bytes(b"x")

    with pytest.raises(WeightsError, match=r"gone\.pth: no such weights file"):
        load_weights(tmp_path / "gone.pth", tmp_path, as_they_are)
    with pytest.raises(WeightsError, match=r"weights\.npz: not a weights file by its name"):
        load_weights(tmp_path / "weights.npz", tmp_path, as_they_are)


def test_first_problems_are_named_and_the_rest_counted() -> None:
    state = {"a": torch.zeros(2), "x": torch.zeros(1), "y": torch.zeros(1)}

    with pytest.raises(WeightsError) as caught:
        fit_state(state, {"a": (3,), "b": (1,)}, "model M", "hint H")

    assert str(caught.value) == (
        "these weights are not of model M: missing b; unexpected x and 1 more; a is (2,) instead of (3,); hint H"
    )


def test_tensors_that_are_no_plain_floats_are_refused() -> None:
    for tensor in (
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2).to_sparse(),
    ):
        with pytest.raises(WeightsError, match=r"tensor a is .* not plain floating point"):
            fit_state({"a": tensor}, {"a": (2,)}, "model M")


def test_a_tensor_that_claims_more_than_the_file_holds_is_not_filled_in(tmp_path: Path) -> None:
    """An expanded tensor of 4 TB is 4 bytes on disk; its shape is compared before it is copied."""
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, tmp_path / "bomb.pth")

    with pytest.raises(WeightsError, match="not of model M"):
        load_weights(tmp_path / "bomb.pth", tmp_path, lambda raw: fit_state(raw, {"w": (4,)}, "model M"))


def test_safetensors_metadata_come_along(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors", {"licence": "MIT"})

    assert load_weights(tmp_path / "w.safetensors", tmp_path, as_they_are).metadata["licence"] == "MIT"
    assert not zipfile.is_zipfile(tmp_path / "w.safetensors")
