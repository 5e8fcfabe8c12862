"""What training takes from a pack, checked against what the run asks for before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from proteus_cache.cache.manifest import TeacherRecord
from proteus_cache.errors import UsageError
from proteus_cache.pack.reader import Pack
from proteus_cache.students.registry import student_size
from proteus_cache.train.blocks import chosen_blocks, student_block
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.masking import n_masked_patches
from proteus_cache.train.targets import CodedTarget, TargetDecoder


class TargetSource(Protocol):
    """What is asked of a pack, or of a live teacher, before a run starts."""

    @property
    def path(self) -> Path:
        """Where it lies, for messages."""

    @property
    def teacher(self) -> TeacherRecord:
        """Who says the targets."""

    @property
    def side_px(self) -> int:
        """Of a view."""

    @property
    def target_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Targets that there are, with the shape of each for one view."""


def check_targets(source: TargetSource, config: TrainConfig) -> None:
    """Refuse a pack that lacks what the losses need.

    Raises:
        UsageError: targets are missing, the patch or block targets are not on the student's grid, or no patch of a
            view would be masked.
    """
    shapes = source.target_shapes
    _check_blocks(source, config)
    missing = [name for name in config.targets if name not in shapes]
    if missing:
        losses = [name for name, weight in _weights(config).items() if weight > 0]
        raise UsageError(
            f"{source.path}: the {', '.join(losses)} losses need the targets {', '.join(config.targets)}, and "
            f"the pack holds only {', '.join(shapes)}; pack the cache with "
            f"--targets {','.join(config.targets)}, or set the weight of the losses that need them to 0"
        )
    side = source.side_px // source.teacher.patch_px
    if "patch" in config.targets and shapes["patch"][0] != side * side:
        raise UsageError(
            f"{source.path}: holds {shapes['patch'][0]} patch targets a view, and a student with the "
            f"teacher's patches has {side} x {side}; this pack cannot train one"
        )
    if config.weight_patch > 0 and n_masked_patches(config.mask_ratio, n_patches(source)) == 0:
        raise UsageError(
            f"{source.path}: mask_ratio {config.mask_ratio:g} hides no patch of a view of {side} x {side}, so there is "
            "no patch loss; set a larger mask_ratio, or weight_patch: 0"
        )


def _check_blocks(source: TargetSource, config: TrainConfig) -> None:
    held = list(source.target_shapes)
    missing = [name for name in config.block_targets or () if name not in held]
    if missing or (config.weight_block > 0 and not _blocks(source, config)):
        what = f"the target {missing[0]}" if missing else "block targets"
        last = source.teacher.depth - 1
        raise UsageError(
            f"{source.path}: the block loss needs {what}, and the pack holds only {', '.join(held)}; extract with "
            f"--targets cls,patch,{missing[0] if missing else f'block.{last // 2}'} (the teacher has block.0 to "
            f"block.{last}), or leave weight_block at 0"
        )
    for name in _blocks(source, config):
        n_tokens = source.target_shapes[name][0]
        if n_tokens != 1 + n_patches(source):
            raise UsageError(
                f"{source.path}: {name} holds {n_tokens} tokens a view, and a student with the teacher's "
                f"patches has {1 + n_patches(source)}; this pack cannot train one on it"
            )


def _blocks(source: TargetSource, config: TrainConfig) -> tuple[str, ...]:
    return chosen_blocks(config.block_targets, source.target_shapes)


def needed_targets(source: TargetSource, config: TrainConfig) -> tuple[str, ...]:
    """Targets that the losses need of this pack."""
    return (*config.targets, *_blocks(source, config))


def student_blocks(source: TargetSource, config: TrainConfig) -> dict[str, int]:
    """Block targets of the block loss, and the student's 0-based block at the relative depth of each."""
    depth = student_size(config.student).depth
    return {
        name: student_block(name, teacher_depth=source.teacher.depth, student_depth=depth)
        for name in _blocks(source, config)
    }


def n_patches(source: TargetSource) -> int:
    """Patches of a view."""
    return (source.side_px // source.teacher.patch_px) ** 2


def target_decoder(pack: Pack, config: TrainConfig) -> TargetDecoder:
    """Decodes the targets that the losses need."""
    offsets = {target.name: target.offset for target in pack.targets}
    names = needed_targets(pack, config)
    return TargetDecoder(tuple(CodedTarget(name, offsets[name], pack.codecs[name]) for name in names))


def mean_sample_bytes(pack: Pack) -> int:
    """Bytes of a sample in its tar, codes and view and headers, on average."""
    tars = [tar for view in pack.views for tar in pack.document.packed[view].tars]
    return round(sum(tar.size for tar in tars) / max(1, sum(tar.n_samples for tar in tars)))


def _weights(config: TrainConfig) -> dict[str, float]:
    return {"token": config.weight_token, "feature": config.weight_feature, "patch": config.weight_patch}
