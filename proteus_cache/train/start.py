"""The start weights of a run, as its config names them. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from proteus_cache import storage
from proteus_cache.errors import UsageError
from proteus_cache.train.config import TrainConfig


def with_init_digest(config: TrainConfig) -> TrainConfig:
    """`config` with the SHA-256 of its `init` filled in; a config without `init` as it is.

    Raises:
        UsageError: there is no such file, or it is not the one that `init_sha256` names.
    """
    if config.init is None:
        return config
    if config.init.is_dir():
        raise UsageError(f"{config.init}: is a folder; --init takes a file of weights, such as student.safetensors")
    if not config.init.is_file():
        raise UsageError(f"{config.init}: no such file; --init names the student's start weights")
    _, sha256 = storage.sha256_of(config.init)
    if config.init_sha256 not in (None, sha256):
        raise UsageError(
            f"{config.init}: init was a file with SHA-256 {config.init_sha256}, and now has {sha256}; give that file "
            "again, or take init_sha256 out of the settings to start from this one"
        )
    return replace(config, init_sha256=sha256)
