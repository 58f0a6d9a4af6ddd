"""Checks of a scheme's options that all schemes share."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

from lightning_lowbit.errors import ConfigError, nearest

__all__ = ["check_choice"]


def check_choice(cls: type[Any], option: str, value: Any) -> None:
    """ConfigError where ``value`` is none of the literals that the field ``option`` of a scheme allows."""
    hint = get_type_hints(cls)[option]  # a Literal, or one that may also be left out: Literal | None
    allowed = next((get_args(part) for part in get_args(hint) if get_origin(part) is Literal), get_args(hint))
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ConfigError(
            f"{cls.__name__}({option}={value!r}): not one of {choices}.{nearest(str(value), map(str, allowed))}"
        )
