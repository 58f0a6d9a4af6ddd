"""Fine-tune one float network on digits under every scheme, and print accuracy, size and exactness side by side."""

import argparse
import contextlib
import copy
import io
import logging
import time

from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_lowbit import Bnn, F8Net, Jacinto, Niti, QuantCallback, Tqt, Wageubn, summarize
from lightning_lowbit.demos import DigitsCnn, DigitsData
from lightning_lowbit.reports.comparison import Comparison, Trial
from lightning_lowbit.reports.cost import float_bytes
from lightning_lowbit.reports.exactness import exactness

SCHEMES = {  # rate and options; integer weights (niti) move by mu, not by the rate
    "tqt": (0.002, Tqt()), "tqt, 4 bits": (0.005, Tqt(bits=4)), "f8net": (0.005, F8Net()),
    "jacinto": (0.002, Jacinto()), "wageubn": (0.1, Wageubn(io="strict", first_last="int8")),
    "niti": (0.005, Niti(mu=[3, 2, 1])), "bnn": (0.05, Bnn(first="int8", last="int8", relu="prelu")),
}  # fmt: skip


class Watch(Callback):
    """Keeps the accuracy of the last validation."""

    accuracy = 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: DigitsCnn) -> None:
        self.accuracy = float(trainer.callback_metrics["val_acc"])


def fit(model: DigitsCnn, epochs: int, *callbacks: Callback) -> float:
    """Accuracy after the fit, whose own report is not printed."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    watch = Watch()
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[*callbacks, watch], **quiet)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(model, DigitsData())
    return watch.accuracy


def main(argv: list[str] | None = None) -> Comparison:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--float_epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args(argv)
    seed_everything(0)
    trained = DigitsCnn(lr=0.02)
    metrics = {"trained": {"val_acc": fit(trained, args.float_epochs)}}
    size = float_bytes(trained)
    trials = [Trial("float", metrics=metrics, size=size, float_size=size)]
    data = DigitsData()
    data.setup()
    batch = next(iter(data.val_dataloader()))
    for name in args.schemes:
        seed_everything(0)
        rate, scheme = SCHEMES[name]
        model = copy.deepcopy(trained)
        model.lr = rate
        quant, start = QuantCallback(scheme, start=0), time.perf_counter()
        fit(model, args.epochs, quant)
        seconds = (time.perf_counter() - start) / args.epochs
        summary, found = summarize(model), exactness(model, batch)
        why = {"not exact": found.why_not} if found.why_not else {}
        costs = {"size": summary.size, "float_size": summary.float_size, "epoch_seconds": seconds}
        trials.append(Trial(name, metrics=quant.metrics, exact=found.exact, repeats=found.repeats, why=why, **costs))
    comparison = Comparison(tuple(trials), "Digits under every scheme")
    comparison.show()
    return comparison


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    main()
