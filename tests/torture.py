"""Train, kill -9 at random moments, resume: the end must be that of a run which nobody disturbed, bit for bit.

    python tests/torture.py --kills 5 --schemes niti tqt

Prints a line for each kill; exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_lowbit import QuantCallback
from lightning_lowbit.demos import DigitsCnn, DigitsData
from lightning_lowbit.reports.certificate import digest

BATCH, EPOCHS, SAVED_EVERY = 96, 3, 4
STEPS = EPOCHS * -(-1437 // BATCH)
PATIENCE = 300.0  # seconds that one run may take
END, PROGRESS = "end.pt", "progress"


class Progress(pl.Callback):
    """Leaves the number of the step that runs, for whoever chooses the moment of a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.path.write_text(str(trainer.global_step))


def work(scheme: str, folder: Path, ckpt_path: Path | None) -> None:
    """One process: the run, or what is left of it behind a checkpoint."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0 if ckpt_path is None else random.getrandbits(31))  # a resume begins with other weights
    net, callback = DigitsCnn(channels=8), QuantCallback(scheme)
    saver = pl.callbacks.ModelCheckpoint(
        folder, "{step}", save_top_k=-1, every_n_train_steps=SAVED_EVERY, save_on_train_epoch_end=False
    )
    run = pl.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, callbacks=[callback, saver, Progress(folder / PROGRESS)], logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    run.fit(net, DigitsData(BATCH), ckpt_path=ckpt_path)
    held = {f"optimizer.{i}": optimizer.state_dict()["state"] for i, optimizer in enumerate(run.optimizers)}
    rule = {} if callback.rule is None else callback.rule.state_dict()
    state = {**net.state_dict(), **held, **{f"rule.{name}": value for name, value in rule.items()}}
    torch.save({name: digest(value) for name, value in state.items()}, folder / END)


def start(scheme: str, folder: Path, ckpt_path: Path | None = None) -> subprocess.Popen[bytes]:
    (folder / PROGRESS).unlink(missing_ok=True)
    command = [
        sys.executable,
        __file__,
        "--work",
        scheme,
        str(folder),
        *([] if ckpt_path is None else [str(ckpt_path)]),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def finished(process: subprocess.Popen[bytes], folder: Path) -> dict[str, str]:
    """What the run left, once it is through."""
    if process.wait(PATIENCE) != 0:
        raise SystemExit(f"torture: a run in {folder} failed with {process.returncode}")
    end: dict[str, str] = torch.load(folder / END, weights_only=True)
    return end


def step_of(path: Path) -> int:
    return int(path.stem.partition("=")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest one; a kill may leave none of them half written."""
    newest = max(folder.glob("step=*.ckpt"), key=step_of, default=None)
    if newest is not None:
        torch.load(newest, map_location="cpu", weights_only=True)
    return newest


def killed(process: subprocess.Popen[bytes], folder: Path, step: int, moment: float) -> int | None:
    """Kill a run ``moment`` seconds into step ``step``; the step that it was in, None where it was through before."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        text = (folder / PROGRESS).read_text() if (folder / PROGRESS).exists() else ""
        if text and int(text) >= step:
            time.sleep(moment)
            break
        time.sleep(0.001)
    process.kill()
    process.wait()
    text = (folder / PROGRESS).read_text()
    return None if (folder / END).exists() or not text else int(text)


def torture(scheme: str, kills: int, folder: Path, chance: random.Random) -> bool:
    """Whether a run that is killed so many times ends as one that is not."""
    (folder / "whole").mkdir(parents=True)
    (folder / "killed").mkdir()
    began = time.monotonic()
    expected = finished(start(scheme, folder / "whole"), folder / "whole")
    print(f"{scheme}: undisturbed, {STEPS} steps, {time.monotonic() - began:.1f} s", flush=True)
    place, checkpoint = folder / "killed", None
    for number in range(1, kills + 1):
        done = 0 if checkpoint is None else step_of(checkpoint)
        # Chosen so that, on average, the kills spread over the run.
        step = chance.randint(done, min(STEPS - 1, done + 2 * (STEPS - done) // (kills - number + 2)))
        at = killed(start(scheme, place, checkpoint), place, step, chance.uniform(0.0, 0.05))
        came_from, checkpoint = checkpoint, last_checkpoint(place)
        begun = "the start" if came_from is None else f"step {step_of(came_from)}"
        if at is None:
            print(f"{scheme}: kill {number}/{kills} came behind the end, the run began at {begun}", flush=True)
            (place / END).unlink()
            continue
        onward = "the start" if checkpoint is None else f"step {step_of(checkpoint)}"
        print(f"{scheme}: kill {number}/{kills} in step {at}, begun at {begun}, resumes at {onward}", flush=True)
    found = finished(start(scheme, place, checkpoint), place)
    apart = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    verdict = f"DIFFERS in {len(apart)} of {len(expected)}: {', '.join(apart[:5])}" if apart else "equal bit for bit"
    print(f"{scheme}: {kills} kills, {verdict}, state {digest(found)[:16]}", flush=True)
    return not apart


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--schemes", nargs="+", default=["niti", "tqt"])
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default another one each time")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        scheme, folder, *checkpoint = given.work
        work(scheme, Path(folder), Path(checkpoint[0]) if checkpoint else None)
        return
    seed = random.SystemRandom().getrandbits(32) if given.seed is None else given.seed
    print(f"torture: --seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        held = [torture(name, given.kills, Path(folder) / name, random.Random(seed)) for name in given.schemes]
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
