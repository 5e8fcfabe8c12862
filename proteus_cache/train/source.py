"""What training takes from a pack, checked against what the run asks for before anything starts."""

from __future__ import annotations

from proteus_cache.errors import UsageError
from proteus_cache.pack.reader import Pack
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.masking import n_masked_patches
from proteus_cache.train.targets import CodedTarget, TargetDecoder


def check_targets(pack: Pack, config: TrainConfig) -> None:
    """Refuse a pack that lacks what the losses need.

    Raises:
        UsageError: targets are missing, the patch targets are not on the student's grid, or no patch of a view
            would be masked.
    """
    shapes = {target.name: target.shape for target in pack.targets}
    missing = [name for name in config.targets if name not in shapes]
    if missing:
        losses = [name for name, weight in _weights(config).items() if weight > 0]
        raise UsageError(
            f"{pack.path}: the {', '.join(losses)} losses need the targets {', '.join(config.targets)}, and "
            f"the pack holds only {', '.join(shapes)}; pack the cache with "
            f"--targets {','.join(config.targets)}, or set the weight of the losses that need them to 0"
        )
    side = pack.side_px // pack.teacher.patch_px
    if "patch" in config.targets and shapes["patch"][0] != side * side:
        raise UsageError(
            f"{pack.path}: holds {shapes['patch'][0]} patch targets a view, and a student with the "
            f"teacher's patches has {side} x {side}; this pack cannot train one"
        )
    if config.weight_patch > 0 and n_masked_patches(config.mask_ratio, n_patches(pack)) == 0:
        raise UsageError(
            f"{pack.path}: mask_ratio {config.mask_ratio:g} hides no patch of a view of {side} x {side}, so there is "
            "no patch loss; set a larger mask_ratio, or weight_patch: 0"
        )


def n_patches(pack: Pack) -> int:
    """Patches of a view."""
    return (pack.side_px // pack.teacher.patch_px) ** 2


def target_decoder(pack: Pack, config: TrainConfig) -> TargetDecoder:
    """Decodes the targets that the losses need."""
    offsets = {target.name: target.offset for target in pack.targets}
    return TargetDecoder(tuple(CodedTarget(name, offsets[name], pack.codecs[name]) for name in config.targets))


def mean_sample_bytes(pack: Pack) -> int:
    """Bytes of a sample in its tar, codes and view and headers, on average."""
    tars = [tar for view in pack.views for tar in pack.document.packed[view].tars]
    return round(sum(tar.size for tar in tars) / max(1, sum(tar.n_samples for tar in tars)))


def _weights(config: TrainConfig) -> dict[str, float]:
    return {"token": config.weight_token, "feature": config.weight_feature, "patch": config.weight_patch}
