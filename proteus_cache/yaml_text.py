"""YAML as this program reads it: config files, pipelines, and the `config.yaml` of a run that somebody may have sent.

Plain values only. Anchors and tags are refused, so that a few lines cannot stand for millions or ask for a Python
object; a key stands once; numbers are finite and have at most 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import yaml

from proteus_cache.errors import FormatError

MAX_BYTES = 64 << 10
_MOST_DEEP = 16
_MOST_PARTS = 20_000
"""Values, and beginnings and ends of lists and maps. A config has a few hundred."""


class _RefusedError(Exception):
    """Something that YAML has and a config must not."""


class _Loader(yaml.SafeLoader):
    """YAML of plain values, in which a key stands once.

    Marks and depth are looked at while the text is read, before anything is built of it: brackets alone cost the
    scanner a time that grows with the square of their number, so the first that is too many ends it.
    """

    levels = 0
    n_parts = 0

    def get_event(self) -> Any:  # the stubs leave events untyped
        event = super().get_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _RefusedError("YAML aliases are not accepted")
        if isinstance(event, yaml.DocumentStartEvent) and (event.version or event.tags):
            raise _RefusedError("not valid YAML for a config: it has directives")
        if isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent) and event.tag is not None:
            raise _RefusedError("not valid YAML for a config: it has tags")
        self.levels += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if self.levels >= _MOST_DEEP:
            raise ValueError("nested too deeply")
        self.n_parts += 1
        if self.n_parts > _MOST_PARTS:
            raise ValueError("more values than a config has")
        return event

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if name in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key {name!r} stands there twice")
            if name is not None:
                seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(data: bytes, what: str) -> Any:
    """The value of a YAML text; None for an empty one.

    Args:
        data: the text.
        what: file, for messages.

    Raises:
        FormatError: longer than 64 KiB, not valid, nested too deeply, with too many values, or with anchors, aliases,
            tags, a key twice, or a number that is not finite or beyond 64 bits.
    """
    if len(data) > MAX_BYTES:
        raise FormatError(f"{what}: larger than a config may be ({len(data):,} bytes, at most {MAX_BYTES:,})")
    try:
        value = yaml.load(data, _Loader)  # a SafeLoader: plain values, no Python objects
        _check(value)
    except _RefusedError as error:
        raise FormatError(f"{what}: {error}; write the values out") from error
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:300]
        raise FormatError(f"{what}: not valid YAML ({reason})") from error
    return value


def _check(value: object) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _check(key)
            _check(inner)
    elif isinstance(value, list):
        for inner in value:
            _check(inner)
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        raise ValueError("a whole number beyond 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the number {value} is not finite")
