"""What a ViT costs, by formula.

FLOPs. Every matrix of a block is applied once to each of the T tokens, and attention multiplies each pair of
tokens twice (scores, values); the patch embedding is one more matrix. One multiply-add counts as 2 FLOPs:

    FLOPs(forward) = 2 (depth (T W + 2 T^2 D) + N D 3 p^2)

with D the width, W the entries of a block's matrices (12 D^2 in a plain block: 4 for attention, 8 for the
MLP; 4 D^2 + 3 D H with a SwiGLU MLP of hidden width H), N patches of p pixels and T = N + CLS + registers. Biases,
norms, softmax and the heads (1 to 4 %) are left out. At 224 px and patch 14: DINOv2-g/14 598.8 GFLOP,
ViT-L/14 162, ViT-B/14 46.3, ViT-S/14 12.2, ViT-Ti/14 3.40.

A training step. Backward costs two forwards. Proteus forwards the student twice, once with masked patches; here the
masked pass runs on the masked half of the images only, which gives the same losses. So a view costs
(1 + 2) x 1.5 = 4.5 forwards of the student, and with a live teacher one forward of the teacher more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from proteus_cache.students.registry import student_size

if TYPE_CHECKING:
    from proteus_cache.teachers.outline import TeacherOutline

FORWARD = 1.0
"""A teacher's view, in forwards of the model."""
STEP = 4.5
"""A trained view, in forwards of the student."""
STEP_WITHOUT_MASKS = 3.0
"""The same where the patch loss has weight 0, so that no patch is masked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VitShape:
    """What decides the FLOPs of a ViT."""

    width: int
    depth: int
    n_patches: int
    patch_px: int
    n_prefix_tokens: int = 1
    """CLS and registers."""
    block_weights: int
    """Entries of the matrices of one block: multiply-adds of one token."""

    @property
    def forward_macs(self) -> int:
        """Multiply-adds of one view."""
        tokens = self.n_patches + self.n_prefix_tokens
        block = tokens * self.block_weights + 2 * tokens**2 * self.width
        return self.depth * block + self.n_patches * self.width * 3 * self.patch_px**2

    @property
    def forward_flops(self) -> int:
        """FLOPs of one view."""
        return 2 * self.forward_macs


def plain_vit(width: int, depth: int, *, size_px: int, patch_px: int) -> VitShape:
    """A ViT with CLS token, no registers, and an MLP four times as wide as its tokens."""
    n_patches = (size_px // patch_px) ** 2
    return VitShape(width=width, depth=depth, n_patches=n_patches, patch_px=patch_px, block_weights=12 * width**2)


def student_shape(name: str, *, size_px: int, patch_px: int) -> VitShape:
    """The shape of one of our students, which has the teacher's patch grid.

    Raises:
        UsageError: no student has that name.
    """
    size = student_size(name)
    return plain_vit(size.width, size.depth, size_px=size_px, patch_px=patch_px)


def teacher_shape(outline: TeacherOutline) -> VitShape:
    """The shape of a teacher; its matrices were counted, whatever its kind of block."""
    return VitShape(
        width=outline.width,
        depth=outline.depth,
        n_patches=outline.n_patches,
        patch_px=outline.patch_px,
        n_prefix_tokens=outline.n_prefix_tokens,
        block_weights=outline.block_weights,
    )
