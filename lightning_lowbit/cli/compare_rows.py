"""One row of a comparison: parsed and built as ``fit`` does it, fitted quietly, and judged."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import logging
import pydoc
import sysconfig
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.cli.fit import WaitingCLI, run
from lightning_lowbit.cli.network import REFUSALS, line_of, transferred
from lightning_lowbit.cli.settings import FLOAT
from lightning_lowbit.cli.step_times import Fitted
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.convert import is_converted
from lightning_lowbit.plugins.checkpoint import initialize_from
from lightning_lowbit.plugins.evaluation import validation_metrics
from lightning_lowbit.reports.comparison import Trial
from lightning_lowbit.reports.cost import float_bytes
from lightning_lowbit.reports.exactness import exactness
from lightning_lowbit.reports.summary import summarize

__all__ = ["Asked", "fit_row", "parsed", "quiet"]

_LIBRARIES = {Path(__file__).parents[1], Path(sysconfig.get_paths()["stdlib"])}
_INSTALLED = {"site-packages", "dist-packages"}
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning_utilities.core.rank_zero", "lightning_lowbit")


@dataclass(frozen=True)
class Asked:
    """A trial that is to be run.

    Attributes:
        name: of its row.
        cli: what `parsed` gave.
        start: what its weights are, in words.
        keep: file for its trained weights.
    """

    name: str
    cli: Any
    start: str = ""
    keep: Path | None = None

    @property
    def what(self) -> str:
        fit = self.cli.config.fit
        epochs = fit.trainer.max_epochs
        return f"{self.name}: seed {fit.seed_everything}" + f", {epochs} epochs:" * (epochs is not None)

    @property
    def model(self) -> str:
        return str(self.cli.config.fit.model.class_path).rpartition(".")[2]


def parsed(words: list[str]) -> WaitingCLI:
    """The command line of one fit, which waits for ``build``.

    Raises:
        SystemExit: it is wrong; the reason is on stderr.
    """
    with quiet():
        return run(WaitingCLI, ["fit", *words])


class _Watch(Callback):
    """Keeps what the last validation logged; a float network starts from ``init_from`` as others do."""

    def __init__(self, init_from: str | None) -> None:
        self.init_from = init_from
        self.metrics: dict[str, float] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.init_from is not None:
            initialize_from(self.init_from, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.metrics = validation_metrics(trainer)


def fit_row(asked: Asked) -> tuple[Trial, Fitted | None]:
    """Fit and judge one row.

    Returns:
        the trial, and Trainer and module behind the fit; None of those where it was refused.
    Raises:
        KeyboardInterrupt: by the user, in a fit too.
    """
    cli = asked.cli
    trial = functools.partial(Trial, asked.name, cli.config.fit.seed_everything, _options(asked))
    with quiet(record=True) as said:
        try:
            arguments = cli.build()
            trainer, module = cli.trainer, cli.model
            if trainer.world_size > 1:  # the processes of one fit would be there for the next one's
                raise ConfigError(f"trainer: {trainer.world_size} processes, compare fits in one. --trainer.devices 1")
            shown = (ProgressBar, ModelSummary)  # of the file's own callbacks too
            trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, shown)]
            watch = _Watch(cli.config.fit.quant.init_from if cli.scheme == FLOAT else None)
            trainer.callbacks.append(watch)
            start = time.perf_counter()
            trainer.fit(**arguments)
            seconds = (time.perf_counter() - start) / max(1, trainer.current_epoch)
        except SystemExit as error:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from error
        except REFUSALS as error:
            return trial(refused=str(error)), None
        except Exception as error:  # of the user's code, or of a library's
            return trial(refused=f"{line_of(error)[:-1]}{_place(error)}."), None
        if asked.keep is not None:
            torch.save(module.state_dict(), asked.keep)
        quant = next((callback for callback in trainer.callbacks if isinstance(callback, QuantCallback)), None)
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        return trial(
            metrics={"trained": watch.metrics} if quant is None else quant.metrics,
            epoch_seconds=seconds,
            checkpoint=best,
            **_judged(trainer, module, _warned(said)),
        ), (trainer, module)


def _judged(trainer: Any, module: Any, warned: Mapping[str, str]) -> dict[str, Any]:
    """Size and exactness, as fields of a `Trial`."""
    if not is_converted(module):
        stored = float_bytes(module)
        return {"size": stored, "float_size": stored, "why": {"does not repeat": "gradients are float", **warned}}
    summary = summarize(module)
    loaders = trainer.val_dataloaders if trainer.val_dataloaders is not None else trainer.train_dataloader
    size = {"size": summary.size, "float_size": summary.float_size}
    try:
        batch, _, number = next(iter(CombinedLoader(loaders, "sequential")))
        found = exactness(module, transferred(batch, number, module, trainer.datamodule))
    except Exception as error:  # of the user's forward: the row is not lost for it
        words = f"could not be tried: {line_of(error)[:-1]}{_place(error)}."
        return {**size, "exact": False, "why": {"not exact": words, **warned}}
    why = {"not exact": found.why_not, "does not repeat": found.differs, **warned}
    return {
        **size,
        "exact": found.exact,
        "repeats": found.repeats,
        "why": {what: words for what, words in why.items() if words},
    }


def _warned(said: Sequence[warnings.WarningMessage]) -> dict[str, str]:
    """Warnings of a fit, each once, as an entry of `Trial.why`."""
    words = dict.fromkeys(" ".join(str(warning.message).split()) for warning in said)
    return {"warned": " ".join(words)} if words else {}


def _place(error: Exception) -> str:
    """Where in the user's own code an error came from; "" where it came from none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        installed = _INSTALLED & {*path.parts} or not _LIBRARIES.isdisjoint(path.parents)
        if path.is_file() and not installed:
            return f" ({path.name}:{frame.lineno} in {frame.name})"
    return ""


def _options(asked: Asked) -> str:
    """What stands under ``quant`` and is no default."""
    quant = asked.cli.config.fit.quant
    given = {}
    if quant.scheme != FLOAT:
        cls: Any = pydoc.locate(quant.scheme.class_path)  # the parser has imported it
        given = _others(quant.scheme.get("init_args"), {f.name: _default(f) for f in dataclasses.fields(cls)})
        own = inspect.signature(QuantCallback).parameters
        given |= _others(quant, {name: parameter.default for name, parameter in own.items() if name != "scheme"})
    if asked.start:
        given["init_from"] = asked.start
    return ", ".join(f"{name}={value}" for name, value in given.items())


def _others(section: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a section that are not the defaults; the parser makes lists of tuples."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    items = {} if section is None else dict(section.items())
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in items.items()}
    return {name: value for name, value in found.items() if name in plain and value != plain[name]}


def _default(entry: dataclasses.Field[Any]) -> Any:
    made = entry.default_factory
    return entry.default if made is dataclasses.MISSING else made()


@contextlib.contextmanager
def quiet(record: bool = False) -> Iterator[list[warnings.WarningMessage]]:
    """Nothing of Lightning's is printed; warnings that are not its own are, or with ``record`` are kept instead."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(record=record) as said, contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", module=r"(lightning|torch|jsonargparse)\.")
            yield [] if said is None else said
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
