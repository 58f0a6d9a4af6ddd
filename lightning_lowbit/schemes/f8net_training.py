"""What F8Net moves beside the user's optimizer: fractional lengths once a step, and the clips (sections 3.3 and 4)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from lightning_lowbit.modules.base import StepContext, UpdateRule
from lightning_lowbit.modules.fraclen import ALPHA_MIN, FraclenInput
from lightning_lowbit.numerics.fraclen_choice import choose
from lightning_lowbit.schemes.private import PrivateOptimizer, drop_gradients

if TYPE_CHECKING:
    from lightning_lowbit.schemes.f8net import F8Net

__all__ = ["FraclenRule", "momentum_at"]


def momentum_at(step: int, begin: int, end: int | None, first: float, last: float | None) -> float:
    """The moving average's momentum: ``first``, or on a geometric way from it to ``last`` between two steps.

    >>> [round(momentum_at(step, 100, 200, 0.1, 0.001), 6) for step in (0, 100, 150, 200, 300)]
    [0.1, 0.1, 0.01, 0.001, 0.001]
    """
    if last is None or end is None:
        return first
    share = min(1.0, max(0.0, (step - begin) / max(1, end - begin)))
    return float(first * (last / first) ** share)


class FraclenRule(UpdateRule):
    """One update of every moving fraclen an optimizer step, from the statistics of all its micro-batches and processes.

        fraclen <- m fraclen* + (1 - m) fraclen,  fraclen* chosen from the pooled statistics

    A tensor moves with the optimizer that holds the weights of the layer that reads it. Clips have SGD with Nesterov
    momentum 0.9, as in the published recipes, without weight decay.

    Args:
        scheme: its options.
        modules: the low-bit modules by path.

    Attributes:
        momentum, last_momentum: the second is reached when fraclens freeze; None keeps the first.
        flips: rounded fraclens that changed since the counts were taken, by site key.
    """

    def __init__(self, scheme: F8Net, modules: dict[str, nn.Module]) -> None:
        self.scheme, self.modules = scheme, modules
        self.momentum, self.last_momentum = scheme.momentum, None
        self.inputs: dict[str, FraclenInput] = {}  # those that keep a moving average
        self.owners: dict[str, str] = {}
        self.limits: dict[str, float] = {}
        alphas: dict[str, nn.Parameter] = {}
        for path, module in modules.items():
            for child in module.children():
                if not isinstance(child, FraclenInput):
                    continue
                key = child.site.key
                self.owners[key] = path
                if child.average is child and child.fixed is None:
                    self.inputs[key] = child
                if child.alpha is not None and child.leader is child:
                    alphas[key] = child.alpha
                    if child.limit is not None:
                        self.limits[key] = child.limit
        self.private = PrivateOptimizer(alphas, self.owners, self._optimizer)
        self.flips: dict[str, int] = dict.fromkeys(self.inputs, 0)
        self.begun: int | None = None
        self.end: int | None = None
        self.rates = dict.fromkeys(alphas, scheme.alpha_lr or 0.0)
        self._said: set[str] = set()

    def _optimizer(self, alphas: list[nn.Parameter]) -> Optimizer:
        each = [{"params": [alpha]} for alpha in alphas]  # with the rate of its layer's weights
        return torch.optim.SGD(each, lr=0.0, momentum=0.9, nesterov=True)

    def before_step(self, optimizer: Optimizer, context: StepContext) -> None:
        for group in optimizer.param_groups if self.scheme.alpha_lr is None else ():
            held = {id(parameter) for parameter in group["params"]}
            for key in self.private.parameters:
                layer: Any = self.modules[self.owners[key]]
                if id(getattr(layer, "weight_orig", getattr(layer, "weight", None))) in held:
                    self.rates[key] = float(group.get("lr", 0.0))
        if self.scheme.train == "statistics":
            drop_gradients(optimizer)

    def milestone(self, what: str, reached: bool, when: int) -> None:
        if what != "freeze_fraclen":
            return
        self.end = when
        for quantizer in self.inputs.values():
            for member in quantizer.group:
                if isinstance(member, FraclenInput):
                    member.frozen = reached

    @torch.no_grad()
    def step(self, owned: set[str], context: StepContext) -> None:
        if self.begun is None:
            self.begun = context.step
        moving = {
            key: q for key, q in self.inputs.items()
            if self.owners[key] in owned and not (q.frozen or q.form.at_once)
        }  # fmt: skip
        if moving:
            self._follow(moving, context)
        gradients = self.private.gather(owned, context)
        still = self.scheme.train == "statistics"
        self.private.step([None if still else g for g in gradients], list(self.rates.values()))
        for key, alpha in self.private.parameters.items():
            size = alpha.abs().clamp(ALPHA_MIN, self.limits.get(key, torch.inf))
            alpha.copy_(torch.copysign(size, alpha))

    def _follow(self, moving: dict[str, FraclenInput], context: StepContext) -> None:
        parts = [quantizer.sums for quantizer in moving.values()]
        flat = context.reduce_sum(torch.cat([part.reshape(-1) for part in parts]))
        for part in parts:
            part.zero_()
        rows = [
            row.view_as(part) for row, part in zip(torch.split(flat, [p.numel() for p in parts]), parts, strict=True)
        ]
        momentum = momentum_at(context.step, self.begun or 0, self.end, self.momentum, self.last_momentum)
        before = [quantizer.rounded() for quantizer in moving.values()]
        targets = []
        for quantizer, sums, fraclen in zip(moving.values(), rows, before, strict=True):
            best = choose(sums, quantizer.form.select, quantizer.form.bits, quantizer.signed).to(fraclen.dtype)
            best = best - quantizer.leader.rounded() if quantizer.relative else best
            targets.append(torch.where(sums[..., 0] > 0, best, quantizer.fraclen))
        for quantizer, target in zip(moving.values(), targets, strict=True):
            quantizer.fraclen.lerp_(target, momentum)
        learned = [
            torch.stack([(sums[..., 0] > 0).all(), (quantizer.rounded() != fraclen).any()])
            for quantizer, sums, fraclen in zip(moving.values(), rows, before, strict=True)
        ]
        self._tell(moving, torch.stack(learned).tolist())

    def _tell(self, moving: dict[str, FraclenInput], learned: list[list[bool]]) -> None:
        """Count flips; say once which tensors had nothing to teach."""
        for (key, quantizer), (known, flipped) in zip(moving.items(), learned, strict=True):
            self.flips[key] += flipped
            if quantizer.ran and not known and key not in self._said:
                self._said.add(key)
                warnings.warn(
                    f"{key}: zero, empty, not finite, or without a positive value in training, so its fraclen keeps "
                    f"{float(quantizer.rounded().reshape(-1)[0]):g}. Look at the layer before it: it may be dead.",
                    stacklevel=2,
                )
            quantizer.ran = False

    def fraclens(self) -> dict[str, float]:
        """The moving averages, by site key (of several channels their mean)."""
        return {key: float(quantizer.fraclen.mean()) for key, quantizer in self.inputs.items()}

    def waiting(self) -> list[str]:
        return self.private.waiting()

    def state_dict(self) -> dict[str, Any]:
        return {"alpha": self.private.state_dict(), "begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.private.load_state_dict(state["alpha"])
            self.begun = state["begun"]
