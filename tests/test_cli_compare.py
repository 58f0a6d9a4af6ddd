"""``compare``: rows are what ``fit`` gives, a refused one does not stop the others, Ctrl-C keeps what is done."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_lowbit import cli
from lightning_lowbit.cli.step_times import step_of
from lightning_lowbit.demos import DigitsCnn
from lightning_lowbit.reports.comparison import Comparison

CONFIG = """
seed_everything: 3
model: {class_path: DigitsCnn, init_args: {channels: 4}}
data: {class_path: DigitsData, init_args: {batch_size: 64}}
quant: {scheme: tqt, scheme.bits: 4, calibrate_batches: 1}
trainer: {accelerator: cpu, devices: 1, max_epochs: 1, limit_train_batches: 3, logger: false,
          enable_checkpointing: false}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.yaml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


def run(*words: str, rounds: int = 0) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", *words, "--step_rounds", str(rounds)])
    return stopped.value.code if isinstance(stopped.value.code, int) else 0


def saved(*words: str, status: int = 0, rounds: int = 0) -> Comparison:
    assert run(*words, "--output", "out.json", rounds=rounds) == status
    return Comparison.from_json(json.loads(Path("out.json").read_text(encoding="utf-8")))


def test_a_row_is_what_fit_gives(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fits: list[dict[str, float]] = []
    original = Trainer.fit

    def fit(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        fits.append({name: float(value) for name, value in self.callback_metrics.items() if name.startswith("val")})

    monkeypatch.setattr(Trainer, "fit", fit)
    found = saved("--config", "net.yaml", "--schemes", "float", "tqt:bits=8:act_bits=6", rounds=2)
    printed = capsys.readouterr().out
    # Behind another row a row has the bits that it has alone.
    options = ["--quant.scheme.bits=8", "--quant.scheme.act_bits=6", "--trainer.enable_progress_bar=false"]
    cli.main(["fit", "--config", "net.yaml", *options])
    assert fits[0] != fits[1] == fits[2]
    assert [dict(trial.metrics["trained"]) for trial in found.trials] == fits[:2]
    assert [trial.options for trial in found.trials] == ["", "bits=8, act_bits=6, calibrate_batches=1"]
    assert [trial.exact for trial in found.trials] == [None, True]
    assert found.trials[1].size < found.trials[0].size == found.trials[1].float_size
    assert found.trials[0].step == 1
    assert found.trials[1].step is not None
    assert found.trials[1].step > 0
    assert [line.partition(" ")[0] for line in printed.splitlines()[:2]] == ["[1/2]", "[2/2]"]
    assert printed.count("s an epoch") == 2
    assert "int8" not in printed  # the report of a fit


def test_others_start_from_the_float_row_of_their_seed() -> None:
    words = ["--from_float", "--seeds", "0", "1", "--trainer.limit_train_batches=1"]
    found = saved("--config", "net.yaml", "--schemes", "tqt", *words)
    assert [(trial.name, trial.seed) for trial in found.trials] == [("float", 0), ("tqt", 0), ("float", 1), ("tqt", 1)]
    for number in (0, 2):
        assert found.trials[number].metrics["trained"] == found.trials[number + 1].metrics["float"]
    assert found.trials[0].metrics != found.trials[2].metrics
    assert "init_from=the row float" in found.trials[1].options


def test_all_rows_start_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.full_like(DigitsCnn(channels=4).conv1.weight, 0.25)
    net = DigitsCnn(channels=4)
    net.conv1.weight.data = weights
    torch.save(net.state_dict(), "float.pt")
    starts: list[torch.Tensor] = []
    monkeypatch.setattr(DigitsCnn, "on_train_start", lambda self: starts.append(self.conv1.weight.detach().clone()))
    words = ["--init_from", "float.pt", "--trainer.limit_train_batches=1"]
    found = saved("--config", "net.yaml", *words, "--schemes", "float", "tqt")
    assert [torch.equal(start, weights) for start in starts] == [True, True]
    assert all("init_from=float.pt" in trial.options for trial in found.trials)


def test_without_schemes_every_file_is_a_row_and_a_refused_one_does_not_stop_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save({"weight": torch.zeros(1)}, "other.pt")
    Path("bad.yaml").write_text(CONFIG.replace("quant: {", "quant: {init_from: other.pt, "), encoding="utf-8")
    found = saved("--config", "bad.yaml", "--config", "net.yaml", "--trainer.limit_train_batches=1", status=1)
    assert [trial.name for trial in found.trials] == ["bad", "net"]
    assert "conv1.weight" in found.trials[0].refused
    assert not found.trials[1].refused
    assert found.trials[1].options.startswith("bits=4")  # of its own quant section
    assert "bad, refused:" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started = []

    def on_train_start(self: Any) -> None:
        started.append(self)
        if len(started) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(DigitsCnn, "on_train_start", on_train_start)
    found = saved("--config", "net.yaml", "--schemes", "float", "tqt", "f8net", status=1)
    assert [trial.name for trial in found.trials] == ["float"]
    assert "interrupted" in capsys.readouterr().out


def test_a_network_that_cannot_be_lowered_keeps_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("not in evaluation")

    monkeypatch.setattr("lightning_lowbit.cli.compare_rows.exactness", fail)
    found = saved("--config", "net.yaml", "--schemes", "tqt", "--trainer.limit_train_batches=1")
    place = f"test_cli_compare.py:{fail.__code__.co_firstlineno + 1} in fail"
    assert found.trials[0].why["not exact"] == f"could not be tried: RuntimeError: not in evaluation ({place})."
    assert found.trials[0].size < found.trials[0].float_size


def test_what_a_fit_warned_of_stands_below_the_table_once_and_with_its_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def on_train_start(self: Any) -> None:
        warnings.simplefilter("always")
        for _ in range(2):
            warnings.warn("a bias\n  of no use", stacklevel=1)

    monkeypatch.setattr(DigitsCnn, "on_train_start", on_train_start)
    found = saved("--config", "net.yaml", "--schemes", "float", "--trainer.limit_train_batches=1")
    assert found.trials[0].why == {"does not repeat": "gradients are float", "warned": "a bias of no use"}
    printed = capsys.readouterr()
    assert "float, warned: a bias of no use" in printed.out
    assert printed.err == ""


def test_an_error_of_the_users_code_has_its_file_and_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def configure_optimizers(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.no_such_rate)

    monkeypatch.setattr(DigitsCnn, "configure_optimizers", configure_optimizers)
    found = saved("--config", "net.yaml", "--schemes", "float", status=1)
    line = configure_optimizers.__code__.co_firstlineno + 1
    assert found.trials[0].refused.endswith(f" (test_cli_compare.py:{line} in configure_optimizers).")


def test_several_processes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", "net.yaml", "--schemes", "tqt", "--trainer.devices=2") == 1
    assert "2 processes, compare fits in one" in capsys.readouterr().out


WRONG = {
    "nothing to compare": (["--config", "net.yaml"], "Name the schemes"),
    "scheme": (["--config", "net.yaml", "--schemes", "tqtt"], "Did you mean 'tqt'?"),
    "option": (["--config", "net.yaml", "--schemes", "tqt:bits"], "expected NAME=VALUE"),
    "commas": (
        ["--config", "net.yaml", "--schemes", "bnn:first=int8,last=int8,relu=prelu"],
        "expected a colon: bnn:first=int8:last=int8:relu=prelu",
    ),
    "no such option": (["--config", "net.yaml", "--schemes", "float", "tqt:bitz=4"], "bitz"),
    "the row": (["--config", "net.yaml", "--schemes", "float", "tqt:bitz=4"], "That is the row tqt:bitz=4."),
    "fit's option": (["--config", "net.yaml", "--schemes", "tqt", "--trainer.max_epoch_count=1"], "trainer.max_epochs"),
    "file": (["--config", "no.yaml", "--schemes", "tqt"], "no.yaml: no such file"),
    "weights": (["--config", "net.yaml", "--schemes", "tqt", "--init_from", "no.pt"], "no.pt: no such file"),
    "output": (["--config", "net.yaml", "--schemes", "tqt", "--output", "table.csv"], "ends in one of"),
    "no float row": (["--config", "net.yaml", "--config", "net.yaml", "--from_float"], "quant.scheme: float"),
}


@pytest.mark.parametrize(("words", "reason"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_before_anything_is_trained(
    words: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: pytest.fail("it trains"))
    assert run(*words) == 2
    assert reason in capsys.readouterr().err


def test_a_step_is_not_timed_where_the_user_steps() -> None:
    module: Any = DigitsCnn(channels=4)
    module.automatic_optimization = False
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match="automatic optimization"):
        step_of(trainer, module)


def test_callbacks_that_print_are_left_out_of_a_row() -> None:
    callbacks = "callbacks: [{class_path: lightning.pytorch.callbacks.TQDMProgressBar}]"
    Path("bar.yaml").write_text(CONFIG.replace("trainer: {", f"trainer: {{{callbacks}, "), encoding="utf-8")
    (row,) = saved("--config", "bar.yaml", "--schemes", "tqt").trials
    assert row.refused == ""
