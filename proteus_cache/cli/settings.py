"""Where a setting comes from: flag, config file, environment, default; and the folders of PROTEUS_HOME."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from proteus_cache import stores
from proteus_cache.choices import unknown
from proteus_cache.errors import ConfigError, FormatError, UsageError


def home() -> Path:
    """PROTEUS_HOME, else ./proteus: caches, packs, runs and weights are kept below it."""
    return Path(os.environ.get("PROTEUS_HOME") or "proteus").expanduser()


def folder(value: object, name: str) -> Path | None:
    """A path of a flag or a config file with `~` resolved; None when it is not given.

    Raises:
        ConfigError: it is no text.
    """
    if value is None:
        return None
    if not isinstance(value, str | Path) or not str(value):
        raise ConfigError(f"--{name} must be a path, got {value!r}")
    return Path(value).expanduser()


def images(given: Path | None, purpose: str = "extract") -> Path:
    """The image folder: given, else PROTEUS_IMAGES, else ./imagenet/train.

    Raises:
        UsageError: there is none, or it is a cache, pack or run.
    """
    if given is not None:
        return _photographs(given)
    if os.environ.get("PROTEUS_IMAGES"):
        return _photographs(Path(os.environ["PROTEUS_IMAGES"]).expanduser())
    default = Path("imagenet/train")
    if default.is_dir():
        return default
    raise UsageError(
        f"no images to {purpose}: say where they are with --images DIR, or set PROTEUS_IMAGES "
        f"(neither is set, and there is no folder {default})"
    )


def _photographs(path: Path) -> Path:
    """`path`, unless it is a store."""
    kind = stores.kind_of(path)
    if kind is not None and not stores.holds_images(path):
        raise UsageError(f"{path}: is a {kind}; --images takes the photographs: class folders, a folder or a .txt list")
    return path


def folder_name(name: str) -> str:
    """A teacher's or student's name as a folder name."""
    return "".join(char if char.isalnum() or char in "._-" else "_" for char in name)


def read_config(path: Path | None, known: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The settings of a YAML file, keys with underscores; empty without a file.

    Args:
        path: the file.
        known: keys that may stand in it; None leaves the check to the caller.

    Raises:
        ConfigError: the file cannot be read, is not a mapping, or holds an unknown key.
    """
    if path is None:
        return {}
    from proteus_cache.yaml_text import MAX_BYTES, read_yaml

    try:
        with open(path, "rb") as file:
            value = read_yaml(file.read(MAX_BYTES + 1), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}; --config names a YAML file") from error
    except FormatError as error:
        raise ConfigError(str(error)) from error
    if value is None:  # empty, or nothing but comments
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: a config is a list of `name: value` lines")
    settings = {str(key).replace("-", "_"): setting for key, setting in value.items()}
    for key in settings:
        if known is not None and key not in known:
            raise ConfigError(f"{path}: {unknown('setting', key, known)}")
    return settings


def merge(flags: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Flags over config file; None means not given."""
    return config | {name: value for name, value in flags.items() if value is not None}


def names(value: object, name: str) -> tuple[str, ...] | None:
    """ "cls,patch" or a YAML list as a tuple; None when it is not given.

    Args:
        value: as given.
        name: of the flag, for the message.

    Raises:
        ConfigError: nothing is named, or `value` is neither text nor a list.
    """
    if value is None:
        return None
    if not isinstance(value, str | list):
        raise ConfigError(f"--{name} must be a list of names, got {value!r}")
    parts = value.split(",") if isinstance(value, str) else map(str, value)
    found = tuple(part.strip() for part in parts if part.strip())
    if not found:
        raise ConfigError(f"--{name} names nothing; leave it out for the default")
    return found
