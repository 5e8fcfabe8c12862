"""What a command is about to do, in numbers: bytes, files, hours, and whether it fits.

    human.py        bytes, times and rates as people read them
    costs.py        FLOPs of a ViT, by formula
    rates.py        what a GPU does in a second, with the source of each number
    extraction.py   how large a cache is, and the plan that `extract` opens with
    training.py     what a training run reads, and the plan that `train` opens with

    config.py       what `proteus-cache plan` is asked for
    measure*.py     rates of this machine, measured with the code that does the work later
    whole.py        one teacher, its cache and several students
    report.py       the same for people and machines

The first five are arithmetic and know neither extraction nor training, which open with them; the others
join everything and are used by the command line alone.
"""

from proteus_cache.plan.human import human_bytes, human_rate, human_time

__all__ = ["human_bytes", "human_rate", "human_time"]
