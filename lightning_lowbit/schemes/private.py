"""Parameters that belong to a scheme, not to the user: their optimizer, their gradients over the processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from lightning_lowbit.modules.base import StepContext

__all__ = ["PrivateOptimizer"]


class PrivateOptimizer:
    """Adam with a rate that falls along a cosine, for parameters that the user's optimizer does not see.

    A parameter steps with the optimizer that holds its layer's weight; a gradient that another optimizer's step finds
    is dropped. Gradients are averaged over the processes in one flat tensor.

    Args:
        parameters: by site key and name.
        owners: path of the low-bit module that each hangs on.
        lr: rate of the first step.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], owners: dict[str, str], lr: float) -> None:
        self.parameters, self.owners, self.lr = parameters, owners, lr
        self.begun: int | None = None  # the run's step in which it stepped first
        self.optimizer: Optimizer | None = None
        if parameters:
            self.optimizer = torch.optim.Adam(list(parameters.values()), lr=lr, foreach=True)

    @torch.no_grad()
    def step(self, owned: set[str], context: StepContext) -> None:
        """One step of all parameters whose module is ``owned``."""
        if self.optimizer is None:
            return
        self.begun = context.step if self.begun is None else self.begun
        gradients, had = [], []
        for key, parameter in self.parameters.items():
            gradient = parameter.grad if self.owners[key] in owned else None
            had.append(float(gradient is not None))
            gradients.append(torch.zeros_like(parameter) if gradient is None else gradient)
        device = gradients[0].device
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients] + [torch.tensor(had, device=device)])
        flat = context.reduce_mean(flat)
        mean, seen = flat[: -len(had)] / context.grad_scale, flat[-len(had) :].tolist()
        parts = torch.split(mean, [gradient.numel() for gradient in gradients])
        for parameter, part, share in zip(self.parameters.values(), parts, seen, strict=True):
            usable = share > 0 and bool(torch.isfinite(part).all())
            parameter.grad = part.view_as(parameter) if usable else None
        self.optimizer.param_groups[0]["lr"] = self._rate(context)
        self.optimizer.step()
        for parameter in self.parameters.values():
            parameter.grad = None

    def _rate(self, context: StepContext) -> float:
        if context.total_steps is None:
            return self.lr
        done, begun = context.step - (self.begun or 0), self.begun or 0
        share = min(1.0, done / max(1, context.total_steps - begun))
        return self.lr * 0.5 * (1 + math.cos(math.pi * share))

    def waiting(self) -> list[str]:
        """Parameters that hold a gradient which no step has used."""
        return [key for key, parameter in self.parameters.items() if parameter.grad is not None]

    def state_dict(self) -> dict[str, Any]:
        if self.optimizer is None:
            return {}
        moments = {key: dict(self.optimizer.state.get(p, {})) for key, p in self.parameters.items()}
        return {"moments": moments, "begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.optimizer is None or not state:
            return
        for key, parameter in self.parameters.items():
            if state["moments"].get(key):
                self.optimizer.state[parameter] = {
                    name: value.clone() if isinstance(value, Tensor) else value
                    for name, value in state["moments"][key].items()
                }
        self.begun = state["begun"]
