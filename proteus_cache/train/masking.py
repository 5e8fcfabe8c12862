"""Which patches of which images the student does not see.

The image at position p of the global batch is masked if p is odd; a masked image hides a fixed number of
uniformly random patches. Draws are keyed by (seed, step, p): neither ranks nor workers nor a resumed run
change them.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_WORDS_PER_BLOCK = 4


def n_masked_patches(mask_ratio: float, n_patches: int) -> int:
    """Patches hidden in each masked image."""
    return int(mask_ratio * n_patches)


def n_masked_images(n_images: int) -> int:
    """Odd positions among the first `n_images`."""
    return n_images // 2


def draw_masks(
    seed: int, step: int, positions: npt.NDArray[np.int64], *, n_patches: int, n_masked: int
) -> npt.NDArray[np.int64]:
    """Masked patch positions of every odd position.

    A Philox stream keyed by BLAKE2b(seed, step) gives image p the words from p * n_patches (rounded up to
    whole blocks of four) on; the `n_masked` patches with the smallest words are masked. Only Philox's raw
    words are used, which are the same for every NumPy.

    Args:
        seed: of the run.
        step: 0-based index of the step.
        positions: (b,) ascending positions within the global batch.
        n_patches: of a view.
        n_masked: at most `n_patches`.

    Returns:
        (M, n_masked) int64, ascending in each row; a row for each odd position, in order.
    """
    odd = positions[positions % 2 == 1]
    if not len(odd):
        return np.empty((0, n_masked), np.int64)
    blocks = -(-n_patches // _WORDS_PER_BLOCK)
    key = hashlib.blake2b(f"mask {seed} {step}".encode(), digest_size=16).digest()
    stream = np.random.Philox(key=np.frombuffer(key, "<u8").astype(np.uint64))
    first, last = int(odd[0]), int(odd[-1])
    stream.advance(first * blocks)
    words = stream.random_raw((last - first + 1) * blocks * _WORDS_PER_BLOCK)
    rows = words.reshape(last - first + 1, -1)[odd - first, :n_patches]
    hidden = np.argsort(rows, axis=1, kind="stable")[:, :n_masked]
    return np.sort(hidden, axis=1).astype(np.int64, copy=False)
