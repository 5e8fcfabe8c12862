"""What to say when the GPU has too little memory for a batch of the teacher."""

from __future__ import annotations

from proteus_cache.devices import Advise


def smaller_batch(batch: int) -> Advise:
    """Names the `--batch-size` that fits instead of `batch`."""

    def advise(fits: int | None, memory: str) -> str:
        if fits is None:
            return (
                f"the GPU has too little memory for a single view ({memory}); end what else uses it (nvidia-smi names "
                "it), or take another GPU or a smaller teacher; finished units are kept"
            )
        return (
            f"the GPU has too little memory for {batch} views at once ({memory}); --batch-size {fits} fits: run the "
            "same command again with it, finished units are kept"
        )

    return advise
