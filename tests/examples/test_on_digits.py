"""The examples on scikit-learn's digits, cut short: each prints its result, and the result is what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import binary_xnor
import fraclen_schedule
import integer_training
import pytest
import quickstart
import torch
import yaml
import your_own_scheme

from lightning_lowbit import IntegerProgram
from lightning_lowbit.modules.base import Site

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_an_example_is_one_short_file() -> None:
    scripts = {path: path.read_text() for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    assert len(scripts) >= 8
    assert {path.name: len(text.splitlines()) for path, text in scripts.items() if text.count("\n") > 80} == {}


def test_quickstart_goes_from_training_to_proved_integers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = quickstart.main(["--epochs", "2", "--folder", str(tmp_path)])
    assert capsys.readouterr().out.rstrip().endswith(result)
    assert "EQUAL" in result
    assert [step.split()[0] for step in result.splitlines()[0].split(", ")] == ["float", "calibrated", "trained"]
    assert IntegerProgram.load(tmp_path / "digits.lowbit").run(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    assert (tmp_path / "runtime.py").is_file()


def test_two_integer_runs_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIGHTNING_LOWBIT_COMPILE", "never")  # compiling takes longer than a run
    found = integer_training.main(["--epochs", "1", "--folder", str(tmp_path)])
    assert found["in integers"] == found["again"] > 30
    assert capsys.readouterr().out.rstrip().endswith("agree: 1 record compared, up to step 23 (the end of epoch 0)")


def test_packed_signs_give_the_logits_of_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "digits.packed"
    found = binary_xnor.main(["--epochs", "3", "--hidden", "64", "--file", str(file)])
    assert found["equal"] == 360
    assert found["right"] > 80
    assert found["smaller"] > 15
    assert f"{found['right']:.2f} % correct, 360 of 360 images" in capsys.readouterr().out
    assert 0 < file.stat().st_size < 40_000


def test_fraclens_stand_still_once_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    diary = fraclen_schedule.main(["--epochs", "3", "--freeze", "0.34", "--final_momentum", "0.001"])
    assert sorted(diary) == [0, 1, 2]
    assert diary[0]["fraclen_flips"] > 0
    frozen = [{key: value for key, value in diary[epoch].items() if "flips" not in key} for epoch in (1, 2)]
    assert frozen[0] == frozen[1]
    assert diary[2]["fraclen_flips"] == 0
    lines = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert lines[0].split() == ["epoch", "conv1", "conv2", "conv3", "fc", "flips"]
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"]
    assert lines[4].startswith("no fraclen moved behind epoch ")
    assert lines[5].startswith("val_acc ")


def test_a_scheme_of_your_own_is_trained_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    your_own_scheme.main(epochs=2)
    printed = capsys.readouterr().out
    assert "scheme sawb" in printed
    assert "int4" in printed
    assert "EQUAL" in printed


def test_a_clip_of_weights_follows_their_statistics() -> None:
    """Of normal ones: the power of two with the least squared error, or one beside it."""
    weights = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        site = Site(path="fc", op="linear", pattern="linear", role="weight")
        quantizer = your_own_scheme.Sawb(bits=bits).quantizer(site).eval()
        quantizer.observe(weights)
        errors = {}
        for exponent in range(-10, 3):
            quantizer.step_exponent.fill_(exponent)
            errors[exponent] = float((quantizer.quantize(weights) - weights).square().mean())
        quantizer.observe(weights)
        assert abs(int(quantizer.exponent()) - min(errors, key=errors.__getitem__)) <= 1


def test_a_scheme_of_your_own_comes_by_its_class_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = pytest.importorskip("lightning_lowbit.cli")
    monkeypatch.chdir(tmp_path)
    command = " ".join(your_own_scheme.__doc__.partition("lightning-lowbit ")[2].replace("\\", "").split())
    words = command.replace("examples/configs", str(EXAMPLES / "configs")).split()
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["quant"]["scheme"] == {
        "class_path": "your_own_scheme.Sawb", "init_args": {"bits": 4},
    }  # fmt: skip
    short = [
        "--trainer.max_epochs",
        "2",
        "--trainer.limit_train_batches",
        "5",
        "--trainer.enable_progress_bar",
        "false",
    ]
    cli.main([*words, *short, "--trainer.logger", "false"])
    assert "scheme sawb" in capsys.readouterr().out
    assert "your_own_scheme" in sys.modules
