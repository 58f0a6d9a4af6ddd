"""The seam of the update: what a scheme moves outside the user's optimizer, and what it may know of the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError

__all__ = ["StepContext", "UpdateRule"]


def same(tensor: Tensor) -> Tensor:
    """A reduction over one process."""
    return tensor


@dataclass(frozen=True)
class StepContext:
    """What an update rule may know of the run.

    Attributes:
        step, total_steps: optimizer steps done and estimated; total is None when it is infinite.
        reduce_sum, reduce_mean, reduce_max: over the processes; sums and maxima of integer tensors are exact.
            Identity on one.
        reduce_sums: of several integer tensors, in one exchange for each of their types.
        world: number of processes.
        grad_scale: factor on all gradients (16-bit mixed precision), 1 without.
    """

    step: int
    total_steps: int | None
    reduce_sum: Callable[[Tensor], Tensor] = same
    reduce_mean: Callable[[Tensor], Tensor] = same
    reduce_max: Callable[[Tensor], Tensor] = same
    reduce_sums: Callable[[list[Tensor]], list[Tensor]] = list
    world: int = 1
    grad_scale: float = 1.0


class UpdateRule(ABC):
    """Updates what the user's optimizer does not own; called by the precision plugin around each step.

    Attributes:
        inert: settings of a Trainer or an optimizer that do not reach these weights, and what does.
    """

    inert: ClassVar[Mapping[str, str]] = {}

    def before_step(  # noqa: B027  # optional
        self, optimizer: torch.optim.Optimizer, context: StepContext
    ) -> None:
        """After backward, before the user's optimizer steps."""

    @abstractmethod
    def step(self, owned: set[str], context: StepContext) -> None:
        """Update the low-bit modules at the paths ``owned``: the stepping optimizer holds their weights."""

    def end_run(self) -> None:  # noqa: B027  # optional
        """The run is over: what it held back is free again."""

    def before_batch(self, continues: bool) -> None:  # noqa: B027  # optional
        """A training batch begins; ``continues``: its gradients are added to those of the batch before."""

    def after_batch(self, context: StepContext) -> None:  # noqa: B027  # optional
        """A training batch has ended, whether or not an optimizer stepped in it."""

    def milestone(self, what: str, reached: bool, when: int) -> bool | None:
        """A scheduled event, due from step ``when`` on: reached, or (again) not yet.

        Returns:
            True where other weights are in place now, so that averages of the old ones mean nothing.
        """
        return None

    def waiting(self) -> list[str]:
        """Names of trained parameters that hold a gradient which no step has used."""
        return []

    def logged(self) -> dict[str, float]:
        """What the rule does at present, by the names under which a learning-rate monitor logs it."""
        return {}

    def news(self) -> list[str]:
        """What a user should hear of now, each thing once."""
        return []

    def notes(self) -> list[str]:
        """What the report of the run says of its updates."""
        return []

    def stopped(self) -> list[str]:
        """Paths of layers that no longer learn, for the report."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors, by parameter name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ConfigError(f"{type(self).__name__} has no state to load, the checkpoint holds {sorted(state)}")
