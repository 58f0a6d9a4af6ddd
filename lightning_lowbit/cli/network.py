"""What the commands beside the Trainer's read: a trained network, and its batches."""

from __future__ import annotations

import inspect
import itertools
import json
import pickle
import pydoc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import instantiate_module

from lightning_lowbit.cli.parser import LowBitParser
from lightning_lowbit.errors import ConfigError, InvariantError, UnsupportedModelError
from lightning_lowbit.export.program import ProgramError
from lightning_lowbit.plugins.loading import load_from_checkpoint

__all__ = [
    "REFUSALS",
    "STAGES",
    "add_network",
    "batches",
    "first_batch",
    "given_options",
    "line_of",
    "network",
    "with_config",
]

REFUSALS = (ConfigError, UnsupportedModelError, ProgramError)
STAGES = {"val": "validate", "test": "test", "predict": "predict", "train": "fit"}  # what a Trainer's setup is told


def add_network(parser: LowBitParser, required: bool = True) -> None:
    parser.add_argument(
        "--config", action="append", type=str, help="A YAML file of fit: its model and its data are taken."
    )
    parser.add_argument("--ckpt", "--ckpt_path", type=str, required=required, help="The checkpoint of the training.")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True, required=required)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)


def with_config(words: list[str]) -> list[str]:
    """Words with the model and the data of every ``--config FILE`` in its place."""
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option not in ("-c", "--config"):
            found.append(word)
            continue
        file = Path(value if equals else next(rest, ""))
        if not file.is_file():
            raise ConfigError(f"--config {file}: no such file.")
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {file}: no YAML: {line_of(error)}") from error
        for key, given in (content if isinstance(content, dict) else {}).items():
            if str(key).partition(".")[0] in ("model", "data") and given is not None:
                found.append(f"--{key}={given if isinstance(given, str) else json.dumps(given)}")
    return found


def network(args: Any) -> LightningModule:
    """The trained network, in evaluation on the CPU; options that nobody gives are the checkpoint's."""
    if not Path(args.ckpt).is_file():
        raise ConfigError(f"--ckpt {args.ckpt}: no such file.")
    cls: Any = pydoc.locate(args.model.class_path)  # the parser has imported it
    try:
        module: LightningModule = load_from_checkpoint(cls, args.ckpt, "cpu", **given_options(args.model))
        return module.eval()
    except (InvariantError, *REFUSALS):
        raise
    except (pickle.UnpicklingError, EOFError) as error:
        raise ConfigError(f"--ckpt {args.ckpt}: it is no checkpoint of tensors and plain types.") from error
    except (LookupError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"--ckpt {args.ckpt}: it does not load into --model {cls.__name__}: {line_of(error)} Give the class and "
            "the options (--model.NAME VALUE) of the training."
        ) from error


def first_batch(args: Any, module: LightningModule) -> tuple[Any, ...]:
    """The forward's arguments in the first batch: as many of its parts as the forward must have."""
    batch = next(iter(batches(args, module)), None)
    if batch is None:
        raise ConfigError(f"--data {args.data.class_path}: it gives no batch. Give --input_shape instead.")
    if not isinstance(batch, (list, tuple)):
        return (batch,)
    wanted = inspect.signature(module.forward).parameters.values()
    needed = [p for p in wanted if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(batch[: max(1, len(needed))])


def batches(args: Any, module: LightningModule) -> Iterator[Any]:
    """Batches of ``--data``, else of the module's own loaders."""
    source: Any = module
    if args.get("data") is not None:
        config = {"_class_path": args.data.class_path, **given_options(args.data)}
        source = instantiate_module(LightningDataModule, config)
    split = args.get("split") or "val"
    source.prepare_data()
    source.setup(STAGES[split])
    try:
        loaders = getattr(source, f"{split}_dataloader")()
    except MisconfigurationException as error:
        where = "--split test, predict or train" if args.get("data") is not None else "--data"
        raise ConfigError(f"{type(source).__name__}: it has no {split}_dataloader. Give {where}.") from error
    several: Iterable[Any] = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    return itertools.chain.from_iterable(several)


def given_options(section: Any) -> dict[str, Any]:
    """The options of a class that were given, without its defaults."""
    options = section.get("init_args")
    return {} if options is None else dict(options.as_dict())


def line_of(error: Exception) -> str:
    """The first words of an error of somebody else's."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.')}."
