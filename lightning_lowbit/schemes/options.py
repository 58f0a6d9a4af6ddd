"""Checks of a scheme's options that all schemes share."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from lightning_lowbit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from lightning_lowbit.graph.plan import Plan

__all__ = [
    "check_bits",
    "check_choice",
    "check_flags",
    "check_number",
    "check_whole",
    "each_override",
    "require_matches",
]


def check_choice(cls: type[Any], option: str, value: Any) -> None:
    """ConfigError where ``value`` is none of the literals that the field ``option`` of a scheme allows."""
    hint = get_type_hints(cls)[option]  # a Literal, or one that may also be left out: Literal | None
    allowed = next((get_args(part) for part in get_args(hint) if get_origin(part) is Literal), get_args(hint))
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ConfigError(
            f"{cls.__name__}({option}={value!r}): not one of {choices}.{nearest(str(value), map(str, allowed))}"
        )


def check_bits(cls: type[Any], option: str, value: Any) -> None:
    """ConfigError where ``value`` is no width from 2 to 16: one signed bit leaves only -1 and 0."""
    if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= 16:
        raise ConfigError(
            f"{cls.__name__}({option}={value!r}): expected an integer from 2 to 16 (one signed bit: only -1 and 0)."
        )


def check_flags(scheme: Any, *options: str) -> None:
    """ConfigError where one of these fields is neither True nor False."""
    for option in options:
        if not isinstance(getattr(scheme, option), bool):
            raise ConfigError(f"{type(scheme).__name__}({option}={getattr(scheme, option)!r}): expected True or False.")


def check_number(cls: type[Any], option: str, value: Any, low: float, high: float) -> None:
    """ConfigError where ``value`` is no finite number from ``low`` to ``high``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        raise ConfigError(f"{cls.__name__}({option}={value!r}): expected a number from {low:g} to {high:g}.")


def check_whole(cls: type[Any], option: str, value: Any, low: int, high: int) -> None:
    """ConfigError where ``value`` is no integer from ``low`` to ``high``."""
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{cls.__name__}({option}={value!r}): expected an integer from {low} to {high}.")


def each_override(cls: type[Any], overrides: Any, known: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Pattern, option and value of ``overrides`` one by one; ConfigError where it is no {pattern: {option: value}}."""
    if not isinstance(overrides, Mapping) or not all(isinstance(options, Mapping) for options in overrides.values()):
        raise ConfigError(
            f"{cls.__name__}(overrides={overrides!r}): expected options by module-path pattern, such as "
            f"{{'layer3.*': {{{known[0]!r}: 8}}}}."
        )
    for pattern, options in overrides.items():
        for option, value in options.items():
            if option not in known:
                raise ConfigError(
                    f"{cls.__name__}(overrides={{{pattern!r}: ...}}): no option {option!r}.{nearest(option, known)}"
                )
            yield pattern, option, value


def require_matches(cls: type[Any], overrides: Mapping[str, Any], plan: Plan) -> None:
    """ConfigError for a pattern that no converted layer or tensor answers to."""
    paths = {site.path for site in (*plan.sites, *plan.results)} | {layer.path for layer in plan.layers}
    for pattern in overrides:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            raise ConfigError(
                f"{cls.__name__}(overrides={{{pattern!r}: ...}}): nothing that is converted has such a path."
                f"{nearest(pattern, paths)}"
            )
