"""Every YAML file of the examples runs for one small epoch, and those of the digits can be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lightning_lowbit.schemes import registry

cli = pytest.importorskip("lightning_lowbit.cli")

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
FILES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.glob("*.yaml"))}
WEIGHT, MEAN = "layer2.0.conv1.weight", "layer2.0.bn1.running_mean"

State = dict[str, Tensor]


def f8net_trains(after: State, public: State) -> None:
    assert not torch.equal(after[f"net.{WEIGHT}"], public[f"module.{WEIGHT}"])
    assert any(key.endswith("alpha") for key in after)


def f8net_renews_statistics(after: State, public: State) -> None:
    assert torch.equal(after[f"net.{WEIGHT}"], public[f"module.{WEIGHT}"])
    assert not torch.equal(after[f"net.{MEAN}"], public[f"module.{MEAN}"])
    assert not any(key.endswith("alpha") for key in after)


def jacinto_trains(after: State, public: State) -> None:
    assert not torch.equal(after[f"net.{WEIGHT}"], public[f"module.{WEIGHT}"])
    assert any(key.endswith("lowbit_output.clips") for key in after)


def wageubn_stays_on_its_grid(after: State, public: State) -> None:
    scale = next(key for key in after if key.endswith(".lowbit_weight.scale"))
    codes = after[scale.replace("lowbit_weight.scale", "weight")] * 2.0 ** (23 - after[scale])
    assert torch.equal(codes, codes.round())


CHECKS: dict[str, Callable[[State, State], None]] = {
    "resnet20_f8net": f8net_trains,
    "resnet20_f8net_tiny": f8net_renews_statistics,
    "resnet20_jacinto": jacinto_trains,
    "resnet20_wageubn": wageubn_stays_on_its_grid,
    "mnist_wageubn": wageubn_stays_on_its_grid,
}


def small(name: str, root: Path, idx: Path, checkpoint: Path) -> list[str]:
    """What makes a run of a file small, on generated images where it wants real ones."""
    model, data = FILES[name]["model"], FILES[name]["data"]["class_path"]
    words = ["--data.batch_size", "8", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    if data == "DigitsData":
        words += ["--trainer.limit_train_batches", "5", "--trainer.limit_val_batches", "1"]
    else:
        words += ["--data.root", str(root if data == "cifar.CifarData" else idx)]
    if "vgg" in name:
        words += ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    if name.startswith("resnet20"):
        binary = model["class_path"].startswith("binary_nets")
        words += ["--model.net", "resnet8"] if binary else ["--model.blocks", "1"]
        words += ["--quant.init_from", str(checkpoint)]
    if name == "resnet20_bnn":  # its second stage begins with an epoch
        words += ["--quant.scheme.weights_at", "0.5", "--trainer.callbacks.teacher", str(checkpoint)]
    return words


@pytest.mark.parametrize("name", FILES)
def test_a_file_runs_for_an_epoch(
    name: str, root: Path, idx: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_LOWBIT_COMPILE", "never")  # compiling takes longer than a run
    words = ["--config", str(CONFIGS / f"{name}.yaml"), *small(name, root, idx, checkpoint)]
    if "validate" in (CONFIGS / f"{name}.yaml").read_text():
        cli.main(["validate", *words])
        assert "val_acc" in capsys.readouterr().out
        return
    cli.main(["fit", *words, "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"])
    (file,) = tmp_path.rglob("*.ckpt")
    after = torch.load(file, weights_only=False)["state_dict"]
    assert any("lowbit" in key for key in after) == (FILES[name]["quant"]["scheme"] != "float")
    CHECKS.get(name, lambda *_: None)(after, torch.load(checkpoint)["state_dict"])


def test_every_scheme_has_a_file_to_compare_with_float() -> None:
    def shared(name: str) -> dict[str, Any]:
        trainer = {key: value for key, value in FILES[name]["trainer"].items() if key not in ("logger", "callbacks")}
        model = {**FILES[name]["model"]["init_args"], "lr": None}  # a rate suits a scheme
        return {**FILES[name], "quant": None, "trainer": trainer, "model": {**FILES[name]["model"], "init_args": model}}

    for scheme in registry():
        assert FILES[f"digits_{scheme}"]["quant"]["scheme"] == scheme
        assert shared(f"digits_{scheme}") == shared("digits_float")
        assert FILES[f"digits_{scheme}"]["trainer"]["logger"]["init_args"]["name"] == f"digits_{scheme}"
