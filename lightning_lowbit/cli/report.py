"""``report``: what is known of a trained network, of its checkpoint and of its log, on one page."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_lowbit.cli.network import REFUSALS, STAGES, add_network, batches, line_of, network, told, with_config
from lightning_lowbit.cli.parser import LowBitParser
from lightning_lowbit.errors import ConfigError, InvariantError
from lightning_lowbit.export.lowering import lower
from lightning_lowbit.export.record import in_evaluation
from lightning_lowbit.modules.base import Tally, low_bit_modules, switch_of
from lightning_lowbit.plugins.checkpoint import KEY
from lightning_lowbit.reports.html import html_report
from lightning_lowbit.reports.plots import Log, new_figure, read_log, traced
from lightning_lowbit.reports.sensitivity import Sensitivity, sensitivity, split, unchanged
from lightning_lowbit.reports.summary import claims, summarize

__all__ = ["REPORT_HELP", "report"]

REPORT_HELP = "Write what is known of a trained network as one HTML page that stands alone."

_BATCHES = 8
_DRAWN = 2  # batches whose activations stand in histograms
_NEED_BATCHES = "saturation, activations, sensitivity"
_TRACES = ("saturation", "exponent", "log2_t")
_T = TypeVar("_T")


def report(words: list[str]) -> int:
    """Run ``lightning-lowbit report``: the page is written whole, or not at all.

    Returns:
        exit status: 0, or 1 where there is no page, with the reason on stderr.
    """
    args = _parser().parse_args(with_config(words), defaults=False)
    return told(lambda: _report(args))


def _parser() -> LowBitParser:
    parser = LowBitParser(prog="lightning-lowbit report", description=REPORT_HELP)
    add_network(parser)
    parser.add_argument("--split", choices=list(STAGES), help="Whose batches are run (val).")
    parser.add_argument("--batches", type=int, help=f"At most so many ({_BATCHES}).")
    parser.add_argument(
        "--log", type=str, help="metrics.csv of a CSVLogger with the values of QuantMonitor; else that of the "
        "checkpoint's own run, where there is one.",
    )  # fmt: skip
    parser.add_argument("--title", type=str, help="Of the page; else the model's class and its scheme.")
    parser.add_argument("--no_plots", action="store_true", help="Draw nothing; needs no matplotlib.")
    parser.add_argument("--output", type=str, help="The file (report.html).")
    return parser


def _report(args: Any) -> list[str]:
    path = _output(args.get("output") or "report.html", args.ckpt, args.get("log"))
    if args.get("batches", 1) < 1:
        raise ConfigError(f"--batches {args.batches}: expected 1 or more.")
    plots = not args.get("no_plots")
    if plots:
        new_figure(1.0)  # what is missing is better said now than behind all measurements
    left: dict[str, str] = {}
    log = _log(args.get("log"), args.ckpt, left) if plots else None
    module = network(args)
    if not any(True for _ in low_bit_modules(module)):
        raise ConfigError(
            f"--ckpt {args.ckpt}: a float network, expected one that was trained in low bits. Train it with "
            "fit --quant.scheme NAME, and give that checkpoint."
        )
    metrics = _metrics(args.ckpt, left)
    seen = _batches(args, module, left)
    tally = _tally(module, seen) if seen else None
    found = _sensitivity(module, seen, left) if seen else None
    program = _part(left, "integer program", lambda: lower(module, _example(module, seen)))
    html_report(
        module,
        path,
        title=args.get("title"),
        tally=tally,
        metrics=metrics,
        batches=seen[:_DRAWN] or None,
        sensitivity=found,
        log=log,
        program=program,
        plots=plots,
        left_out=left,
    )
    said = [*claims(module, summarize(module)), f"{path}: {path.stat().st_size:,} bytes"]
    return said + [f"left out: {name} ({why})" for name, why in left.items()]


def _output(output: str, ckpt: str, log: str | None) -> Path:
    path = Path(output)
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--output {output}: expected the path of a file, in a folder that exists.")
    for option, source in (("--ckpt", ckpt), ("--log", log)):
        if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
            raise ConfigError(f"--output {output}: that is what {option} names. Give another name.")
    return path


def _part(left: dict[str, str], name: str, make: Callable[[], _T]) -> _T | None:
    """A part of the page; None where it cannot be had, with the reason in ``left``."""
    try:
        return make()
    except REFUSALS as error:
        left[name] = str(error).removeprefix(f"{name}: ")
        return None


# -- what there is to read -------------------------------------------------------------------------------------------
def _log(given: str | None, ckpt: str, left: dict[str, str]) -> Log | None:
    """A log that was given is read or refused; the one beside the checkpoint is taken if it is any."""
    beside = Path(os.path.abspath(ckpt)).parent.parent / "metrics.csv"  # version_0/checkpoints/last.ckpt
    if given is not None:
        log: Log | None = read_log(given)
    elif beside.is_file():
        log = _part(left, "log", lambda: read_log(beside))
    else:
        left["log"] = "no metrics.csv of the checkpoint's run. Train with a CSVLogger and QuantMonitor, or give --log"
        return None
    if log is not None and not any(traced(log, metric) for metric in _TRACES):
        left["log"] = f"{given or beside.name} has no lowbit/SITE/METRIC. Train with QuantMonitor"
        return None
    return log


def _metrics(ckpt: str, left: dict[str, str]) -> Mapping[str, Mapping[str, float]] | None:
    """The module's own validation metrics by stage, which `QuantCallback` keeps with a run."""
    content = torch.load(ckpt, map_location="cpu", weights_only=True)
    record = content.get(KEY) or {}
    found: dict[str, dict[str, float]] = (record.get("run") or {}).get("metrics") or {}
    if not any(found.values()):
        left["metrics"] = "the checkpoint holds none: it has weights alone, or was saved before a validation"
        return None
    return found


def _batches(args: Any, module: LightningModule, left: dict[str, str]) -> list[Any]:
    split_of = args.get("split") or "val"
    if args.get("data") is None and not is_overridden(f"{split_of}_dataloader", module, LightningModule):
        left[_NEED_BATCHES] = "they need batches. Give --data"
        return []
    seen = list(itertools.islice(batches(args, module), args.get("batches") or _BATCHES))
    if not seen:
        raise ConfigError(f"--split {split_of}: it gives no batch. Give another one.")
    for number, batch in enumerate(seen):
        if _part(left, _NEED_BATCHES, lambda: split(module, batch, number)) is None:  # noqa: B023  # called at once
            return []
    return seen


def _tally(module: LightningModule, seen: Sequence[Any]) -> Tally:
    """How many values were saturated in these batches."""
    tally, switch = Tally(), switch_of(module)
    with unchanged(module), in_evaluation(module), torch.no_grad():
        switch.tally = tally
        for number, batch in enumerate(seen):
            arguments, _ = split(module, batch, number)
            try:
                module(*arguments)
            except (InvariantError, *REFUSALS):
                raise
            except Exception as error:  # of the user's forward
                raise ConfigError(
                    f"batch {number}: the forward of {type(module).__name__} fails on it: {line_of(error)} Give the "
                    "--data of the training."
                ) from error
    return tally


def _sensitivity(module: LightningModule, seen: Sequence[Any], left: dict[str, str]) -> Sensitivity | None:
    """With accuracy where labels are those of classes, else without."""
    why: dict[str, str] = {}
    found = _part(why, "sensitivity", lambda: sensitivity(module, seen))
    if found is None:
        found = _part(left, "sensitivity", lambda: sensitivity(module, seen, metrics=("sqnr", "cosine", "kl")))
        if found is not None:
            left["accuracy"] = why["sensitivity"]
    return found


def _example(module: LightningModule, seen: Sequence[Any]) -> Any:
    """What `lower` runs: a batch where there is one, else the module's own example."""
    return split(module, seen[0], 0)[0] if seen and module.example_input_array is None else None
