"""What to say of a name that is none of those there are: the nearest ones, else all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_NEAR = 3


def unknown(what: str, given: object, choices: Iterable[str], *, also: str | None = None) -> str:
    """One line: `unknown codec 'int9'; did you mean int8?` or `unknown codec 'zip'; choose float32, float16 or int8`.

    Args:
        what: kind of name, for example "codec".
        given: what was asked for.
        choices: all names there are.
        also: names that cannot be listed, for example "timm:NAME".
    """
    names = list(choices)
    near = nearest(str(given), names)
    if near:
        return f"unknown {what} {given!r}; did you mean {either(near)}?"
    return f"unknown {what} {given!r}; choose {either([*names, also] if also else names)}"


def nearest(given: str, choices: Iterable[str]) -> list[str]:
    """Up to three of `choices` that look like `given`, likeliest first; capitals and `-` for `_` count for nothing."""
    by_plain = {_plain(choice): choice for choice in choices}
    if _plain(given) in by_plain:
        return [by_plain[_plain(given)]]
    return [by_plain[name] for name in difflib.get_close_matches(_plain(given), by_plain, n=_MOST_NEAR)]


def either(names: list[str]) -> str:
    """Names as a choice: `a`, `a or b`, `a, b or c`."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)  # nothing for none


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
