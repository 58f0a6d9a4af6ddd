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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.rounding import divide_rounded, round_to

__all__ = ["NormConstants", "NormFormat", "batch_norm", "norm_constants", "normalize", "running_update"]

_OFF = 32  # bits: from here on a value is left alone
_SLICE = 1 << 16  # elements in float64 at a time: the scratch stays in the cache
_Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class NormFormat:
    """Bits of what a batch norm computes with; k bits are k - 1 behind the binary point, 32 or more are no grid.

    Args:
        mean, deviation, xhat, gamma, beta: widths.
        eps_exponent: log2 of what is added to the deviation.
        integer_bits: of the normalized value, which is clipped below 2^integer_bits; None does not clip. A channel
            that was constant in training is divided by 2^-15, so that one odd value in evaluation is 2^15 times
            too large.

    Raises:
        ConfigError: a field out of range.
    """

    mean: int = 16
    deviation: int = 16
    xhat: int = 16
    gamma: int = 8
    beta: int = 8
    eps_exponent: int = -15
    integer_bits: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self)[:5]:
            bits = getattr(self, field.name)
            if not (type(bits) is int and (2 <= bits <= 24 or bits >= _OFF)):
                raise ConfigError(
                    f"NormFormat: got {field.name}={bits!r}, expected an integer from 2 to 24, or {_OFF} for no grid."
                )
        if not -24 <= self.eps_exponent <= -1:
            raise ConfigError(f"NormFormat: got eps_exponent={self.eps_exponent!r}, expected -24 to -1.")
        if self.integer_bits is not None and not 0 <= self.integer_bits <= 16:
            raise ConfigError(f"NormFormat: got integer_bits={self.integer_bits!r}, expected 0 to 16, or None.")

    @property
    def fraction(self) -> int:
        """Fractional bits of y."""
        return max(self.gamma + self.xhat - 2, self.beta - 1)

    @property
    def xhat_limit(self) -> float | None:
        """Largest |xhat|: one unit below 2^integer_bits."""
        return None if self.integer_bits is None else 2.0**self.integer_bits - 2.0 ** (1 - self.xhat)


class _Statistics(NamedTuple):
    """What a channel is normalized with, float64 [C]; ``mean`` and ``deviation`` are those before their grids."""

    mean_q: Tensor
    s: Tensor
    mean: Tensor
    deviation: Tensor
    values: Tensor | None  # how many per channel; None: of no batch, so no gradient flows through the statistics


def batch_norm(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    format: NormFormat,
    running: tuple[Tensor, Tensor] | None = None,
    reduce: _Reduce | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize by the statistics of the batch, or by ``running`` ones (evaluation, and training with frozen ones).

    y is computed in float64. Where float32 does not hold it (|y| >= 4 at the default widths) its last bit says so
    (round to odd): whatever coarser grid y is put on next, the result is that of the exact y.

    Backward keeps x and six numbers a channel, and works in float64 slices.

    Args:
        x: [N, C, ...], float; 16-bit floats count as float32.
        gamma, beta: [C], or None for 1 and 0.
        running: mean and biased variance, [C] each.
        reduce: sums float64 tensors over processes; None: statistics of this process.
    Returns:
        y (float64 for float64 x, else float32; x's shape), and the mean and biased variance it was normalized by,
        float64 [C], detached.

    >>> x = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
    >>> y, mean, var = batch_norm(x, None, None, NormFormat())
    >>> mean.item(), var.item(), (y[:, 0] * 2**15).tolist()
    (3.0, 3.5, [-35030.0, -17515.0, 0.0, 52545.0])
    >>> batch_norm(torch.ones(3, 1), None, None, NormFormat())[0].tolist()  # a constant channel
    [[0.0], [0.0], [0.0]]
    """
    with torch.no_grad():
        if running is None:
            statistics, mean, var = _batch_statistics(x.detach(), format, reduce)
        else:
            mean, var = (value.detach().to(torch.float64) for value in running)
            statistics = _statistics(mean, var, format)
    y = _Norm.apply(x, gamma, beta, format, statistics, reduce)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return y, mean, var


def running_update(running: Tensor, value: Tensor, decay: float = 0.997, bits: int = _OFF) -> None:
    """running = Q(decay * running + (1 - decay) * value, bits), in place; the sum is float64.

    A grid costs sensitivity: with 16 bits and a decay of 0.997 a statistic stays where it is while ``value`` is
    within 2^-16 / 0.003 = 0.005 of it.

    Args:
        running, value: mean or biased variance, [C].
        bits: grid of the running statistic; 32 or more is none.

    >>> running = torch.tensor([1.0, 1.0])
    >>> running_update(running, torch.tensor([2.0, 1.004]), bits=16)
    >>> running.tolist()
    [1.00299072265625, 1.0]
    """
    with torch.no_grad():
        moved = running.to(torch.float64) * decay + value.to(torch.float64) * (1.0 - decay)
        running.copy_(_on_grid(moved, bits))


def _on_grid(v: Tensor, bits: int) -> Tensor:
    return v if bits >= _OFF else round_to(v * 2.0 ** (bits - 1)) * 2.0 ** (1 - bits)


def _statistics(mean: Tensor, var: Tensor, format: NormFormat, values: Tensor | None = None) -> _Statistics:
    mean_q, deviation = _on_grid(mean, format.mean), var.clamp(min=0.0).sqrt()
    s = _on_grid(deviation, format.deviation) + 2.0**format.eps_exponent
    return _Statistics(mean_q, s, mean, deviation, values)


def _batch_statistics(x: Tensor, format: NormFormat, reduce: _Reduce | None) -> tuple[_Statistics, Tensor, Tensor]:
    """Sums of x on a grid of 15 fractional bits are exact, in whatever order and number of processes they are added."""
    first = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
    for piece in _pieces(x):
        first[0] += _sum(piece)
    first[1] = x.numel() // max(x.shape[1], 1)
    total, count = (reduce(first) if reduce is not None else first).unbind()
    count = count.clamp(min=1.0)
    mean = total / count
    # Around mu_q, not 0: x - mu_q is exact, and nothing cancels where the mean is large.
    mean_q = _on_grid(mean, format.mean)
    squares = torch.zeros_like(mean)
    for piece in _pieces(x):
        squares += _sum((piece - _wide(mean_q, x)).square_())
    squares = reduce(squares) if reduce is not None else squares
    var = (squares / count - (mean - mean_q).square()).clamp(min=0.0)
    return _statistics(mean, var, format, count), mean, var


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        format: NormFormat,
        statistics: _Statistics,
        reduce: _Reduce | None,
    ) -> Tensor:
        gamma_q = torch.ones_like(statistics.s) if gamma is None else _on_grid(gamma.to(torch.float64), format.gamma)
        beta_q = torch.zeros_like(gamma_q) if beta is None else _on_grid(beta.to(torch.float64), format.beta)
        ctx.format, ctx.reduce = format, reduce
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (gamma, beta))
        ctx.save_for_backward(x, gamma_q, *statistics)
        y = torch.empty_like(x, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        for out, piece in zip(_split(y), _pieces(x), strict=True):
            xhat = _normalized(piece.sub_(_wide(statistics.mean_q, x)), statistics.s, format)
            exact = xhat.mul_(_wide(gamma_q, x)).add_(_wide(beta_q, x))
            out.copy_(exact if y.dtype == torch.float64 else _to_odd(exact))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, _, mean_q, s, *_ = ctx.saved_tensors
        sums = torch.zeros(3, len(s), dtype=torch.float64, device=x.device)  # of g, g (x - mu_q), g xhat
        for g, piece in zip(_pieces(grad), _pieces(x), strict=True):
            d = piece.sub_(_wide(mean_q, x))
            sums[0] += _sum(g)
            sums[1] += _sum(g * d)
            sums[2] += _sum(g.mul_(_normalized(d, s, ctx.format)))
        dx = _input_gradient(ctx, grad, sums[:2]) if ctx.needs_input_grad[0] else None
        gamma_dtype, beta_dtype = ctx.dtypes
        return (
            dx,
            None if gamma_dtype is None else sums[2].to(gamma_dtype),
            None if beta_dtype is None else sums[0].to(beta_dtype),
            None,
            None,
            None,
        )


def _input_gradient(ctx: Any, grad: Tensor, sums: Tensor) -> Tensor:
    """dx = gamma / s (g - mean(g)) - (x - mean) / deviation * gamma / s^2 * mean(g (x - mu_q)).

    The last factor comes of the deviation: d(deviation)/dx = (x - mean) / (n deviation), 0 where the deviation is.
    """
    x, gamma_q, _, s, mean, deviation, values = ctx.saved_tensors
    slope = gamma_q / s
    dx = torch.empty_like(x)
    if values is None:
        for out, g in zip(_split(dx), _pieces(grad), strict=True):
            out.copy_(g.mul_(_wide(slope, x)))
        return dx
    g_mean, gd_mean = ((ctx.reduce(sums) if ctx.reduce is not None else sums) / values).unbind()
    pull = torch.where(deviation > 0, slope / s * gd_mean / deviation, 0.0)
    for out, g, piece in zip(_split(dx), _pieces(grad), _pieces(x), strict=True):
        centered = piece.sub_(_wide(mean, x))
        out.copy_(g.sub_(_wide(g_mean, x)).mul_(_wide(slope, x)).sub_(centered.mul_(_wide(pull, x))))
    return dx


def _normalized(d: Tensor, s: Tensor, format: NormFormat) -> Tensor:
    """xhat of d = x - mu_q, float64."""
    xhat = _on_grid(d / _wide(s, d), format.xhat)
    limit = format.xhat_limit
    return xhat if limit is None else xhat.clamp_(-limit, limit)


def _to_odd(v: Tensor) -> Tensor:
    """float64 cut to the 24 bits of float32, the last of them set where anything was lost."""
    bits = v.view(torch.int64)
    lost = (1 << 29) - 1
    odd = ((bits & lost) != 0).to(torch.int64) << 29
    return ((bits & ~lost) | odd).view(torch.float64)


def _wide(channel: Tensor, like: Tensor) -> Tensor:
    return channel.reshape(1, -1, *[1] * (like.dim() - 2))


def _sum(piece: Tensor) -> Tensor:
    return piece.sum([axis for axis in range(piece.dim()) if axis != 1])


def _split(x: Tensor) -> tuple[Tensor, ...]:
    """Samples, as many at a time as fit a slice."""
    samples = max(1, _SLICE * len(x) // max(x.numel(), 1)) if x.device.type == "cpu" else max(len(x), 1)
    return torch.split(x, samples)


def _pieces(x: Tensor) -> Iterator[Tensor]:
    """The same in float64, each one new memory."""
    return (piece.to(torch.float64, copy=True) for piece in _split(x))


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
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, format: NormFormat
) -> NormConstants:
    """Codes of running statistics and parameters, for :func:`normalize`.

    Args:
        mean, var: running mean and biased variance, [C].
        gamma, beta: [C], or None for 1 and 0.

    Raises:
        ConfigError: a width of ``format`` is no grid.
    """
    for field in fields(format)[:5]:
        if getattr(format, field.name) >= _OFF:
            raise ConfigError(f"norm_constants: got {field.name}={_OFF} or more, expected a grid; integers need one.")
    statistics = _statistics(mean.detach().to(torch.float64), var.detach().to(torch.float64), format)
    s_fraction = max(format.deviation - 1, -format.eps_exponent)
    one, zero = torch.ones_like(statistics.s), torch.zeros_like(statistics.s)
    gamma_q = one if gamma is None else _on_grid(gamma.detach().to(torch.float64), format.gamma)
    beta_q = zero if beta is None else _on_grid(beta.detach().to(torch.float64), format.beta)
    return NormConstants(
        _code(statistics.mean_q, format.mean - 1),
        _code(statistics.s, s_fraction),
        s_fraction,
        _code(gamma_q, format.gamma - 1),
        _code(beta_q, format.fraction),
    )


def _code(v: Tensor, fraction: int) -> Tensor:
    return (v * 2.0**fraction).to(torch.int64)


def normalize(x: Tensor, x_fraction: int, constants: NormConstants, format: NormFormat) -> Tensor:
    """Batch norm of codes: y = gamma * round((x - mean) / s) + beta, half to even, by a constant divisor per channel.

    What :func:`batch_norm` gives for running statistics, bit for bit. int64 holds every numerator while
    |x - mean| < 2^32 at the default widths.

    Args:
        x: integers [N, C, ...], worth x * 2^-x_fraction.
        x_fraction: fractional bits of x, from -16 to 24.
    Returns:
        int64 codes with ``format.fraction`` fractional bits.

    >>> constants = norm_constants(torch.tensor([3.0]), torch.tensor([3.5]), None, None, NormFormat())
    >>> y = normalize(torch.tensor([[1], [2], [3], [6]]), 0, constants, NormFormat())
    >>> (y[:, 0] / 2**7).tolist()
    [-35030.0, -17515.0, 0.0, 52545.0]
    """
    fraction = max(x_fraction, format.mean - 1)
    d = (x.to(torch.int64) << (fraction - x_fraction)) - _wide(constants.mean << (fraction - format.mean + 1), x)
    left = format.xhat - 1 + constants.s_fraction - fraction  # of d / s, for the fraction of xhat
    xhat = divide_rounded(d << max(left, 0), _wide(constants.s << max(-left, 0), x))
    if format.integer_bits is not None:
        limit = (1 << (format.integer_bits + format.xhat - 1)) - 1
        xhat = xhat.clamp(-limit, limit)
    aligned = format.fraction - (format.gamma + format.xhat - 2)
    return ((_wide(constants.gamma, x) * xhat) << aligned) + _wide(constants.beta, x)
