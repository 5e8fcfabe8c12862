"""devices: which GPU a process takes, asked of a stand-in for machines that have several."""

import pytest
import torch

from proteus_cache.devices import best_device, or_explain, use_device
from proteus_cache.errors import ProteusCacheError, UsageError


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Four GPUs, and the devices that were made current."""
    chosen: list[torch.device] = []
    for name in ("LOCAL_RANK", "SLURM_STEP_ID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize(
    ("environment", "index"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "3"}, 3),
        ({"SLURM_STEP_ID": "0", "SLURM_LOCALID": "2"}, 2),
        ({"SLURM_LOCALID": "2"}, 0),
    ],
)
@pytest.mark.parametrize("asked", [None, "cuda"])
def test_a_rank_takes_and_enters_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch,
    current: list[torch.device],
    environment: dict[str, str],
    index: int,
    asked: str | None,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert use_device(asked) == torch.device("cuda", index)
    assert current == [torch.device("cuda", index)]


def test_a_launcher_that_shows_one_gpu_leaves_no_choice(
    monkeypatch: pytest.MonkeyPatch, current: list[torch.device]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")

    assert best_device(None) == torch.device("cuda", 0)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, current: list[torch.device]) -> None:
    monkeypatch.setenv("LOCAL_RANK", "4")
    for asked, reason in (
        (None, "there are 4 GPUs"),
        ("cuda:9", "cuda:9"),
        ("abacus", "unknown device 'abacus'; choose cuda, cpu or cuda:1"),
        ("meta", "unknown device 'meta'"),
    ):
        with pytest.raises(UsageError, match=reason):
            use_device(asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="sees no GPU"):
        use_device("cuda")
    assert best_device(None) == torch.device("cpu")
    assert current == []


def _needs_memory_for(n: int, tried: list[int]) -> None:
    """Work that has memory for five."""
    tried.append(n)
    if n > 5:
        raise torch.cuda.OutOfMemoryError("no memory")


def _advise(fits: int | None, memory: str) -> str:
    return f"{fits} fit ({memory})"


def test_what_would_fit_is_found_by_halving() -> None:
    tried: list[int] = []

    with pytest.raises(ProteusCacheError, match=r"5 fit \(how much is free is not known\)") as caught:
        or_explain(lambda: _needs_memory_for(40, tried), 40, lambda n: _needs_memory_for(n, tried), _advise)

    assert tried == [40, 20, 10, 5]
    assert isinstance(caught.value.__cause__, torch.cuda.OutOfMemoryError)
    assert caught.value.__cause__.__traceback__ is None, "its frames would hold what the work computed"


def test_work_that_fits_is_done_once() -> None:
    tried: list[int] = []

    or_explain(lambda: _needs_memory_for(5, tried), 5, lambda n: pytest.fail("tried"), _advise)

    assert tried == [5]


def test_where_nothing_fits_that_is_said() -> None:
    def never(n: int) -> None:
        raise torch.cuda.OutOfMemoryError

    with pytest.raises(ProteusCacheError, match="None fit"):
        or_explain(lambda: never(4), 4, never, _advise)


def test_an_attempt_that_fails_otherwise_does_not_hide_the_lack_of_memory() -> None:
    def broken(n: int) -> None:
        raise RuntimeError("the device is lost")

    with pytest.raises(ProteusCacheError, match="None fit") as caught:
        or_explain(lambda: _needs_memory_for(8, []), 8, broken, _advise)

    assert "the device is lost" in str(getattr(caught.value.__cause__, "__notes__", []))


def test_other_errors_of_the_work_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        or_explain(lambda: torch.ones(2) @ torch.ones(3, 3), 8, lambda n: None, _advise)
