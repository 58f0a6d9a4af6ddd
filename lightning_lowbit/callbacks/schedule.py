"""What Calibrate, Freeze and FoldBatchNorm have in common: they hand a setting to the life cycle."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.plugins.lifecycle import Lifecycle

__all__ = ["Setting"]


class Setting(Callback):
    """A callback whose only act is to configure the trainer's QuantCallback, wherever both stand."""

    def configure(self, lifecycle: Lifecycle) -> None:
        raise NotImplementedError

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        found = [callback for callback in trainer.callbacks if isinstance(callback, Lifecycle)]
        if not found:
            raise ConfigError(
                f"Trainer(callbacks=[{type(self).__name__}(...)]): it changes what QuantCallback does, and "
                "there is none. Add "
                "QuantCallback() to the list."
            )
        self.configure(found[0])
