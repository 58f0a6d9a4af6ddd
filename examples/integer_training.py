"""Train twice in integers only, with no float number between the data and the weights: the same bits both times.

python examples/integer_training.py --epochs 20
"""

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from lightning_lowbit import Niti, QuantCallback, TrainingCertificate
from lightning_lowbit.demos import DigitsCnn, DigitsData
from lightning_lowbit.reports.certificate import compare, read_certificate

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def accuracy(epochs: int, lr: float, *callbacks) -> float:
    """Percent of the validation images that are right behind a run; nothing differs but the callbacks and the rate."""
    seed_everything(0, verbose=False)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", devices=1, callbacks=list(callbacks), **QUIET)
    trainer.fit(DigitsCnn(lr=lr), DigitsData())
    return 100 * float(trainer.callback_metrics["val_acc"])


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("integers"), help="for the certificates")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    found, certificates = {"float": accuracy(args.epochs, 0.02)}, []
    for name in ("in integers", "again"):
        file = str(args.folder / f"{name.replace(' ', '_')}.json")
        # The rate is that of batch norms alone: integer weights move by a few bits, as the scheme says (mu).
        found[name] = accuracy(args.epochs, 0.05, QuantCallback(Niti(), evaluate=False), TrainingCertificate(path=file))
        certificates.append(read_certificate(file))
    print("", *(f"{name:<12}{value:6.2f} % of 360 images" for name, value in found.items()), sep="\n")
    print(compare(*certificates))  # SHA-256 of every layer's integers, epoch by epoch
    return found


if __name__ == "__main__":
    main()
