"""How binary weights learn: latents clipped behind the user's optimizer, or signs that flip (sections 4 and 8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import StepContext, UpdateRule
from lightning_lowbit.modules.binary import LatentSign, Rectifier, SignInput
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.norm import LowBitBatchNorm
from lightning_lowbit.numerics.binary import binary_sign
from lightning_lowbit.schemes.private import PrivateOptimizer, cosine_rate

if TYPE_CHECKING:
    from lightning_lowbit.schemes.bnn import Bnn

__all__ = ["BopRule", "LatentRule"]


class LatentRule(UpdateRule):
    """Clips latents behind each step; begins the second stage; moves what the scheme itself has to learn.

    Attributes:
        layers: those with binary weights, by path.
        staged: whether the weights have become binary in this run.
    """

    def __init__(self, scheme: Bnn, modules: dict[str, nn.Module]) -> None:
        self.scheme = scheme
        self.layers: dict[str, Any] = {
            path: m
            for path, m in modules.items()
            if isinstance(m, LowBitLayer) and isinstance(m.lowbit_weight, LatentSign)
        }
        self.norms: list[Any] = [m for m in modules.values() if isinstance(m, LowBitBatchNorm)]
        self.annealed = {
            path: child for path, m in modules.items() for child in m.children()
            if isinstance(child, SignInput) and child.anneals
        }  # fmt: skip
        parameters: dict[str, nn.Parameter] = {}
        owners: dict[str, str] = {}
        for path, module in modules.items():
            for child in module.children():
                if isinstance(child, (SignInput, Rectifier)):
                    for name, parameter in child.named_parameters():
                        parameters[f"{child.site.key}.{name}"], owners[f"{child.site.key}.{name}"] = parameter, path
        self.private = PrivateOptimizer(parameters, owners, lambda found: torch.optim.Adam(found, scheme.param_lr))
        self.staged = False
        self.kept: bool | None = None  # the weights were binary before this fit, and stay so
        self.entered: int | None = None  # the step that begins the second stage, in this session
        self.begun: int | None = None

    # -- stages -------------------------------------------------------------------------------------------
    def milestone(self, what: str, reached: bool, when: int) -> bool:
        """The second stage: weights become latent. What is done once is remembered, over a resume and further fits."""
        if self.kept is None:
            self.kept = bool(self.layers) and all(layer.lowbit_weight.ready for layer in self.layers.values())
            self.staged |= self.kept
        reached, adopted = reached or self.kept, reached and not (self.staged or self.kept)
        for layer in self.layers.values():
            layer.lowbit_weight.set_ready(reached)
        if adopted:
            for layer in self.layers.values():
                if layer.lowbit_weight.group[0] is layer.lowbit_weight:
                    layer.lowbit_weight.adopt()
            for norm in self.norms:
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.zero_()
            self.entered = when
        for norm in self.norms:  # its statistics are those of the second stage alone
            known = norm.num_batches_tracked
            norm.since = int(known) if reached and known is not None else None
        self.staged = reached
        return adopted

    def before_step(self, optimizer: Optimizer, context: StepContext) -> None:
        """The second stage begins without memory of the first, and without weight decay, which drains inertia."""
        if self.entered == context.step:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                if group.get("weight_decay"):
                    group["weight_decay"] = 0.0

    @torch.no_grad()
    def step(self, owned: set[str], context: StepContext) -> None:
        self.begun = context.step if self.begun is None else self.begun
        rate = cosine_rate(self.scheme.param_lr, self.begun, context)
        self.private.step(self.private.gather(owned, context), rate)
        latents = [
            self.layers[path] for path in sorted(owned & self.layers.keys()) if self.layers[path].lowbit_weight.ready
        ]
        if latents:
            weights = [layer.weight for layer in latents]
            if self.scheme.clip_bias:
                weights += [layer.bias for layer in latents if layer.bias is not None]
            torch._foreach_clamp_min_(weights, -1.0)
            torch._foreach_clamp_max_(weights, 1.0)
        self._anneal(owned, context)

    def _anneal(self, owned: set[str], context: StepContext) -> None:
        """Progress of the signs' derivatives, a function of the step alone."""
        total = context.total_steps or 10_000
        progress = min(1.0, (context.step + 1 - (self.begun or 0)) / max(1, total - (self.begun or 0)))
        for path, quantizer in self.annealed.items():
            if path in owned:
                quantizer.progress.fill_(progress)

    # -- reports and state --------------------------------------------------------------------------------
    def waiting(self) -> list[str]:
        return self.private.waiting()

    def state_dict(self) -> dict[str, Any]:
        return {"private": self.private.state_dict(), "staged": self.staged, "begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self.private.load_state_dict(state["private"])
        self.staged, self.begun = state["staged"], state["begun"]


class BopRule(LatentRule):
    """Bop (Helwegen et al., NeurIPS 2019): no latents, a sign flips when the mean of its gradients points along it.

        m <- (1 - gamma) m + gamma g;   w <- -w where |m| > tau and sign(m) = sign(w)

    Attributes:
        mean: m by layer path.
        gathered: gradients of the present step, taken before the user's optimizer sees them.
    """

    inert: ClassVar[Mapping[str, str]] = {
        "gradient_clip_val": "bop_threshold decides what flips",
        "weight_decay": "a sign has no magnitude",
    }

    def __init__(self, scheme: Bnn, modules: dict[str, nn.Module]) -> None:
        super().__init__(scheme, modules)
        self.mean: dict[str, Tensor] = {}
        self.gathered: dict[str, Tensor] = {}

    def before_step(self, optimizer: Optimizer, context: StepContext) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for path, layer in self.layers.items():
            if id(layer.weight) in held and layer.weight.grad is not None:
                self.gathered[path] = layer.weight.grad / context.grad_scale
                layer.weight.grad = None

    @torch.no_grad()
    def step(self, owned: set[str], context: StepContext) -> None:
        for path in sorted(owned & self.gathered.keys()):
            weight, gradient = self.layers[path].weight, self.gathered.pop(path)
            if not bool(torch.isfinite(gradient).all()):
                continue
            signs = binary_sign(weight)
            mean = self.mean.get(path, torch.zeros_like(weight))
            self.mean[path] = mean = torch.lerp(mean, gradient, self.scheme.bop_gamma)
            weight.copy_(torch.where(mean * signs > self.scheme.bop_threshold, -signs, signs))
        super().step(owned, context)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mean": {path: value.clone() for path, value in self.mean.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        unknown = sorted(state.get("mean", {}).keys() - self.layers.keys())
        if unknown:
            raise ConfigError(
                f"{unknown[0]}: the checkpoint holds the mean of its gradients, this network has no such binary layer. "
                "Load into the code that was trained, with the same skip= and include=."
            )
        self.mean = {path: value.clone() for path, value in state.get("mean", {}).items()}
