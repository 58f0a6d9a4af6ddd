"""LightningCLI with the low-bit settings under one key, ``quant``: what the Trainer's commands parse and build."""

from __future__ import annotations

import inspect
import itertools
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse import set_loader
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.cli.network import REFUSALS, STAGES
from lightning_lowbit.cli.parser import LowBitParser
from lightning_lowbit.cli.settings import (
    FLOAT,
    import_path,
    load_yaml,
    read_config,
    requires_options,
    resolve_words,
    scheme_spec,
)
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import Scheme
from lightning_lowbit.plugins.checkpoint import read_scheme, read_spec
from lightning_lowbit.plugins.checks import check_checkpoint_file
from lightning_lowbit.plugins.prediction_file import PredictionFile
from lightning_lowbit.schemes import find

__all__ = ["LowBitCLI", "WaitingCLI", "run"]

LOADER = "lowbit_yaml"
LOADERS = {command: f"{split}_dataloader" for split, command in STAGES.items()}
TRAINER = {
    "fit": "Train a network in low bits, or fine-tune one.",
    "validate": "Run the validation set through a checkpoint.",
    "test": "Run the test set through a checkpoint.",
    "predict": "Run a checkpoint on data, and keep what it gives.",
}

_C = TypeVar("_C", bound="LowBitCLI")


class LowBitCLI(LightningCLI):
    """LightningCLI with the key ``quant`` for every subcommand, and a file for what ``predict`` gives.

    Args:
        commands: further commands for the help, which run without a Trainer, and what they do.
    """

    def __init__(self, *args: Any, commands: Mapping[str, str], **kwargs: Any) -> None:
        self.commands = commands
        super().__init__(*args, **kwargs)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Add the Trainer's subcommands, and names and texts of those that run without one."""
        super()._add_subcommands(parser, **kwargs)
        action = parser._subcommands_action
        assert action is not None
        for choice in action._choices_actions:
            choice.help = TRAINER[choice.dest]
        for name, text in self.commands.items():
            action.add_subcommand(name, LowBitParser(description=text), help=text)

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
        said = list(_said(args))  # reads the files first, and says more of what is wrong in them
        self.says_quant = any(key.partition(".")[0] == "quant" for key in said)
        self.says_options = any(key.startswith("quant.scheme.") for key in said)
        self.config = parser.parse_args(resolve_words(args))

    def _parse_ckpt_path(self) -> None:
        """Take the model's options from the checkpoint, as Lightning's own does of files that a CLI has trained."""
        section = self.config[self.config.subcommand]
        self.checkpoint = _read_checkpoint(section.get("ckpt_path"), section.get("weights_only") is not False)
        trained = read_spec(self.checkpoint) if "state_dict" in self.checkpoint else None
        if trained is not None and section.quant.scheme == FLOAT:
            raise ConfigError(
                f"quant.scheme: got 'float', and {section.ckpt_path} was trained with {trained['scheme']!r}. Leave "
                "quant.scheme out, or name that scheme."
            )
        options = {k: v for k, v in self.checkpoint.get("hyper_parameters", {}).items() if k != "_instantiator"}
        if options:
            name = options.pop("_class_path", section.model.class_path)
            model = {"class_path": name, "dict_kwargs": options}
            self.config = self.parser.parse_object({self.config.subcommand: {"model": model}}, self.config)

    def instantiate_classes(self) -> None:
        """Build what is configured; a scheme's or a callback's own refusal comes without the parser's around it."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, REFUSALS):
                cause = cause.__cause__
            raise error if cause is None else cause from None
        loader = LOADERS[str(self.subcommand)]
        if self.datamodule is None and not is_overridden(loader, self.model):
            raise ConfigError(f"--data: expected, and {type(self.model).__name__} has no {loader}.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with `QuantCallback` first among its callbacks.

        Raises:
            ConfigError: ``trainer.callbacks`` names a second `QuantCallback`.
        """
        config = self.config_init[self.subcommand]
        if self.subcommand != "fit":
            self.save_config_callback = None  # the config.yaml that lies there is that of the training
            config.trainer.logger = False if config.trainer.logger is None else config.trainer.logger
        given = config.trainer.callbacks or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if any(isinstance(callback, QuantCallback) for callback in callbacks):
            raise ConfigError(
                "trainer.callbacks: a QuantCallback stands there, and the key quant makes one already. "
                "Move its arguments under quant."
            )
        if config.quant.scheme != FLOAT:
            # First, so that callbacks that copy or prune the network meet the converted one.
            scheme = config.quant.scheme
            options = {**config.quant.as_dict(), "scheme": scheme if self.says_options else _name_if_default(scheme)}
            if self.subcommand != "fit":
                options |= {} if self.says_quant else _as_trained(self.checkpoint)
                options["init_from"] = None if self.checkpoint else options["init_from"]  # its weights come behind
            callbacks.insert(0, QuantCallback(**options))
        if self.subcommand == "predict" and config.get("output") is None:
            rank_zero_info("predict: --output FILE.npy keeps what it gives; without, nothing is written")
        if config.get("output") is not None:
            if not Path(config.output).parent.is_dir():
                raise ConfigError(f"--output {config.output}: expected the path of a file, in a folder that exists.")
            callbacks.append(PredictionFile(config.output))
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (ValueError, TypeError) as error:
            if isinstance(error, REFUSALS):
                raise
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error


class WaitingCLI(LowBitCLI):
    """`LowBitCLI` up to where it has read the words of a fit; ``build`` goes on."""

    def instantiate_classes(self) -> None:
        """Not before ``build``: it draws random numbers."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def build(self) -> dict[str, Any]:
        """Seed, model, data and Trainer, in the order in which ``fit`` makes them; gives fit's arguments."""
        self._set_seed()
        super().instantiate_classes()
        arguments: dict[str, Any] = self._prepare_subcommand_kwargs("fit")
        return arguments

    @property
    def scheme(self) -> Any:
        return self.config.fit.quant.scheme


def run(cls: type[_C], words: Sequence[str], commands: Mapping[str, str] | None = None, **parser: Any) -> _C:
    """A command line of the Trainer's, parsed and, by `LowBitCLI`, run.

    Args:
        cls: what parses it.
        words: the command first.
        commands: further ones for the help, and what they do.
        parser: arguments of the parser.
    """
    set_loader(LOADER, load_yaml, exceptions=(yaml.YAMLError,))
    return cls(
        args=list(words),
        commands=commands or {},
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=LowBitParser,
        parser_kwargs={
            **{name: {"description": text, "parser_mode": LOADER} for name, text in TRAINER.items()},
            "prog": "lightning-lowbit",
            "parser_mode": LOADER,
            **parser,
        },
        seed_everything_default=0,
        # A second run without a logger writes its config.yaml over the first one's.
        save_config_kwargs={"overwrite": True},
    )


def _name_if_default(scheme: Any) -> Any:
    """The name of a scheme whose options all have their defaults, else ``scheme`` itself.

    A callback with a bare name takes the options from the checkpoint that it continues; written in full, as
    the parser hands them over, the defaults would contradict a checkpoint with other ones.
    """
    cls = type(scheme)
    if isinstance(scheme, Scheme) and not requires_options(cls) and scheme == cls():  # what stands for others is spent
        name = cls.name or import_path(cls)
        return name if find(name) is cls else scheme
    return scheme


def _said(words: list[str]) -> Iterator[str]:
    """Dotted keys that a command line, or a file that it names, gives; of a scheme's ``init_args`` each."""
    for option, value in itertools.pairwise((*words, "")):
        name, equals, given = option.partition("=")
        yield name.removeprefix("--")
        file = Path(given if equals else value)
        if name in ("-c", "--config") and (equals or not value.startswith("-")):
            content = read_config(file)
            section = content.get(words[0])
            yield from _keys({**content, **(section if isinstance(section, dict) else {})})
        elif name == "--quant" and file.is_file():
            yield from _keys({"quant": read_config(file)})


def _keys(content: dict[Any, Any]) -> Iterator[str]:
    for key, value in content.items():
        yield str(key)
        quant = str(key) == "quant" or str(key).startswith("quant.")
        if quant and isinstance(value, dict):
            yield from (f"{key}.{below}".replace(".init_args", "") for below in _keys_of_scheme(value))
        elif str(key) == "quant" and isinstance(value, str) and Path(value).is_file():
            yield from _keys({"quant": read_config(Path(value))})


def _keys_of_scheme(section: dict[Any, Any]) -> Iterator[str]:
    for key, value in section.items():
        yield str(key)
        if key in ("scheme", "init_args") and isinstance(value, dict):
            yield from (
                f"{key}.{below}" for below in _keys_of_scheme(value) if below not in ("class_path", "init_args")
            )


def _read_checkpoint(path: Any, weights_only: bool) -> dict[str, Any]:
    """A checkpoint's content; {} for none, and for what only the Trainer reads: a folder, an address, "best"."""
    if not isinstance(path, str) or Path(path).is_dir() or ":" in path or path in ("best", "last", "hpc"):
        return {}
    if not Path(path).is_file():
        raise ConfigError(f"--ckpt_path {path}: no such file.")
    check_checkpoint_file(path, "--ckpt_path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=weights_only)
    except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, OSError) as error:
        raise ConfigError(
            f"--ckpt_path {path}: it is no checkpoint of tensors and plain types. One with other objects, that you "
            "trust: --weights_only false."
        ) from error
    return content if isinstance(content, dict) else {}


def _as_trained(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Scheme and layers of a low-bit checkpoint, as arguments of `QuantCallback`; none of another."""
    spec = read_spec(checkpoint) if "state_dict" in checkpoint else None
    return {} if spec is None else {"scheme": read_scheme(spec), "include": list(spec["layers"])}
