"""The plan of a training run: steps, bytes to read and to write. Opens the pack, builds no model."""

from __future__ import annotations

from proteus_cache import storage
from proteus_cache.pack.reader import Pack, open_pack
from proteus_cache.plan import TrainPlan
from proteus_cache.students.registry import student_architecture
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.source import check_targets


def plan_training(config: TrainConfig, processes: int) -> TrainPlan:
    """What `train(config)` is about to do.

    Raises:
        UsageError: the pack lacks what the losses need, or holds less than one batch.
    """
    pack = open_pack(config.data)
    check_targets(pack, config)
    order = pack.training_order(seed=config.seed, batch_size=config.global_batch)
    trained = [view for view in pack.document.packed if view != "probe"]
    entries = [pack.document.packed[view] for view in trained]
    n_stored = sum(entry.n_samples for entry in entries)
    held_out = set(pack.document.held_out)
    counted = [tar.n_samples for number, tar in enumerate(entries[0].tars) if number not in held_out]
    n_all_steps = config.epochs * order.steps_per_epoch
    return TrainPlan(
        data=config.data,
        out=config.out,
        student=config.student,
        n_parameters=count_parameters(config, pack),
        teacher=pack.teacher.name,
        n_views=len(trained),
        n_trained=sum(counted),
        n_held_out=len(held_out),
        bytes_per_sample=sum(tar.size for entry in entries for tar in entry.tars) / max(1, n_stored),
        batch_size=config.global_batch,
        steps_per_epoch=order.steps_per_epoch,
        n_steps=min(n_all_steps, config.max_steps or n_all_steps),
        peak_lr=config.peak_lr,
        processes=processes,
        free_bytes=storage.free_space(config.out).bytes,
        keep_checkpoints=config.keep_checkpoints,
    )


def count_parameters(config: TrainConfig, pack: Pack) -> int:
    """Parameters of the student and its heads, counted without making them."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    architecture = student_architecture(config.student, size_px=pack.side_px, patch_px=pack.teacher.patch_px)
    with torch.device("meta"):
        student = VisionTransformer(**architecture)  # type: ignore[arg-type]  # one dict of checked arguments
    width = student.embed_dim
    head = 2 * width + (width + 1) * pack.teacher.width
    return sum(parameter.numel() for parameter in student.parameters()) + width + head * len(config.heads)
