"""What a run of predict gives, as a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from lightning_lowbit.errors import ConfigError

__all__ = ["PredictionFile"]


class PredictionFile(BasePredictionWriter):
    """Writes what ``predict`` gives, batch behind batch, as one numpy array, and says what it wrote."""

    def __init__(self, path: str) -> None:
        super().__init__("epoch")
        self.path, self.said = path, ""

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Join the predictions along their first axis and save them.

        Raises:
            ConfigError: several processes predict, or a prediction is no tensor.
        """
        if trainer.world_size > 1:
            raise ConfigError(f"--output {self.path}: {trainer.world_size} processes predict, expected one.")
        if not all(isinstance(part, torch.Tensor) for part in predictions):
            raise ConfigError(
                f"--output {self.path}: predict_step of {type(pl_module).__name__} and its loaders give no single "
                "tensor a batch. Return one, or write what it returns with a BasePredictionWriter of your own."
            )
        whole = torch.cat(list(predictions)).cpu().numpy()
        with open(self.path, "wb") as file:  # np.save would add a suffix to a name
            np.save(file, whole)
        self.said = f"{self.path}: {whole.dtype} {list(whole.shape)}"

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Print it where the progress bars are done."""
        if self.said:
            print(self.said)
            self.said = ""
