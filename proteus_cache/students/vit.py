"""Forward passes of a timm VisionTransformer that Proteus needs: all normed tokens, clean and masked.

A masked patch is replaced by the mask token after patch embedding and before the position embedding (as iBOT
and DINOv2 do), so the sequence keeps its length. timm's class has no such pass.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


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


def encode_patches(student: VisionTransformer, patches_BND: Tensor) -> Tensor:
    """Positions, blocks and final norm on patch embeddings: (B, N, D) -> (B, 1 + N, D), CLS first."""
    tokens = student._pos_embed(patches_BND)
    tokens = student.norm_pre(student.patch_drop(tokens))
    normed: Tensor = student.norm(student.blocks(tokens))
    return normed


def clean_and_masked_tokens(
    student: VisionTransformer,
    pixels: Tensor,
    masked_rows: slice | Tensor,
    masked_MK: Tensor,
    mask_token: Tensor,
) -> tuple[Tensor, Tensor]:
    """Normed tokens of every image, and of some images once more with patches masked, in one pass over the
    blocks.

    The released code masks half of the images and forwards all of them twice; the clean repeats in its second
    pass reach no loss, so this forwards the masked images only: the same numbers for 1.5 instead of 2
    forwards.

    Args:
        student: no dropout and no drop path, else the two halves would draw noise of their own.
        pixels: (B, 3, H, W) float, normalised.
        masked_rows: which M of the B images are masked.
        masked_MK: (M, K) int64 patch positions.
        mask_token: (1, D).

    Returns:
        (B, 1 + N, D) clean tokens and (M, 1 + N, D) masked tokens.
    """
    clean = embed_patches(student, pixels)
    masked = mask_patches(clean[masked_rows], masked_MK, mask_token)
    tokens = encode_patches(student, torch.cat((clean, masked)))
    n_clean = len(clean)
    return tokens[:n_clean], tokens[n_clean:]
