"""What the commands beside the Trainer's read: a trained network, and its batches."""

from __future__ import annotations

import inspect
import json
import pickle
import pydoc
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import instantiate_module
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_lowbit.cli.parser import LowBitParser
from lightning_lowbit.cli.settings import read_config, scheme_class
from lightning_lowbit.errors import ConfigError, InvariantError, UnsupportedModelError
from lightning_lowbit.export.program import ProgramError
from lightning_lowbit.plugins.loading import load_from_checkpoint

__all__ = [
    "REFUSALS",
    "STAGES",
    "add_network",
    "batches",
    "batches_of",
    "first_batch",
    "given_options",
    "line_of",
    "network",
    "told",
    "transferred",
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
    parser.add_argument(
        "--quant.scheme", type=str,
        help="Class path of a scheme of your own, which the checkpoint names and does not import.",
    )  # fmt: skip


def with_config(words: list[str]) -> list[str]:
    """Words with the model and the data of every ``--config FILE`` in its place."""
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option not in ("-c", "--config"):
            found.append(word)
            continue
        name = value if equals else next(rest, "")
        if not name:
            raise ConfigError("--config: expected a file behind it.")
        for key, given in read_config(Path(name)).items():
            if str(key).partition(".")[0] in ("model", "data") and given is not None:
                found.append(f"--{key}={given if isinstance(given, str) else json.dumps(given)}")
            elif path := _scheme_path(key, given):
                found.append(f"--quant.scheme={path}")
    return found


def _scheme_path(key: Any, given: Any) -> str:
    """The class path of a scheme with no name of its own, where a key of a file of fit has one."""
    if key == "quant" and isinstance(given, dict):
        key, given = "quant.scheme", given.get("scheme")
    if isinstance(given, dict):
        given = given.get("class_path")
    return given if key == "quant.scheme" and isinstance(given, str) and "." in given else ""


def network(args: Any) -> LightningModule:
    """The trained network, in evaluation on the CPU; options that nobody gives are the checkpoint's."""
    if not Path(args.ckpt).is_file():
        raise ConfigError(f"--ckpt {args.ckpt}: no such file.")
    if args.get("quant.scheme") is not None:
        scheme_class(args["quant.scheme"])
    cls: Any = pydoc.locate(args.model.class_path)  # the parser has imported it
    try:
        module: LightningModule = load_from_checkpoint(cls, args.ckpt, "cpu", **given_options(args.model))
        return module.eval()
    except (InvariantError, *REFUSALS):
        raise
    except (pickle.UnpicklingError, EOFError) as error:
        raise ConfigError(f"--ckpt {args.ckpt}: it is no checkpoint of tensors and plain types.") from error
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        _require_class(args.ckpt, cls, args.model.class_path)
        raise ConfigError(
            f"--ckpt {args.ckpt}: it does not load into --model {cls.__name__}: {line_of(error)} Give the class and "
            "the options (--model.NAME VALUE) of the training."
        ) from error


def _require_class(path: str, cls: type, given: str) -> None:
    """ConfigError where a checkpoint that does not load is none, or names another class."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        told = str(checkpoint.get("hyper_parameters", {}).get("_class_path") or "")
    except Exception as error:  # whatever bytes that are no checkpoint lead to
        raise ConfigError(
            f"--ckpt {path}: it is no checkpoint that torch.load reads. Give a file that the training saved."
        ) from error
    if told and told not in (given, f"{cls.__module__}.{cls.__qualname__}"):
        raise ConfigError(f"--ckpt {path}: it is of {told}, got --model {given}. Give --model {told}.")


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
    data: Any = None
    if args.get("data") is not None:
        config = {"_class_path": args.data.class_path, **given_options(args.data)}
        data = instantiate_module(LightningDataModule, config)
    otherwise = "--data" if data is None else "--split test, predict or train"
    return batches_of(module, data, args.get("split") or "val", otherwise)


def batches_of(module: Any, data: Any, split: str, otherwise: str = "another --split") -> Iterator[Any]:
    """Batches as the forward of ``module`` gets them.

    Args:
        data: a data module; None takes the module's own loaders.
        split: train, val, test or predict.
        otherwise: what to give where there is no such loader.
    """
    source = module if data is None else data
    source.prepare_data()
    source.setup(STAGES[split])
    try:
        loaders = getattr(source, f"{split}_dataloader")()
    except MisconfigurationException as error:
        raise ConfigError(f"{type(source).__name__}: it has no {split}_dataloader. Give {otherwise}.") from error
    for number, loader in enumerate(loaders if isinstance(loaders, (list, tuple)) else [loaders]):
        for batch in loader:
            yield transferred(batch, number, module, data)


def transferred(batch: Any, loader: int, module: Any, data: Any) -> Any:
    """As the hooks around the transfer to a device make it: the data module's where it has its own."""
    for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
        owner = data if data is not None and is_overridden(hook, data) else module
        batch = getattr(owner, hook)(batch, loader)
    return batch


def given_options(section: Any) -> dict[str, Any]:
    """The options of a class that were given, without its defaults."""
    options = section.get("init_args")
    return {} if options is None else dict(options.as_dict())


def told(make: Callable[[], Iterable[str]]) -> int:
    """Print what a command has written; its exit status: 1 where it is refused, with the reason on stderr."""
    try:
        lines = make()
    except (*REFUSALS, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*lines, sep="\n")
    return 0


def line_of(error: Exception) -> str:
    """The first words of an error of somebody else's."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.')}."
