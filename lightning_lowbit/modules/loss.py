"""The integer gradient of cross-entropy, behind ``F.cross_entropy`` and ``nn.CrossEntropyLoss`` (NITI section 7)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lowbit.modules.carrier import Carrier, apply, carry
from lightning_lowbit.modules.integer_rounding import random_bits
from lightning_lowbit.numerics.exponent import ceil_log2
from lightning_lowbit.numerics.integer_loss import ERROR_EXPONENT, cross_entropy_error

__all__ = ["displayed_loss", "integer_cross_entropy"]


def integer_cross_entropy(
    input: Carrier, target: Tensor, weight: Tensor | None = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    """``F.cross_entropy`` of integer logits [N, C, ...] and class indices, with default arguments.

    Class weights, label smoothing, ignored targets, probabilities and ``reduction="none"`` are left to torch; the
    float gradient that comes back is then rounded where it enters the last layer.
    """
    plain_form = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    indices = target.dtype is torch.int64 and target.shape == (*input.shape[:1], *input.shape[2:])
    if not plain_form or not indices or reduction == "none" or input.dim() < 2 or bool((target == ignore_index).any()):
        return NotImplemented
    return apply(_CrossEntropy, input, target, reduction)


def displayed_loss(logits: Carrier, target: Tensor, reduction: str) -> Tensor:
    """The value that is logged: float, and nothing is computed from it."""
    return F.cross_entropy(logits.plain(), target, reduction=reduction)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Carrier, target: Tensor, reduction: str) -> Tensor:
        ctx.origin, ctx.reduction, ctx.batch = logits.origin, reduction, logits.origin.switch.run.batch
        ctx.save_for_backward(logits.payload, logits.exponent, target)
        return displayed_loss(logits, target, reduction)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The errors do not depend on a positive factor on the loss: that goes into their exponent (Decision 5)."""
        codes, exponent, target = ctx.saved_tensors
        origin, run = ctx.origin, ctx.origin.switch.run
        rows = codes.movedim(1, -1)
        per_sample = rows.shape[1:].numel()
        noise = random_bits(origin, "loss", len(rows), per_sample, rows.device, batch=ctx.batch)
        shape, classes = rows.shape, rows.shape[-1]
        err = cross_entropy_error(rows.reshape(-1, classes), exponent, target.reshape(-1), noise.reshape(-1, classes))
        count = torch.full((), 0 if run.blank else target.numel(), device=codes.device)
        factor = grad.double()
        if ctx.reduction == "mean":
            factor = factor / run.reduce_sum(count).clamp(min=1)
        sign = (torch.zeros_like(grad) if run.blank else grad.sign()).to(err.dtype)
        err = (err * sign).reshape(shape).movedim(-1, 1)
        return carry(err, ceil_log2(factor.abs()) + (run.error_bits + ERROR_EXPONENT), origin), None, None
