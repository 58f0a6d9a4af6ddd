"""Batch norm whose mean, deviation and normalized value are fixed-point numbers (Yang et al., arXiv:1909.02384).

    mu_q = Q(mean, 16)              s = Q(sqrt(var), 16) + 2^-15
    xhat = Q((x - mu_q) / s, 16)    y = Q(gamma, 8) xhat + Q(beta, 8)

Q(v, k) = round(v 2^(k-1)) / 2^(k-1), ties to even and no clip; a width of 32 or more leaves v alone. Backward, every Q
is the identity and the gradient flows through mean and deviation. The variance is the biased one, and the small number
is added to the deviation.

The division is what decides the bits: a float32 quotient lands on the wrong side of a tie, or on one. In float64,
a / b for integers a 2^f and b is nearer to no tie than 1/(2b), so its rounding is that of the integers while
|x - mu_q| < 2^22 at the default widths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.normalize_blocks import blocks_of, dense, scratch
from lightning_lowbit.numerics.normalize_format import OFF, NormFormat, Statistics, on_grid, statistics_of
from lightning_lowbit.numerics.rounding import divide_rounded
from lightning_lowbit.numerics.ste import eager_cpu
from lightning_lowbit.numerics.through import require_first_order

__all__ = ["NormConstants", "NormFormat", "batch_norm", "norm_constants", "normalize", "odd_float32", "running_update"]

_GROUP, _MANY = 64, 256  # numbers looked at together, and how many such groups are worth a look
_CANCELS = 8  # times as large as the sum of squares around it: the mean's part of the sum around 0 costs 3 bits
_Reduce = Callable[[Tensor], Tensor]


def batch_norm(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    format: NormFormat,
    running: tuple[Tensor, Tensor] | None = None,
    reduce: _Reduce | None = None,
    exponent: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize by the statistics of the batch, or by ``running`` ones (evaluation, and training with frozen ones).

    y is computed in float64. Where float32 does not hold it (|y| >= 4 at the default widths) its last bit says so
    (round to odd): whatever coarser grid y is put on next, the result is that of the exact y.

    NaN or inf in x makes its channel NaN, statistics included.

    Backward keeps x and six numbers a channel, and works in float64 slices.

    Args:
        x: [N, C, ...], float; 16-bit floats count as float32.
        gamma, beta: [C], or None for 1 and 0.
        running: mean and biased variance, [C] each.
        reduce: sums float64 tensors over processes; None: statistics of this process.
        exponent: the norm counts in units of 2^exponent: y and the gradients of gamma and beta are those of
            x 2^-exponent, while x, its gradient, mean and variance stay in x's own units. A layer whose weights
            shrink by 2^exponent before this norm is thus one whose norm counts 2^exponent coarser; no parameter
            is touched.
    Returns:
        y (float64 for float64 x, else float32; x's shape), and the mean and biased variance it was normalized by,
        float64 [C], detached.

    >>> x = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
    >>> y, mean, var = batch_norm(x, None, None, NormFormat())
    >>> mean.item(), var.item(), (y[:, 0] * 2**15).tolist()
    (3.0, 3.5, [-35030.0, -17515.0, 0.0, 52545.0])
    >>> y, mean, var = batch_norm(8 * x, None, None, NormFormat(), exponent=3)
    >>> mean.item(), var.item(), (y[:, 0] * 2**15).tolist()
    (24.0, 224.0, [-35030.0, -17515.0, 0.0, 52545.0])
    >>> batch_norm(torch.ones(3, 1), None, None, NormFormat())[0].tolist()  # a constant channel
    [[0.0], [0.0], [0.0]]
    """
    x = dense(x)
    with torch.no_grad():
        if running is None:
            statistics, mean, var = _batch_statistics(x.detach(), format, exponent, reduce)
        else:
            mean, var = (value.detach().to(torch.float64) for value in running)
            statistics = statistics_of(mean, var, format, exponent)
    y = _Norm.apply(x, gamma, beta, format, statistics, reduce)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return y, mean, var


def running_update(running: Tensor, value: Tensor, decay: float = 0.997, bits: int = OFF, exponent: int = 0) -> None:
    """running = Q(decay * running + (1 - decay) * value, bits), in place; the sum is float64.

    A grid costs sensitivity: with 16 bits and a decay of 0.997 a statistic stays where it is while ``value`` is
    within 2^-16 / 0.003 = 0.005 of it.

    Args:
        running, value: mean or biased variance, [C].
        bits: grid of the running statistic; 32 or more is none.
        exponent: the grid is 2^(exponent - bits + 1); a norm in units of 2^e has e for the mean, 2 e for the variance.

    >>> running = torch.tensor([1.0, 1.0])
    >>> running_update(running, torch.tensor([2.0, 1.004]), bits=16)
    >>> running.tolist()
    [1.00299072265625, 1.0]
    """
    with torch.no_grad():
        moved = running.to(torch.float64) * decay + value.to(torch.float64) * (1.0 - decay)
        running.copy_(on_grid(moved, bits, exponent))


def _batch_statistics(
    x: Tensor, format: NormFormat, exponent: int, reduce: _Reduce | None
) -> tuple[Statistics, Tensor, Tensor]:
    """Sums of x on a grid of 15 fractional bits are exact, in whatever order and number of processes they are added."""
    once = reduce is None and eager_cpu(x)
    sums, squares = _sums(x, None, once)
    first = torch.stack([sums, torch.full_like(sums, x.numel() // max(x.shape[1], 1))])
    total, count = (reduce(first) if reduce is not None else first).unbind()
    count = count.clamp(min=1.0)
    mean = total / count
    # Squares around mu_q: x - mu_q is exact, and nothing cancels where the mean is large. Those around 0 come with the
    # first reading of x, and are moved where that loses nothing: as integers in units of the mean's grid, squared.
    mean_q = on_grid(mean, format.mean, exponent)
    moved = squares - mean_q * (2 * total - count * mean_q)
    exact = squares * 4.0 ** (format.mean - 1 - exponent) < 2.0**53
    if once and bool((exact & (count * mean_q.square() <= _CANCELS * moved)).all()):
        squares = moved
    else:
        squares, _ = _sums(x, mean_q)
        squares = reduce(squares) if reduce is not None else squares
    var = (squares / count - (mean - mean_q).square()).clamp(min=0.0)
    return statistics_of(mean, var, format, exponent, count), mean, var


def _sums(x: Tensor, center: Tensor | None, both: bool = False) -> tuple[Tensor, Tensor]:
    """Per channel, of x and, if ``both``, of x^2; of (x - center)^2 where there is a center."""
    blocks = blocks_of(x)
    pieces = blocks.of(x)
    totals, parts = blocks.totals()
    more, more_parts = blocks.totals()
    centers = [None] * len(pieces) if center is None else blocks.wide(center)
    for piece, (v,), part, other, mu in zip(pieces, scratch(pieces, 1), parts, more_parts, centers, strict=True):
        v.copy_(piece)
        blocks.add(part, v if mu is None else v.sub_(mu).square_())
        if both:
            blocks.add(other, v.square_())
    return blocks.fold(totals), blocks.fold(more)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        format: NormFormat,
        statistics: Statistics,
        reduce: _Reduce | None,
    ) -> Tensor:
        mean_q, s = statistics[:2]
        gamma_q = torch.ones_like(s) if gamma is None else on_grid(gamma.to(torch.float64), format.gamma)
        beta_q = torch.zeros_like(s) if beta is None else on_grid(beta.to(torch.float64), format.beta)
        ctx.format, ctx.reduce = format, reduce
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (gamma, beta))
        ctx.save_for_backward(x, gamma_q, *statistics)
        y = torch.empty_like(x, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        blocks, unit = blocks_of(x), format.xhat_unit
        pieces = blocks.of(x)
        channels = (blocks.wide(c) for c in (mean_q, s * unit, gamma_q * unit, beta_q))
        for piece, out, (v, spare), center, divisor, factor, shift in zip(
            pieces, blocks.of(y), scratch(pieces, 2), *channels, strict=True
        ):
            blocks.affine(_xhat_codes(v.copy_(piece).sub_(center), divisor, format), factor, shift, v)
            if y.dtype == torch.float64:
                out.copy_(v)
            else:
                _put_odd(out, v, spare, format)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        require_first_order("batch_norm")
        saved = ctx.saved_tensors  # once: a checkpointed block unpacks them once
        x, _, mean_q, s, *_, values = saved
        need_x, need_gamma, need_beta = ctx.needs_input_grad[:3]
        need_sums = need_x and values is not None
        if grad.stride() != x.stride():
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        blocks, unit = blocks_of(x), ctx.format.xhat_unit
        pieces = blocks.of(x)
        totals, parts = zip(*(blocks.totals() for _ in range(3)), strict=True)  # of g, g (x - mu_q), g xhat
        channels = (blocks.wide(c) for c in (mean_q, s * unit))
        for piece, g_i, (d, g, gd), center, divisor, g_sum, gd_sum, gx_sum in zip(
            pieces, blocks.of(grad), scratch(pieces, 3), *channels, *parts, strict=True
        ):
            g.copy_(g_i)
            if need_sums or need_beta:
                blocks.add(g_sum, g)
            if need_sums or need_gamma:
                d.copy_(piece).sub_(center)
            if need_sums:
                blocks.add(gd_sum, torch.mul(g, d, out=gd))
            if need_gamma:
                blocks.add(gx_sum, _xhat_codes(d, divisor, ctx.format).mul_(g))
        g_sum, gd_sum, gx_sum = (blocks.fold(t) for t in totals)
        gamma_dtype, beta_dtype = ctx.dtypes
        return (
            _input_gradient(saved, ctx.reduce, grad, torch.stack([g_sum, gd_sum])) if need_x else None,
            (gx_sum * unit).to(gamma_dtype) if need_gamma else None,
            g_sum.to(beta_dtype) if need_beta else None,
            None,
            None,
            None,
        )


def _input_gradient(saved: Any, reduce: _Reduce | None, grad: Tensor, sums: Tensor) -> Tensor:
    """dx = gamma / s (g - mean(g)) - (x - mean) / deviation * gamma / s^2 * mean(g (x - mu_q)).

    The last factor comes of the deviation: d(deviation)/dx = (x - mean) / (n deviation), 0 where the deviation is.
    """
    x, gamma_q, _, s, mean, deviation, values = saved
    blocks = blocks_of(x)
    slope = gamma_q / s
    dx = torch.empty_like(x)
    outs, grads = blocks.of(dx), blocks.of(grad)
    if values is None:
        for out, g_i, (g,), factor in zip(outs, grads, scratch(grads, 1), blocks.wide(slope), strict=True):
            out.copy_(g.copy_(g_i).mul_(factor))
        return dx
    g_mean, gd_mean = ((reduce(sums) if reduce is not None else sums) / values).unbind()
    pull = torch.where(deviation > 0, slope / s * gd_mean / deviation, 0.0)
    numbers = (blocks.wide(c) for c in (slope, -pull, pull * mean - slope * g_mean))
    for piece, out, g_i, (v, g), factor, weight, shift in zip(
        blocks.of(x), outs, grads, scratch(grads, 2), *numbers, strict=True
    ):
        blocks.affine(v.copy_(piece), weight, shift, v)
        out.copy_(blocks.affine(g.copy_(g_i), factor, v, g))
    return dx


def _xhat_codes(d: Tensor, divisor: Tensor, format: NormFormat) -> Tensor:
    """xhat / unit of d = x - mu_q, in place of d; the divisor is s in units of xhat."""
    d.div_(divisor)
    if format.xhat < OFF:
        d.round_()
    limit = format.xhat_limit
    return d if limit is None else d.clamp_(-limit / format.xhat_unit, limit / format.xhat_unit)


def _put_odd(out: Tensor, v: Tensor, spare: Tensor, format: NormFormat) -> None:
    """out = v, float64 rounded to odd; v and spare are lost.

    float32 holds v up to 2^(24 - fraction). Rounding to odd costs as much as the division, so it is done where 64
    numbers have a larger one among them, as long as that is rare.
    """
    few = 0
    if max(format.gamma, format.xhat, format.beta) < OFF and eager_cpu(out) and out.numel() % _GROUP == 0:
        few = out.numel() // _GROUP
    if few < _MANY:
        out.copy_(_to_odd(v, spare))
        return
    groups, values = out.copy_(v).view(_GROUP, few), v.view(_GROUP, few)
    magnitudes = torch.abs(groups, out=spare.view(-1).view(torch.float32)[: out.numel()].view(_GROUP, few))
    held = magnitudes.amax(0) <= 2.0 ** (24 - format.fraction)  # not of NaN
    beyond = held.logical_not_().nonzero().view(-1)
    if 4 * len(beyond) > few:
        out.copy_(_to_odd(v, spare))
    elif len(beyond):
        picked = values.index_select(1, beyond)
        groups.index_copy_(1, beyond, _to_odd(picked, torch.empty_like(picked)).to(out.dtype))


def odd_float32(v: Tensor) -> Tensor:
    """float64 numbers as float32, rounded to odd: put on any coarser grid next, they give what v gives.

    >>> v = torch.tensor([1.0, 1 + 2**-40, 1 + 2**-22 - 2**-40], dtype=torch.float64)
    >>> (odd_float32(v) - 1) * 2**23, (v.float() - 1) * 2**23
    (tensor([0., 1., 1.]), tensor([0., 0., 2.]))
    """
    return _to_odd(v.detach().clone(), torch.empty_like(v)).to(torch.float32)


def _to_odd(v: Tensor, spare: Tensor) -> Tensor:
    """float64 cut to the 24 bits of float32, the last of them set where anything was lost; in place."""
    bits, lost = v.view(torch.int64), (1 << 29) - 1
    carry = torch.bitwise_and(bits, lost, out=spare.view(torch.int64)).add_(lost)  # bit 29: whether anything is lost
    bits.bitwise_or_(carry).bitwise_and_(~lost)
    return v


class NormConstants(NamedTuple):
    """A batch norm in evaluation as integers, int64 [C] each.

    ``mean`` has format.mean - 1 fractional bits, ``s`` (deviation plus eps, at least 1) ``s_fraction`` of them;
    ``gamma`` format.gamma - 1, ``beta`` format.fraction.
    """

    mean: Tensor
    s: Tensor
    s_fraction: int
    gamma: Tensor
    beta: Tensor


def norm_constants(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, format: NormFormat, exponent: int = 0
) -> NormConstants:
    """Codes of running statistics and parameters, for :func:`normalize`.

    Args:
        mean, var: running mean and biased variance, [C].
        gamma, beta: [C], or None for 1 and 0.
        exponent: as of :func:`batch_norm`; mean and s count in units of 2^exponent.

    Raises:
        ConfigError: a width of ``format`` is no grid.
    """
    for field in fields(format)[:5]:
        if getattr(format, field.name) >= OFF:
            raise ConfigError(f"norm_constants: got {field.name}={OFF} or more, expected a grid; integers need one.")
    unit = 2.0**exponent
    mean, var = mean.detach().to(torch.float64) / unit, var.detach().to(torch.float64) / unit**2
    statistics = statistics_of(mean, var, format, 0)
    s_fraction = max(format.deviation - 1, -format.eps_exponent)
    one, zero = torch.ones_like(statistics.s), torch.zeros_like(statistics.s)
    gamma_q = one if gamma is None else on_grid(gamma.detach().to(torch.float64), format.gamma)
    beta_q = zero if beta is None else on_grid(beta.detach().to(torch.float64), format.beta)
    return NormConstants(
        _code(statistics.mean_q, format.mean - 1),
        _code(statistics.s, s_fraction),
        s_fraction,
        _code(gamma_q, format.gamma - 1),
        _code(beta_q, format.fraction),
    )


def _code(v: Tensor, fraction: int) -> Tensor:
    return (v * 2.0**fraction).to(torch.int64)


def _wide(channel: Tensor, like: Tensor) -> Tensor:
    return channel.reshape(1, -1, *[1] * (like.dim() - 2))


def normalize(x: Tensor, x_fraction: int, constants: NormConstants, format: NormFormat, exponent: int = 0) -> Tensor:
    """Batch norm of codes: y = gamma * round((x - mean) / s) + beta, half to even, by a constant divisor per channel.

    What :func:`batch_norm` gives for running statistics, bit for bit. int64 holds every numerator while
    |x - mean| < 2^32 at the default widths.

    Args:
        x: integers [N, C, ...], worth x * 2^-x_fraction.
        x_fraction: fractional bits of x.
        exponent: that of the constants; x_fraction + exponent is from -16 to 24.
    Returns:
        int64 codes with ``format.fraction`` fractional bits.

    >>> constants = norm_constants(torch.tensor([3.0]), torch.tensor([3.5]), None, None, NormFormat())
    >>> y = normalize(torch.tensor([[1], [2], [3], [6]]), 0, constants, NormFormat())
    >>> (y[:, 0] / 2**7).tolist()
    [-35030.0, -17515.0, 0.0, 52545.0]
    """
    x_fraction += exponent
    fraction = max(x_fraction, format.mean - 1)
    d = (x.to(torch.int64) << (fraction - x_fraction)) - _wide(constants.mean << (fraction - format.mean + 1), x)
    left = format.xhat - 1 + constants.s_fraction - fraction  # of d / s, for the fraction of xhat
    xhat = divide_rounded(d << max(left, 0), _wide(constants.s << max(-left, 0), x))
    if format.integer_bits is not None:
        limit = (1 << (format.integer_bits + format.xhat - 1)) - 1
        xhat = xhat.clamp(-limit, limit)
    aligned = format.fraction - (format.gamma + format.xhat - 2)
    return ((_wide(constants.gamma, x) * xhat) << aligned) + _wide(constants.beta, x)
