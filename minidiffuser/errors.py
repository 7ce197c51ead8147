"""Messages for people: what was wrong, where, and what to do; the nearest known names, say."""

import difflib
import errno
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

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


def first_line(error: Exception) -> str:
    """What another library's error says first, for a message of one line; its kind, if nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn a failure to write into a ValueError that says where, why and what to do."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        text, number = str(error), getattr(error, "errno", None)
        # safetensors and torch.save report the system's failures as errors of their own.
        own = isinstance(error, OSError | SafetensorError) or "PytorchStreamWriter" in text
        if not own:
            raise
        full = number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        if full or any(f"os error {n}" in text for n in (errno.ENOSPC, errno.EFBIG)):
            why = "there is no space left; free some, or choose another folder"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            why = "it is read-only for you; choose another folder"
        else:
            why = text
        raise ValueError(f"cannot write to {folder}: {why}. What was saved before is "
                         "untouched") from error
