"""What a fit prints behind its last batch: the network in low bits, what it cost, where its integers are."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_lowbit.modules.base import Tally, switch_of
from lightning_lowbit.modules.update import UpdateRule
from lightning_lowbit.plugins.integer_run import run_notes
from lightning_lowbit.reports.summary import print_report
from lightning_lowbit.reports.table import setbacks, wrapped

__all__ = ["report_run"]

_RECURRENT = {"RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"}


def report_run(
    trainer: Any,
    module: nn.Module,
    metrics: Mapping[str, Mapping[str, float]],
    tally: Tally | None,
    rule: UpdateRule | None,
) -> None:
    """Print the report of a run, and how to get the integers of what was trained."""
    # A live progress bar would break the lines and print itself once more below; it ends at the fit's end anyway.
    getattr(trainer.progress_bar_callback, "_stop_progress", int)()
    print_report(module, metrics, tally, run_notes(module, rule))
    if fallen := setbacks(metrics):
        print("", *wrapped(fallen), sep="\n")
    print(*_integers(trainer, module), sep="\n")


def _integers(trainer: Any, module: nn.Module) -> Iterator[str]:
    """The next step, as lines to paste; nothing where no program can hold the network."""
    conversion = switch_of(module).conversion
    if conversion.uncovered or _RECURRENT & set(conversion.float_by_nature):
        return
    saved = getattr(trainer.checkpoint_callback, "best_model_path", "")
    # Not trainer.log_dir, which all processes must ask for together.
    places = [getattr(trainer.logger, name, None) for name in ("log_dir", "save_dir")]
    config = Path(next((place for place in places if place), trainer.default_root_dir), "config.yaml")
    from_cli = any(type(callback).__name__ == "SaveConfigCallback" for callback in trainer.callbacks)
    yield ""
    if from_cli and config.is_file() and saved and Path(saved).is_file():
        yield "its integers:"
        yield f"  lightning-lowbit export --config {_short(config)} \\"
        yield f"    --ckpt {_short(Path(saved))} \\"
        yield f"    --to program --output {type(module).__name__.lower()}"
    else:
        example = "" if getattr(module, "example_input_array", None) is not None else ", batch"
        yield f'its integers: lightning_lowbit.lower(model{example}).save("{type(module).__name__.lower()}.lowbit")'


def _short(path: Path) -> str:
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
