"""WAGEUBN's golden vectors of batch norm, and how far a float32 batch norm may be from the exact one.

Its mean, deviation and quotient go to the other side of a tie where float32 cannot tell, and nowhere else: an
element may differ only where one of the three is that near to a tie, and only by what the one unit amounts to.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from schemes.vector_table import Comparison
from schemes.wageubn_vectors_nets import Beside, authors, converted, same
from torch import Tensor, nn

from lightning_lowbit.numerics.direct import direct_quantize
from lightning_lowbit.numerics.normalize import NormFormat, batch_norm, norm_constants, normalize, running_update

__all__ = ["Allowance", "allowance", "check_batch_norm", "norm_format", "per_channel"]

GRADIENT = 1e-4  # of the largest
SINGLE = 1e-6
DECAY = 0.997  # no key holds it
SUM_BLUR = 2.0**-20  # relative error of a float32 sum, in whatever order
QUOTIENT_BLUR = 2.0**-22  # of a subtraction and a division


class Allowance(NamedTuple):
    """Largest differences, float64.

    Args:
        xhat: of a normalized value (before gamma), elementwise.
        y: of the output, elementwise.
        slope: of the gradient of the input, relative.
    """

    xhat: Tensor
    y: Tensor
    slope: float


def norm_format(v: Comparison, bits: int) -> NormFormat:
    """With ``bits`` of the normalized value, and the eps of the file if it has one."""
    exponent = round(math.log2(v.number("eps"))) if "eps" in v.arrays else NormFormat().eps_exponent
    return NormFormat(xhat=bits, eps_exponent=exponent)


def near_tie(value: Tensor, blur: Tensor, bits: int) -> Tensor:
    """Whether value +-blur holds a number half-way between two of the grid."""
    scaled = value * 2.0 ** (bits - 1)
    return (scaled - torch.floor(scaled) - 0.5).abs() <= blur * 2.0 ** (bits - 1)


def allowance(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, y: Tensor, format: NormFormat, blur: float = SUM_BLUR
) -> Allowance:
    """Of a float32 computation of y.

    Args:
        x, y: [N, C, ...].
        mean, var, gamma: [C]; the first two float64, as the exact one has them.
        blur: relative error of the statistics.
    """
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, var, gamma = (channel.double().reshape(shape) for channel in (mean, var, gamma))
    deviation = var.sqrt()
    size = per_channel(x.double().abs()).reshape(shape) * (x.shape[1] / x.numel())
    s = direct_quantize(deviation, format.deviation) + 2.0**format.eps_exponent
    quotient = (x.double() - direct_quantize(mean, format.mean)) / s
    of_mean = near_tie(mean, blur * size, format.mean) * 2.0 ** (1 - format.mean) / s
    of_deviation = near_tie(deviation, blur * deviation, format.deviation) * 2.0 ** (1 - format.deviation) / s
    unit = 2.0 ** (1 - format.xhat)
    blurred = of_mean + (of_deviation + QUOTIENT_BLUR) * quotient.abs()
    xhat = near_tie(quotient, blurred, format.xhat) * torch.ceil(blurred / unit) * unit
    # What is left is the float32 of the product and of the sum.
    factor = direct_quantize(gamma, format.gamma).abs()
    y_bound = xhat * factor + 2.0**-22 * (y.double().abs() + quotient.abs() * factor)
    # The deviation is divided by three times: once for the slope, twice for what comes of the deviation's own.
    return Allowance(xhat, y_bound, 3 * float((of_mean + of_deviation).max()))


def per_channel(x: Tensor) -> Tensor:
    """Sums, [C]."""
    return x.sum([axis for axis in range(x.dim()) if axis != 1])


def compare_within(v: Comparison, key: str, got: Tensor, bound: Tensor) -> None:
    """Every element within its own bound; notes how many are no float32 neighbors."""
    want = v[key].double()
    off = (got.detach().double() - want).abs()
    v.exact(key, torch.where(off <= bound, want, got.detach().double()))
    aside = int((off > 2.0**-21 * want.abs()).sum())
    if aside:
        v.notes.append(f"{key}: {aside} of {want.numel()} a tie aside")


def check_batch_norm(v: Comparison) -> None:
    running = (v["moving_mean0"], v["moving_var0"])
    g = v["gout"]
    mean = var = torch.empty(0)
    for match in v.matching(r"(kx(\d+))_train_y"):
        tag, format = match[1], norm_format(v, int(match[2]))
        x, gamma, beta = (v[name].requires_grad_() for name in ("x", "gamma", "beta"))
        y, mean, var = batch_norm(x, gamma, beta, format)
        allowed = allowance(x.detach(), mean, var, gamma.detach(), y.detach(), format)
        compare_within(v, match[0], y, allowed.y)
        dx, dgamma, dbeta = torch.autograd.grad(y, (x, gamma, beta), g)
        v.close(f"{tag}_grad_x", dx, GRADIENT + allowed.slope)
        turned = float(per_channel(g.double().abs() * allowed.xhat).max())
        v.close(f"{tag}_grad_gamma", dgamma, GRADIENT, turned)
        v.close(f"{tag}_grad_beta", dbeta, GRADIENT)
        v.close(f"{tag}_batch_mean", mean, SINGLE, SINGLE * float(x.detach().abs().max()))
        v.close(f"{tag}_batch_var", var, SINGLE, SINGLE)
        check_evaluation(v, f"{tag}_eval_y", format, running)
        check_island(v, tag, format, Trained(y, dx, dgamma, dbeta))
    for name, moving, value in zip(("mean", "var"), running, (mean, var), strict=True):
        running_update(moving, value, DECAY)
        v.close(f"moving_{name}1", moving, SINGLE)


class Trained(NamedTuple):
    """Of a norm in training, or the gradients that come back to it."""

    y: Tensor
    grad_x: Tensor
    grad_gamma: Tensor
    grad_beta: Tensor


def check_island(v: Comparison, tag: str, format: NormFormat, want: Trained) -> None:
    """A converted norm gives the same, in training and (before it has trained) in evaluation, in every bit."""
    scheme = authors(xhat_bits=format.xhat, check=True)
    assert scheme.norm_format == format, f"eps: no option, expected 2^{scheme.norm_format.eps_exponent}"
    x, g = v["x"], v["gout"]
    norm: Any = nn.BatchNorm2d(x.shape[1])
    values = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean0", "running_var": "moving_var0"}
    norm.load_state_dict({name: v[key] for name, key in values.items()}, strict=False)
    converted(Beside(nn.Conv2d(x.shape[1], 1, 1), norm), scheme, x, x)
    with torch.no_grad():
        running = (norm.running_mean.clone(), norm.running_var.clone())
        expected, *_ = batch_norm(x, norm.weight, norm.bias, format, running)
        same(f"{tag}_eval_y of the network", norm.eval()(x), expected)
    x = x.requires_grad_()
    y = norm.train()(x)
    got = Trained(y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), g))
    for name, have, exact in zip(Trained._fields, got, want, strict=True):
        same(f"{tag}_{name} of the network", have, exact)
    assert scheme.norm_momentum is not None
    assert math.isclose(1.0 - scheme.norm_momentum, DECAY)
    for name in ("mean", "var"):
        v.close(f"moving_{name}1", norm.get_buffer(f"running_{name}"), SINGLE)


def check_evaluation(v: Comparison, key: str, format: NormFormat, running: tuple[Tensor, Tensor]) -> None:
    """By the running statistics: of floats, and, where x is put on a grid, of integers the same."""
    x, gamma, beta = v["x"], v["gamma"], v["beta"]
    y, mean, var = batch_norm(x, gamma, beta, format, running)
    compare_within(v, key, y, allowance(x, mean, var, gamma, y, format, QUOTIENT_BLUR).y)
    fraction = 15
    codes = torch.round(x.double() * 2.0**fraction)
    on_grid, *_ = batch_norm(codes * 2.0**-fraction, gamma, beta, format, running)
    integers = normalize(codes.long(), fraction, norm_constants(*running, gamma, beta, format), format)
    assert torch.equal(integers.double() * 2.0**-format.fraction, on_grid), f"{key}: integers differ from float64"
