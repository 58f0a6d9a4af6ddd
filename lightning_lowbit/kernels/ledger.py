"""What ran: how many products each backend computed by which route, and which backends were refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["counts", "note", "refusals", "report", "silent"]

counts: Counter[tuple[str, str]] = Counter()
"""Products by (backend, route) since the process began."""

refusals: dict[str, str] = {}
"""Why a backend, or a route of one, is not used in this process."""


def note(backend: str, route: str) -> None:
    """One product is computed by this route."""
    counts[backend, route] += 1


@contextmanager
def silent() -> Iterator[None]:
    """Count nothing inside the block."""
    before = counts.copy()
    try:
        yield
    finally:
        counts.clear()
        counts.update(before)


def report() -> str:
    """One line: which backends computed how many products by which routes; which were refused, and why.

    A product that the int8 backend leaves to floats (few channels, groups) counts as one of `simulate`.
    """
    routes: dict[str, list[str]] = {}
    for (backend, route), count in sorted(counts.items()):
        routes.setdefault(backend, []).append(f"{route} {count}")
    ran = [f"{backend} ({', '.join(parts)})" for backend, parts in routes.items()]
    refused = [f"{name} refused: {reason}" for name, reason in sorted(refusals.items())]
    return "; ".join([*(ran or ["no product yet"]), *refused])
