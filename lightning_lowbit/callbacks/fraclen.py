"""FraclenSchedule: how fast fractional lengths follow, when they stand still, and what they do meanwhile."""

from __future__ import annotations

from typing import Any

from lightning_lowbit.callbacks.schedule import Setting
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import Milestone
from lightning_lowbit.modules.moments import check_moment
from lightning_lowbit.plugins.lifecycle import Lifecycle

__all__ = ["FraclenSchedule"]


class FraclenSchedule(Setting):
    """Fractional lengths over time, in place of the scheme's own moments (F8Net).

    At the end of every epoch it logs ``fraclen/<site>``, the moving average, and ``fraclen_flips``, how many rounded
    fraclens changed in an optimizer step, summed over the epoch: near k + 0.5 one flips back and forth, and each time
    the scales of a whole layer double or halve.

    Args:
        momentum: of the moving average; None takes the scheme's.
        final_momentum: where the momentum arrives, geometrically, when fraclens freeze; None keeps it.
        freeze: from when on fraclens stand still: fraction of the run, epoch, "N steps"; None never.
        freeze_batch_norm: from when on folded batch norms use their moving statistics. Behind ``freeze``, so that they
            see the network as it stays.
        log: whether to log.
    Raises:
        ConfigError: a momentum outside (0, 1], or a final one that is never reached.
    """

    def __init__(
        self, momentum: float | None = None, final_momentum: float | None = None,
        freeze: float | int | str | None = 0.5, freeze_batch_norm: float | int | str | None = 0.75, log: bool = True,
    ) -> None:  # fmt: skip
        for name, value in (("momentum", momentum), ("final_momentum", final_momentum)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value <= 1):
                raise ConfigError(f"FraclenSchedule({name}={value!r}): expected a number in (0, 1].")
        if final_momentum is not None and freeze is None:
            raise ConfigError("FraclenSchedule(final_momentum=...): it is reached when fraclens freeze; give freeze=.")
        check_moment("FraclenSchedule(freeze)", freeze)
        check_moment("FraclenSchedule(freeze_batch_norm)", freeze_batch_norm)
        self.momentum, self.final_momentum = momentum, final_momentum
        self.freeze, self.freeze_batch_norm = freeze, freeze_batch_norm
        self.logging = log  # a callback's ``log`` is Lightning's
        self._lifecycle: Lifecycle | None = None

    def configure(self, lifecycle: Lifecycle) -> None:
        if "freeze_fraclen" not in {milestone.what for milestone in lifecycle.scheme.milestones()}:
            raise ConfigError(
                f"FraclenSchedule: scheme {lifecycle.scheme.name!r} has no fractional lengths (fraclen). Take "
                "QuantCallback('f8net'), or leave FraclenSchedule out."
            )
        self._lifecycle = lifecycle
        lifecycle.replace(
            Milestone(self.freeze, "freeze_fraclen"), Milestone(self.freeze_batch_norm, "freeze_batch_norm")
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        rule = self._rule()
        if self.momentum is not None:
            rule.momentum = self.momentum
        rule.last_momentum = self.final_momentum

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        rule = self._rule()
        flips = sum(rule.flips.values())
        rule.flips = dict.fromkeys(rule.flips, 0)
        if self.logging and rule.begun is not None:
            values = {f"fraclen/{key.removesuffix('.lowbit_input')}": value for key, value in rule.fraclens().items()}
            pl_module.log_dict({**values, "fraclen_flips": float(flips)}, rank_zero_only=True, sync_dist=False)

    def _rule(self) -> Any:
        return None if self._lifecycle is None else self._lifecycle.rule
