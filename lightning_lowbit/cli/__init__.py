"""The command line: Lightning's own, with the low-bit settings under one key, ``quant``.

::

    lightning-lowbit fit --config digits.yaml --quant.scheme tqt --quant.scheme.bits 4
    lightning-lowbit validate --config digits.yaml --ckpt_path last.ckpt
    lightning-lowbit predict --model DigitsCnn --data DigitsData --ckpt_path last.ckpt --output digits.npy
    lightning-lowbit export --model DigitsCnn --ckpt last.ckpt --to program c --output digits
    lightning-lowbit verify --program digits.lowbit --ckpt last.ckpt --model DigitsCnn --data DigitsData
    lightning-lowbit verify --certificate version_0/certificate.json version_1/certificate.json
    lightning-lowbit report --model DigitsCnn --data DigitsData --ckpt last.ckpt --output report.html
    lightning-lowbit compare --config digits.yaml --schemes float tqt f8net jacinto
    lightning-lowbit plan --config digits.yaml --quant.init_from float.pt --bit_ops 0.25 --output plan.yaml
    lightning-lowbit schemes tqt

``quant`` takes the arguments of `QuantCallback`; ``quant.scheme: float`` converts nothing, for a baseline
under the same file. Where nothing is said of ``quant``, validate, test and predict convert as the checkpoint says.
Needs the extra ``cli``.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_lowbit.callbacks
from lightning_lowbit.cli.compare import COMPARE_HELP, compare
from lightning_lowbit.cli.fit import LowBitCLI
from lightning_lowbit.cli.fit import run as run_trainer
from lightning_lowbit.cli.network import REFUSALS, line_of
from lightning_lowbit.cli.parser import DEMOS
from lightning_lowbit.cli.plan import PLAN_HELP, plan
from lightning_lowbit.cli.programs import EXPORT_HELP, VERIFY_HELP, export, verify
from lightning_lowbit.cli.report import REPORT_HELP, report
from lightning_lowbit.cli.schemes import SCHEMES_HELP, schemes

__all__ = ["LowBitCLI", "main"]

COMMANDS = {
    "export": (export, EXPORT_HELP),
    "verify": (verify, VERIFY_HELP),
    "report": (report, REPORT_HELP),
    "compare": (compare, COMPARE_HELP),
    "plan": (plan, PLAN_HELP),
    "schemes": (schemes, SCHEMES_HELP),
}
"""Those beside the Trainer's: called with the words behind their name, each gives its exit status."""

DESCRIPTION = (
    "Low-bit networks with PyTorch Lightning: train, export to integers, verify. "
    "First try: lightning-lowbit fit --model DigitsCnn --data DigitsData --quant.scheme tqt"
)


def main(args: list[str] | None = None) -> None:
    """Run the console script ``lightning-lowbit``.

    Args:
        args: the words after the program's name; None = those of this process.

    Raises:
        SystemExit: status 2 for a wrong command line or setting, with the reason on stderr; the status of a command
            beside the Trainer's: 1 of ``verify`` where something differs, of ``export`` and ``report`` where nothing is
            written, of ``compare`` where a row was refused.
    """
    words = (sys.argv[1:] if args is None else args) or ["--help"]
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # a user's own module lies there; last, so that it shadows nothing installed
    try:
        # Makes `model: DigitsCnn` a known name. Imported by name: demos stands above this file.
        importlib.import_module(DEMOS)
        for module in pkgutil.iter_modules(lightning_lowbit.callbacks.__path__):  # and `class_path: FraclenSchedule`
            importlib.import_module(f"{lightning_lowbit.callbacks.__name__}.{module.name}")
        if words[:1] and words[0] in COMMANDS:
            run, _ = COMMANDS[words[0]]
            raise SystemExit(run(words[1:]))
        texts = {name: text for name, (_, text) in COMMANDS.items()}
        with warnings.catch_warnings():
            # Lightning 2.6 under torch 2.13 says so in every run; nobody who reads it can do anything about it.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            run_trainer(LowBitCLI, words, texts, description=DESCRIPTION, version=_version())
    except (*REFUSALS, MisconfigurationException) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        print(f"error: --ckpt_path: it holds another network. {line_of(error)}", file=sys.stderr)
        raise SystemExit(2) from error


def _version() -> str:
    try:
        own = version("lightning-lowbit")
    except PackageNotFoundError:
        own = "(source tree)"
    return f"{own}, torch {torch.__version__}, lightning {version('lightning')}"
