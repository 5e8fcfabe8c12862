"""Device, precision and processes of a run, through Accelerate.

Accelerate reads a launcher's environment (torchrun, `accelerate launch`), wraps the model for data-parallel
training and autocast, and scales fp16 losses. It does not see the loader: it would shard what is sharded
already.
"""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

from proteus_cache.errors import UsageError
from proteus_cache.train.config import Precision, TrainConfig

_ended_groups: list[object] = []
_ACCELERATE_NAMES = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}


def resolve_device(config: TrainConfig) -> str:
    """`cpu` or `cuda`.

    Raises:
        UsageError: a GPU is asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise UsageError("--device cuda: torch finds no GPU here; use --device cpu, or a torch build with CUDA")
    return config.device or ("cuda" if has_gpu else "cpu")


def resolve_precision(config: TrainConfig, device: str) -> Precision:
    """The precision of the forward pass; by default the one the hardware is made for.

    Raises:
        UsageError: fp16 on a CPU, or bf16 on a GPU that has none.
    """
    if device == "cpu":
        if config.precision == "fp16":
            raise UsageError("--precision fp16 needs a GPU; use fp32 or bf16 on a CPU")
        return config.precision or "fp32"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "bf16" and not has_bf16:
        raise UsageError("--precision bf16: this GPU has no bf16; use fp16 or fp32")
    return config.precision or ("bf16" if has_bf16 else "fp16")


def make_accelerator(device: str, precision: Precision) -> Accelerator:
    """An Accelerator for this process of the run, whatever another run in this process had before.

    Raises:
        UsageError: the launcher shards the model, which checkpoints here know nothing of.
    """
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(name, "false").lower() in ("1", "true", "yes"):
            raise UsageError(
                f"{name} is set: students are trained data-parallel only; choose that with `accelerate config`, or "
                "start the command without a launcher"
            )
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    return Accelerator(
        mixed_precision=_ACCELERATE_NAMES[precision],
        cpu=device == "cpu",
        # Given here, because a launcher's ACCELERATE_GRADIENT_ACCUMULATION_STEPS would divide our losses.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[ddp],
        step_scheduler_with_optimizer=False,
    )


def end_run(accelerator: Accelerator) -> None:
    """End a run that came to its end in every process; the next one in this process may have other ranks.

    The process group is kept alive until the process ends. What takes it apart joins gloo's thread with the interpreter
    lock in hand, and that thread may be waiting for the lock, to drop the tensors of the last reduction or barrier.
    """
    if accelerator.num_processes > 1:
        _ended_groups.append(torch.distributed.group.WORLD)
    accelerator.end_training()


def ranks_here(accelerator: Accelerator) -> int:
    """Processes of this run on this machine, as the launcher says; all of them when it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
