"""Every scheme's files in a process that has not seen their training: loaded, and by ``lightning-lowbit predict``."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from launch import run_script
from lightning.pytorch import Trainer

from lightning_lowbit import cli
from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.cli.fit import _said
from lightning_lowbit.demos import DigitsCnn, DigitsData
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.plugins.checkpoint import save_compact
from lightning_lowbit.plugins.loading import load_from_checkpoint
from lightning_lowbit.plugins.prediction_file import PredictionFile
from lightning_lowbit.schemes import registry

SCHEMES = sorted(registry())
KINDS = ("whole", "weights", "compact")
CHANNELS = 4
SILENT: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False,
}  # fmt: skip
WORDS = [
    "predict", "--model", "DigitsCnn", "--data", "DigitsData", "--data.batch_size", "360",
    *(word for name, value in SILENT.items() for word in (f"--trainer.{name}", str(value).lower())),
]  # fmt: skip


def pixels() -> torch.Tensor:
    return torch.randint(0, 17, (64, 1, 8, 8), generator=torch.Generator().manual_seed(2)) / 16


def by_command(scheme: str, kind: str) -> bool:
    """Whether the command predicts from a file too: it reads all kinds the same way."""
    return kind == "whole" or (scheme, kind) in (("bnn", "compact"), ("tqt", "weights"))


def read_all(folder: Path) -> None:
    """What every file gives here, beside it; the model's options come from the file."""
    os.chdir(folder)
    for path in sorted(folder.glob("*.ckpt")):
        with torch.no_grad():
            torch.save(load_from_checkpoint(DigitsCnn, path).eval()(pixels()), path.with_suffix(".logits"))
        if by_command(*path.stem.split("-")):
            cli.main([*WORDS, "--ckpt_path", str(path), "--output", str(path.with_suffix(".npy"))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of every scheme, its three files, what they should give, and what a fresh process makes of them.

    Made once for all workers of a test run.
    """
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "files_of_every_scheme"
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            folder.mkdir()
            make_all(folder)
            (folder / "made").touch()
    return folder


def make_all(folder: Path) -> None:
    data = DigitsData(batch_size=360)
    for scheme in SCHEMES:
        torch.manual_seed(0)
        module = DigitsCnn(channels=CHANNELS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a scheme thinks of this network
            run = Trainer(
                callbacks=[QuantCallback(scheme, start=0, evaluate=False, calibrate_batches=1)], max_steps=2, **SILENT
            )
            run.fit(module, data)
        run.save_checkpoint(folder / f"{scheme}-whole.ckpt")
        run.save_checkpoint(folder / f"{scheme}-weights.ckpt", weights_only=True)
        save_compact(module, folder / f"{scheme}-compact.ckpt")
        with torch.no_grad():
            torch.save(module.eval()(pixels()), folder / f"{scheme}.logits")
            images = next(iter(data.predict_dataloader()))[0]
            np.save(folder / f"{scheme}.npy", module(images).argmax(1).numpy())
    run_script(Path(__file__), folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_fresh_process_computes_the_same(folder: Path, scheme: str, kind: str) -> None:
    logits, digits = torch.load(folder / f"{scheme}.logits"), np.load(folder / f"{scheme}.npy")
    assert logits.shape == (64, 10)
    assert torch.equal(torch.load(folder / f"{scheme}-{kind}.logits"), logits)
    assert digits.shape == (360,)
    assert not by_command(scheme, kind) or np.array_equal(np.load(folder / f"{scheme}-{kind}.npy"), digits)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where Lightning's command line leaves its config.yaml


def refusal(*words: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as stopped:
        cli.main([*WORDS, *words])
    assert stopped.value.code == 2
    return said.getvalue().rpartition("error: ")[2]


@pytest.mark.parametrize("way", ["words", "file", "file with equals sign"])
def test_what_the_user_says_of_quant_is_held_against_the_file(folder: Path, tmp_path: Path, way: str) -> None:
    config = tmp_path / "quant.yaml"
    config.write_text("quant: {scheme: tqt}\n", encoding="utf-8")
    words = {"words": ["--quant.scheme", "tqt"], "file": ["--config", str(config)]}
    said = refusal(*words.get(way, [f"--config={config}"]), "--ckpt_path", str(folder / "niti-whole.ckpt"))
    assert "ckpt_path: trained with Niti" in said


def test_a_section_speaks_for_its_own_subcommand(tmp_path: Path) -> None:
    config = tmp_path / "quant.yaml"
    config.write_text("predict: {quant.scheme: tqt}\n", encoding="utf-8")
    assert "quant.scheme" in _said(["predict", "--config", str(config)])
    assert "quant.scheme" not in _said(["test", "--config", str(config)])


def test_validate_converts_as_the_file_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["validate", *WORDS[1:], "--ckpt_path", str(folder / "bnn-whole.ckpt")])
    assert "val_acc" in capsys.readouterr().out


def test_a_file_is_written_of_tensors_alone(tmp_path: Path) -> None:
    writer, module = PredictionFile(str(tmp_path / "out.npy")), DigitsCnn(channels=CHANNELS)
    one, two = Trainer(**SILENT), Trainer(**SILENT, devices=2, strategy="ddp")
    with pytest.raises(ConfigError, match=r"predict_step of DigitsCnn.*no single tensor.*BasePredictionWriter"):
        writer.write_on_epoch_end(one, module, [[torch.zeros(2)]], [])
    with pytest.raises(ConfigError, match="2 processes predict, expected one"):
        writer.write_on_epoch_end(two, module, [torch.zeros(2)], [])
    assert not (tmp_path / "out.npy").exists()
    writer.write_on_epoch_end(one, module, [torch.zeros(2, 3), torch.ones(1, 3)], [])
    assert np.load(tmp_path / "out.npy").tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3]


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    read_all(Path(sys.argv[1]))
