"""What older checkpoints are brought up to date by: one function a format, applied in order before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_lowbit.errors import ConfigError

__all__ = ["FORMAT", "MIGRATIONS", "Migration", "migrate"]

FORMAT = 1
"""Of the record that is written under ``checkpoint["lightning_lowbit"]``, low-bit keys of the state dict included."""

Migration = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]

MIGRATIONS: dict[int, Migration] = {}
"""format -> a function of (record, state dict) that gives the record of the next format and edits the state dict.

There is none yet: format 1 is the first. Whoever raises FORMAT enters the way from the one before, under its number.
"""


def migrate(spec: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """A record in the present format; ``spec`` itself where it is in that already.

    Args:
        spec: the record of a checkpoint.
        state: its state dict, which may be edited.
    Raises:
        ConfigError: a newer format, one that nobody wrote, or an old one without a way here.
    """
    while spec.get("format") != FORMAT:
        found: Any = spec.get("format")
        step = MIGRATIONS.get(found) if type(found) is int else None
        if step is None:
            newer = isinstance(found, int) and found > FORMAT
            known = ", ".join(map(str, sorted({*MIGRATIONS, FORMAT})))
            raise ConfigError(
                f"checkpoint: low-bit format {found!r} (written by lightning-lowbit {spec.get('version')}), this "
                f"version reads format {known}. "
                + ("Install that version, or a later one." if newer else "Install the version that wrote it.")
            )
        spec = {**step(dict(spec), state), "format": found + 1}
    return spec
