"""Forward passes of a timm VisionTransformer that Proteus needs: all normed tokens, clean and masked.

A masked patch is replaced by the mask token after patch embedding and before the position embedding (as iBOT
and DINOv2 do), so the sequence keeps its length. timm's class has no such pass.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def embed_patches(student: VisionTransformer, pixels: Tensor) -> Tensor:
    """Patch embeddings before positions are added: (B, 3, H, W) float -> (B, N, D)."""
    embedded: Tensor = student.patch_embed(pixels)
    return embedded


def mask_patches(patches_BND: Tensor, masked_BK: Tensor, mask_token: Tensor) -> Tensor:
    """Put the mask token at the given positions.

    Args:
        patches_BND: (B, N, D) patch embeddings.
        masked_BK: (B, K) int64, distinct patch positions of each image.
        mask_token: (1, D).

    Returns:
        (B, N, D) of the patches' dtype; `patches_BND` is not changed.
    """
    width = patches_BND.shape[-1]
    index = masked_BK.unsqueeze(-1).expand(-1, -1, width)
    filling = mask_token.to(patches_BND.dtype).unsqueeze(0).expand(index.shape)
    return patches_BND.scatter(1, index, filling)


def encode_patches(
    student: VisionTransformer,
    patches_BND: Tensor,
    *,
    tapped: Collection[int] = (),
    branch_scales: Tensor | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Positions, blocks and final norm on patch embeddings.

    Args:
        student: no dropout and no drop path of its own.
        patches_BND: (B, N, D) patch embeddings.
        tapped: blocks whose outputs are wanted.
        branch_scales: (B, depth, 2) factors of each block's attention and MLP branch; None: all 1.

    Returns:
        (B, 1 + N, D) normed tokens, CLS first, and the same of the tapped blocks before the final norm.
    """
    tokens = student._pos_embed(patches_BND)
    tokens = student.norm_pre(student.patch_drop(tokens))
    outputs = {}
    if not tapped and branch_scales is None:
        tokens = student.blocks(tokens)
    else:
        for number, block in enumerate(student.blocks):
            tokens = block(tokens) if branch_scales is None else _scaled(block, tokens, branch_scales[:, number])
            if number in tapped:
                outputs[number] = tokens
    normed: Tensor = student.norm(tokens)
    return normed, outputs


def _scaled(block: nn.Module, tokens: Tensor, scales_B2: Tensor) -> Tensor:
    """timm's `Block.forward` with `scales_B2` where its two DropPath stand."""
    attention, mlp = scales_B2.unsqueeze(-1).unsqueeze(-1).unbind(1)
    tokens = tokens + attention * block.ls1(block.attn(block.norm1(tokens)))  # type: ignore[operator]  # timm's Block
    result: Tensor = tokens + mlp * block.ls2(block.mlp(block.norm2(tokens)))  # type: ignore[operator]  # likewise
    return result


@dataclass(frozen=True, slots=True)
class StudentTokens:
    """What a step needs of the student."""

    clean: Tensor
    """(B, 1 + N, D) after the final norm, CLS first."""
    masked: Tensor
    """(M, 1 + N, D) of the masked pass, after the final norm."""
    blocks: dict[int, Tensor]
    """Block -> (B, 1 + N, D) of the clean pass, before the final norm."""


def clean_and_masked_tokens(
    student: VisionTransformer,
    pixels: Tensor,
    masked_rows: slice | Tensor,
    masked_MK: Tensor,
    mask_token: Tensor,
    *,
    tapped: Collection[int] = (),
    branch_scales: Tensor | None = None,
) -> StudentTokens:
    """Tokens of every image, and of some images once more with patches masked, in one pass over the blocks.

    The released code masks half of the images and forwards all of them twice; the clean repeats in its second
    pass reach no loss, so this forwards the masked images only: the same numbers for 1.5 instead of 2
    forwards. That holds with drop path too: what an image loses does not depend on the others.

    Args:
        student: no dropout and no drop path of its own.
        pixels: (B, 3, H, W) float, normalised.
        masked_rows: which M of the B images are masked.
        masked_MK: (M, K) int64 patch positions.
        mask_token: (1, D).
        tapped: blocks whose clean outputs are wanted.
        branch_scales: (B, 2, depth, 2) factors of image, pass (clean, masked), block and branch; None: all 1.
    """
    clean = embed_patches(student, pixels)
    masked = mask_patches(clean[masked_rows], masked_MK, mask_token)
    scales = None
    if branch_scales is not None:
        scales = torch.cat((branch_scales[:, 0], branch_scales[masked_rows, 1]))
    tokens, outputs = encode_patches(student, torch.cat((clean, masked)), tapped=tapped, branch_scales=scales)
    n_clean = len(clean)
    blocks = {number: output[:n_clean] for number, output in outputs.items()}
    return StudentTokens(tokens[:n_clean], tokens[n_clean:], blocks)


def clean_tokens(
    student: VisionTransformer,
    pixels: Tensor,
    *,
    tapped: Collection[int] = (),
    branch_scales: Tensor | None = None,
) -> StudentTokens:
    """As `clean_and_masked_tokens`, with no image masked."""
    patches = embed_patches(student, pixels)
    scales = None if branch_scales is None else branch_scales[:, 0]
    tokens, blocks = encode_patches(student, patches, tapped=tapped, branch_scales=scales)
    return StudentTokens(tokens, tokens[:0], blocks)
