"""What training gets from a pack, without the training."""

from __future__ import annotations

import hashlib
from pathlib import Path

from proteus_cache.pack.loader import open_loader
from proteus_cache.pack.reader import open_pack


def batches_of(path: Path, first: int = 0, n: int | None = None) -> list[str]:
    """Digests of batches of one view each, with decoded targets: read and checked as training reads and checks.

    Args:
        path: of a pack.
        first: batch; all batches together hold every stored view once.
        n: how many; None reads all that there are.

    Raises:
        DamageError, StorageError, UsageError: as training would.
    """
    pack = open_pack(path)
    order = pack.training_order(seed=1, batch_size=1)
    last = len(pack) if n is None else first + n
    digests = []
    with open_loader(pack, order, first_step=first, last_step=last, n_workers=0) as batches:
        for batch in batches:
            digest = hashlib.sha256(batch.views.numpy().tobytes() + batch.codes.numpy().tobytes())
            for name, tokens in pack.decode(batch.codes).items():
                digest.update(name.encode() + tokens.numpy().tobytes())
            digests.append(digest.hexdigest())
    return digests
