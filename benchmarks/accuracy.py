"""What the accuracy measurements share: a row per way of training, several seeds, one table.

Networks and data are those of ``examples/``. Every row is an ordinary ``Trainer.fit`` of the same LightningModule,
which low-bit rows convert by one callback.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from cifar import CifarData
from classifiers import Classifier
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from mnist import MnistData
from resnet import LitResNet, load_public

from lightning_lowbit import QuantCallback
from lightning_lowbit.demos import DigitsCnn, DigitsData

# Of the float row, and of what a low-bit scheme leaves to the optimizer.
LEARNING_RATE = {"mlp": 0.1, "cnn": 0.1, "digits_bn": 0.02, "lenet": 0.05, "vgg_small": 0.02, "resnet20": 0.01}


@dataclass
class Result:
    """One row: accuracies in percent and minutes of training, per seed; ``epochs`` after each epoch."""

    before: list[float] = field(default_factory=list)
    epochs: list[list[float]] = field(default_factory=list)
    minutes: list[float] = field(default_factory=list)


class Curve(Callback):
    """Keeps and prints the validation accuracy of every epoch, in percent."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.values.append(100 * float(trainer.callback_metrics["val_acc"]))
        print(f"  epoch {trainer.current_epoch + 1}: {self.values[-1]:.2f}", flush=True)


def network(name: str) -> LightningModule:
    if name == "resnet20":
        return LitResNet(lr=LEARNING_RATE[name])
    if name == "digits_bn":
        return DigitsCnn(lr=LEARNING_RATE[name])
    return Classifier(name, lr=LEARNING_RATE[name])  # type: ignore[arg-type]  # one of its names


def images(args: argparse.Namespace, seed: int) -> LightningDataModule:
    if args.net in ("mlp", "cnn", "digits_bn"):
        return DigitsData(args.batch_size, seed)
    if args.net == "lenet":
        return MnistData(args.root, args.batch_size)
    return CifarData(args.root, args.batch_size, seed, args.cache)


def quiet_trainer(epochs: int, callbacks: list[Callback], args: argparse.Namespace) -> Trainer:
    """One device, nothing written, nothing printed but what the callbacks print."""
    return Trainer(
        max_epochs=epochs,
        limit_train_batches=args.steps_per_epoch,
        callbacks=callbacks,
        accelerator=args.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=args.progress,
        num_sanity_val_steps=0,
    )


def fit(
    trainer: Trainer, model: Any, data: LightningDataModule, quant: QuantCallback | None, float_weights: Path | None
) -> float:
    """Train; returns the accuracy before, in percent: of the float network as loaded, or of the calibrated one."""
    if quant is not None:
        trainer.fit(model, data)
        return 100 * float(quant.metrics["calibrated"]["val_acc"])
    if float_weights is not None:
        load_public(model, float_weights)
    before = float(trainer.validate(model, data, verbose=False)[0]["val_acc"])
    trainer.fit(model, data)
    return 100 * before


def over_seeds(
    args: argparse.Namespace, run: Callable[[str, int], tuple[float, list[float], float]]
) -> dict[str, Result]:
    """Run every row with every seed, say what came of it, and print the table."""
    # The data is in memory, where workers would only take cores from the network.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    results: dict[str, Result] = {}
    for row in args.rows:
        results[row] = Result()
        for seed in args.seeds:
            seed_everything(seed, verbose=False)
            before, epochs, minutes = run(row, seed)
            print(f"{row}, seed {seed}: {before:.2f} -> {epochs[-1]:.2f} in {minutes:.1f} min", flush=True)
            results[row].before.append(before)
            results[row].epochs.append(epochs)
            results[row].minutes.append(minutes)
    print(f"\n{table(results)}")
    return results


def table(results: dict[str, Result]) -> str:
    """Markdown: per row the mean over the seeds, the seeds themselves, and the distance to float."""
    lines = [
        "| training | before | after each epoch, mean | trained, mean | each seed | below float | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = mean(curve[-1] for curve in results["float"].epochs) if "float" in results else None
    for row, result in results.items():
        trained = [curve[-1] for curve in result.epochs]
        curve = [mean(values) for values in zip(*result.epochs, strict=True)]
        shown = " ".join(f"{value:.1f}" for value in (curve if len(curve) <= 10 else curve[:: len(curve) // 5]))
        gap = "" if reference is None else f"{reference - mean(trained):.2f}"
        seeds = " ".join(f"{value:.2f}" for value in trained)
        cells = row, f"{mean(result.before):.2f}", shown, f"{mean(trained):.2f}", seeds, gap
        lines.append("| " + " | ".join((*cells, f"{mean(result.minutes):.1f}")) + " |")
    return "\n".join(lines)


def command_line(doc: str | None, scheme: str, example: str) -> argparse.ArgumentParser:
    """What the examples that train from a network's name take; ``example`` is of the scheme's options."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=LEARNING_RATE, required=True, help="digits: mlp, cnn, digits_bn")
    parser.add_argument("--data.root", dest="root", help="folder with MNIST, or zip or folder with CIFAR-10")
    parser.add_argument("--data.cache", dest="cache", help="folder in which to keep the decoded images")
    parser.add_argument("--data.batch_size", dest="batch_size", type=int, default=64)
    parser.add_argument("--checkpoint", type=Path, help="of resnet20: a public .th file to start from")
    parser.add_argument("--rows", nargs="+", choices=("float", scheme), default=["float", scheme])
    parser.add_argument(f"--{scheme}", type=json.loads, default={}, help=f"its options as JSON: '{example}'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps_per_epoch", type=int, help="default all")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--progress", action="store_true", help="show a progress bar")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if args.root is None and args.net in ("lenet", "vgg_small", "resnet20"):
        parser.error(f"--net {args.net} needs --data.root")
    return args


def written(results: dict[str, Result], path: Path | None) -> dict[str, Result]:
    """The results, as JSON in a file too where one is named."""
    if path is not None:
        path.write_text(json.dumps({row: asdict(result) for row, result in results.items()}, indent=1))
    return results
