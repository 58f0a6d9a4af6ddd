"""``plan``: the words of a fit and a budget in, a file out that a fit takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import cli
from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.cli.network import batches_of
from lightning_lowbit.cli.plan import plan
from lightning_lowbit.demos import DigitsCnn
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.reports.bit_plan import read_plan
from lightning_lowbit.schemes.tqt import Tqt

CONFIG = """
model: {class_path: DigitsCnn, init_args: {channels: 8}}
data: {class_path: DigitsData, init_args: {batch_size: 64}}
quant: {scheme: tqt, scheme.act_round: half_up, skip: [fc], calibrate_batches: 2}
trainer: {accelerator: cpu, devices: 1, max_steps: 2, logger: false, enable_checkpointing: false,
          enable_progress_bar: false, enable_model_summary: false, limit_val_batches: 1}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("fit.yaml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


def status_of(*words: str) -> Any:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(words))
    return stopped.value.code


def test_a_plan_goes_back_into_the_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    torch.save(DigitsCnn(channels=8).state_dict(), "float.pt")
    words = ["plan", "--config", "fit.yaml", "--quant.init_from", "float.pt", "--bit_ops", "0.4", "--batches", "1"]
    assert status_of(*words, "--output", "mine.yaml") == 0
    said = capsys.readouterr()
    assert "mine.yaml: edit it, and pass it on with fit ... --quant mine.yaml --quant.init_from float.pt" in said.out
    assert "0.400 of those with 8 × 8 bits" in said.out
    assert "weights: those" not in said.err
    arguments = read_plan("mine.yaml")
    scheme = arguments["scheme"]
    assert isinstance(scheme, Tqt)
    assert (scheme.act_round, arguments["skip"]) == ("half_up", ["fc"])

    seen: dict[str, Any] = {}

    def keep(self: QuantCallback, trainer: Any, pl_module: Any) -> None:
        seen["scheme"] = next(part.scheme for _, part in low_bit_modules(pl_module))
        seen["bits"] = {q.site.key: q.grid().bits for _, q in quantizers(pl_module) if q.site.role == "weight"}

    monkeypatch.setattr(QuantCallback, "on_fit_end", keep)
    cli.main(["fit", "--config", "fit.yaml", "--quant", "mine.yaml", "--quant.start", "0"])
    assert seen["scheme"] == scheme
    chosen = {f"{path}.lowbit_weight": o["weight_bits"] for path, o in scheme.overrides.items() if "weight_bits" in o}
    assert chosen
    assert chosen.items() <= seen["bits"].items()


def test_untrained_weights_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(["--config", "fit.yaml", "--size", "0.4", "--batches", "1"]) == 0
    assert "weights: those that DigitsCnn is made with; --quant.init_from gives trained ones" in capsys.readouterr().err
    assert Path("plan.yaml").is_file()


WRONG = {
    "budget": (["--config", "fit.yaml"], "got size=None and bit_ops=None, expected one of the two"),
    "float": (["--config", "fit.yaml", "--size", "0.2", "--quant.scheme", "float"], "quant.scheme: got 'float'"),
    "scheme": (["--config", "fit.yaml", "--size", "0.2", "--quant.scheme", "bnn"], "scheme 'bnn' has one width"),
    "folder": (["--size", "0.2", "--output", "none/plan.yaml"], "--output none/plan.yaml: expected the path of a file"),
    "batches": (["--size", "0.2", "--batches", "0"], "--batches 0: expected 1 or more"),
    "word": (["--config", "fit.yaml", "--size", "0.2", "--quant.skp", "x"], "Did you mean 'quant.skip'?"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, text = WRONG[case]
    assert status_of("plan", *words) == 2
    assert text in capsys.readouterr().err
    assert not Path("plan.yaml").exists()


class Raw(LightningDataModule):
    """Pixels as bytes, normalized in the hook behind the transfer, as kornia's users do."""

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.arange(4, dtype=torch.uint8)), batch_size=2)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Tensor:
        return batch[0].float() / 4  # type: ignore[no-any-return]  # a list of tensors


def test_batches_come_as_the_forward_gets_them() -> None:
    module = DigitsCnn(channels=4)
    assert [batch.tolist() for batch in batches_of(module, Raw(), "val")] == [[0.0, 0.25], [0.5, 0.75]]
    with pytest.raises(ConfigError, match=r"Raw: it has no test_dataloader\. Give another --split"):
        next(batches_of(module, Raw(), "test"))
