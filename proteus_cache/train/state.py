"""What changes from step to step: model, optimiser, average and loss scaling, to and from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from proteus_cache.errors import FormatError
from proteus_cache.train.checkpoint import Checkpoint
from proteus_cache.train.compiling import compiled
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.model import Distillation

_TOKENS = ("pos_embed", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The moving parts of a run."""

    bare: Distillation
    """The module without Accelerate's wrappers."""
    model: nn.Module
    """What is called: compiled if asked for, wrapped for autocast and data-parallel training."""
    adamw: torch.optim.AdamW
    optimizer: torch.optim.Optimizer
    """Accelerate's wrapper of `adamw`, which knows of loss scaling."""
    ema: ModelEmaV3
    """Average of the student alone."""
    scaler: GradScaler | None


def make_state(bare: Distillation, config: TrainConfig, accelerator: Accelerator) -> TrainingState:
    """Move the module to the device and make what trains it."""
    device = accelerator.device
    bare.to(device).train()
    ema = ModelEmaV3(bare.student, decay=config.ema_decay)
    adamw = torch.optim.AdamW(
        parameter_groups(bare, config.weight_decay, decay_tokens=config.decay_tokens),
        lr=config.peak_lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )
    model, optimizer = accelerator.prepare(compiled(bare) if config.compile else bare, adamw)
    return TrainingState(bare, model, adamw, optimizer, ema, accelerator.scaler)


def parameter_groups(module: nn.Module, weight_decay: float, *, decay_tokens: bool = True) -> list[dict[str, object]]:
    """Decayed and undecayed parameters, in the order of the module.

    Parameters with one axis go without decay (biases, norms, LayerScale). Position embedding, CLS and mask token are
    decayed: the released wrapper exposes no list of exceptions.

    Args:
        module: whose parameters.
        weight_decay: of the first group.
        decay_tokens: false spares position embedding, CLS and mask token, as DeiT and timm's ViTs ask for.

    Source: Proteus-pytorch, timm optim_factory add_weight_decay on MetaArch.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_token = name.rpartition(".")[2] in _TOKENS
        is_decayed = parameter.ndim > 1 and (decay_tokens or not is_token)
        (decayed if is_decayed else spared).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def tensors_of(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    """Everything that a checkpoint keeps, by file name."""
    return {
        "model.safetensors": state.bare.state_dict(),
        "ema.safetensors": state.ema.module.state_dict(),
        "optimizer.safetensors": _optimizer_tensors(state),
    }


def scaler_of(state: TrainingState) -> dict[str, float | int] | None:
    """The state of loss scaling; None without it."""
    return dict(state.scaler.state_dict()) if state.scaler is not None else None


def restore(state: TrainingState, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into all moving parts.

    Raises:
        FormatError: it is of another model.
    """
    try:
        state.bare.load_state_dict(checkpoint.model, strict=True)
        state.ema.module.load_state_dict(checkpoint.ema, strict=True)
        _load_optimizer(state, checkpoint.optimizer)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise FormatError(f"{checkpoint.path}: not a checkpoint of this student ({reason})") from error
    if state.scaler is not None and checkpoint.state.scaler is not None:
        state.scaler.load_state_dict(checkpoint.state.scaler)


def _optimizer_names(state: TrainingState) -> list[str]:
    """Parameter names in the order of AdamW's groups."""
    names = {id(parameter): name for name, parameter in state.bare.named_parameters()}
    return [names[id(parameter)] for group in state.adamw.param_groups for parameter in group["params"]]


def _optimizer_tensors(state: TrainingState) -> dict[str, Tensor]:
    """AdamW's state as `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`; empty before the first step."""
    by_index: Mapping[int, Mapping[str, Tensor]] = state.adamw.state_dict()["state"]
    names = _optimizer_names(state)
    return {f"{kind}.{names[index]}": tensor for index, values in by_index.items() for kind, tensor in values.items()}


def _load_optimizer(state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    """Load what `_optimizer_tensors` gave."""
    names = _optimizer_names(state)
    kinds = ("step", "exp_avg", "exp_avg_sq")
    full = state.adamw.state_dict()
    full["state"] = (
        {index: {kind: tensors[f"{kind}.{name}"] for kind in kinds} for index, name in enumerate(names)}
        if tensors
        else {}
    )
    state.adamw.load_state_dict(full)
