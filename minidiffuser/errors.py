"""Messages for people: an unknown name is answered with the names nearest to it."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

V = TypeVar("V")


def suggest(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' with the known names nearest to ``name``, or the whole short list."""
    known = [str(k) for k in known]
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if near:
        return f" Did you mean {' or '.join(repr(n) for n in near)}?"
    shown = ", ".join(repr(k) for k in known[:12]) + (", ..." if len(known) > 12 else "")
    return f" Known: {shown or 'none'}."


def choose(what: str, name: str, table: Mapping[str, V]) -> V:
    """``table[name]``, or a ValueError that says what was asked for and what there is."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}.{suggest(name, table)}")
    return table[name]
