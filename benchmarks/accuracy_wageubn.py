"""Train a network at full 8 bits (WAGEUBN), beside the same network in float: accuracies, epoch by epoch.

    python benchmarks/accuracy_wageubn.py --net digits_bn --epochs 40 --seeds 0 1 2
    python benchmarks/accuracy_wageubn.py --net lenet --data.root mnist --epochs 5
    python benchmarks/accuracy_wageubn.py --net resnet20 --data.root cifar10.zip --checkpoint resnet20-12fca82f.th

Both rows are ordinary ``Trainer.fit`` calls on the same LightningModule, which the second converts by one callback.
Gradients of 8-bit layers are brought to one size, so that the learning rate alone is the size of their steps: theirs
is ``lr_scale`` times that of the float row.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from accuracy import (
    Curve,
    Result,
    command_line,
    fit,
    images,
    network,
    over_seeds,
    parsed,
    quiet_trainer,
    written,
)
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import Timer

from lightning_lowbit import QuantCallback, Wageubn

LR_SCALE = {"mlp": 10, "cnn": 10, "digits_bn": 50, "lenet": 8, "vgg_small": 10, "resnet20": 5}


def run(row: str, data: LightningDataModule, args: argparse.Namespace, seed: int) -> tuple[float, list[float], float]:
    """Train one row with one seed: accuracy before, after each epoch, and minutes of training."""
    model, timer, curve = network(args.net), Timer(), Curve()
    callbacks: list[Callback] = [timer, curve]
    quant = None
    if row == "wageubn":
        checkpoint = None if args.checkpoint is None else str(args.checkpoint)
        options = {"lr_scale": LR_SCALE[args.net], "seed": seed, **args.wageubn}
        quant = QuantCallback(Wageubn(**options), init_from=checkpoint, calibrate_batches=10)
        callbacks.append(quant)
    before = fit(quiet_trainer(args.epochs, callbacks, args), model, data, quant, args.checkpoint)
    return before, curve.values, timer.time_elapsed("train") / 60


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    args = parsed(command_line(__doc__, "wageubn", '{"e2": "flag16"}'), argv)
    return written(over_seeds(args, lambda row, seed: run(row, images(args, seed), args, seed)), args.json)


if __name__ == "__main__":
    main()
