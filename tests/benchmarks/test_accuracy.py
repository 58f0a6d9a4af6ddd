"""The accuracy measurements in seconds: few epochs of digits, a step or two of generated images."""

from __future__ import annotations

import json
from pathlib import Path

import accuracy_f8net
import accuracy_niti
import accuracy_wageubn
import pytest


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling kernels takes longer than these runs."""
    monkeypatch.setenv("LIGHTNING_LOWBIT_COMPILE", "never")


def test_integer_training_prints_both_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("certificate", "json")}
    argv = ["--net", "mlp", "--epochs", "6", "--data.batch_size", "32", "--seeds", "0", "1"]
    results = accuracy_niti.main([*argv, *(word for name in files for word in (f"--{name}", str(files[name])))])
    printed = capsys.readouterr().out
    for row, result in results.items():
        assert [len(curve) for curve in result.epochs] == [6, 6]
        assert max(result.before) < 30
        assert min(curve[-1] for curve in result.epochs) > 85
        assert f"| {row} |" in printed
    written = json.loads(files["json"].read_text())
    assert written["niti"]["epochs"] == results["niti"].epochs
    certificate = json.loads(files["certificate"].read_text())
    assert certificate["scheme"] == "niti"
    assert certificate["limits"] == []
    assert len(certificate["records"]) == 6


def test_integer_training_takes_every_network(root: Path, idx: Path) -> None:
    for net, folder, options in (
        ("lenet", idx, []),
        ("vgg_small", root, ["--steps_per_epoch", "1"]),
        ("digits_bn", idx, ["--steps_per_epoch", "2"]),
        ("resnet20", root, ["--steps_per_epoch", "1", "--niti", '{"mu": [-2]}']),
    ):
        results = accuracy_niti.main(
            ["--net", net, "--data.root", str(folder), "--data.batch_size", "4", "--rows", "niti", *options]
        )
        assert all(0 <= value <= 100 for curve in results["niti"].epochs for value in curve)


def test_images_that_are_missing_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for measure in (accuracy_niti, accuracy_wageubn):
        with pytest.raises(SystemExit):
            measure.main(["--net", "lenet"])
        assert "--net lenet needs --data.root" in capsys.readouterr().err


def test_fixed_point_prints_every_row(root: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--checkpoint", str(checkpoint), "--data.root", str(root), "--data.batch_size", "8", "--batches", "2"]
    accuracy_f8net.main([*argv, "--blocks", "1", "--freeze", "3 steps", "--accelerator", "cpu"])
    printed = capsys.readouterr().out
    assert all(f"| {row} |" in printed for row in accuracy_f8net.ROWS)


def test_full_8_bits_print_both_rows(root: Path, idx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = accuracy_wageubn.main(["--net", "cnn", "--epochs", "4", "--json", str(tmp_path / "json")])
    printed = capsys.readouterr().out
    assert list(results) == ["float", "wageubn"]
    assert all(f"| {row} |" in printed for row in results)
    assert min(result.epochs[0][-1] for result in results.values()) > 85
    assert json.loads((tmp_path / "json").read_text())["wageubn"]["epochs"] == results["wageubn"].epochs
    for net, folder in (("lenet", idx), ("digits_bn", idx), ("resnet20", root)):
        argv = ["--net", net, "--data.root", str(folder), "--data.batch_size", "4", "--steps_per_epoch", "1"]
        results = accuracy_wageubn.main([*argv, "--rows", "wageubn", "--wageubn", '{"e2": "flag16"}'])
        assert all(0 <= value <= 100 for curve in results["wageubn"].epochs for value in curve)
