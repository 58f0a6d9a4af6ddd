"""Train at 4 bits, keep, load, look, turn into integers, and prove that they are the network's.

python examples/quickstart.py
"""

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from lightning_lowbit import QuantCallback, Tqt, load_from_checkpoint, lower, summarize, verify
from lightning_lowbit.demos import DigitsCnn, DigitsData


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("quickstart"), help="for the checkpoint and the program")
    args = parser.parse_args(argv)
    seed_everything(1)

    # Any LightningModule, any data: one callback. Float for half of the run, then calibrated and trained at 4 bits.
    model, data = DigitsCnn(lr=0.01), DigitsData()
    quant = QuantCallback(Tqt(bits=4), start=0.5)
    trainer = Trainer(
        max_epochs=args.epochs, accelerator="cpu", callbacks=[quant], default_root_dir=args.folder, logger=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, data)  # prints every tensor's grid at its end

    trainer.save_checkpoint(args.folder / "lowbit.ckpt")  # knows its scheme, sites and ties
    again = load_from_checkpoint(DigitsCnn, args.folder / "lowbit.ckpt").eval()  # no Trainer, no callback
    report = summarize(again)

    program = lower(again)  # what evaluation computes, as operations on integers
    program.save(args.folder / "digits.lowbit", with_runtime=True)  # runs where there is numpy and nothing else
    certificate = verify(again, program, data.test_dataloader())
    steps = ", ".join(f"{when} {100 * metrics['val_acc']:.2f} %" for when, metrics in quant.metrics.items())
    result = f"{steps}\n{report.size:,} bytes, {report.float_size:,} in float\n{certificate}"
    print(f"\n{result}")
    return result


if __name__ == "__main__":
    main()
