from __future__ import annotations

import shutil
from typing import cast

import pytest
import torch
from accelerate import Accelerator
from timm.optim._param_groups import param_groups_weight_decay
from torch import nn

from proteus_cache.errors import UsageError
from proteus_cache.students.registry import STUDENTS, StudentSize, build_student
from proteus_cache.train.compiling import cxx_compilers
from proteus_cache.train.config import TrainConfig, config_from_mapping
from proteus_cache.train.model import Distillation, build_distillation
from proteus_cache.train.state import make_state, parameter_groups, tensors_of

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def _config(**settings: object) -> TrainConfig:
    return config_from_mapping({"student": "vit_ti14", "data": "pack", "out": "run"} | settings)


def _build(config: TrainConfig, **options: dict[str, int]) -> Distillation:
    student = build_student(config.student, size_px=8, patch_px=4, mean=MEAN, std=STD, seed=0)
    return build_distillation(config, student, teacher_width=6, mean=MEAN, std=STD, **options)


def _names(bare: nn.Module, group: dict[str, object]) -> set[str]:
    names = {id(parameter): name for name, parameter in bare.named_parameters()}
    return {names[id(parameter)] for parameter in cast(list[nn.Parameter], group["params"])}


def test_what_is_decayed_is_what_the_released_code_decays() -> None:
    bare = _build(_config())

    decayed, spared = parameter_groups(bare, 0.05)

    # The released wrapper goes through timm's helper and exposes no list of exceptions.
    theirs = param_groups_weight_decay(bare, weight_decay=0.05, no_weight_decay_list=())
    by_rate = {group["weight_decay"]: _names(bare, group) for group in theirs}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert _names(bare, decayed) == by_rate[0.05]
    assert _names(bare, spared) == by_rate[0.0]
    assert {"student.pos_embed", "student.cls_token", "mask_token", "heads.feature.1.weight"} <= _names(bare, decayed)
    assert {"student.blocks.0.ls1.gamma", "student.norm.weight", "heads.patch.1.bias"} <= _names(bare, spared)


def test_tokens_can_be_spared_as_deit_does() -> None:
    bare = _build(_config(decay_tokens=False))

    decayed, spared = parameter_groups(bare, 0.05, decay_tokens=False)

    exceptions = [*(f"student.{name}" for name in bare.student.no_weight_decay()), "mask_token"]
    theirs = param_groups_weight_decay(bare, weight_decay=0.05, no_weight_decay_list=exceptions)
    by_rate = {group["weight_decay"]: _names(bare, group) for group in theirs}
    assert _names(bare, decayed) == by_rate[0.05]
    assert _names(bare, spared) == by_rate[0.0]
    everything = _names(bare, decayed) | _names(bare, spared)
    assert everything == {name for name, _ in bare.named_parameters()}


@pytest.mark.parametrize("decay_tokens", [True, False])
def test_the_optimiser_is_the_published_one(decay_tokens: bool) -> None:
    config = _config(decay_tokens=decay_tokens)
    bare = _build(config)

    state = make_state(bare, config, Accelerator(cpu=True))

    decayed, spared = state.adamw.param_groups
    for group in (decayed, spared):
        assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.999), 1e-8, 1e-3)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert ("mask_token" in _names(bare, decayed)) == decay_tokens
    assert ("student.pos_embed" in _names(bare, decayed)) == decay_tokens


def test_heads_of_blocks_are_trained_like_the_others() -> None:
    bare = _build(_config(weight_block=1.0), blocks={"block.3": 3})

    decayed, spared = parameter_groups(bare, 0.05)

    assert "heads.block_3.1.weight" in _names(bare, decayed)
    assert {"heads.block_3.0.weight", "heads.block_3.1.bias"} <= _names(bare, spared)


def test_the_average_moves_by_its_rate_at_every_step_from_the_first_on() -> None:
    config = _config()
    state = make_state(_build(config), config, Accelerator(cpu=True))
    expected = {name: value.double().clone() for name, value in state.bare.student.state_dict().items()}

    for _ in range(5):
        for parameter in state.bare.student.parameters():
            parameter.data += torch.randn_like(parameter)
        state.ema.update(state.bare.student)
        for name, value in state.bare.student.state_dict().items():
            expected[name] = 0.99996 * expected[name] + (1 - 0.99996) * value.double()

    assert config.ema_decay == 0.99996
    for name, value in state.ema.module.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-5)
    assert not any(name.startswith(("heads", "mask")) for name in state.ema.module.state_dict())


# A compiled student.


def _losses(config: TrainConfig, n_steps: int) -> tuple[list[float], list[str]]:
    """Losses of steps on made-up batches, and the names that a checkpoint would hold."""
    bare = _build(config)
    state = make_state(bare, config, Accelerator(cpu=True))
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(n_steps):
        views = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=generator)
        targets = {"cls": torch.randn(4, 6, generator=generator), "patch": torch.randn(4, 4, 6, generator=generator)}
        masked = torch.tensor([[0, 2], [1, 3]])
        loss = state.model(views, targets, masked, 1, (4.0, 2.0), None)
        loss[0].backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        losses.append(float(loss[0]))
    return losses, [name for tensors in tensors_of(state).values() for name in tensors]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, cxx_compilers())), reason="torch.compile needs a C++ compiler: none here")
def test_a_compiled_student_computes_what_a_plain_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cast(dict[str, StudentSize], STUDENTS), "vit_ti14", StudentSize(width=12, depth=1, heads=3))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    plain, names = _losses(_config(), 3)
    compiled, compiled_names = _losses(_config(compile=True), 3)

    assert compiled == pytest.approx(plain, rel=1e-5)
    assert compiled_names == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # no part of it is left out
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiling_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    config = _config(compile=True)

    with pytest.raises(UsageError, match=r"--compile: torch needs a C\+\+ compiler for it, and .* not on the PATH"):
        make_state(_build(config), config, Accelerator(cpu=True))
