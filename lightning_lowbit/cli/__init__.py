"""The command line: Lightning's own, with the low-bit settings under one key, ``quant``.

::

    lightning-lowbit fit --config digits.yaml --quant.scheme tqt --quant.scheme.bits 4
    lightning-lowbit validate --config digits.yaml --ckpt_path last.ckpt
    lightning-lowbit predict --model DigitsCnn --data DigitsData --ckpt_path last.ckpt --output digits.npy
    lightning-lowbit export --model DigitsCnn --ckpt last.ckpt --to program c --output digits
    lightning-lowbit verify --program digits.lowbit --ckpt last.ckpt --model DigitsCnn --data DigitsData
    lightning-lowbit verify --certificate version_0/certificate.json version_1/certificate.json
    lightning-lowbit schemes tqt

``quant`` takes the arguments of `QuantCallback`; ``quant.scheme: float`` converts nothing, for a baseline
under the same file. Where nothing is said of ``quant``, validate, test and predict convert as the checkpoint says.
Needs the extra ``cli``.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import set_loader
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightning_lowbit.callbacks
from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.cli.network import REFUSALS
from lightning_lowbit.cli.parser import DEMOS, LowBitParser
from lightning_lowbit.cli.programs import EXPORT_HELP, VERIFY_HELP, export, verify
from lightning_lowbit.cli.schemes import SCHEMES_HELP, schemes
from lightning_lowbit.cli.settings import FLOAT, load_yaml, requires_options, resolve_words, scheme_spec
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.plugins.checkpoint import read_scheme, read_spec
from lightning_lowbit.plugins.prediction_file import PredictionFile
from lightning_lowbit.schemes import registry

__all__ = ["LowBitCLI", "main"]

LOADER = "lowbit_yaml"
COMMANDS = {
    "export": (export, EXPORT_HELP),
    "verify": (verify, VERIFY_HELP),
    "schemes": (schemes, SCHEMES_HELP),
}
"""Those that run without LightningCLI: called with the words behind their name, each gives its exit status."""


class MainParser(LowBitParser):
    """The parser of the whole command line."""

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Add the Trainer's subcommands, and those that run without a Trainer: for the help, `main` calls them."""
        action = super().add_subcommands(*args, **kwargs)
        for name, (_, text) in COMMANDS.items():
            action.add_subcommand(name, LowBitParser(description=text), help=text)
        return action


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
        parser.set_defaults({"quant.scheme": scheme_spec(default)})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Resolve short names in ``args`` and parse them; unlike Lightning's, indifferent to ``sys.argv``."""
        if not isinstance(args, list):
            raise ConfigError(f"LowBitCLI: args is a list of command-line words, got {type(args).__name__}.")
        self.config = parser.parse_args(resolve_words(args))
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
        SystemExit: status 2 for a wrong command line or setting, with the reason on stderr; the status of a command
            that runs without a Trainer: 1 of ``verify`` where something differs, and of ``export`` where nothing is
            written.
    """
    words = sys.argv[1:] if args is None else args
    set_loader(LOADER, load_yaml, exceptions=(yaml.YAMLError,))
    try:
        # Makes `model: DigitsCnn` a known name. Imported by name: demos stands above this file.
        importlib.import_module(DEMOS)
        for module in pkgutil.iter_modules(lightning_lowbit.callbacks.__path__):  # and `class_path: FraclenSchedule`
            importlib.import_module(f"{lightning_lowbit.callbacks.__name__}.{module.name}")
        if words[:1] and words[0] in COMMANDS:
            run, _ = COMMANDS[words[0]]
            raise SystemExit(run(words[1:]))
        LowBitCLI(
            args=words,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=MainParser,
            parser_kwargs={"prog": "lightning-lowbit", "parser_mode": LOADER},
            seed_everything_default=0,
            # A second run without a logger writes its config.yaml over the first one's.
            save_config_kwargs={"overwrite": True},
        )
    except REFUSALS as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _name_if_default(scheme: Any) -> Any:
    """The name of a scheme whose options all have their defaults, else ``scheme`` itself.

    A callback with a bare name takes the options from the checkpoint that it continues; written in full, as
    the parser hands them over, the defaults would contradict a checkpoint with other ones.
    """
    for name, cls in registry().items():
        if type(scheme) is cls and not requires_options(cls) and scheme == cls():  # what stands for others is spent
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
