"""How ``quant`` is written: a scheme's short name, and its options beside it, as jsonargparse's class path."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from typing import Any

from jsonargparse import get_loader
from lightning.pytorch.cli import LightningCLI

from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.errors import ConfigError, nearest
from lightning_lowbit.modules.base import Scheme
from lightning_lowbit.schemes import find, registry

__all__ = ["FLOAT", "import_path", "load_yaml", "requires_options", "resolve_words", "scheme_spec"]

FLOAT = "float"  # the one name under quant.scheme that is no scheme: leave the network as it is


def import_path(cls: type[Scheme]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def scheme_spec(value: Any, options: Mapping[str, Any] | None = None) -> Any:
    """Write a short name as jsonargparse's class path, so that options given elsewhere add to it.

    Args:
        value: a registered name, ``float``, a class path or class name, or a mapping with ``class_path``.
        options: fields of the scheme given beside it, as ``scheme.bits``.

    Raises:
        ConfigError: a name without a dot that is neither registered nor a scheme's class name.
    """
    if isinstance(value, Mapping):
        spec = dict(value)
        if isinstance(spec.get("class_path"), str):
            spec = {**spec, **_named(spec["class_path"], spec.get("init_args"))}
    elif isinstance(value, str) and value != FLOAT:
        spec = _named(value)
    elif options and value is not None:
        raise ConfigError(f"quant.scheme: {value!r} has no options, got {', '.join(sorted(options))}.")
    else:
        spec = {} if options else value
    if options:
        spec["init_args"] = {**spec.get("init_args", {}), **options}
    return spec


def _named(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A scheme's class path and its options, with its own defaults where those of the default scheme are others.

    What a key's default sets is otherwise carried over to whatever class is named, option by option.
    """
    path = _class_path(name)
    cls = next((cls for cls in registry().values() if import_path(cls) == path), None)
    own = {} if cls is None else _defaults(cls)
    before = _defaults(find(inspect.signature(QuantCallback).parameters["scheme"].default))
    others = {option: value for option, value in own.items() if option in before and before[option] != value}
    given = {**others, **(options or {})}
    return {"class_path": path, "init_args": given} if given else {"class_path": path}


def _defaults(cls: type[Any]) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}


def requires_options(cls: type[Any]) -> bool:
    """Whether a scheme has options without a default."""
    missing = dataclasses.MISSING
    return any(f.init and f.default is missing and f.default_factory is missing for f in dataclasses.fields(cls))


def _class_path(name: str) -> str:
    known = registry()
    paths = {name: import_path(cls) for name, cls in known.items()}
    paths |= {cls.__name__: import_path(cls) for cls in known.values()}
    if name in paths or "." in name:
        return paths.get(name, name)
    raise ConfigError(f"quant.scheme: no scheme is called {name!r}.{nearest(name, [*known, FLOAT])}")


def resolve_words(words: list[str]) -> list[str]:
    """Replace the short name after ``--quant.scheme`` and ``--quant.scheme.help``."""
    resolved: list[str] = []
    asked = ""
    for word in words:
        option, equals, value = word.partition("=")
        names_scheme = option in ("--quant.scheme", "--quant.scheme.help")
        if names_scheme and equals:
            resolved.append(f"{option}={_scheme_word(option, value)}")
        else:
            resolved.append(_scheme_word(asked, word) if asked and not word.startswith("-") else word)
        asked = option if names_scheme and not equals else ""
    return resolved


def _scheme_word(option: str, word: str) -> str:
    # An inline mapping ("{class_path: tqt}") goes through the loader below like any other YAML.
    if word == FLOAT or word.lstrip().startswith("{"):
        return word
    spec = _named(word)
    return json.dumps(spec) if "init_args" in spec and not option.endswith(".help") else str(spec["class_path"])


def load_yaml(text: str) -> Any:
    """Load YAML as jsonargparse does and resolve the scheme's short name in every ``quant`` section."""
    return _resolve_config(get_loader("yaml")(text))


def _resolve_config(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    if "class_path" in config and config["class_path"] in registry():
        return scheme_spec(config)
    keys = {key.partition(".")[0] for key in config}
    # All of them arguments of the callback: the content of `--quant FILE`.
    if "scheme" in keys and keys <= set(inspect.signature(QuantCallback).parameters):
        return _resolve_quant(config)
    config, quant = _take_dotted(config, "quant")
    if quant:
        section = config.get("quant", {})
        config["quant"] = {**section, **quant} if isinstance(section, dict) else section
    if isinstance(config.get("quant"), dict):
        config["quant"] = _resolve_quant(config["quant"])
    for subcommand in LightningCLI.subcommands():
        if subcommand in config:
            config[subcommand] = _resolve_config(config[subcommand])
    return config


def _resolve_quant(quant: dict[str, Any]) -> dict[str, Any]:
    quant, options = _take_dotted(quant, "scheme")
    if options or "scheme" in quant:
        quant["scheme"] = scheme_spec(quant.get("scheme"), options)
    return quant


def _take_dotted(section: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split ``{"a": 1, "name.b": 2}`` into ``{"a": 1}`` and ``{"b": 2}``."""
    dotted = {key: value for key, value in section.items() if key.startswith(f"{name}.")}
    rest = {key: value for key, value in section.items() if key not in dotted}
    return rest, {key.removeprefix(f"{name}."): value for key, value in dotted.items()}
