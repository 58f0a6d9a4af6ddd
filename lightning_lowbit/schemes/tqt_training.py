"""What the published recipe does to thresholds over time: normed gradients, staircases, freezing (TQT)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import StepContext, UpdateRule
from lightning_lowbit.modules.thresholds import ThresholdQuantizer
from lightning_lowbit.schemes.private import PrivateOptimizer, cosine_rate, drop_gradients

if TYPE_CHECKING:
    from lightning_lowbit.schemes.tqt import Tqt

__all__ = ["NormedSgd", "ThresholdRule", "next_to_freeze", "staircase"]


class NormedSgd(Optimizer):
    """SGD on normed gradients: as scale-free as Adam, without its momentum (TQT, appendix on convergence).

        v     = beta v + (1 - beta) g^2
        g~    = tanh(g / sqrt(v / (1 - beta^t) + eps))
        theta = theta - lr g~

    No element moves by more than lr in a step, and a zero gradient moves nothing: a frozen threshold is one
    whose gradient is zeroed.

    Args:
        params: parameters or groups, of any shape (thresholds have one element).
        lr: step size in units of the parameter.
        beta: decay of the mean square.
        eps: added under the root.

    Raises:
        ConfigError: lr is negative, eps not positive, or beta outside [0, 1).
    """

    def __init__(self, params: ParamsT, lr: float = 1e-2, beta: float = 0.999, eps: float = 1e-12) -> None:
        if not (lr >= 0 and 0 <= beta < 1 and eps > 0):
            raise ConfigError(
                f"NormedSgd: got lr={lr}, beta={beta}, eps={eps}; expected lr >= 0, 0 <= beta < 1, eps > 0."
            )
        super().__init__(params, {"lr": lr, "beta": beta, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for theta in group["params"]:
                if theta.grad is not None:
                    self._update(theta, theta.grad, self.state[theta], group)
        return loss

    @staticmethod
    def _update(theta: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = 0
            state["mean_square"] = torch.zeros_like(theta)
        state["step"] += 1
        v, beta = state["mean_square"], group["beta"]
        v.mul_(beta).addcmul_(g, g, value=1 - beta)
        v_hat = v / (1 - beta ** state["step"])
        theta.sub_(torch.tanh(g / torch.sqrt(v_hat + group["eps"])), alpha=group["lr"])


def staircase(step: int, base_lr: float, every: float, factor: float) -> float:
    """base_lr * factor^floor(step / every).

    The recipe for batch size N: thresholds 1e-2, every 1000 * 24/N steps, 0.5; weights 1e-6, every
    3000 * 24/N, 0.94.

    >>> [staircase(step, 1.0, 1000, 0.5) for step in (0, 999, 1000, 3000)]
    [1.0, 1.0, 0.5, 0.125]
    """
    return base_lr * math.pow(factor, step // every)


def next_to_freeze(current_log2_t: Tensor, ema_log2_t: Tensor, abs_grad: Tensor, frozen: Tensor) -> int | None:
    """The threshold to freeze next, or None: the calmest of those that are in the bin where they mostly are.

    Near a power of two a threshold swings between two exponents. It is frozen only while ceil(log2_t) equals
    the ceil of its moving average, and among such the one with the least mean gradient goes first.

    Args:
        current_log2_t: [n], the thresholds now.
        ema_log2_t: [n], their moving averages, zero-debiased.
        abs_grad: [n], magnitude of the gradient averaged since the last freeze; reduced over ranks.
        frozen: [n] bool, those that no longer take part.

    >>> grad = torch.tensor([0.1, 0.3, 0.2])
    >>> now, average = torch.tensor([0.1, 1.2, 2.5]), torch.tensor([-0.1, 1.9, 2.1])
    >>> next_to_freeze(now, average, grad, torch.tensor([False, False, False]))
    2
    >>> next_to_freeze(now, average, grad, torch.tensor([False, True, True])) is None
    True
    """
    ready = (torch.ceil(current_log2_t) == torch.ceil(ema_log2_t)) & ~frozen.bool()
    if not bool(ready.any()):
        return None
    return int(torch.where(ready, abs_grad, torch.inf).argmin())


class ThresholdRule(UpdateRule):
    """Private optimizer of the thresholds: own learning rate and schedule, no weight decay, freezing at the end.

    A threshold steps with the optimizer that holds its layer's weight; a gradient that another optimizer's step
    finds is dropped.

    Args:
        scheme: its options.
        modules: the low-bit modules by path.
    """

    def __init__(self, scheme: Tqt, modules: dict[str, nn.Module]) -> None:
        self.scheme = scheme
        self.thresholds: dict[str, ThresholdQuantizer] = {}  # one entry a tie, under its first member's key
        owners: dict[str, str] = {}  # key -> path of the low-bit module it hangs on
        seen: set[int] = set()
        for path, module in modules.items():
            for child in module.children():
                if isinstance(child, ThresholdQuantizer) and child.log2_t is not None and id(child.log2_t) not in seen:
                    seen.add(id(child.log2_t))
                    if child.log2_t.requires_grad:
                        self.thresholds[child.site.key] = child
                        owners[child.site.key] = path
        parameters = {key: quantizer.log2_t for key, quantizer in self.thresholds.items()}
        self.private = PrivateOptimizer(parameters, owners, self._optimizer)
        n = len(parameters)
        self.average = torch.zeros(n)  # moving average of log2_t, not yet debiased
        self.weight = torch.zeros(())  # what the average's decays leave of 1: divides it
        self.abs_grad = torch.zeros(n)  # of the gradients since the last freeze
        self.count = torch.zeros(2, dtype=torch.int64)  # steps in all, steps since the last freeze
        self.begun: int | None = None  # run's step at which quantization began
        self.when: dict[str, int] = {}

    def _optimizer(self, thresholds: list[nn.Parameter]) -> Optimizer:
        lr, beta2 = self.scheme.threshold_lr, self.scheme.threshold_beta2
        if self.scheme.threshold_optimizer == "adam":
            return torch.optim.Adam(thresholds, lr=lr, betas=(0.9, beta2), foreach=True)
        return NormedSgd(thresholds, lr=lr, beta=beta2)

    def before_step(self, optimizer: Optimizer, context: StepContext) -> None:
        if self.scheme.mode in ("static", "retrain_th"):  # weights stay
            drop_gradients(optimizer)

    def milestone(self, what: str, reached: bool, when: int) -> None:
        self.when[what] = when
        if what == "freeze_ranges" and not reached:  # what an earlier fit froze
            for leader in self.thresholds.values():
                for member in leader.group:
                    if isinstance(member, ThresholdQuantizer):
                        member.frozen.fill_(0.0)

    @torch.no_grad()
    def step(self, owned: set[str], context: StepContext) -> None:
        quantizers = list(self.thresholds.values())
        if not quantizers:
            return
        if self.begun is None:
            self.begun = context.step
        gradients = self.private.gather(owned, context)
        frozen = torch.stack([quantizer.frozen for quantizer in quantizers]).cpu() > 0.5
        moving = [None if still else g for g, still in zip(gradients, frozen.tolist(), strict=True)]
        self.private.step(moving, self._lr(context))
        now = torch.cat([quantizer.log2_t for quantizer in quantizers]).cpu()
        abs_grad = torch.cat([now.new_zeros(1) if g is None else g.abs().cpu() for g in gradients])
        self._follow(now, abs_grad, context.total_steps)
        self._freeze(quantizers, frozen, context.step)

    def _lr(self, context: StepContext) -> float:
        lr, begun = self.scheme.threshold_lr, self.begun or 0
        if self.scheme.threshold_schedule == "staircase":
            return staircase(context.step - begun, lr, self.scheme.lr_step, 0.5)
        return cosine_rate(lr, begun, context) if self.scheme.threshold_schedule == "cosine" else lr

    def _follow(self, now: Tensor, abs_grad: Tensor, total_steps: int | None) -> None:
        """Moving averages. The published decay, 0.9999, looks back over a tenth of the published run; so does ours."""
        decay = 0.9999 if total_steps is None else min(0.9999, max(0.0, 1 - 10 / total_steps))
        self.average.mul_(decay).add_(now, alpha=1 - decay)
        self.weight.mul_(decay).add_(1 - decay)
        self.abs_grad.add_(abs_grad)
        self.count += 1

    def _freeze(self, quantizers: list[ThresholdQuantizer], frozen: Tensor, step: int) -> None:
        """From ``freeze_ranges`` on, one after the other; all of them by ``ranges_frozen``."""
        first = self.when.get("freeze_ranges")
        if first is None or step < first:
            return
        last = max(first, self.when.get("ranges_frozen", first))
        due = math.ceil(len(quantizers) * min(1.0, (step + 1 - first) / max(1, last - first)))
        debiased = self.average / self.weight
        while int(frozen.sum()) < due:
            now = torch.cat([quantizer.log2_t for quantizer in quantizers]).cpu()
            index = next_to_freeze(now, debiased, self.abs_grad / max(1, int(self.count[1])), frozen)
            if index is None:
                if step + 1 < last:
                    return
                index = int((~frozen).nonzero()[0])  # out of time: where its average lies, it spent most steps
                quantizers[index].log2_t.fill_(debiased[index])
            for member in quantizers[index].group:
                if isinstance(member, ThresholdQuantizer):
                    member.frozen.fill_(1.0)
            frozen[index] = True
            self.abs_grad.zero_()
            self.count[1] = 0

    def waiting(self) -> list[str]:
        return [key for key, q in self.thresholds.items() if q.log2_t.grad is not None and not bool(q.frozen > 0.5)]

    def state_dict(self) -> dict[str, Any]:
        if not self.thresholds:
            return {}
        return {
            "optimizer": self.private.state_dict(), "average": self.average.clone(),
            "weight": self.weight.clone(), "abs_grad": self.abs_grad.clone(),
            "count": self.count.clone(), "begun": self.begun,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.thresholds or not state:
            return
        self.private.load_state_dict(state["optimizer"])
        self.average, self.weight = state["average"].clone(), state["weight"].clone()
        self.abs_grad = state["abs_grad"].clone()
        self.count, self.begun = state["count"].clone(), state["begun"]
