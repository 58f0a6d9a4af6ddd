"""The command line: Lightning's own, with the low-bit settings under one key, ``quant``.

::

    lightning-lowbit fit --config digits.yaml --quant.scheme tqt --quant.scheme.bits 4
    lightning-lowbit validate --config digits.yaml --ckpt_path last.ckpt
    lightning-lowbit predict --model DigitsCnn --data DigitsData --ckpt_path last.ckpt --output digits.npy
    lightning-lowbit schemes
    lightning-lowbit verify --certificate version_0/certificate.json version_1/certificate.json

``quant`` takes the arguments of `QuantCallback`; ``quant.scheme: float`` converts nothing, for a baseline
under the same file. Where nothing is said of ``quant``, validate, test and predict convert as the checkpoint says.
Needs the extra ``cli``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import json
import pkgutil
import re
import sys
import textwrap
import zipfile
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightning_lowbit.callbacks
from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.errors import ConfigError, UnsupportedModelError, nearest
from lightning_lowbit.modules.base import Scheme
from lightning_lowbit.plugins.checkpoint import read_scheme, read_spec
from lightning_lowbit.plugins.prediction_file import PredictionFile
from lightning_lowbit.reports.certificate import compare, read_certificate
from lightning_lowbit.schemes import find, registry

__all__ = ["LowBitCLI", "main"]

FLOAT = "float"  # the one name under quant.scheme that is no scheme: leave the network as it is
LOADER = "lowbit_yaml"
DEMOS = "lightning_lowbit.demos"

# What jsonargparse says of a name that it does not know; the group is the name.
UNKNOWN_OPTION = re.compile(
    r"Option '([^']+)' is not accepted$|does not accept option '([^']+)'$|unrecognized arguments: --([\w.]+)"
)
UNKNOWN_SUBCOMMAND = re.compile(r"invalid choice: '([^']+)' \(choose from (.*)\)")
UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\w+)$", re.MULTILINE)


class LowBitParser(LightningArgumentParser):
    """Lightning's parser; an unknown name comes back with the nearest one that exists."""

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Add the Trainer's subcommands, and those that run without a Trainer."""
        action = super().add_subcommands(*args, **kwargs)
        for name, text in (("schemes", _SCHEMES_HELP), ("verify", _VERIFY_HELP)):
            action.add_subcommand(name, type(self)(description=text), help=text)
        return action

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the usage and ``message``, with a hint where a name is unknown, and exit with status 2."""
        super().error(message + self._hint(message, ex), ex)

    def _hint(self, message: str, ex: Exception | None) -> str:
        if match := UNKNOWN_SUBCOMMAND.search(message):
            return "." + nearest(match[1], re.findall(r"'(\w+)'", match[2]))
        if match := UNKNOWN_CLASS.search(message):
            return f"\n  {match[1]} is no class imported so far: give its full path." + nearest(
                match[1], importlib.import_module(DEMOS).__all__
            )
        if match := UNKNOWN_OPTION.search(message):
            # An option of a nested class is reported by that class's own parser, which comes here first.
            parser = getattr(ex, "subcommand_parser", None) or self
            options = [text[2:] for action in parser._actions for text in action.option_strings]
            word = next(group for group in match.groups() if group)
            return "." + nearest(word, (name for name in options if name and not name.endswith("help")))
        return ""


class LowBitCLI(LightningCLI):
    """LightningCLI with the key ``quant`` for every subcommand, and a file for what ``predict`` gives."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument("--output", type=str | None, default=None, help="numpy file for the predictions.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `QuantCallback`'s arguments under ``quant``."""
        # Not instantiated by the parser, since with scheme float there must be no callback.
        parser.add_class_arguments(QuantCallback, "quant", instantiate=False, sub_configs=True)
        default = inspect.signature(QuantCallback).parameters["scheme"].default
        # A class path where the signature has a name, so that `quant.scheme.bits` alone finds its class.
        parser.set_defaults({"quant.scheme": _scheme_spec(default)})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Resolve short names in ``args`` and parse them; unlike Lightning's, indifferent to ``sys.argv``."""
        if not isinstance(args, list):
            raise ConfigError(f"LowBitCLI: args is a list of command-line words, got {type(args).__name__}.")
        self.config = parser.parse_args(_resolve_words(args))
        self.says_quant = _says_quant(args)

    def _parse_ckpt_path(self) -> None:
        """Take the model's options from the checkpoint, as Lightning's own does of files that a CLI has trained."""
        section = self.config[self.config.subcommand]
        self.checkpoint = _read_checkpoint(section.get("ckpt_path"))
        options = {k: v for k, v in self.checkpoint.get("hyper_parameters", {}).items() if k != "_instantiator"}
        if options:
            name = options.pop("_class_path", section.model.class_path)
            model = {"class_path": name, "dict_kwargs": options}
            self.config = self.parser.parse_object({self.config.subcommand: {"model": model}}, self.config)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with `QuantCallback` first among its callbacks.

        Raises:
            ConfigError: ``trainer.callbacks`` names a second `QuantCallback`.
        """
        config = self.config_init[self.subcommand]
        given = config.trainer.callbacks or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if any(isinstance(callback, QuantCallback) for callback in callbacks):
            raise ConfigError(
                "trainer.callbacks: a QuantCallback stands there, and the key quant makes one already. "
                "Move its arguments under quant."
            )
        if config.quant.scheme != FLOAT:
            # First, so that callbacks that copy or prune the network meet the converted one.
            options = {**config.quant.as_dict(), "scheme": _name_if_default(config.quant.scheme)}
            if self.subcommand != "fit" and not self.says_quant:
                options |= _as_trained(self.checkpoint)
            callbacks.insert(0, QuantCallback(**options))
        if config.get("output") is not None:
            callbacks.append(PredictionFile(config.output))
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)


def main(args: list[str] | None = None) -> None:
    """Run the console script ``lightning-lowbit``.

    Args:
        args: the words after the program's name; None = those of this process.

    Raises:
        SystemExit: status 2 for a wrong command line or setting, with the reason on stderr; of ``verify`` status 1
            where two runs part.
    """
    words = sys.argv[1:] if args is None else args
    set_loader(LOADER, _load_yaml, exceptions=(yaml.YAMLError,))
    try:
        if words[:1] == ["schemes"]:
            ArgumentParser(prog="lightning-lowbit schemes", description=_SCHEMES_HELP).parse_args(words[1:])
            print(_schemes_table())
            return
        if words[:1] == ["verify"]:
            raise SystemExit(_verify(words[1:]))
        # Makes `model: DigitsCnn` a known name. Imported by name: demos stands above this file.
        importlib.import_module(DEMOS)
        for module in pkgutil.iter_modules(lightning_lowbit.callbacks.__path__):  # and `class_path: FraclenSchedule`
            importlib.import_module(f"{lightning_lowbit.callbacks.__name__}.{module.name}")
        LowBitCLI(
            args=words,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=LowBitParser,
            parser_kwargs={"prog": "lightning-lowbit", "parser_mode": LOADER},
            seed_everything_default=0,
            # A second run without a logger writes its config.yaml over the first one's.
            save_config_kwargs={"overwrite": True},
        )
    except (ConfigError, UnsupportedModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


_SCHEMES_HELP = "List the schemes that quant.scheme knows by name, with their options."
_VERIFY_HELP = "Say whether two runs hold the same bits, and at which step and in which layer they part."


def _verify(words: list[str]) -> int:
    """Exit status: 0 where everything agrees, 1 where it does not."""
    parser = ArgumentParser(prog="lightning-lowbit verify", description=_VERIFY_HELP)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--certificate", nargs=2, metavar=("A", "B"), help="certificate.json, or a checkpoint, of either run"
    )
    a, b = map(read_certificate, parser.parse_args(words).certificate)
    found = compare(a, b)
    print(found)
    return int(found.parting is not None)


def _schemes_table() -> str:
    """One paragraph a scheme: name, class path, what it is, and its options with their defaults."""
    paragraphs = []
    for name, cls in sorted(registry().items()):
        summary = (inspect.getdoc(cls) or "").partition("\n")[0]
        # Every concrete scheme is a dataclass, which the type of the base class cannot say.
        fields = dataclasses.fields(cast("Any", cls))
        options = " ".join(f"{field.name}={_default(field)}" for field in fields if field.init)
        paragraphs.append((name, [_import_path(cls), summary, *textwrap.wrap(options, 98)]))
    paragraphs.append((FLOAT, ["no scheme: the network stays as it is"]))
    width = 2 + max(len(name) for name, _ in paragraphs)
    return "\n".join(
        f"{'' if row else name:<{width}}{line}" for name, lines in paragraphs for row, line in enumerate(lines)
    )


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "(required)" if field.default is dataclasses.MISSING else repr(field.default)


def _name_if_default(scheme: Any) -> Any:
    """The name of a scheme whose options all have their defaults, else ``scheme`` itself.

    A callback with a bare name takes the options from the checkpoint that it continues; written in full, as
    the parser hands them over, the defaults would contradict a checkpoint with other ones.
    """
    for name, cls in registry().items():
        required = any(_default(field) == "(required)" for field in dataclasses.fields(cast("Any", cls)))
        if type(scheme) is cls and not required and scheme == cls():  # what stands for others is spent in both
            return name
    return scheme


def _says_quant(words: list[str]) -> bool:
    """Whether a command line, or a file that it names, has the key ``quant``."""
    files = [b for a, b in itertools.pairwise(words) if a in ("-c", "--config")]
    files += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    sections = [yaml.safe_load(Path(name).read_text(encoding="utf-8")) for name in files if Path(name).is_file()]
    sections += [section.get(words[0]) for section in sections if isinstance(section, dict)]
    keys = [str(key) for section in sections if isinstance(section, dict) for key in section]
    return any(key.partition(".")[0] == "quant" for key in (*keys, *(word.removeprefix("--") for word in words)))


def _read_checkpoint(path: Any) -> dict[str, Any]:
    """A checkpoint's content; {} for what is no file of torch's, which the Trainer refuses by name."""
    known = isinstance(path, str) and zipfile.is_zipfile(path)
    content = torch.load(path, map_location="cpu", weights_only=True) if known else None
    return content if isinstance(content, dict) else {}


def _as_trained(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Scheme and layers of a low-bit checkpoint, as arguments of `QuantCallback`; none of another."""
    spec = read_spec(checkpoint) if "state_dict" in checkpoint else None
    return {} if spec is None else {"scheme": read_scheme(spec), "include": list(spec["layers"])}


def _import_path(cls: type[Scheme]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _scheme_spec(value: Any, options: Mapping[str, Any] | None = None) -> Any:
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
    cls = next((cls for cls in registry().values() if _import_path(cls) == path), None)
    own = {} if cls is None else _defaults(cls)
    before = _defaults(find(inspect.signature(QuantCallback).parameters["scheme"].default))
    others = {option: value for option, value in own.items() if option in before and before[option] != value}
    given = {**others, **(options or {})}
    return {"class_path": path, "init_args": given} if given else {"class_path": path}


def _defaults(cls: type[Any]) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}


def _class_path(name: str) -> str:
    known = registry()
    paths = {name: _import_path(cls) for name, cls in known.items()}
    paths |= {cls.__name__: _import_path(cls) for cls in known.values()}
    if name in paths or "." in name:
        return paths.get(name, name)
    raise ConfigError(f"quant.scheme: no scheme is called {name!r}.{nearest(name, [*known, FLOAT])}")


def _resolve_words(words: list[str]) -> list[str]:
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


def _load_yaml(text: str) -> Any:
    """Load YAML as jsonargparse does and resolve the scheme's short name in every ``quant`` section."""
    return _resolve_config(get_loader("yaml")(text))


def _resolve_config(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    if "class_path" in config and config["class_path"] in registry():
        return _scheme_spec(config)
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
    for subcommand in LowBitCLI.subcommands():
        if subcommand in config:
            config[subcommand] = _resolve_config(config[subcommand])
    return config


def _resolve_quant(quant: dict[str, Any]) -> dict[str, Any]:
    quant, options = _take_dotted(quant, "scheme")
    if options or "scheme" in quant:
        quant["scheme"] = _scheme_spec(quant.get("scheme"), options)
    return quant


def _take_dotted(section: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split ``{"a": 1, "name.b": 2}`` into ``{"a": 1}`` and ``{"b": 2}``."""
    dotted = {key: value for key, value in section.items() if key.startswith(f"{name}.")}
    rest = {key: value for key, value in section.items() if key not in dotted}
    return rest, {key.removeprefix(f"{name}."): value for key, value in dotted.items()}


if __name__ == "__main__":
    main()
