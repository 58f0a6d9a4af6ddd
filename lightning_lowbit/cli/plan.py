"""``plan``: bits of each layer under a budget, as a file to edit and to pass to ``fit --quant``."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.cli.compare_rows import parsed, quiet
from lightning_lowbit.cli.network import STAGES, batches_of
from lightning_lowbit.cli.settings import FLOAT
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.plugins.checkpoint import initialize_from
from lightning_lowbit.reports.bit_plan import BitPlan
from lightning_lowbit.reports.bit_search import plan_bits

__all__ = ["PLAN_HELP", "plan"]

PLAN_HELP = "Choose the bits of each layer under a budget, and write them as a file for fit --quant."

_EPILOG = """Every other option is one of fit: --config FILE, --model, --data, --quant.scheme tqt, and --quant.init_from
for the float weights. One of --size and --bit_ops is needed."""


def plan(words: list[str]) -> int:
    """Run ``lightning-lowbit plan``.

    Returns:
        exit status 0.
    Raises:
        ConfigError: no budget, or one that cannot be kept; a scheme without widths of layers; no batch.
    """
    args, rest = _parser().parse_known_args(words)
    path = Path(args.output)
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--output {path}: expected the path of a file, in a folder that exists.")
    if args.batches < 1:
        raise ConfigError(f"--batches {args.batches}: expected 1 or more.")
    found, start = _planned(args, rest)
    found.show()
    found.save(path, start)
    print(f"\n{path}: edit it, and pass it on with fit ... --quant {path}{start}")
    return 0


def _parser() -> argparse.ArgumentParser:
    # Not jsonargparse's: what it does not know is handed on to the parser of fit.
    parser = argparse.ArgumentParser(
        prog="lightning-lowbit plan", description=PLAN_HELP, epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("--size", type=_number, metavar="N", help="Bytes of parameters, or a share of float32: 0.1.")
    parser.add_argument(
        "--bit_ops", type=_number, metavar="N",
        help="Products x bits of the weight x bits of the input, or a share of those with 8 x 8 bits: 0.25.",
    )  # fmt: skip
    parser.add_argument(
        "--widths", nargs="+", type=int, default=[2, 4, 8], metavar="BITS", help="To choose from (2 4 8)."
    )
    parser.add_argument("--split", choices=list(STAGES), default="train", help="Whose batches are measured on (train).")
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="How many of them (4).")
    parser.add_argument("--output", default="plan.yaml", metavar="FILE", help="The file (plan.yaml).")
    return parser


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def _planned(args: argparse.Namespace, rest: list[str]) -> tuple[BitPlan, str]:
    """The plan, and the words that give a fit the weights that it was measured with."""
    cli = parsed(rest)
    if cli.scheme == FLOAT:
        raise ConfigError("quant.scheme: got 'float', expected a scheme with bits of layers, as in --quant.scheme tqt.")
    with quiet():
        arguments = cli.build()
        trainer: Any = cli.trainer
        quant = next(callback for callback in trainer.callbacks if isinstance(callback, QuantCallback))
        if quant.init_from is not None:
            initialize_from(quant.init_from, cli.model)
        else:
            name = type(cli.model).__name__
            print(f"weights: those that {name} is made with; --quant.init_from gives trained ones", file=sys.stderr)
        seen = list(itertools.islice(batches_of(cli.model, arguments["datamodule"], args.split), args.batches))
    found = plan_bits(
        cli.model, seen, quant.scheme, size=args.size, bit_ops=args.bit_ops, widths=args.widths,
        skip=quant.selection.skip, include=quant.selection.include,
    )  # fmt: skip
    return found, "" if quant.init_from is None else f" --quant.init_from {quant.init_from}"
