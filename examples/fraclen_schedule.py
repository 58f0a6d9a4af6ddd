"""Fractional lengths over a run (F8Net): they follow the batches, calm down, and stand still from half of it on.

python examples/fraclen_schedule.py --final_momentum 0.001
"""

import argparse

from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_lowbit import F8Net, FraclenSchedule, QuantCallback
from lightning_lowbit.demos import DigitsCnn, DigitsData


class Diary(Callback):
    """What FraclenSchedule has logged, epoch by epoch; an epoch in float has no entry."""

    def __init__(self) -> None:
        self.epochs: dict[int, dict[str, float]] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: object) -> None:
        logged = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("fraclen")}
        if logged:
            self.epochs[trainer.current_epoch] = logged


def table(epochs: dict[int, dict[str, float]]) -> str:
    """A line an epoch: the rounded fraclen of every input, how often one flipped, and since when all stand still."""
    sites = [key.removeprefix("fraclen/") for key in next(iter(epochs.values())) if key != "fraclen_flips"]
    lines = [" ".join(f"{name:>8}" for name in ("epoch", *sites, "flips"))]
    for epoch, logged in epochs.items():
        fraclens = (round(logged[f"fraclen/{site}"]) for site in sites)
        lines.append(" ".join(f"{value:>8}" for value in (epoch, *fraclens, int(logged["fraclen_flips"]))))
    moved = [epoch for epoch, logged in epochs.items() if logged["fraclen_flips"]]
    return "\n".join([*lines, f"no fraclen moved behind epoch {max(moved, default=min(epochs))}"])


def main(argv: list[str] | None = None) -> dict[int, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--final_momentum", type=float, help="where the momentum of the averages has arrived at --freeze"
    )
    parser.add_argument("--freeze", type=float, default=0.5, help="when fraclens freeze, as a share of the run")
    args = parser.parse_args(argv)
    seed_everything(0)
    quant, diary = QuantCallback(F8Net(), start=0), Diary()
    schedule = FraclenSchedule(final_momentum=args.final_momentum, freeze=args.freeze)
    trainer = Trainer(
        max_epochs=args.epochs, accelerator="cpu", callbacks=[quant, schedule, diary], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(DigitsCnn(lr=0.05), DigitsData())
    print(f"\n{table(diary.epochs)}\nval_acc {100 * quant.metrics['trained']['val_acc']:.2f} %")
    return diary.epochs


if __name__ == "__main__":
    main()
