"""Attributes put on other people's objects, and taken off again."""

from __future__ import annotations

from typing import Any

__all__ = ["Patches"]

_ABSENT = object()


class Patches:
    """Instance attributes set over what was there; ``undo`` restores all, and may be called twice."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """Put ``value`` into the instance's own dictionary: no property and no ``__setattr__`` is asked."""
        self._before.append((target, name, target.__dict__.get(name, _ABSENT)))
        target.__dict__[name] = value

    def undo(self) -> None:
        for target, name, value in reversed(self._before):
            if value is _ABSENT:
                target.__dict__.pop(name, None)
            else:
                target.__dict__[name] = value
        self._before.clear()
