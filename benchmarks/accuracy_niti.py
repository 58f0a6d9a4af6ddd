"""Train a network in integers only (NITI), beside the same network in float: accuracies, epoch by epoch.

    python benchmarks/accuracy_niti.py --net mlp --epochs 30 --seeds 0 1 2
    python benchmarks/accuracy_niti.py --net lenet --data.root mnist --epochs 5
    python benchmarks/accuracy_niti.py --net vgg_small --data.root cifar10.zip --data.batch_size 256 --epochs 6
    python benchmarks/accuracy_niti.py --net resnet20 --data.root cifar10.zip --checkpoint resnet20-12fca82f.th

The learning rate is the float row's alone: integer updates have their own size, mu.
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

from lightning_lowbit import Niti, QuantCallback, TrainingCertificate


def run(row: str, data: LightningDataModule, args: argparse.Namespace) -> tuple[float, list[float], float]:
    """Train one row with one seed: accuracy before, after each epoch, and minutes of training."""
    model, timer, curve = network(args.net), Timer(), Curve()
    callbacks: list[Callback] = [timer, curve]
    quant = None
    if row == "niti":
        checkpoint = None if args.checkpoint is None else str(args.checkpoint)
        quant = QuantCallback(Niti(**args.niti), init_from=checkpoint)
        callbacks.append(quant)
        if args.certificate is not None:
            callbacks.append(TrainingCertificate(path=args.certificate))
    trainer = quiet_trainer(args.epochs, callbacks, args)
    before = fit(trainer, model, data, quant, args.checkpoint)
    return before, curve.values, timer.time_elapsed("train") / 60


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    parser = command_line(__doc__, "niti", '{"mu": [0, -1]}')
    parser.add_argument("--certificate", help="write hashes of the last integer run here")
    args = parsed(parser, argv)

    def seeded(row: str, seed: int) -> tuple[float, list[float], float]:
        if row == "niti":
            args.niti = {**args.niti, "seed": seed}
        return run(row, images(args, seed), args)

    results = over_seeds(args, seeded)
    if args.certificate is not None and "niti" in args.rows:
        print(f"\nCertificate of the integer run: {args.certificate}")
    return written(results, args.json)


if __name__ == "__main__":
    main()
