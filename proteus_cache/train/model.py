"""What one step computes: student, mask token and heads on a batch, to the losses.

One module with one forward pass, so that data-parallel training sees every parameter once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from proteus_cache.codecs.codec import Basis
from proteus_cache.losses import Components, Tokens, block_loss, feature_loss, patch_loss, token_loss
from proteus_cache.pixels import channel_values, normalise
from proteus_cache.students.heads import Heads, block_head, build_heads, keep_components, predict_components
from proteus_cache.students.start import load_start
from proteus_cache.students.vit import StudentTokens, clean_and_masked_tokens, clean_tokens
from proteus_cache.train.blocks import is_raw
from proteus_cache.train.config import TrainConfig
from proteus_cache.train.drop_path import drop_rates
from proteus_cache.train.targets import Target

_NO_BLOCKS: Mapping[str, int] = {}
_NO_BASES: Mapping[str, Basis] = {}


class Distillation(nn.Module):
    """A student with what training adds to it; the losses come out of `forward`.

    Args:
        student: in float32, without dropout or drop path of its own.
        heads: those that the weights need.
        mask_token: (1, D), or None when no image is masked.
        weights: of the token, feature, patch and block loss.
        mean: of the pixels in 0..1, per channel.
        std: likewise.
        feature_cls_head: head of the CLS token in the feature loss.
        blocks: block targets of the block loss, and the student's block that faces each.
        drop_path: rate of the last block where `forward` is told which branches to keep.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    branch_scale: Tensor

    def __init__(
        self,
        student: VisionTransformer,
        heads: Heads,
        mask_token: nn.Parameter | None,
        *,
        weights: tuple[float, float, float, float],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        feature_cls_head: Literal["token", "feature"] = "token",
        blocks: Mapping[str, int] = _NO_BLOCKS,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.student = student
        self.heads = heads
        self.mask_token = mask_token
        self.weights = weights
        self._feature_cls_head = feature_cls_head
        self._blocks = dict(blocks)
        self._tapped = frozenset(blocks.values())
        self.register_buffer("pixel_mean", channel_values(mean), persistent=False)
        self.register_buffer("pixel_std", channel_values(std), persistent=False)
        rates = torch.from_numpy(drop_rates(drop_path, len(student.blocks))).float()
        self.register_buffer("branch_scale", (1 / (1 - rates)).reshape(-1, 1), persistent=False)

    def forward(
        self,
        views: Tensor,
        targets: Mapping[str, Target],
        masked_MK: Tensor,
        first_odd: int,
        counts: tuple[float, float],
        kept: Tensor | None = None,
    ) -> Tensor:
        """The losses of a part of a batch.

        Args:
            views: (b, H, W, 3) uint8, or of floating point and normalised already.
            targets: `cls` (b, D), `patch` (b, N, D) and `block.N` (b, 1 + N, D) float32, those that the losses need;
                all but `cls` may be components.
            masked_MK: (M, K) int64 masked patches of every second view.
            first_odd: 0 or 1, the first masked view.
            counts: views and masked views that the means run over.
            kept: (b, 2, depth, 2) of 0 and 1, as `draw_kept` gives; None: no drop path.

        Returns:
            (5,) float32: weighted sum, token, feature, patch and block loss; NaN stands for a loss of weight 0.
        """
        pixels = normalise(views, self.pixel_mean, self.pixel_std)
        masked_rows = slice(first_odd, None, 2)
        tokens = self._tokens(pixels, masked_MK, masked_rows, kept)
        parts = self._losses(tokens, targets, masked_MK, masked_rows, counts)
        weighted = [weight * part for weight, part in zip(self.weights, parts, strict=True) if part is not None]
        off = torch.full_like(pixels[0, 0, 0, 0], torch.nan)
        return torch.stack([torch.stack(weighted).sum(), *(off if part is None else part for part in parts)])

    def _tokens(self, pixels: Tensor, masked_MK: Tensor, masked_rows: slice, kept: Tensor | None) -> StudentTokens:
        scales = None if kept is None else kept.to(self.branch_scale.dtype) * self.branch_scale
        if self.mask_token is None:
            return clean_tokens(self.student, pixels, tapped=self._tapped, branch_scales=scales)
        return clean_and_masked_tokens(
            self.student,
            pixels,
            masked_rows,
            masked_MK,
            self.mask_token,
            tapped=self._tapped,
            branch_scales=scales,
        )

    def _losses(
        self,
        tokens: StudentTokens,
        targets: Mapping[str, Target],
        masked_MK: Tensor,
        masked_rows: slice,
        counts: tuple[float, float],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        n_images, n_masked = counts
        clean = tokens.clean
        token = feature = patch = block = None
        if self.mask_token is not None:
            shown = _at(targets["patch"], masked_rows, masked_MK)
            predicted = self._prediction("patch", _take(tokens.masked[:, 1:], masked_MK), shown)
            patch = patch_loss(predicted, _known(shown), n_images=n_masked)
        if "token" in self.heads:
            cls = self.heads["token"](clean[:, 0])
            token = token_loss(cls, _whole(targets["cls"]), n_images=n_images) if self.weights[0] > 0 else None
        if "feature" in self.heads:
            if self._feature_cls_head == "feature":
                cls = self.heads["feature"](clean[:, 0])
            patches = self._prediction("feature", clean[:, 1:], targets["patch"])
            feature = feature_loss(cls, patches, _whole(targets["cls"]), _known(targets["patch"]), n_images=n_images)
        if self._blocks:
            outputs = [
                self._prediction(block_head(name), self._at_block(name, tokens.blocks[number]), targets[name])
                for name, number in self._blocks.items()
            ]
            block = block_loss(outputs, [_known(targets[name]) for name in self._blocks], n_images=n_images)
        return token, feature, patch, block

    def _prediction(self, head: str, tokens_BTd: Tensor, target: Target) -> Tokens:
        """What a head says of tokens, in the kind of the target."""
        module = self.heads[head]
        if isinstance(target, Tensor):
            predicted: Tensor = module(tokens_BTd)
            return predicted
        lead = target.tokens.lead_BLD
        n_lead = lead.shape[1]
        return Components(
            module(tokens_BTd[:, :n_lead]) if n_lead else lead,
            predict_components(module, tokens_BTd[:, n_lead:], target.mean_D, target.vectors_DK),
        )

    def _at_block(self, target: str, tokens_BTd: Tensor) -> Tensor:
        """The student's tokens that face a block target: with or without the final norm, as the teacher's are."""
        return tokens_BTd if is_raw(target) else self.student.norm(tokens_BTd)

    def head_tensors(self, bases: Mapping[str, Basis] = _NO_BASES) -> dict[str, Tensor]:
        """What training adds to the student: `mask_token` and `token.0.weight`, ...

        Args:
            bases: of targets that the losses saw components of. Heads that said nothing but such patches then say the
                teacher's mean along all other directions, where no loss ever looked.
        """
        tensors = dict(self.heads.state_dict())
        for name in self._heads_of_patches() if "patch" in bases else ():
            state = keep_components(self.heads[name].state_dict(), bases["patch"].mean, bases["patch"].vectors)
            tensors |= {f"{name}.{key}": tensor for key, tensor in state.items()}
        if self.mask_token is not None:
            tensors["mask_token"] = self.mask_token.detach()
        return tensors

    def _heads_of_patches(self) -> list[str]:
        """Heads that no CLS token passes through."""
        names = ["patch"] if self._feature_cls_head == "feature" else ["feature", "patch"]
        return [name for name in names if name in self.heads]


def build_distillation(
    config: TrainConfig,
    student: VisionTransformer,
    *,
    teacher_width: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    blocks: Mapping[str, int] = _NO_BLOCKS,
) -> Distillation:
    """The module that a run trains, on the CPU, initialised from the run's seed and start weights.

    Args:
        config: of the run.
        student: freshly built; it takes the weights of `config.init`.
        teacher_width: D of the targets.
        mean: of the pixels.
        std: of the pixels.
        blocks: as `source.student_blocks` gives.

    Raises:
        WeightsError: `config.init` is not of this student.
    """
    width = student.embed_dim
    heads = build_heads(
        (*config.heads, *map(block_head, blocks)),
        student_width=width,
        teacher_width=teacher_width,
        seed=config.seed,
        norm_eps=config.head_norm_eps,
    )
    start = None if config.init is None else load_start(config.init, student, config.student)
    mask_token = None
    if config.weight_patch > 0:
        mask_token = nn.Parameter(torch.zeros(1, width) if start is None else start)
    return Distillation(
        student,
        heads,
        mask_token,
        weights=config.loss_weights,
        mean=mean,
        std=std,
        feature_cls_head=config.feature_cls_head,
        blocks=blocks,
        drop_path=config.drop_path,
    )


def _known(target: Target) -> Tokens:
    """What the losses compare with."""
    return target if isinstance(target, Tensor) else target.tokens


def _whole(target: Target) -> Tensor:
    """`cls`, which every codec gives back whole."""
    assert isinstance(target, Tensor)
    return target


def _at(target: Target, rows: slice, index_MK: Tensor) -> Target:
    """A patch target at the given rows and positions."""
    if isinstance(target, Tensor):
        return _take(target[rows], index_MK)
    lead, rest = target.tokens
    assert lead.shape[1] == 0, "positions are those of patches"
    return target._replace(tokens=Components(lead[rows], _take(rest[rows], index_MK)))


def _take(tokens_MND: Tensor, index_MK: Tensor) -> Tensor:
    """The tokens at the given positions: (M, K, D)."""
    return tokens_MND.gather(1, index_MK.unsqueeze(-1).expand(-1, -1, tokens_MND.shape[-1]))
