"""Fine-tune a public float ResNet-20 to low bits in one epoch of CIFAR-10, beside an epoch in float.

    python examples/finetune_resnet20.py --checkpoint resnet20-12fca82f.th --data.root cifar10.zip --seeds 0 1

Every row is an ordinary ``Trainer.fit`` of the same LightningModule; a quantized row has one callback more.
Compare only with float numbers measured on the same copy of CIFAR-10: recompressed images cost ten points.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

import torch
from cifar import CifarData
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from resnet import LitResNet

from lightning_lowbit import Jacinto, QuantCallback, Scheme, Tqt, Wageubn

ROWS: dict[str, tuple[str, Scheme | None]] = {
    "float": ("float", None),
    "8/8": ("8/8", Tqt()),
    "4/4": ("4/4 (8 bits: first and last weights, input, pooled features, add operands)", Tqt(bits=4)),
    "4/4-add4": (
        "4/4, add operands too (8 bits: first and last weights, input, pooled features)",
        Tqt(bits=4, operand_bits=4),
    ),
    "jacinto": ("8/8, ranges by statistics (jacinto)", Jacinto()),
    "jacinto-folded": ("the same, gradient of the merged convolution", Jacinto(ste_weights="folded")),
    "jacinto-4/8": ("4-bit weights a channel, 8-bit activations (jacinto)", Jacinto(preset="WC4_AT8")),
    # lr_scale: gradients are brought to one size, and the rate alone is the size of a step.
    "full-8": ("forward, backward and update in 8 bits (wageubn)", Wageubn(lr_scale=5)),
    "full-8-shift8": ("the same, layers' errors with one unit", Wageubn(lr_scale=5, e2="shift8")),
    "full-8-shift16": ("the same in 16 bits", Wageubn(lr_scale=5, e2="shift16")),
    "full-8-flag16": ("the same in 16 bits with two units", Wageubn(lr_scale=5, e2="flag16")),
}


@dataclass
class Result:
    """One row: accuracies in percent over the seeds, minutes of training per run."""

    label: str
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    minutes: list[float] = field(default_factory=list)


def load_public(model: LitResNet, checkpoint: Path) -> None:
    """Load a ``.th`` file of the public CIFAR ResNets; its keys carry the prefix of DataParallel."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    model.net.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})


def run(scheme: Scheme | None, data: CifarData, args: argparse.Namespace) -> tuple[float, float, float]:
    """Train one row with one seed: accuracy before and after in percent, and minutes of training.

    Before means the float network as loaded, or the quantized one after calibration.
    """
    model = LitResNet(blocks=args.blocks, lr=args.lr)
    timer = Timer()
    callbacks: list[Callback] = [timer]
    quant = None
    if scheme is not None:
        quant = QuantCallback(scheme, init_from=str(args.checkpoint), calibrate_batches=10)
        callbacks.append(quant)
    trainer = Trainer(
        max_epochs=args.epochs,
        callbacks=callbacks,
        accelerator=args.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    if quant is None:
        load_public(model, args.checkpoint)
        before = trainer.validate(model, data, verbose=False)[0]["val_acc"]
        trainer.fit(model, data)
        after = float(trainer.callback_metrics["val_acc"])
    else:
        trainer.fit(model, data)
        before = float(quant.metrics["calibrated"]["val_acc"])
        after = float(quant.metrics["trained"]["val_acc"])
    return 100 * before, 100 * after, timer.time_elapsed("train") / 60


def table(results: dict[str, Result]) -> str:
    """Markdown: per row the mean over the seeds, the seeds themselves, and the distance to float."""
    lines = [
        "| weights/activations | before training | fine-tuned, mean | each seed | below float | minutes |",
        "|---|---|---|---|---|---|",
    ]
    reference = mean(results["float"].after) if "float" in results else None
    for result in results.values():
        tuned = mean(result.after)
        gap = "" if reference is None else f"{reference - tuned:.2f}"
        seeds = " ".join(f"{accuracy:.2f}" for accuracy in result.after)
        minutes = f"{mean(result.minutes):.1f}"
        cells = result.label, f"{mean(result.before):.2f}", f"{tuned:.2f}", seeds, gap, minutes
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("\nBefore training: float as loaded, quantized after calibration on 10 training batches.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a public .th file")
    parser.add_argument("--data.root", dest="root", required=True, help="zip or folder with CIFAR-10")
    parser.add_argument("--data.cache", dest="cache", help="folder in which to keep the decoded images")
    parser.add_argument("--data.batch_size", dest="batch_size", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--blocks", type=int, default=3, help="per stage: 3 ResNet-20, 5 ResNet-32, 9 ResNet-56")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--threads", type=int, help="cap on torch's threads")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    args = parser.parse_args(argv)
    # The data is in memory, where workers would only take cores from the network.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    if args.threads:
        torch.set_num_threads(args.threads)

    data = CifarData(args.root, batch_size=args.batch_size, cache=args.cache)
    results: dict[str, Result] = {}
    for name in args.rows:
        label, scheme = ROWS[name]
        results[name] = Result(label)
        for seed in args.seeds:
            seed_everything(seed, verbose=False)
            data.seed = seed
            before, after, minutes = run(scheme, data, args)
            print(f"{name}, seed {seed}: {before:.2f} -> {after:.2f} in {minutes:.1f} min", flush=True)
            results[name].before.append(before)
            results[name].after.append(after)
            results[name].minutes.append(minutes)
    print(f"\n{table(results)}")
    if args.json:
        args.json.write_text(json.dumps({name: asdict(result) for name, result in results.items()}, indent=1))
    return results


if __name__ == "__main__":
    main()
