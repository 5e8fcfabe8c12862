"""devices: which GPU a process takes, asked of a stand-in for machines that have several."""

import pytest
import torch

from proteus_cache.devices import best_device, use_device
from proteus_cache.errors import UsageError


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
        ("abacus", "not a device"),
        ("meta", "only"),
    ):
        with pytest.raises(UsageError, match=reason):
            use_device(asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="sees no GPU"):
        use_device("cuda")
    assert best_device(None) == torch.device("cpu")
    assert current == []
