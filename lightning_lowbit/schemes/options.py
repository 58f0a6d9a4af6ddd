"""Checks of a scheme's options that all schemes share."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from lightning_lowbit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from lightning_lowbit.graph.plan import Plan, Site

__all__ = [
    "check_bits",
    "check_choice",
    "check_flags",
    "check_number",
    "check_whole",
    "each_override",
    "option_at",
    "option_of",
    "pattern_of",
    "require_effects",
    "require_joined",
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


def pattern_of(scheme: Any, path: str, option: str) -> str | None:
    """The first pattern of a scheme's ``overrides`` that names an option and matches a path; None where none does."""
    named = (pattern for pattern, options in scheme.overrides.items() if option in options)
    return next((pattern for pattern in named if fnmatch.fnmatchcase(path, pattern)), None)


def option_of(scheme: Any, path: str, option: str, otherwise: Any = None) -> Any:
    """What ``overrides`` say of a path; else the scheme's own value, ``otherwise`` where it has no such field."""
    pattern = pattern_of(scheme, path, option)
    return getattr(scheme, option, otherwise) if pattern is None else scheme.overrides[pattern][option]


def option_at(scheme: Any, site: Site, option: str) -> Any:
    """The value of an option for a tensor: by its own path, else by the paths of the layers that read it.

    A sum or a pool that reads it too is a reader whose path nobody has to name: it must not get what was meant for a
    layer beside it.

    Raises:
        ConfigError: readers are given different values, of which one tensor can have one.
    """
    if not site.readers or pattern_of(scheme, site.path, option) is not None:
        return option_of(scheme, site.path, option)
    given = {path: option_of(scheme, path, option) for path in site.readers}
    if any(value != getattr(scheme, option) for value in given.values()):
        given |= {path: option_of(scheme, path, option) for path in site.operations}
    first, *others = given.values()
    if any(value != first for value in others):
        raise ConfigError(
            f"{type(scheme).__name__}(overrides=...): got {option} of {_each(given)}, which all read {site.path}, "
            f"expected one value for one tensor. Name it instead, {{{site.path!r}: {{{option!r}: ...}}}}, or give all "
            "the same."
        )
    return first


def require_effects(scheme: Any, plan: Plan, sites: Mapping[str, Sequence[Site]]) -> None:
    """ConfigError for an option of ``overrides`` that changes nothing where its pattern stands.

    Args:
        sites: the tensors that each option acts on; what their readers are given counts as given to them.
    """
    for pattern, options in scheme.overrides.items():
        for option in options:
            if not any(_acts(scheme, pattern, option, site) for site in sites[option]):
                where = f"{type(scheme).__name__}(overrides={{{pattern!r}: {{{option!r}: ...}}}})"
                raise ConfigError(f"{where}: {_why_idle(scheme, plan, pattern, option, sites[option])}")


def require_joined(scheme: Any, plan: Plan, bits: Callable[[Site], Any]) -> None:
    """ConfigError where tensors that a concat joins on one grid are given different widths; None is of no account."""
    sites = {site.key: site for site in plan.sites}
    for tie in plan.joined():
        given = {sites[key].path: width for key in tie if (width := bits(sites[key])) is not None}
        if len(set(given.values())) > 1:
            raise ConfigError(
                f"{type(scheme).__name__}(overrides=...): got bits of {_each(given)}, expected one width: they are "
                "joined, on one grid. Give all the same."
            )


def _acts(scheme: Any, pattern: str, option: str, site: Site) -> bool:
    """Whether a tensor has its option from this pattern, or the same value from its own."""
    own, value = pattern_of(scheme, site.path, option), scheme.overrides[pattern][option]
    if own == pattern:
        return True
    agrees = own is None or scheme.overrides[own][option] == value
    return agrees and any(pattern_of(scheme, path, option) == pattern for path in site.readers)


def _why_idle(scheme: Any, plan: Plan, pattern: str, option: str, sites: Sequence[Site]) -> str:
    paths = {path for site in sites for path in (site.path, *site.readers)}
    if all(pattern_of(scheme, path, option) != pattern for path in paths):
        if any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            return "patterns in front of it name all that it matches. Put it first, or leave it out."
        return f"it acts on nothing there, expected the path of what has {option}.{_neighbor(pattern, paths, plan)}"
    site, path = next(
        (site, path) for site in sites for path in site.readers if pattern_of(scheme, path, option) == pattern
    )
    own = pattern_of(scheme, site.path, option)
    return (
        f"{path} reads {site.path}, which {own!r} gives {option}={scheme.overrides[own][option]!r}. Leave one of the "
        "two out, or give both the same."
    )


def _neighbor(pattern: str, paths: set[str], plan: Plan) -> str:
    """The path beside it in the network, else the one that is spelled most like it."""
    for site in plan.sites:
        beside = [(site.path, reader) for reader in site.readers] + [(reader, site.path) for reader in site.readers]
        for path, other in beside:
            if fnmatch.fnmatchcase(path, pattern) and other in paths:
                return f" Did you mean {other!r}?"
    return nearest(pattern, paths)


def _each(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{path} ({value!r})" for path, value in given.items())
