"""The three errors of the package: the user's, the model's and ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = ["ConfigError", "InvariantError", "UnsupportedModelError", "nearest"]


class ConfigError(ValueError):
    """A setting, file or combination that the user can change; the message says to what."""


class UnsupportedModelError(ValueError):
    """A layer or a graph that cannot be converted; the message names it and the way around it."""


class InvariantError(RuntimeError):
    """A promise of this package that did not hold: our bug, please report it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the known name nearest to ``word``, or all names.

    >>> nearest("tqtt", ["niti", "tqt"])
    " Did you mean 'tqt'?"
    >>> nearest("zzz", ["niti", "tqt"])
    " Known: 'niti', 'tqt'."
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return " Known: " + ", ".join(repr(name) for name in known) + "."


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names for a sentence, cut where they are many.

    >>> listed(["a", "b", "c"]), listed(["a", "b", "c"], most=2)
    ('a, b, c', 'a, b and 1 more')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
