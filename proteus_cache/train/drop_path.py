"""Which residual branches a step leaves out (stochastic depth), for runs with `drop_path` above 0.

The published student has none. Draws are keyed by (seed, step, position in the global batch), as masks are: neither
ranks nor parts of a batch nor a resumed run change them, and there is no random state to keep.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

N_PASSES, N_BRANCHES = 2, 2
"""Clean and masked pass; attention and MLP."""
_WORDS_PER_BLOCK = 4


def drop_rates(drop_path: float, depth: int) -> npt.NDArray[np.float64]:
    """Rate of every block: from 0 in the first, in equal steps, to `drop_path` in the last.

    Source: timm VisionTransformer and DINOv2's DinoVisionTransformer, both `linspace(0, drop_path, depth)`.
    """
    return np.linspace(0.0, drop_path, depth)


def draw_kept(
    seed: int, step: int, positions: npt.NDArray[np.int64], *, drop_path: float, depth: int
) -> npt.NDArray[np.uint8]:
    """Which branches stay.

    A Philox stream keyed by BLAKE2b(seed, step) gives image p the words from p * 4 * `depth` on. The two passes draw
    for themselves, as two forwards of the released code would.

    Args:
        seed: of the run.
        step: 0-based index of the step.
        positions: (b,) consecutive positions within the global batch.
        drop_path: rate of the last block, below 1.
        depth: blocks of the student.

    Returns:
        (b, 2, depth, 2) of 0 and 1: image, pass, block, branch.
    """
    n_words = N_PASSES * depth * N_BRANCHES  # whole blocks of Philox
    key = hashlib.blake2b(f"drop path {seed} {step}".encode(), digest_size=16).digest()
    stream = np.random.Philox(key=np.frombuffer(key, "<u8").astype(np.uint64))
    stream.advance(int(positions[0]) * n_words // _WORDS_PER_BLOCK)
    words = stream.random_raw(len(positions) * n_words).reshape(len(positions), N_PASSES, depth, N_BRANCHES)
    uniform = (words >> np.uint64(11)) * 2.0**-53
    kept: npt.NDArray[np.uint8] = (uniform >= drop_rates(drop_path, depth)[:, None]).astype(np.uint8)
    return kept
