"""What a run will read and write, found out before it starts; and whether its checkpoints fit on the disk."""

from __future__ import annotations

from proteus_cache import storage
from proteus_cache.devices import gpu_name
from proteus_cache.errors import SpaceError
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.plan.costs import STEP, STEP_WITHOUT_MASKS, student_shape
from proteus_cache.plan.human import human_bytes
from proteus_cache.plan.rates import Gpu, gpu_named
from proteus_cache.plan.training import TrainingSize, TrainPlan
from proteus_cache.students.registry import student_size
from proteus_cache.train.checkpoint import checkpoint_steps
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.data import TrainingData, TrainingOrder
from proteus_cache.train.run_folder import CHECKPOINTS
from proteus_cache.train.source import TargetSource, check_targets, mean_sample_bytes, n_patches, student_blocks

_BYTES_PER_PARAMETER = 4


def plan_training(config: TrainConfig, processes: int) -> TrainPlan:
    """The numbers of a run; nothing is read but the pack's description.

    Raises:
        UsageError: pack and config do not go together, or a GPU is asked for and there is none.
    """
    pack = open_pack(config.pack_path, expect_id=config.expect_id)
    gpu = gpu_named(gpu_name(config.device))
    return plan_for_pack(config, pack, processes, None if config.precision == "fp32" else gpu)


def plan_for_pack(config: TrainConfig, pack: Pack, processes: int, gpu: Gpu | None = None) -> TrainPlan:
    """As `plan_training`, with the pack at hand.

    Args:
        config: the run.
        pack: at `config.data`.
        processes: that train.
        gpu: what each of them runs on, where its rates are known and wanted.
    """
    check_targets(pack, config)
    order = pack.training_order(seed=config.seed, batch_size=config.global_batch, repeats=config.repeats)
    return _plan(config, pack, order, len(pack), mean_sample_bytes(pack), processes, gpu)


def plan_for_data(config: TrainConfig, data: TrainingData, processes: int) -> TrainPlan:
    """As `plan_training`, for anything that can be trained on."""
    return _plan(config, data, data.order, data.n_views, data.bytes_per_view, processes, None)


def _plan(
    config: TrainConfig,
    source: TargetSource,
    order: TrainingOrder,
    n_views: int | None,
    bytes_per_view: float,
    processes: int,
    gpu: Gpu | None,
) -> TrainPlan:
    parameters = student_parameters(config.student, source)
    trained = parameters + added_parameters(config, source)
    checkpoint = _BYTES_PER_PARAMETER * (3 * trained + parameters)  # weights and two moments; the average
    results = _BYTES_PER_PARAMETER * (trained + parameters + parameters * (config.init is not None))
    shape = student_shape(config.student, size_px=source.side_px, patch_px=source.teacher.patch_px)
    passes = STEP if config.weight_patch > 0 else STEP_WITHOUT_MASKS
    return TrainPlan(
        student=config.student,
        parameters=parameters,
        views=n_views,
        size=TrainingSize(
            views_per_epoch=order.n_samples,
            batch_size=config.global_batch,
            n_steps=config.n_steps(order.steps_per_epoch),
            bytes_per_view=bytes_per_view,
        ),
        checkpoint_bytes=checkpoint,
        bytes_to_write=(config.keep_checkpoints + 1) * checkpoint + results,
        free=storage.free_space(config.out),
        processes=processes,
        gpu=None if gpu is None else gpu.title,
        rate=None if gpu is None else gpu.rate(config.student, shape, passes),
    )


def check_space(config: TrainConfig, plan: TrainPlan) -> None:
    """Refuse a run whose checkpoints do not fit; those that are there already count as fitting.

    Raises:
        SpaceError: says how much is missing, and the most checkpoints that would fit.
    """
    n_there = len(checkpoint_steps(config.out / CHECKPOINTS))
    missing = plan.bytes_to_write - n_there * plan.checkpoint_bytes - plan.free.bytes
    if missing <= 0:
        return
    fitting = config.keep_checkpoints - -(-missing // plan.checkpoint_bytes)
    remedy = (
        f"keep_checkpoints: {fitting} in --config would fit"
        if fitting >= 1
        else "free space there, or choose an --out on another disk"
    )
    raise SpaceError(
        f"{config.out}: the run needs {human_bytes(plan.bytes_to_write)} (results, {config.keep_checkpoints} "
        f"checkpoints, one more while it is written), and {human_bytes(plan.free.bytes)} are free; {remedy}"
    )


def student_parameters(name: str, pack: TargetSource) -> int:
    """Parameters of a student on the grid of a pack, from its widths alone."""
    size = student_size(name)
    width, patch_px = size.width, pack.teacher.patch_px
    embedding = width * (3 * patch_px**2 + 1) + width * (n_patches(pack) + 2)
    block = 12 * width**2 + 15 * width  # attention 4 W^2, MLP 8 W^2; biases 9 W, norms 4 W, LayerScale 2 W
    return embedding + size.depth * block + 2 * width


def added_parameters(config: TrainConfig, pack: TargetSource) -> int:
    """Parameters of heads, those of block targets too, and mask token."""
    width = student_size(config.student).width
    head = 2 * width + (width + 1) * pack.teacher.width
    n_heads = len(config.heads) + len(student_blocks(pack, config))
    return n_heads * head + width * (config.weight_patch > 0)
