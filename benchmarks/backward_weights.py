"""Float or quantized weights in the backward pass (Jacinto): accuracies of the three variants, and their gradients.

    python benchmarks/backward_weights.py --seeds 0 1 2

One network, convolution, depthwise, pointwise, linear, each with a batch norm but the last, on scikit-learn's digits. A
float network per seed; from it, for every width and variant of ``ste_weights``, a fit with batch norms that freeze on
the way and one with norms that are frozen throughout; then the gradients of the weights in all variants at the weights
of the float network, on the same batches, with norms frozen and live.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from recipe import SgdClassifier
from torch import Tensor, nn

from lightning_lowbit import Jacinto, QuantCallback
from lightning_lowbit.demos import DigitsData
from lightning_lowbit.modules.merging import Backward

VARIANTS: tuple[Backward, ...] = get_args(Backward)
LAYERS = {"fc": "net.fc", "pointwise": "net.pointwise", "depthwise": "net.depthwise", "conv": "net.conv"}
FREEZE = {"frozen on the way": 0.75, "frozen throughout": 0}


class Digits(SgdClassifier):
    """16c3, depthwise 16c3 with stride 2, 32c1, mean, linear.

    Args:
        lr: rate of the first step, on a cosine to 0.
        momentum: of SGD.
        weight_decay: on all parameters.
    """

    def __init__(self, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 1e-4) -> None:
        net = nn.Sequential()
        for name, layer in (
            ("conv", nn.Conv2d(1, 16, 3, padding=1, bias=False)),
            ("depthwise", nn.Conv2d(16, 16, 3, padding=1, stride=2, groups=16, bias=False)),
            ("pointwise", nn.Conv2d(16, 32, 1, bias=False)),
        ):
            net.add_module(name, layer)
            net.add_module(f"{name}_norm", nn.BatchNorm2d(layer.out_channels))
            net.add_module(f"{name}_relu", nn.ReLU())
        net.add_module("pool", nn.AvgPool2d(4))
        net.add_module("flatten", nn.Flatten())
        net.add_module("fc", nn.Linear(32, 10))
        super().__init__(net)
        self.save_hyperparameters()


class Gradients(Callback):
    """Keeps the gradient of every layer's weight, batch by batch."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {layer: [] for layer in LAYERS}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for layer, path in LAYERS.items():
            weight = pl_module.get_parameter(f"{path}.weight")
            assert weight.grad is not None
            self.seen[layer].append(weight.grad.flatten().double())

    def of(self, layer: str) -> Tensor:
        """Those of all batches in one vector."""
        return torch.cat(self.seen[layer])


def fit(model: LightningModule, seed: int, epochs: int, *callbacks: Callback, batches: int | None = None) -> None:
    """Train silently; ``batches`` of each epoch, all if None."""
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        max_epochs=epochs, limit_train_batches=batches, callbacks=list(callbacks), accelerator="cpu", devices=1,
        logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(model, DigitsData(seed=seed))


def accuracy(model: LightningModule, seed: int) -> float:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    return 100 * float(trainer.validate(model, DigitsData(seed=seed), verbose=False)[0]["val_acc"])


def trained(scheme: Jacinto, file: str, seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """Accuracy of the calibrated network, and of the same after some epochs."""
    quant = QuantCallback(scheme, init_from=file)
    fit(Digits(lr=args.lr), seed, args.epochs, quant)
    return 100 * quant.metrics["calibrated"]["val_acc"], 100 * quant.metrics["trained"]["val_acc"]


def gradients(scheme: Jacinto, file: str, seed: int, args: argparse.Namespace) -> Gradients:
    """Gradients at the weights of the file, with ranges as calibration left them."""
    found = Gradients()
    model = Digits(lr=0.0, weight_decay=0.0)
    fit(model, seed, 1, QuantCallback(scheme, init_from=file, evaluate=False), found, batches=args.batches)
    return found


def distance(other: Tensor, reference: Tensor) -> tuple[float, float]:
    """Relative L2 distance, and cosine."""
    cosine = torch.dot(other, reference) / (other.norm() * reference.norm())
    return float((other - reference).norm() / reference.norm()), float(cosine)


Distances = dict[str, dict[str, tuple[float, float]]]  # variant -> layer -> relative L2, cosine


def measure(bits: int, norms: str, files: dict[int, str], args: argparse.Namespace) -> Distances:
    """Every variant's gradients against those of "float", the mean over seeds."""
    each: list[Distances] = []
    for seed, file in files.items():
        found = {
            variant: gradients(
                Jacinto(
                    bits=bits, ste_weights=variant, freeze_batch_norm=0 if norms == "frozen" else None, freeze_ranges=0
                ),
                file, seed, args,
            )
            for variant in VARIANTS
        }  # fmt: skip
        each.append(
            {v: {name: distance(found[v].of(name), found["float"].of(name)) for name in LAYERS} for v in VARIANTS}
        )
    return {
        v: {name: (mean(e[v][name][0] for e in each), mean(e[v][name][1] for e in each)) for name in LAYERS}
        for v in VARIANTS
    }


def train_float(files: dict[int, str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Accuracies of the float network in percent, as it is and after the epochs of low-bit training in float."""
    results: dict[str, list[float]] = {"float": [], "after the same epochs in float": []}
    for seed, file in files.items():
        model = Digits(lr=args.lr)
        model.load_state_dict(torch.load(file))
        results["float"].append(accuracy(model, seed))
        fit(model, seed, args.epochs)
        results["after the same epochs in float"].append(accuracy(model, seed))
    return results


def train_all(norms: str, files: dict[int, str], args: argparse.Namespace) -> dict[int, dict[str, list[float]]]:
    """Accuracies in percent by width and variant, one for each seed."""
    results = {}
    for bits in args.bits:
        rows: dict[str, list[float]] = {"calibrated": [], **{variant: [] for variant in VARIANTS}}
        for seed, file in files.items():
            for variant in VARIANTS:
                scheme = Jacinto(bits=bits, ste_weights=variant, freeze_batch_norm=FREEZE[norms])
                before, after = trained(scheme, file, seed, args)
                rows[variant].append(after)
            rows["calibrated"].append(before)  # before a gradient there is no variant
        results[bits] = rows
    return results


def cell(values: list[float]) -> str:
    """The mean over seeds, and each of them."""
    each = f" ({' '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
    return f"{mean(values):.1f}{each}"


def accuracy_table(results: dict[int, dict[str, list[float]]]) -> str:
    """Markdown: a row for each width."""
    lines = [f"| bits | calibrated | {' | '.join(VARIANTS)} |", "|---|---|" + "---|" * len(VARIANTS)]
    for bits, rows in results.items():
        lines.append(f"| {bits} | {' | '.join(cell(rows[name]) for name in ('calibrated', *VARIANTS))} |")
    return "\n".join(lines)


def gradient_table(found: dict[int, Distances]) -> str:
    """Markdown: relative L2 / cosine against "float", a column for each width and variant, the last layer first."""
    columns = [(bits, variant) for bits in found for variant in VARIANTS if variant != "float"]
    lines = [
        "| layer | " + " | ".join(f"{bits} bits, {variant}" for bits, variant in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in LAYERS:
        cells = [
            f"{found[bits][variant][name][0]:.3f} / {found[bits][variant][name][1]:.4f}" for bits, variant in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--float_epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10, help="of low-bit training")
    parser.add_argument("--lr", type=float, default=0.003, help="of low-bit training")
    parser.add_argument("--batches", type=int, default=20, help="that gradients are compared on")
    parser.add_argument("--fast", action="store_true", help="one seed, 8 bits, an epoch or two: minutes become seconds")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    args = parser.parse_args(argv)
    if args.fast:
        args.bits, args.seeds, args.float_epochs, args.epochs, args.batches = [8], [0], 2, 1, 2
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for foreign in (".*does not have many workers", ".*LeafSpec"):
        warnings.filterwarnings("ignore", message=foreign)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for seed in args.seeds:
            seed_everything(seed, verbose=False)
            model = Digits()
            fit(model, seed, args.float_epochs)
            files[seed] = str(Path(folder) / f"float{seed}.pt")
            torch.save(model.state_dict(), files[seed])
        results["float"] = train_float(files, args)
        for what, values in results["float"].items():
            print(f"{what}: {cell(values)}", flush=True)
        for norms in FREEZE:
            results[norms] = train_all(norms, files, args)
            print(f"\nAccuracy in percent, mean (each seed), batch norms {norms}\n", flush=True)
            print(accuracy_table(results[norms]), flush=True)
        for norms in ("frozen", "live"):
            results[norms] = {bits: measure(bits, norms, files, args) for bits in args.bits}
            print(f'\nWeight gradients against "float", relative L2 / cosine, batch norms {norms}\n', flush=True)
            print(gradient_table(results[norms]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
