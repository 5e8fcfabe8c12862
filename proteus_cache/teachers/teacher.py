"""The teacher: a frozen timm ViT, its identity, and a function from views to named targets.

Target names: `cls` (CLS token after the final norm), `patch` (patch tokens after it), `block.N` (CLS and
patch tokens after 0-based block N, final norm applied) and `block.N.raw` (the same without the norm).
Register tokens are never part of a target. All names asked for come from one forward.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias, cast

import torch
from torch import Tensor

from proteus_cache.errors import UsageError
from proteus_cache.pixels import channel_values, normalise
from proteus_cache.teachers.backbone import TokenModel
from proteus_cache.teachers.identity import TeacherIdentity

Precision: TypeAlias = Literal["fp32", "fp16", "bf16"]

_AUTOCAST_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}
_BLOCK = re.compile(r"block\.(0|[1-9][0-9]{0,3})(\.raw)?")


@dataclass(frozen=True, slots=True)
class BlockTokens:
    """Output of one block, no norm applied."""

    prefix: Tensor
    """(B, 1 + R, D): CLS, then register tokens."""
    patch: Tensor
    """(B, P, D)."""


class Teacher:
    """A frozen ViT that says something of each view.

    Starts on the CPU in fp32; `to` moves it. The weights stay float32 in every precision (autocast lowers the
    matrix products only), so `to(device, "fp32")` always gives exact outputs again.
    """

    def __init__(self, model: TokenModel, identity: TeacherIdentity) -> None:
        """Take over `model`, weights loaded; it is frozen and put in eval mode."""
        self.identity = identity
        self._model = model.eval().requires_grad_(False)
        self._patch_grid: tuple[int, int] = model.patch_embed.grid_size
        self.to("cpu", "fp32")

    @property
    def n_patches(self) -> int:
        """Patch tokens of one view, P."""
        return self._patch_grid[0] * self._patch_grid[1]

    @property
    def device(self) -> torch.device:
        """Where the forward runs and targets are."""
        return self._device

    @property
    def precision(self) -> Precision:
        """Precision of the matrix products; targets are float32 in each."""
        return self._precision

    def to(self, device: torch.device | str, precision: Precision) -> Self:
        """Move the weights to `device` and set the precision of the next forwards; returns self."""
        if precision not in ("fp32", "fp16", "bf16"):
            raise UsageError(f"unknown precision {precision!r}; choose fp32, fp16 or bf16")
        self._device = torch.device(device)
        self._precision: Precision = precision
        self._model.to(self._device)
        self._mean = channel_values(self.identity.mean, self._device)
        self._std = channel_values(self.identity.std, self._device)
        return self

    def target_shape(self, name: str) -> tuple[int, ...]:
        """Shape of target `name` for one view: (D,), (P, D) or (1 + P, D).

        Raises:
            UsageError: this teacher has no such target.
        """
        identity = self.identity
        return target_shape(
            name, teacher=identity.name, n_patches=self.n_patches, width=identity.width, depth=identity.depth
        )

    def targets(self, views: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """What the teacher says of a batch of views, from one forward.

        Args:
            views: (B, H, W, 3) on any device; pinned memory is copied asynchronously. uint8 is normalised there,
                floating point taken as normalised.
            names: targets, each once or more.

        Returns:
            Name -> (B, *target_shape(name)) float32 on the teacher's device, contiguous, free of autograd.

        Raises:
            UsageError: a name this teacher does not have, or views of another size or type.
        """
        blocks = {name: self._block_of(name) for name in names}
        if not blocks:
            return {}
        tokens = self.tokens(self._normalise(views), sorted(set(blocks.values())))
        return {name: self._target(name, tokens[block]) for name, block in blocks.items()}

    def tokens(self, pixels: Tensor, blocks: Sequence[int]) -> dict[int, BlockTokens]:
        """Outputs of chosen blocks for pixels that are already normalised.

        Args:
            pixels: (B, 3, H, W) float on the teacher's device.
            blocks: 0-based block numbers, ascending; blocks after the last of them do not run.

        Returns:
            Block number -> its tokens, before the final norm, in the dtype of the residual stream.
        """
        with torch.inference_mode(), self._arithmetic():
            outputs = self._model.forward_intermediates(
                pixels,
                indices=list(blocks),
                return_prefix_tokens=True,
                norm=False,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
        pairs = cast(list[tuple[Tensor, Tensor]], outputs)
        return {block: BlockTokens(prefix, patch) for block, (patch, prefix) in zip(blocks, pairs, strict=True)}

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The model's final norm of (..., D) tokens, computed in float32 whatever the precision."""
        with torch.inference_mode():
            return cast(Tensor, self._model.norm(tokens.float()))

    def _target(self, name: str, tokens: BlockTokens) -> Tensor:
        cls, patch = tokens.prefix[:, :1], tokens.patch
        if name == "cls":
            chosen = self.final_norm(cls).squeeze(1)
        elif name == "patch":
            chosen = self.final_norm(patch)
        else:
            chosen = torch.cat([cls, patch], dim=1).float()
            chosen = chosen if name.endswith(".raw") else self.final_norm(chosen)
        # Tensors made in inference mode may not take part in a loss; a copy made outside it may.
        return chosen.clone(memory_format=torch.contiguous_format)

    def _block_of(self, name: str) -> int:
        return _block_of(name, self.identity.name, self.identity.depth)

    def _normalise(self, views: Tensor) -> Tensor:
        """(B, H, W, 3) -> (B, 3, H, W) float32 on the device, contiguous."""
        patch_px = self.identity.patch_px
        height, width = (count * patch_px for count in self._patch_grid)
        is_known = views.dtype == torch.uint8 or views.is_floating_point()
        if not is_known or views.ndim != 4 or views.shape[1:] != (height, width, 3):
            raise UsageError(
                f"{self.identity.name} takes views (B, {height}, {width}, 3) uint8, or normalised floating point, "
                f"got {tuple(views.shape)} {str(views.dtype).removeprefix('torch.')}"
            )
        return normalise(views.to(self._device, non_blocking=True), self._mean, self._std).contiguous()

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        if self._precision == "fp32":
            with torch.autocast(self._device.type, enabled=False), _without_tf32():
                yield
        else:
            with torch.autocast(self._device.type, _AUTOCAST_DTYPE[self._precision]):
                yield


def target_shape(name: str, *, teacher: str, n_patches: int, width: int, depth: int) -> tuple[int, ...]:
    """Shape of target `name` of a teacher of these widths for one view: (D,), (P, D) or (1 + P, D).

    Raises:
        UsageError: it has no such target.
    """
    _block_of(name, teacher, depth)
    if name == "cls":
        return (width,)
    return (n_patches, width) if name == "patch" else (1 + n_patches, width)


def _block_of(name: str, teacher: str, depth: int) -> int:
    """The 0-based block that a target comes from."""
    last = depth - 1
    if name in ("cls", "patch"):
        return last
    match = _BLOCK.fullmatch(name)
    if match is None or int(match[1]) > last:
        raise UsageError(
            f"{teacher} has no target {name!r}; it has cls, patch and block.0 to block.{last} "
            f"(block.N.raw without the final norm)"
        )
    return int(match[1])


@contextmanager
def _without_tf32() -> Iterator[None]:
    """fp32 means IEEE float32; cuDNN uses TF32 unless told not to, and a program may allow it elsewhere."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
