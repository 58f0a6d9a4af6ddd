"""`lightning-lowbit report`: what stands on the page, what it says of the rest, and what it refuses."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit.callbacks.monitor import QuantMonitor
from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.cli.report import report
from lightning_lowbit.demos import DigitsCnn, DigitsData

MODEL = ["--model", "DigitsCnn"]
DATA = ["--data", "DigitsData", "--data.batch_size", "16", "--batches", "3"]
RUN = "tqt/version_0/checkpoints/last.ckpt"
PLAIN: dict[str, Any] = {
    "max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "limit_val_batches": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps: of tqt with a monitor and a log, of niti, and of the float network."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("tqt", "niti", "float"):
        callbacks = [] if name == "float" else [QuantCallback(name, start=0, evaluate=False, calibrate_batches=1)]
        logger = CSVLogger(folder, name, version=0) if name == "tqt" else False
        run = Trainer(callbacks=[*callbacks, *([QuantMonitor(1)] if logger else [])], logger=logger, **PLAIN)
        run.fit(DigitsCnn(channels=4), DigitsData(batch_size=720))
        run.save_checkpoint(folder / (RUN if logger else f"{name}.ckpt"))
    shutil.copy(folder / RUN, folder / "alone.ckpt")
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sections(name: str = "report.html") -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", Path(name).read_text("utf-8"))


def test_everything_that_is_known_stands_on_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(["--ckpt", RUN, *MODEL, *DATA, "--title", "Digits & co"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("evaluation integer-exact: ")
    assert printed[-1] == f"report.html: {Path('report.html').stat().st_size:,} bytes"
    assert sections() == [
        "Claims", "Metrics", "Layers", "Shared grids", "What stays float, and other notes", "Sensitivity", "Plots",
        "Integer program",
    ]  # fmt: skip
    page = Path("report.html").read_text("utf-8")
    captions = [re.split("[ ,;]", caption)[0] for caption in re.findall(r"<figcaption>(.*?)<", page)]
    assert captions == ["Weights", "Activations", "Sensitivity", "Saturated", "Exponents", "Thresholds"]
    for words in ("<h1>Digits &amp; co</h1>", "val_acc", '<th scope="col" class="number">saturated</th>', "48 samples"):
        assert words in page


def test_without_data_and_log_the_page_says_what_it_lacks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(["--ckpt", "alone.ckpt", *MODEL, "--output", "a.html"]) == 0
    printed = capsys.readouterr().out
    assert "left out: log (no metrics.csv of the checkpoint's run" in printed
    assert "left out: saturation, activations, sensitivity (they need batches. Give --data)" in printed
    assert sections("a.html")[-3:] == ["Plots", "Integer program", "Not on this page"]
    assert "Sensitivity" not in sections("a.html")
    page = Path("a.html").read_text("utf-8")
    assert "<li>saturation, activations, sensitivity: they need batches. Give --data</li>" in page
    assert ">saturated<" not in page


def test_a_scheme_without_float_layers_has_no_sensitivity_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # --no_plots needs none
    assert report(["--ckpt", "niti.ckpt", *MODEL, *DATA, "--no_plots"]) == 0
    assert "left out: sensitivity (DigitsCnn was converted with scheme niti" in capsys.readouterr().out
    assert {"Sensitivity", "Plots"}.isdisjoint(sections())
    assert sections()[-2:] == ["Integer program", "Not on this page"]


def test_batches_of_the_module_itself_and_a_log_that_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = DataLoader(TensorDataset(torch.rand(45, 1, 8, 8), torch.zeros(45, 2, dtype=torch.int64)), batch_size=5)
    monkeypatch.setattr(DigitsCnn, "val_dataloader", lambda self: loader)
    Path("loss.csv").write_text("step,train_loss\n0,1.5\n")
    assert report(["--ckpt", RUN, *MODEL, "--log", "loss.csv"]) == 0
    printed = capsys.readouterr().out
    assert "left out: log (loss.csv has no lowbit/SITE/METRIC. Train with QuantMonitor)" in printed
    assert "left out: accuracy (got labels of shape [5, 2]" in printed
    assert "Sensitivity" in sections()
    assert "40 samples" in Path("report.html").read_text("utf-8")  # eight batches, where nobody says how many


def test_batches_that_are_no_arguments_are_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DigitsData, "val_dataloader", lambda self: iter([{"images": torch.rand(2, 1, 8, 8)}]))
    assert report(["--ckpt", RUN, *MODEL, *DATA, "--no_plots"]) == 0
    assert "sensitivity (batch 0: got a dict, expected a tensor or a tuple" in capsys.readouterr().out


REFUSED = {
    "float network": (["--ckpt", "float.ckpt"], "float.ckpt: a float network, expected one that was trained in low"),
    "no checkpoint": (["--ckpt", "none.ckpt"], "--ckpt none.ckpt: no such file"),
    "no folder": (["--ckpt", RUN, "--output", "none/a.html"], "in a folder that exists"),
    "over the checkpoint": (["--ckpt", "alone.ckpt", "--output", "alone.ckpt"], "that is what --ckpt names"),
    "no batches": (["--ckpt", RUN, "--batches", "0"], "--batches 0: expected 1 or more"),
    "no log": (["--ckpt", RUN, "--log", "none.csv"], "No such file"),
    "other images": (["--ckpt", RUN, *DATA], "batch 0: the forward of DigitsCnn fails on it: RuntimeError"),
}


@pytest.mark.parametrize(("words", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_one_message_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], reason: str
) -> None:
    monkeypatch.setattr(DigitsData, "val_dataloader", lambda self: iter([torch.rand(2, 3, 8, 8)]))
    before = Path("alone.ckpt").read_bytes()
    assert report([*words, *MODEL]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("error: ")
    assert reason in said.err
    assert not list(folder.rglob("*.html"))
    assert Path("alone.ckpt").read_bytes() == before
