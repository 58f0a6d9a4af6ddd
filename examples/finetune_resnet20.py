"""Fine-tune a public float ResNet-20 to low bits in one epoch of CIFAR-10, beside an epoch in float.

    python examples/finetune_resnet20.py --checkpoint resnet20-12fca82f.th --data.root cifar10.zip --rows float 4/4

Every row is an ordinary ``Trainer.fit`` of the same LightningModule; a quantized row has one callback more.
Compare only with float numbers measured on the same copy of CIFAR-10: recompressed images cost ten points.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
from cifar import CifarData
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from resnet import LitResNet, load_public

from lightning_lowbit import Jacinto, QuantCallback, Scheme, Tqt, Wageubn

ROWS = {
    "float": None, "8/8": Tqt(), "4/4": Tqt(bits=4), "4/4-add4": Tqt(bits=4, operand_bits=4),  # weights/activations
    "jacinto": Jacinto(), "jacinto-folded": Jacinto(ste_weights="folded"), "jacinto-4/8": Jacinto(preset="WC4_AT8"),
    "full-8": Wageubn(lr_scale=5),  # gradients are brought to one size, and the rate alone is the size of a step
    **{f"full-8-{e2}": Wageubn(lr_scale=5, e2=e2) for e2 in ("shift8", "shift16", "flag16")},
}  # fmt: skip


def run(scheme: Scheme | None, seed: int, data: CifarData, args: argparse.Namespace) -> tuple[float, float, float]:
    """Accuracy before (float as loaded, or calibrated) and after in percent, and minutes of training."""
    data.seed = seed_everything(seed, verbose=False)
    model, timer = LitResNet(blocks=args.blocks, lr=args.lr), Timer()
    quant = None if scheme is None else QuantCallback(scheme, init_from=str(args.checkpoint), calibrate_batches=10)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    trainer = Trainer(
        max_epochs=args.epochs, callbacks=[timer] if quant is None else [timer, quant], accelerator=args.accelerator,
        devices=1, num_sanity_val_steps=0, **quiet,
    )  # fmt: skip
    if quant is None:
        load_public(model, args.checkpoint)
        before = trainer.validate(model, data, verbose=False)[0]["val_acc"]
    trainer.fit(model, data)
    before = before if quant is None else quant.metrics["calibrated"]["val_acc"]
    after = trainer.callback_metrics["val_acc"]
    return 100 * float(before), 100 * float(after), timer.time_elapsed("train") / 60


def main(argv: list[str] | None = None) -> dict[str, dict[str, list[float]]]:
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
    torch.set_num_threads(args.threads or torch.get_num_threads())
    data, results = CifarData(args.root, batch_size=args.batch_size, cache=args.cache), {}
    print("| row | before training | fine-tuned, mean | each seed | minutes |\n|---|---|---|---|---|")
    for row in args.rows:
        runs = [run(ROWS[row], seed, data, args) for seed in args.seeds]
        results[row] = dict(zip(("before", "after", "minutes"), map(list, zip(*runs, strict=True)), strict=True))
        before, after, minutes = (mean(values) for values in results[row].values())
        seeds = " ".join(f"{accuracy:.2f}" for accuracy in results[row]["after"])
        print(f"| {row} | {before:.2f} | {after:.2f} | {seeds} | {minutes:.1f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
