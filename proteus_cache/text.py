"""Text for people that may hold what somebody else wrote: names of files, keys, classes, fields of a store.

Escape codes could rewrite a terminal, a line break could add a line to a log, a control of writing direction could show
one name as another: `printable` leaves no such character. Nor does it leave a password: what stands before the `@` or
behind the `?` of an address is replaced, and so are tokens that can be told by their look.
"""

from __future__ import annotations

import re

# Each pattern begins where an address or token can begin and goes over no character twice, however long the text is.
_SCHEME_END = r"(?<=[A-Za-z0-9+.-]):/{1,3}"  # Path joins the two slashes into one
_SECRETS = (
    (re.compile(rf"({_SCHEME_END})[^\s/@'\"`]++@"), r"\1***@"),
    (re.compile(r"\b(hf_)[A-Za-z0-9]{8,}"), r"\1***"),
    (re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{12,}"), r"\1***"),
    # A token has digits and both cases; words that follow "basic" have not.
    (re.compile(r"\b([Bb]earer |[Bb]asic )(?=\S*\d)(?=\S*[a-z])(?=\S*[A-Z])[A-Za-z0-9._~+/=-]{8,}"), r"\1***"),
)
_SCHEME = re.compile(_SCHEME_END)
_WORD = re.compile(r"[^\s'\"`]+")
_QUERY_END = re.compile(r"[)\]]")


def printable(text: str) -> str:
    """`text` in one line, without secrets, and with everything escaped that is not plainly visible.

    Applied twice it is the same.
    """
    shown = text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    for pattern, instead in _SECRETS:
        shown = pattern.sub(instead, shown)
    return _WORD.sub(_without_queries, shown) if "?" in shown else shown


def _without_queries(word: re.Match[str]) -> str:
    """A word, with `***` for what stands behind the `?` of each address in it."""
    text, parts, done = word[0], [], 0
    while (scheme := _SCHEME.search(text, done)) is not None and (mark := text.find("?", scheme.end()) + 1) > 0:
        found = _QUERY_END.search(text, mark)
        end = len(text) if found is None else found.start()
        parts += [text[done:mark], "***" if end > mark else ""]
        done = end
    return "".join([*parts, text[done:]])
