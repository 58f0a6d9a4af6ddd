"""How ``quant`` is written: a scheme's short name, and its options beside it, as jsonargparse's class path."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader
from lightning.pytorch.cli import LightningCLI

from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.errors import ConfigError, nearest
from lightning_lowbit.modules.base import Scheme
from lightning_lowbit.schemes import find, registry

__all__ = [
    "FLOAT",
    "import_path",
    "load_yaml",
    "read_config",
    "requires_options",
    "resolve_words",
    "scheme_class",
    "scheme_spec",
]

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
    elif isinstance(value, str) and value != FLOAT and not _is_file(value):
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
    cls = scheme_class(name)
    own, before = _defaults(cls), _defaults(find(inspect.signature(QuantCallback).parameters["scheme"].default))
    others = {option: value for option, value in own.items() if option in before and before[option] != value}
    given = {**others, **(options or {})}
    path = name if "." in name else import_path(cls)
    return {"class_path": path, "init_args": given} if given else {"class_path": path}


def _defaults(cls: type[Any]) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}


def requires_options(cls: type[Any]) -> bool:
    """Whether a scheme has options without a default."""
    missing = dataclasses.MISSING
    return any(f.init and f.default is missing and f.default_factory is missing for f in dataclasses.fields(cls))


def scheme_class(name: str) -> type[Scheme]:
    """The scheme of a registered name, a class name, a name whose class is imported, or a class path, which it imports.

    Raises:
        ConfigError: there is none; it names the nearest.
    """
    known = registry()
    named = {**{cls.__name__: cls for cls in known.values()}, **known}
    if name in named:
        return named[name]
    try:
        if "." not in name:
            return find(name)
        found = pkgutil.resolve_name(name)
    except ConfigError as error:
        raise ConfigError(
            f"quant.scheme: no scheme is called {name!r}.{nearest(name, [*known, FLOAT])} "
            "A scheme of your own: its class path, as in my_module.MyScheme."
        ) from error
    except (ImportError, AttributeError, ValueError) as error:
        text = str(error).rstrip(".")
        raise ConfigError(
            f"quant.scheme: {name!r} cannot be imported: {text}. Expected module.Class, with the module installed, in "
            f"the current folder or on PYTHONPATH, or a name.{nearest(name.rpartition('.')[2], named)}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Scheme)):
        raise ConfigError(f"quant.scheme: {name} is no subclass of lightning_lowbit.Scheme.")
    return found


def resolve_words(words: list[str]) -> list[str]:
    """Replace the short name after ``--quant.scheme`` and ``--quant.scheme.help``."""
    resolved: list[str] = []
    asked = ""
    for number, word in enumerate(words):
        option, equals, value = word.partition("=")
        section = value if equals else "".join(words[number + 1 : number + 2])
        if option == "--quant" and section in (FLOAT, *registry()):
            raise ConfigError(f"--quant {section}: expected a file or options, as in --quant.scheme {section}.")
        names_scheme = option in ("--quant.scheme", "--quant.scheme.help")
        if names_scheme and equals:
            resolved.append(f"{option}={_scheme_word(option, value)}")
        else:
            resolved.append(_scheme_word(asked, word) if asked and not word.startswith("-") else word)
        asked = option if names_scheme and not equals else ""
    return resolved


def _scheme_word(option: str, word: str) -> str:
    # An inline mapping ("{class_path: tqt}") goes through the loader below like any other YAML, and so does a file.
    if word == FLOAT or word.lstrip().startswith("{") or _is_file(word):
        return word
    spec = _named(word)
    return json.dumps(spec) if "init_args" in spec and not option.endswith(".help") else str(spec["class_path"])


def read_config(file: Path) -> dict[Any, Any]:
    """The content of a ``--config`` file, as it stands there.

    Raises:
        ConfigError: it is missing, no YAML, no mapping, or has a key twice, of which YAML keeps the last.
    """
    if not file.is_file():
        raise ConfigError(f"--config {file}: no such file.")
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        tab = mark is not None and (mark.buffer or "")[mark.pointer : mark.pointer + 1] == "\t"
        reason = "a tab. YAML is indented with spaces" if tab else error.problem
        raise ConfigError(f"--config {file}: no YAML: {where}{reason}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"--config {file}: expected keys such as model, data, quant, trainer; got {kind}.")
    for key, line in _repeated(node):
        raise ConfigError(f"--config {file}: line {line}: the key {key!r} stands there a second time. Leave one.")
    return content


def _repeated(node: Any) -> Iterator[tuple[str, int]]:
    """Keys that a mapping has already, and their lines."""
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _repeated(child)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    yield key.value, key.start_mark.line + 1
                seen.add(key.value)
            yield from _repeated(value)


def _is_file(value: str) -> bool:
    return "." in value and Path(value).is_file()


def load_yaml(text: str) -> Any:
    """Load YAML as jsonargparse does and resolve the scheme's short name in every ``quant`` section."""
    return _resolve_config(get_loader("yaml")(text))


def _resolve_config(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    if isinstance(config.get("class_path"), str) and config["class_path"] in registry():
        return scheme_spec(config)
    keys = {key.partition(".")[0] for key in config}
    # All of them arguments of the callback: the content of `--quant FILE`.
    if "scheme" in keys and keys <= set(inspect.signature(QuantCallback).parameters):
        return _resolve_quant(config)
    config, quant = _take_dotted(config, "quant")
    if quant:
        section = config.get("quant", {})
        config["quant"] = {**section, **quant} if isinstance(section, dict) else section
    section = config.get("quant")
    if isinstance(section, dict):
        config["quant"] = _resolve_quant(section)
    elif "quant" in config and (not isinstance(section, str) or section in (FLOAT, *registry())):  # else a file
        raise ConfigError(f"quant: got {section!r}, expected its options, as in quant: {{scheme: tqt}}.")
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
