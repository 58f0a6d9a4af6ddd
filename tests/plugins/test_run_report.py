"""The last lines of a fit's report say how to get the integers, and what they say runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.cli import main
from lightning_lowbit.demos import DigitsCnn, DigitsData
from lightning_lowbit.export.program import IntegerProgram

WORDS = "its integers:"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(model: Any, **options: Any) -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1, callbacks=[QuantCallback(start=0)],
                      **quiet, **options)  # fmt: skip
    trainer.fit(model, DigitsData())


def test_the_command_behind_a_fit_of_the_command_line_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.py").write_text(
        "from lightning_lowbit.demos import DigitsCnn\n\n\nclass Own(DigitsCnn):\n"
        "    def __init__(self, width: int = 4) -> None:\n        super().__init__(width)\n"
        "        self.example_input_array = None\n"
    )
    words = ["--model", "own.Own", "--model.width", "6", "--data", "DigitsData", "--quant.start", "0"]
    words += ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--trainer.logger", "CSVLogger"]
    words += ["--trainer.logger.save_dir", "a b", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]
    main(["fit", *words])
    printed = capsys.readouterr().out
    lines = printed[printed.index(WORDS) :].splitlines()[1:4]
    assert max(map(len, lines)) <= 80
    assert str(tmp_path) not in printed  # paths as a reader of this folder writes them
    program, *command = shlex.split(" ".join(line.removesuffix("\\") for line in lines))
    assert program == "lightning-lowbit"
    with pytest.raises(SystemExit, match="0"):
        main(command)
    assert len(IntegerProgram.load("own.lowbit").ops) > 5


def test_from_python_it_is_a_line_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    model = DigitsCnn(channels=4)
    fit(model)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(WORDS)]
    exec(f"import lightning_lowbit\n{line.removeprefix(WORDS).strip()}", {"model": model})
    assert len(IntegerProgram.load("digitscnn.lowbit").ops) > 5


class Recurrent(DigitsCnn):
    """With a part that no program has."""

    def __init__(self) -> None:
        super().__init__(channels=4)
        self.rnn = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.relu(self.rnn(x.squeeze(1))[0]).unsqueeze(1))


def test_where_no_program_can_be_nothing_is_promised(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Recurrent())
    printed = capsys.readouterr().out
    assert "layers low-bit" in printed
    assert WORDS not in printed
