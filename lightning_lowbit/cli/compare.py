"""``compare``: fit one network under several schemes, each as ``fit`` would, and put the results side by side."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lowbit.cli.compare_rows import Asked, fit_row, parsed, quiet
from lightning_lowbit.cli.settings import FLOAT
from lightning_lowbit.cli.step_times import Fitted, ratios
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.reports.comparison import SUFFIXES, Comparison, Trial, checked_output, outcome

__all__ = ["COMPARE_HELP", "compare"]

COMPARE_HELP = "Fit one network under several schemes and compare accuracy, size, step time and exactness in one table."

_EPILOG = """Every other option is one of fit: --trainer.max_epochs 5, --model.lr 0.01, --quant.start 0.5. Rows start
from the same seed, with the same data and Trainer; each writes the logs and checkpoints that its fit writes."""
_ROUNDS = 10  # of timed steps


def compare(words: list[str]) -> int:
    """Run ``lightning-lowbit compare``.

    Returns:
        exit status: 0, or 1 where a row was refused or the run was interrupted.
    Raises:
        ConfigError: nothing to compare, or a file that cannot be written; before anything is trained.
    """
    args, rest = _parser().parse_known_args(words)
    outputs = [checked_output(path) for path in args.output]
    with tempfile.TemporaryDirectory(prefix="lowbit-compare-") as folder:
        found, complete = _run(_asked(args, rest, Path(folder)), args)
    if not found.trials:
        return 1
    found.show()
    written = [_written(found, path) for path in outputs]
    return int(not (found.ok and complete and all(written)))


def _written(found: Comparison, path: Path) -> bool:
    """Whether a file could be written; a long run is not lost for one that could not."""
    try:
        found.save(path)
    except (ConfigError, OSError) as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return False
    print(f"written: {path}")
    return True


def _parser() -> argparse.ArgumentParser:
    # Not jsonargparse's: what it does not know is handed on to the parser of fit.
    parser = argparse.ArgumentParser(
        prog="lightning-lowbit compare", description=COMPARE_HELP, epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="FILE",
        help="A YAML file of fit. Without --schemes every file is a row, with its own quant section.",
    )  # fmt: skip
    parser.add_argument(
        "--schemes", nargs="+", default=[], metavar="SCHEME",
        help="A row each, of the same files: float, or quant.scheme with options behind colons, as in tqt:bits=4 or "
        "tqt:bits=4:operand_bits=8.",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help="seed_everything of each trial.")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--init_from", metavar="FILE", help="Float weights that every row starts from, float too.")
    start.add_argument("--from_float", action="store_true", help="Fit the float row first; others start from it.")
    parser.add_argument("--metric", metavar="NAME", help="Of validation; else the first that is called an accuracy.")
    parser.add_argument(
        "--step_rounds", type=int, default=_ROUNDS, metavar="N", help="Timed steps of each row; 0 times none."
    )
    parser.add_argument(
        "--output", nargs="+", default=[], metavar="FILE", help=f"Files to write: {', '.join(SUFFIXES)}."
    )
    return parser


def _asked(args: argparse.Namespace, rest: Sequence[str], folder: Path) -> list[Asked]:
    """The trials in the order in which they run, every one of them parsed before the first is trained."""
    rows, first = _rows(args, rest), None
    if args.from_float:
        first = next((name for name, words in rows.items() if _parsed(name, words).scheme == FLOAT), None)
        if first is None and not args.schemes:
            raise ConfigError("--from_float: no --config has quant.scheme: float. Give one that does.")
        first = first or FLOAT
        rows = {first: rows.get(first) or _words(FLOAT, args.config, rest), **rows}
    asked = []
    for seed in dict.fromkeys(args.seeds) or [None]:
        weights = folder / f"float-{seed}.pt"
        for name, words in rows.items():
            own = name == first or not (args.from_float or args.init_from)  # weights that it is built with
            more = [] if seed is None else [f"--seed_everything={seed}"]
            more += [] if own else [f"--quant.init_from={args.init_from or weights}"]
            start = "" if own else args.init_from or f"the row {first}"
            asked.append(Asked(name, _parsed(name, [*words, *more]), start, weights if name == first else None))
    return asked


def _parsed(name: str, words: list[str]) -> Any:
    """As `parsed`; what is wrong is said to be of this row."""
    try:
        return parsed(words)
    except SystemExit:
        print(f"That is the row {name}. What compare itself takes: lightning-lowbit compare --help", file=sys.stderr)
        raise


def _rows(args: argparse.Namespace, rest: Sequence[str]) -> dict[str, list[str]]:
    """Name -> words of fit."""
    if args.init_from is not None and not Path(args.init_from).is_file():
        raise ConfigError(f"--init_from {args.init_from}: no such file.")
    for file in args.config:
        if not Path(file).is_file():
            raise ConfigError(f"--config {file}: no such file.")
    if args.schemes:
        return {scheme: _words(scheme, args.config, rest) for scheme in args.schemes}
    if len(args.config) < 2:
        raise ConfigError(
            f"compare: got {len(args.config)} --config and no --schemes. Name the schemes, as in --schemes float tqt "
            "f8net, or give a --config for every row."
        )
    stems = [Path(file).stem for file in args.config]
    names = stems if len(set(stems)) == len(stems) else args.config
    return {name: ["--config", file, *rest] for name, file in zip(names, args.config, strict=True)}


def _words(scheme: str, configs: Sequence[str], rest: Sequence[str]) -> list[str]:
    """Of one row: ``tqt:bits=4`` is ``--quant.scheme=tqt --quant.scheme.bits=4``."""
    name, *options = scheme.split(":")
    for option in options:
        if "=" not in option:
            raise ConfigError(f"--schemes {scheme}: got {option!r}, expected NAME=VALUE, as in {name}:bits=4.")
        parts = re.split(r",\s*(?=[A-Za-z_]\w*=)", option)
        if len(parts) > 1:
            apart = scheme.replace(option, ":".join(parts))
            raise ConfigError(f"--schemes {scheme}: got a comma between options, expected a colon: {apart}")
    files = [word for file in configs for word in ("--config", file)]
    return [*files, *rest, f"--quant.scheme={name}", *(f"--quant.scheme.{option}" for option in options)]


def _run(asked: Sequence[Asked], args: argparse.Namespace) -> tuple[Comparison, bool]:
    """The trials that ended, and whether all of them did."""
    done: list[Trial] = []
    fitted: dict[str, Fitted] = {}
    base, complete = None, True
    times: tuple[dict[str, float], dict[str, str]] = {}, {}
    try:
        for number, one in enumerate(asked, 1):
            print(f"[{number}/{len(asked)}] {one.what}", end=" ", flush=True)
            trial, run = fit_row(one)
            done.append(trial)
            pace = "" if trial.epoch_seconds is None else f", {trial.epoch_seconds:.2f} s an epoch"
            print(f"{outcome(trial, args.metric)}{pace}", flush=True)
            if run is not None and trial.name not in fitted and args.step_rounds > 0:
                fitted[trial.name] = run
                base = trial.name if base is None and one.cli.scheme == FLOAT else base
        if base is not None:
            with quiet():
                times = ratios(fitted, base, args.step_rounds)
    except KeyboardInterrupt:
        print("interrupted")
        complete = False
    found = Comparison(tuple(done), f"Comparison: {asked[0].model}", args.metric)
    return found.with_steps(*times), complete
