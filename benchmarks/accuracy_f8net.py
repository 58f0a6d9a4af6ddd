"""Fine-tune a public float ResNet-20 to 8-bit fixed point (F8Net) by its two recipes, beside the same in float.

    python benchmarks/accuracy_f8net.py --checkpoint resnet20-12fca82f.th --data.root cifar10.zip --seeds 0 1 2

Rows:
    float          one epoch of fine-tuning in float
    conventional   the same epoch in fixed point: weights, batch norms and clips are trained
    statistics     the float network after --batches training batches that renew its batch norms and nothing else
    tiny           the same batches in fixed point: they renew batch norms and fractional lengths

Compare conventional with float and tiny with statistics: on another copy of the images, re-estimated batch norms alone
are worth some points.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from accuracy import Curve, fit, over_seeds, quiet_trainer, written
from cifar import CifarData
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from resnet import LitResNet

from lightning_lowbit import F8Net, FraclenSchedule, QuantCallback

ROWS = ("float", "conventional", "statistics", "tiny")


def run(row: str, data: CifarData, args: argparse.Namespace) -> tuple[float, list[float], float]:
    """Train one row with one seed: accuracy before, after each epoch, and minutes of training."""
    short = row in ("statistics", "tiny")
    model = LitResNet(blocks=args.blocks, lr=0.0) if short else LitResNet(blocks=args.blocks)
    timer, curve = Timer(), Curve()
    callbacks: list[Callback] = [timer, curve]
    quant = None
    if row in ("conventional", "tiny"):
        scheme = F8Net.tiny(**args.f8net) if short else F8Net.conventional(**args.f8net)
        quant = QuantCallback(scheme, init_from=str(args.checkpoint), calibrate_batches=10)
        callbacks.append(quant)
        if not short:
            callbacks.append(FraclenSchedule(freeze=args.freeze, freeze_batch_norm=args.freeze_batch_norm))
    args.steps_per_epoch = args.batches if short else None
    trainer = quiet_trainer(1 if short else args.epochs, callbacks, args)
    before = fit(trainer, model, data, quant, args.checkpoint)
    return before, curve.values, timer.time_elapsed("train") / 60


def moment(text: str) -> float | int | str | None:
    """A fraction, an epoch, "N steps" or "never", as on the command line."""
    if text == "never":
        return None
    return text if "step" in text else float(text) if "." in text else int(text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a public .th file")
    parser.add_argument("--data.root", dest="root", required=True, help="zip or folder with CIFAR-10")
    parser.add_argument("--data.cache", dest="cache", help="folder in which to keep the decoded images")
    parser.add_argument("--data.batch_size", dest="batch_size", type=int, default=128)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--blocks", type=int, default=3, help="per stage: 3 ResNet-20, 5 ResNet-32, 9 ResNet-56")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batches", type=int, default=100, help="of the rows statistics and tiny")
    parser.add_argument("--f8net", type=json.loads, default={}, help='options of F8Net as JSON: \'{"ste": "clip"}\'')
    parser.add_argument("--freeze", type=moment, default=0.5, help="when fractional lengths freeze")
    parser.add_argument("--freeze_batch_norm", type=moment, default=0.75)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--progress", action="store_true", help="show a progress bar")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    args = parser.parse_args(argv)
    results = over_seeds(
        args, lambda row, seed: run(row, CifarData(args.root, args.batch_size, seed, args.cache), args)
    )
    written(results, args.json)


if __name__ == "__main__":
    main()
