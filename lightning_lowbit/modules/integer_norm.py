"""Batch norm between integer layers: int8 in and out, statistics as exact integer sums over all processes (Decision 9).

The elementwise part is float64 in one fixed order, so its bits depend on no machine, thread count or process count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lowbit.modules.block import BlockRange, largest_range
from lightning_lowbit.modules.carrier import Carrier, apply, carry, is_codes
from lightning_lowbit.modules.integer_rounding import error_codes, lower_carried, lower_entry
from lightning_lowbit.modules.lowering import Builder, Codes, Snap, refuse
from lightning_lowbit.numerics.affine import affine_parameters
from lightning_lowbit.numerics.exponent import pow2
from lightning_lowbit.numerics.integer_affine import integer_affine
from lightning_lowbit.numerics.niti_rules import PAYLOAD_BITS
from lightning_lowbit.numerics.rounding import Rounding, round_to

__all__ = ["integer_norm", "lower_norm"]

_FRACTIONS = ("fraction_in", "mean_fraction", "s_fraction", "xhat_fraction", "out_fraction", "product_fraction")


def integer_norm(norm: Any, x: Tensor) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * gamma + beta of a carrier [N, C, ...], rounded to 8 bits."""
    if not is_codes(x):
        return norm.op(x)  # type: ignore[no-any-return]
    return apply(_Norm, x, norm.weight, norm.bias, norm)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Carrier, weight: Tensor | None, bias: Tensor | None, norm: Any) -> Tensor:
        q, unit = _rows(x.payload), pow2(x.exponent, torch.float64)
        by_batch = norm.training or norm.running_mean is None
        if by_batch:
            count, mean, var = _batch_moments(q, unit, norm)
        else:
            count, mean, var = None, norm.running_mean.double(), norm.running_var.double()
        inverse = 1.0 / torch.sqrt(var + norm.eps)
        gamma, slope, offset = _line(weight, bias, mean, inverse, unit)
        y = q.double() * slope + offset
        ctx.norm, ctx.affine, ctx.count = norm, weight is not None, count
        ctx.save_for_backward(x.payload, x.exponent, mean, inverse, gamma)
        return _to_carrier(y, x.payload, norm.lowbit_accumulator, norm.training, norm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        norm, run = ctx.norm, ctx.norm.switch.run
        payload, exponent, mean, inverse, gamma = ctx.saved_tensors
        err, err_exponent = error_codes(grad, norm, norm.lowbit_error)
        g, q = _rows(err), _rows(payload)
        unit, err_unit = pow2(exponent, torch.float64), pow2(err_exponent, torch.float64)
        sums = torch.stack([_sum(g), _sum(g.to(torch.int16) * q.to(torch.int16))])
        sums = run.reduce_sum(torch.zeros_like(sums) if run.blank else sums)
        sum_g = sums[0].double() * err_unit
        # sum g * xhat, xhat = (q * unit - mean) * inverse
        sum_gx = (sums[1].double() * err_unit * unit - mean * sum_g) * inverse
        dx = g.double() * (gamma * inverse * err_unit)
        if ctx.count is not None:
            # dx = gamma / sigma * (g - mean(g) - xhat * mean(g * xhat))
            pull = gamma * inverse * inverse * sum_gx / ctx.count
            dx = dx - (q.double() * (pull * unit) + (gamma * inverse * sum_g / ctx.count - pull * mean))
        if run.blank:  # the two means would send an error to a sample that is none
            dx = torch.zeros_like(dx)
        error = _to_carrier(dx, payload, norm.lowbit_error, True, norm)
        if not ctx.affine:
            return error, None, None, None
        # The errors carry the factor of a mean over processes, which these sums over all of them must not have twice.
        once = 0.5**run.error_bits
        return error, (sum_gx * once).float(), (sum_g * once).float(), None


def _line(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """gamma, and slope and offset of y as a function of the code, float64 [channels]."""
    gamma = torch.ones_like(mean) if weight is None else weight.double()
    beta = torch.zeros_like(mean) if bias is None else bias.double()
    return gamma, gamma * inverse * unit, beta - gamma * inverse * mean


def lower_norm(build: Builder, norm: Any, x: Codes) -> Codes:
    """``integer_norm`` of evaluation: 256 codes may come in, so integers exist that round each of them alike."""
    ranges = norm.lowbit_accumulator
    if norm.running_mean is None:
        raise refuse(
            norm.path, "it normalizes by the statistics of each batch", "Convert it with track_running_stats=True."
        )
    mean, var = norm.running_mean.double(), norm.running_var.double()
    if x.word != 8:
        a, b = affine_parameters(mean, var, norm.weight, norm.bias, norm.eps)
        return lower_entry(build, build.island("affine", x, constants={"a": a, "b": b}), ranges)
    exponent, codes = _exponent(ranges.range()), torch.arange(x.low, x.high + 1, device=mean.device)
    inverse, unit = 1.0 / torch.sqrt(var + norm.eps), pow2(torch.tensor(x.exponent), torch.float64).to(mean.device)
    _, slope, offset = _line(norm.weight, norm.bias, mean, inverse, unit)
    step = pow2(-exponent, torch.float64)
    results = _codes(codes.double()[:, None] * slope + offset, exponent).to(torch.int64)
    found = integer_affine(codes, results, slope * step, offset * step)
    if found is None:
        raise refuse(norm.path, "no integers of 61 bits round as its statistics do", "Convert with norms='fold'.")
    m, b, s = found
    constants = {"mean": torch.zeros_like(m), "s": torch.ones_like(m), "gamma": m, "beta": b}
    y = build.normalize(x, dict.fromkeys(_FRACTIONS, 0) | {"limit": None}, constants, s - int(exponent))
    return lower_carried(build, build.snap(y, Snap(int(exponent), -127, 127, Rounding.HALF_AWAY)))


def _batch_moments(q: Tensor, unit: Tensor, norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance over the batches of all processes, from integer sums; moving averages are renewed."""
    run = norm.switch.run
    sums = torch.stack([_sum(q), _sum(q.to(torch.int16) * q.to(torch.int16)), torch.full_like(_sum(q[:1]), len(q))])
    sums = run.reduce_sum(torch.zeros_like(sums) if run.blank else sums).double()
    count = sums[2]
    mean_q = sums[0] / count
    var_q = (sums[1] / count - mean_q * mean_q).clamp(min=0.0)
    mean, var = mean_q * unit, var_q * unit * unit
    if norm.training and norm.running_mean is not None:
        _track(norm, mean, var * (count / (count - 1.0).clamp(min=1.0)))
    return count, mean, var


@torch.no_grad()
def _track(norm: Any, mean: Tensor, unbiased: Tensor) -> None:
    """Moving averages as torch's batch norm keeps them, each product and sum rounded once."""
    norm.num_batches_tracked.add_(1)
    share = 1.0 / norm.num_batches_tracked.double() if norm.momentum is None else norm.momentum
    for moving, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        moving.copy_(moving.double() * (1.0 - share) + value * share)


def _rows(x: Tensor) -> Tensor:
    """[N, C, ...] as [values, C]; a view of channels-last data."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(0, dtype=torch.int64)


def _to_carrier(rows: Tensor, like: Tensor, ranges: BlockRange, training: bool, norm: Any) -> Carrier:
    """float64 rows rounded to codes, ties away from zero, in the shape and memory format of ``like``."""
    exponent = _exponent(ranges.follow(lambda: largest_range(rows), training))
    shape = (like.shape[0], *like.shape[2:], like.shape[1])
    return carry(_codes(rows, exponent).reshape(shape).movedim(-1, 1), exponent, norm)


def _exponent(found: Tensor) -> Tensor:
    """That of codes in a range; of nothing but zeros by convention."""
    exponent = found - PAYLOAD_BITS
    return torch.where(exponent < -PAYLOAD_BITS - 126, -PAYLOAD_BITS, exponent)


def _codes(rows: Tensor, exponent: Tensor) -> Tensor:
    scaled = rows * pow2(-exponent, torch.float64)
    return round_to(scaled, Rounding.HALF_AWAY).clamp(-127, 127).to(torch.int8)
