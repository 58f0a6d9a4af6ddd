r"""Train a binary network beside the same network in float: accuracies, epoch by epoch.

    python benchmarks/accuracy_bnn.py --net digits_mlp --epochs 20
    python benchmarks/accuracy_bnn.py --net mnist_mlp --data.root mnist --epochs 10
    python benchmarks/accuracy_bnn.py --net vgg --data.root cifar10.zip --epochs 8
    python benchmarks/accuracy_bnn.py --net resnet20 --data.root cifar10.zip --checkpoint resnet20-12fca82f.th \
        --stages 1 2 --distill

Both rows are ordinary ``Trainer.fit`` calls on the same LightningModule, which the second converts by one callback.
With ``--packed file`` the last binary network is packed into words of 64 signs, checked and saved.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy import Curve, Result, fit, over_seeds, quiet_trainer, written
from binary_nets import NETS, BinaryClassifier
from cifar import CifarData
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Timer
from mnist import MnistData

from lightning_lowbit import Bnn, Distill, QuantCallback, pack
from lightning_lowbit.demos import DigitsData
from lightning_lowbit.export.packed import packing_of
from lightning_lowbit.export.packed_file import save_packed

MODEL: dict[str, dict[str, Any]] = {
    "digits_mlp": {"lr": 1e-2, "loss": "squared_hinge"},
    "mnist_mlp": {"lr": 3e-3, "loss": "squared_hinge"},
    "vgg": {"lr": 5e-3},
    "resnet20": {"lr": 5e-3, "weight_decay": 1e-5},
    "resnet8": {"lr": 5e-3, "weight_decay": 1e-5},
}
TWO_STAGES = {"scale": "channel_mean", "ste": "approx", "relu": "prelu", "shift": True, "shift_init": "mean"}


def images(args: argparse.Namespace, seed: int) -> LightningDataModule:
    if args.net == "digits_mlp":
        return DigitsData(args.batch_size, seed)
    if args.net == "mnist_mlp":
        return MnistData(args.root, args.batch_size)
    return CifarData(args.root, args.batch_size, seed, args.cache)


def run(row: str, data: LightningDataModule, args: argparse.Namespace) -> tuple[float, list[float], float]:
    """Train one row with one seed: accuracy before, after each epoch, and minutes of training."""
    epochs = sum(args.stages) if args.stages else args.epochs
    restart = args.stages[0] / epochs if args.stages and row == "bnn" else None
    options = {**MODEL[args.net], **args.model, "restart": restart}
    model, timer, curve = BinaryClassifier(args.net, **options), Timer(), Curve()
    callbacks: list[Callback] = [timer, curve]
    quant = None
    if row == "bnn":
        scheme = {**({**TWO_STAGES, "weights_at": args.stages[0]} if args.stages else {}), **args.bnn}
        quant = QuantCallback(Bnn(**scheme), init_from=None if args.checkpoint is None else str(args.checkpoint))
        callbacks.append(quant)
        if args.distill:
            callbacks.append(Distill(str(args.checkpoint)))
    trainer = quiet_trainer(epochs, callbacks, args)
    before = fit(trainer, model, data, quant, args.checkpoint)
    if quant is not None and args.packed is not None:
        save(model, data, args)
    return before, curve.values, timer.time_elapsed("train") / 60


def save(model: LightningModule, data: LightningDataModule, args: argparse.Namespace) -> None:
    """Pack the trained network, compare the logits of the test images bit by bit, save it and print its sizes."""
    packed = pack(model)
    model.eval()
    images = right = different = 0
    with torch.inference_mode():
        for batch in data.val_dataloader():
            x, labels = data.on_after_batch_transfer(batch, 0)
            logits = packed(x)
            images += len(labels)
            right += int((logits.argmax(1) == labels).sum())
            different += int((logits != model(x)).any(1).sum())
    print(packing_of(packed))
    save_packed(packed, args.packed)  # prints the sizes
    print(f"packed: {100 * right / images:.2f} on {images} images, logits of {different} differ from evaluation's")


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, required=True)
    parser.add_argument("--data.root", dest="root", help="folder with MNIST, or zip or folder with CIFAR-10")
    parser.add_argument("--data.cache", dest="cache", help="folder in which to keep the decoded images")
    parser.add_argument("--data.batch_size", dest="batch_size", type=int, default=128)
    parser.add_argument("--checkpoint", type=Path, help="of resnet20: a public .th file to start from")
    parser.add_argument("--stages", type=int, nargs=2, help="epochs with float weights, then with binary ones")
    parser.add_argument("--distill", action="store_true", help="toward the float network of the checkpoint")
    parser.add_argument("--rows", nargs="+", choices=("float", "bnn"), default=["float", "bnn"])
    parser.add_argument("--bnn", type=json.loads, default={}, help='options of Bnn as JSON: \'{"ste": "approx"}\'')
    parser.add_argument("--model", type=json.loads, default={}, help="options of BinaryClassifier as JSON")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=1, help="without --stages")
    parser.add_argument("--steps_per_epoch", type=int, help="default all")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--progress", action="store_true", help="show a progress bar")
    parser.add_argument("--packed", type=Path, help="pack the trained binary network and save it here")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    args = parser.parse_args(argv)
    if args.root is None and args.net != "digits_mlp":
        parser.error(f"--net {args.net} needs --data.root")
    return written(over_seeds(args, lambda row, seed: run(row, images(args, seed), args)), args.json)


if __name__ == "__main__":
    main()
