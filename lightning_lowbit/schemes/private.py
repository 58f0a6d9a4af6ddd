"""Parameters that belong to a scheme, not to the user: their optimizer, and their gradients over the processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from lightning_lowbit.modules.base import StepContext

__all__ = ["PrivateOptimizer", "cosine_rate", "drop_gradients"]


def cosine_rate(lr: float, begun: int, context: StepContext) -> float:
    """lr at step ``begun``, 0 at the run's end, half a cosine between; lr throughout where the run has no end.

    >>> [round(cosine_rate(1.0, 100, StepContext(step, 200)), 3) for step in (100, 150, 200)]
    [1.0, 0.5, 0.0]
    """
    if context.total_steps is None:
        return lr
    share = min(1.0, (context.step - begun) / max(1, context.total_steps - begun))
    return lr * 0.5 * (1 + math.cos(math.pi * share))


def drop_gradients(optimizer: Optimizer) -> None:
    """Leave an optimizer nothing to step: no gradient, no decay, no momentum."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


class PrivateOptimizer:
    """Steps parameters that the user's optimizer does not see.

    A parameter steps with the optimizer that holds its layer's weight; a gradient that another optimizer's step finds
    is dropped. Gradients are averaged over the processes in one flat tensor, so that all of them step alike.

    Args:
        parameters: by a name that a checkpoint may keep.
        owners: by the same names, the low-bit module that each hangs on.
        make: the optimizer of a list of parameters.

    Attributes:
        optimizer: None without parameters.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], owners: dict[str, str],
        make: Callable[[list[nn.Parameter]], Optimizer],
    ) -> None:  # fmt: skip
        self.parameters, self.owners = parameters, owners
        self.optimizer = make(list(parameters.values())) if parameters else None

    @torch.no_grad()
    def gather(self, owned: set[str], context: StepContext) -> list[Tensor | None]:
        """Gradients of this step, averaged over the processes and unscaled, of all parameters in their order.

        None where no process had one, where another optimizer steps, and where a value is not finite.
        """
        if not self.parameters:
            return []
        given = [p.grad if self.owners[key] in owned else None for key, p in self.parameters.items()]
        parts = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(self.parameters.values(), given, strict=True)
        ]
        had = parts[0].new_tensor([float(gradient is not None) for gradient in given])
        flat = context.reduce_mean(torch.cat([*(part.reshape(-1) for part in parts), had]))
        means = torch.split(flat[: -len(had)] / context.grad_scale, [part.numel() for part in parts])
        finite = torch.stack([torch.isfinite(mean).all() for mean in means])
        usable = ((flat[-len(had) :] > 0) & finite).tolist()
        return [mean.view_as(part) if use else None for mean, part, use in zip(means, parts, usable, strict=True)]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], lr: float | Sequence[float]) -> None:
        """One step of those that have a gradient; ``lr`` for all of the optimizer's groups, or one for each."""
        if self.optimizer is None:
            return
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        rates = lr if isinstance(lr, Sequence) else [lr] * len(self.optimizer.param_groups)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimizer.step()
        for parameter in self.parameters.values():
            parameter.grad = None

    def waiting(self) -> list[str]:
        """Parameters that hold a gradient which no step has used."""
        return [key for key, parameter in self.parameters.items() if parameter.grad is not None]

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer keeps, by name."""
        if self.optimizer is None:
            return {}
        return {key: dict(self.optimizer.state.get(p, {})) for key, p in self.parameters.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.optimizer is None:
            return
        for key, parameter in self.parameters.items():
            kept = state.get(key)
            if kept:
                self.optimizer.state[parameter] = {
                    name: value.clone() if isinstance(value, Tensor) else value for name, value in kept.items()
                }
