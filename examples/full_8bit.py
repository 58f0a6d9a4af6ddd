"""Train a network at full 8 bits (WAGEUBN), beside the same network in float: accuracies, epoch by epoch.

    python examples/full_8bit.py --net digits_bn --epochs 40 --seeds 0 1 2
    python examples/full_8bit.py --net lenet --data.root mnist --epochs 5
    python examples/full_8bit.py --net resnet20 --data.root cifar10.zip --checkpoint resnet20-12fca82f.th

Both rows are ordinary ``Trainer.fit`` calls on the same LightningModule, which the second converts by one callback.
Gradients of 8-bit layers are brought to one size, so that the learning rate alone is the size of their steps: theirs
is ``lr_scale`` times that of the float row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from integer_training import LEARNING_RATE, Curve, Result, fit, images, network, over_seeds, quiet_trainer
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=LEARNING_RATE, required=True, help="digits: mlp, cnn, digits_bn")
    parser.add_argument("--data.root", dest="root", help="folder with MNIST, or zip or folder with CIFAR-10")
    parser.add_argument("--data.cache", dest="cache", help="folder in which to keep the decoded images")
    parser.add_argument("--data.batch_size", dest="batch_size", type=int, default=64)
    parser.add_argument("--checkpoint", type=Path, help="of resnet20: a public .th file to start from")
    parser.add_argument("--rows", nargs="+", choices=("float", "wageubn"), default=["float", "wageubn"])
    parser.add_argument("--wageubn", type=json.loads, default={}, help='options as JSON: \'{"e2": "flag16"}\'')
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps_per_epoch", type=int, help="default all")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--progress", action="store_true", help="show a progress bar")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    args = parser.parse_args(argv)
    if args.root is None and args.net in ("lenet", "vgg_small", "resnet20"):
        parser.error(f"--net {args.net} needs --data.root")
    results = over_seeds(args, lambda row, seed: run(row, images(args, seed), args, seed))
    if args.json:
        args.json.write_text(json.dumps({row: asdict(result) for row, result in results.items()}, indent=1))
    return results


if __name__ == "__main__":
    main()
