"""A whole run in one file: images, caches, packs, students, scores.

    document.py     the YAML, and everything that is wrong with one
    stages.py       what its sections come to: stages, each with the command that it stands for
    finished.py     whether a stage is done, by what is on disk
    numbers.py      what is known of a stage before anything runs: bytes, views, files, steps, hours
    run.py          the stages in their order, each in a process of its own

A stage is nothing but a command: what it makes, the command makes, and either goes on with what the other left.
"""
