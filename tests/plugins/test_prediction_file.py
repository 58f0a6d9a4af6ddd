"""The file that predict writes, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.plugins.prediction_file import PredictionFile


def test_what_was_written_is_said_when_the_bars_are_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, trainer = str(tmp_path / "digits.out"), SimpleNamespace(world_size=1)
    writer: Any = PredictionFile(path)
    writer.write_on_epoch_end(trainer, None, [torch.arange(4), torch.arange(3)], [])
    assert capsys.readouterr().out == ""
    writer.teardown(trainer, None, "predict")
    writer.teardown(trainer, None, "predict")
    assert capsys.readouterr().out == f"{path}: int64 [7]\n"
    assert np.load(path).tolist() == [0, 1, 2, 3, 0, 1, 2]
    with pytest.raises(ConfigError, match="no single tensor a batch"):
        writer.write_on_epoch_end(trainer, None, [{"a": torch.zeros(1)}], [])
    writer.teardown(trainer, None, "predict")
    assert capsys.readouterr().out == ""
