"""QuantCallback: the one callback that turns a LightningModule into a low-bit network."""

from __future__ import annotations

import weakref
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import Scheme
from lightning_lowbit.modules.convert import is_converted
from lightning_lowbit.plugins.lifecycle import Lifecycle
from lightning_lowbit.reports.summary import summarize
from lightning_lowbit.reports.widths import Widths

__all__ = ["QuantCallback"]


class QuantCallback(Lifecycle):
    """Turn any LightningModule into a low-bit network when a Trainer takes it, and train it.

    After a fit, ``metrics`` holds the module's own validation metrics as {"float": ..., "calibrated": ...,
    "trained": ...}; ``width_report()`` prints how many bits every tensor of the network has.

    Args:
        scheme: "tqt" and the other names that ``lightning-lowbit schemes`` lists, or a Scheme instance with
            options.
        skip: module-path globs (or, from Python, layer classes) that stay float; accepts a named refusal.
        include: if given, only these are converted.
        init_from: float checkpoint (a state dict or a file around one) to start from.
        calibrate_batches: train batches on which grids are set before the first low-bit step.
        start: when quantization begins: a float in (0, 1) is a fraction of the run, an int an epoch,
            "500 steps" a step, 0 at once. None lets the scheme decide (at once with init_from, a restored
            checkpoint or a module trained in low bits).
        compile: run torch.compile on the converted parts.
        evaluate: validate once in float and once calibrated before the first low-bit step (in float not again where
            the last validation was of these weights).
        resume_order: make the sample order a function of seed and epoch alone; None lets the scheme decide.
    """

    def __init__(
        self,
        scheme: Scheme | str = "tqt",
        skip: list[str] | tuple[str | type, ...] = (),
        include: list[str] | None = None,
        init_from: str | None = None,
        calibrate_batches: int = 8,
        start: int | float | str | None = None,
        compile: bool = False,
        evaluate: bool = True,
        resume_order: bool | None = None,
    ) -> None:
        super().__init__(scheme, skip, include, init_from, calibrate_batches, start, compile, evaluate, resume_order)
        self._module: weakref.ref[nn.Module] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._module = weakref.ref(pl_module)

    def width_report(self) -> Widths:
        """Print every tensor's total, integer and fraction bits, and what sums need, of the module of the last run.

        Returns:
            the same; its ``rows`` have the numbers.
        Raises:
            ConfigError: there is none, or none that is converted.
        """
        module = None if self._module is None else self._module()
        if module is None or not is_converted(module):
            raise ConfigError(
                "QuantCallback.width_report(): no converted module yet, or it is gone. Call it behind "
                "trainer.fit(model), or without a Trainer: print(lightning_lowbit.summarize(model).widths())."
            )
        widths = summarize(module, self._tally).widths()
        rank_zero_only(widths.show)()
        return widths

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None}  # a weak reference does not pickle
