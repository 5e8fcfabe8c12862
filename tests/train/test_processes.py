"""Several processes compute what one does: the same global batches, gradients and weights, and none of them hangs.

Four processes are started once and take part in run after run; runs of fewer leave the others out.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from proteus_cache.errors import ProteusCacheError
from proteus_cache.pack.loader import Batch, Loader
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.processes import free_port
from proteus_cache.train.loop import train
from proteus_cache.train.model import Distillation
from tests.pack.synthetic import write_pack
from tests.train.runs import forked, ready_processes, run_config, step_lines, tiny_student

pytestmark = pytest.mark.slow

N_IMAGES = 23
WORLD = 4
# A large epsilon: the gradient of a key's bias is rounding alone, and Adam would blow it up.
COMMON: dict[str, object] = {"max_steps": 6, "checkpoint_every": 4, "ema_decay": 0.5, "adam_eps": 1e-3}
RUNS: dict[str, dict[str, object]] = {
    "even": {"batch_size": 8},
    "uneven": {"batch_size": 5, "accumulate": 2},
    "repeats": {"batch_size": 6, "repeats": 2, "drop_path": 0.3},
}
"""What every number of processes computes. Of its 18 trained images `uneven` drops 3 an epoch; four processes get
1, 1, 1 and 2 of a batch, and two of them no masked one."""
NUMBERS = (1, 2, 4)
CHAINS = {
    "chain": ((3, 1), (6, 2), (9, 4), (12, 1)),
    "one-two-one": ((2, 1), (5, 2), (8, 1)),
    "two-one-two": ((4, 2), (7, 1), (10, 2)),
}
"""Starts of one run: steps when each of them ends, and processes. An epoch has 3 steps."""
LONGEST = max(starts[-1][0] for starts in CHAINS.values())


@dataclass(frozen=True, slots=True)
class Step:
    """What one process saw of a step."""

    views: list[bytes]
    """Pixels of its part of the batch."""
    gradient: NDArray[np.float32]
    """Of all parameters, when the optimiser took it."""


class Recorder:
    """Looks at every step of this process from the outside."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._views: list[bytes] = []
        nn.modules.module.register_module_forward_pre_hook(self._see_views)
        register_optimizer_step_pre_hook(self._see_gradient)

    def _see_views(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, Distillation) and torch.is_grad_enabled():
            self._views += [view.numpy().tobytes() for view in arguments[0]]

    def _see_gradient(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if isinstance(optimizer, torch.optim.AdamW):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            assert all(p.grad is not None for p in parameters)
            gradient = torch.cat([p.grad.reshape(-1) for p in parameters]).numpy()
            self.steps.append(Step(self._views, gradient.copy()))
            self._views = []

    def save(self, path: Path) -> None:
        """Write down the steps, and forget them."""
        tensors = {f"gradient {n}": torch.from_numpy(step.gradient) for n, step in enumerate(self.steps)}
        for n, step in enumerate(self.steps):
            tensors[f"views {n}"] = torch.stack([torch.frombuffer(bytearray(v), dtype=torch.uint8) for v in step.views])
        save_file(tensors, path)
        self.steps = []


def saved_steps(path: Path) -> list[Step]:
    """What `Recorder.save` wrote."""
    tensors = load_file(path)
    return [
        Step([view.numpy().tobytes() for view in tensors[f"views {n}"]], tensors[f"gradient {n}"].numpy())
        for n in range(len(tensors) // 2)
    ]


def _place(rank: int, world: int, port: int) -> None:
    """Make this process one of a run, as a launcher would."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _compute(folder: str, rank: int, ports: list[int]) -> None:
    """All runs that go well, as one of the four processes."""
    torch.set_num_threads(1)
    root, recorder, left = Path(folder), Recorder(), iter(ports)

    def run(name: str, world: int, **settings: object) -> None:
        """One start of a run, with the first `world` processes."""
        port = next(left)
        if rank >= world:
            return
        _place(rank, world, port)
        config = run_config(root / "pack", root / name, **(COMMON | settings))
        train(config, resume=True)
        recorder.save(root / f"{name}-{config.max_steps}-of-{world}-rank-{rank}.safetensors")

    with tiny_student():
        for world in NUMBERS:
            for name, settings in RUNS.items():
                run(f"{name}-{world}", world, **settings)
        for name, starts in CHAINS.items():
            for steps, world in starts:
                run(name, world, **RUNS["uneven"] | {"max_steps": steps})
        run("unbroken", 1, **RUNS["uneven"] | {"max_steps": LONGEST})
        for world in (1, 2):
            run(f"accumulated-{world}", world, **RUNS["even"] | {"accumulate": 3})
        with pytest.MonkeyPatch.context() as patch:
            if rank == 2:
                patch.setattr(Loader, "__next__", _late)
            run("late", WORLD, **RUNS["even"])


_real_next = Loader.__next__


def _late(loader: Loader) -> Batch:
    time.sleep(0.1)  # what is tested is that the others wait for it
    return _real_next(loader)


def _end_early(folder: str, rank: int, port: int, how: str) -> None:
    """A run in which process 2 does not reach the end."""
    faulthandler.dump_traceback_later(40)  # says where one that does not end stands
    torch.set_num_threads(1)
    _place(rank, WORLD, port)

    def die(loader: Loader) -> Batch:
        batch = _real_next(loader)
        if batch.step == 2 and rank == 2:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ProteusCacheError("this process cannot go on")
        return batch

    with tiny_student(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "__next__", die)
        train(run_config(Path(folder, "pack"), Path(folder, how), **(COMMON | RUNS["even"])))


@pytest.fixture(scope="module", autouse=True)
def _ready_processes() -> Iterator[None]:
    with ready_processes():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pack of all runs."""
    root = tmp_path_factory.mktemp("processes")
    write_pack(root / "pack", n_images=N_IMAGES, shard_size=5, views=("v000", "v001", "v002", "probe"), held_out=(1,))
    return root


@pytest.fixture(scope="module")
def computed(root: Path) -> Path:
    """The folder with everything that `_compute` leaves."""
    ports = [free_port() for _ in range(30)]
    ranks = [forked(_compute, str(root), rank, ports) for rank in range(WORLD)]
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * WORLD
    return root


def _steps(root: Path, name: str, world: int, max_steps: object = COMMON["max_steps"]) -> list[list[Step]]:
    """What each process of a run saw."""
    return [saved_steps(root / f"{name}-{max_steps}-of-{world}-rank-{rank}.safetensors") for rank in range(world)]


def _planned(pack: Pack, name: str, steps: range) -> list[list[bytes]]:
    """Pixels of the global batches that the order says."""
    batch_size, repeats = (int(str(RUNS[name].get(field, 1))) for field in ("batch_size", "repeats"))
    order = pack.training_order(seed=0, batch_size=batch_size, repeats=repeats)
    batches = []
    for plan in map(order.batch, steps):
        assert plan.view_indices is not None
        entries = zip(plan.view_indices.tolist(), plan.records.tolist(), strict=True)
        batches.append([pack.sample(f"v{view:03d}", record).view.tobytes() for view, record in entries])
    return batches


def _joined(ranks: list[list[Step]]) -> list[list[bytes]]:
    """Pixels of the global batches that processes saw."""
    return [[view for rank in step for view in rank.views] for step in zip(*ranks, strict=True)]


def _distance(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _flat(path: Path) -> NDArray[np.float32]:
    weights = load_file(path)
    flat: NDArray[np.float32] = torch.cat([weights[name].reshape(-1) for name in sorted(weights)]).numpy()
    return flat


@pytest.mark.parametrize("world", NUMBERS)
@pytest.mark.parametrize("name", RUNS)
def test_processes_share_the_same_global_batches(computed: Path, name: str, world: int) -> None:
    ranks = _steps(computed, f"{name}-{world}", world)

    assert _joined(ranks) == _planned(open_pack(computed / "pack"), name, range(6))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", RUNS)
def test_processes_compute_the_same_gradients_losses_and_weights(computed: Path, name: str, world: int) -> None:
    _assert_equal(computed, (f"{name}-{world}", world), (f"{name}-1", 1))


@pytest.mark.parametrize("world", [1, 2])
def test_accumulated_parts_compute_what_the_whole_batch_does(computed: Path, world: int) -> None:
    _assert_equal(computed, (f"accumulated-{world}", world), ("even-1", 1))


def _assert_equal(root: Path, run: tuple[str, int], reference: tuple[str, int]) -> None:
    """Gradients, losses and weights of a run are those of another, but for rounding."""
    first, *others = _steps(root, *run)
    expected = _steps(root, *reference)[0]
    for step, gradient in enumerate(step.gradient for step in expected):
        assert all(np.array_equal(other[step].gradient, first[step].gradient) for other in others)
        assert _distance(first[step].gradient, gradient) < 1e-5
    out, expected_out = root / run[0], root / reference[0]
    for line, expected_line in zip(step_lines(out), step_lines(expected_out), strict=True):
        assert line == pytest.approx(expected_line, rel=1e-5)
    for file in ("student.safetensors", "heads.safetensors", "ema.safetensors"):
        assert _distance(_flat(out / file), _flat(expected_out / file)) < 1e-5


def test_uneven_batches_leave_processes_without_a_masked_view(computed: Path) -> None:
    ranks = _steps(computed, "uneven-4", 4)

    assert [len(rank[0].views) for rank in ranks] == [1, 1, 1, 2]
    assert open_pack(computed / "pack").training_order(seed=0, batch_size=5).n_samples % 5 == 3  # dropped
    assert all(line["loss_patch"] > 0 for line in step_lines(computed / "uneven-4"))


@pytest.mark.parametrize("name", CHAINS)
def test_the_number_of_processes_may_change_at_every_start(computed: Path, name: str) -> None:
    starts = [_steps(computed, name, world, steps) for steps, world in CHAINS[name]]

    batches = [batch for ranks in starts for batch in _joined(ranks)]

    pack, n_steps = open_pack(computed / "pack"), CHAINS[name][-1][0]
    assert pack.training_order(seed=0, batch_size=5).steps_per_epoch == 3
    assert batches == _planned(pack, "uneven", range(n_steps))
    unbroken = step_lines(computed / "unbroken")[:n_steps]
    for line, expected in zip(step_lines(computed / name), unbroken, strict=True):
        assert line == pytest.approx(expected, rel=1e-5)


def test_a_late_process_is_waited_for(computed: Path) -> None:
    late, even = computed / "late", computed / "even-4"

    for name in ("metrics.jsonl", "student.safetensors"):
        assert (late / name).read_bytes() == (even / name).read_bytes()


@pytest.mark.parametrize("how", ["killed", "failed"])
def test_when_one_process_ends_early_the_others_end_at_once(root: Path, how: str) -> None:
    port = free_port()
    ranks = [forked(_end_early, str(root), rank, port, how) for rank in range(WORLD)]

    ranks[2].join()
    gone = time.monotonic()
    for rank in ranks:
        rank.join(60)
    ended_s = time.monotonic() - gone

    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes[2] == (-signal.SIGKILL if how == "killed" else 1)
    assert [codes[rank] for rank in (0, 1, 3)] == [1, 1, 1]
    assert ended_s < 20
    assert not (root / how / "student.safetensors").exists()
    with tiny_student():
        assert train(run_config(root / "pack", root / how, **(COMMON | RUNS["even"])), resume=True).is_finished
