"""Checks of a scheme's options that all schemes share."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

from lightning_lowbit.errors import ConfigError, nearest

__all__ = ["check_choice"]


def check_choice(cls: type[Any], option: str, value: Any) -> None:
    """ConfigError where ``value`` is none of the literals that the field ``option`` of a scheme allows."""
    allowed = get_args(get_type_hints(cls)[option])
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ConfigError(
            f"{cls.__name__}({option}={value!r}): not one of {choices}.{nearest(str(value), map(str, allowed))}"
        )
