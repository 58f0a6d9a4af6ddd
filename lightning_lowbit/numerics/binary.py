"""Signs in place of numbers, and what passes back through them (Courbariaux et al., arXiv:1602.02830)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "STES", "Ste", "binarize", "binary_sign", "channel_mean", "leaky", "probability_sign", "progressive_width",
    "scaled_sign", "swish_slope",
]  # fmt: skip

Ste = Literal["identity", "htanh", "approx", "swish", "annealed", "progressive"]
STES: tuple[str, ...] = get_args(Ste)
ScaleGrad = Literal["unit", "alpha", "full"]

_LARGEST = 80.0  # cosh overflows float32 beyond 89; the quotient is 0 long before


def binary_sign(x: Tensor) -> Tensor:
    """-1 where x is negative, else +1: a binary network has no zero, unlike torch.sign.

        x      -inf  -1  -0.0   0   1   inf   NaN
        sign    -1   -1    1    1   1    1     1

    Args:
        x: any real dtype and shape.
    Returns:
        the signs in the dtype of x.

    >>> binary_sign(torch.tensor([float("-inf"), -1, -0.0, 0, 1, float("nan")])).tolist()
    [-1.0, -1.0, 1.0, 1.0, 1.0, 1.0]
    """
    if torch.compiler.is_compiling():
        return torch.where(x < 0, -1.0, 1.0).to(x.dtype)
    # On a CPU a twentieth of the time of torch.where: the comparison is written as numbers at once.
    return torch.lt(x.detach(), 0, out=torch.empty_like(x, requires_grad=False)).mul_(-2).add_(1)


def probability_sign(x: Tensor, u: Tensor) -> Tensor:
    """+1 with probability clip((x + 1) / 2, 0, 1), else -1 (arXiv:1602.02830 eq. 2).

    +1 where (x + 1) / 2 + u > 1: a tie gives -1, and |x| >= 1 leaves nothing to chance.

    Args:
        x: real values; computed in float32 at least.
        u: uniform in [0, 1), shape of x.

    >>> x, u = torch.tensor([-1.0, 0.0, 0.0, 0.5, 1.0]), torch.tensor([0.99, 0.5, 0.51, 0.26, 0.01])
    >>> probability_sign(x, u).tolist()
    [-1.0, -1.0, 1.0, 1.0, 1.0]
    """
    wide = x if x.dtype == torch.float64 else x.float()
    positive = (wide + 1) / 2 + u > 1
    return torch.where(positive, 1.0, -1.0).to(x.dtype)


def binarize(x: Tensor, ste: str = "htanh", progress: Tensor | None = None, u: Tensor | None = None) -> Tensor:
    """Signs of x; the gradient that comes back is multiplied by d(x), a stand-in for the sign's derivative.

        ste          d(x)
        identity     1
        htanh        1 where |x| <= 1, else 0: a closed window, so that a clipped latent weight still learns
        approx       max(0, 2 - 2|x|)                                        (Bi-Real Net, arXiv:1808.00278 eq. 6)
        swish        5 (2 - 5x tanh(5x/2)) / (1 + cosh(5x))                  (BNN+, arXiv:1812.11800)
        annealed     k t (1 - tanh^2(t x)), t = 0.1 ... 10, k = max(1/t, 1)  (IR-Net, arXiv:1909.10788 eq. 9)
        progressive  1 within the window of a hardtanh that narrows to the sign (forward too)

    Args:
        x: real values of any shape.
        ste: one of STES.
        progress: 0-dim in [0, 1], how far annealed and progressive have come; None is the end, 1.
        u: uniform noise in [0, 1) of the shape of x makes the signs stochastic.
    Returns:
        the signs, dtype of x.
    """
    if ste == "progressive":
        return _apply(_Progressive, x, progressive_width(progress, x))
    if ste == "identity":
        return _apply(_Through, x, u)
    return _apply(_Sign, x, u, _SLOPES[ste], progress)


def scaled_sign(
    w: Tensor,
    scale: Tensor,
    ste: str = "identity",
    grad: str = "alpha",
    u: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """scale * sign(w), with one of three gradients to the latent w.

        grad    to w_i, for g_i the gradient of q_i = scale * sign(w_i)
        unit    g_i d(w_i)                                          (Bi-Real Net and ReActNet, as published in code)
        alpha   scale g_i d(w_i)                                    (larq)
        full    sign(w_i)/n * sum_j g_j sign(w_j) + scale g_i d(w_i)    the derivative for scale = mean |w|

    Args:
        w: latent weights, outputs on axis 0.
        scale: what the signs are multiplied with: 0-dim, or [outputs, 1, ...]; no gradient reaches it by itself.
        ste: d, one of STES but progressive.
        u: uniform noise for stochastic signs; computed on w / scale, where the scale is not 0.
        gain: factor in ``scale`` that does not come from w, and that the ratio leaves out; None is 1.
    """
    if u is not None:
        own = scale if gain is None else scale / gain
        ratio = torch.where(own > 0, w / torch.where(own > 0, own, 1), w)
        signs = probability_sign(ratio, u)
    else:
        signs = binary_sign(w)
    return _apply(_Scaled, w, signs, scale, _SLOPES[ste], grad)


def leaky(x: Tensor, slope: Tensor) -> Tensor:
    """x where x > 0, else slope x: a PReLU whose slope broadcasts against x, along any axis.

    On channels_last tensors torch's own takes several times as long on the way back.
    """
    return _apply(_Leaky, x, slope)


def channel_mean(w: Tensor) -> Tensor:
    """alpha_c = mean |w| over all but axis 0, [outputs, 1, ...] (XNOR-Net, arXiv:1603.05279 eq. 6).

    Added up in float64 and rounded once, so that the order in which a compiled sum goes cannot show.
    """
    return w.detach().abs().mean(tuple(range(1, w.dim())), keepdim=True, dtype=torch.float64).to(w.dtype)


def progressive_width(progress: Tensor | None, like: Tensor) -> Tensor:
    """1 - T of the progressive sign, T = 1 - 4^(-10 s) for progress s; 0 at the end (the hard sign).

    >>> [float(progressive_width(torch.tensor(s), torch.ones(()))) for s in (0.0, 0.1, 0.5)]
    [1.0, 0.25, 0.0009765625]
    """
    if progress is None:
        return torch.zeros((), dtype=like.dtype, device=like.device)
    width = torch.pow(4.0, -10.0 * progress.to(like.device, torch.float32))
    return torch.where(progress.to(like.device) >= 1, 0.0, width).to(like.dtype)


def _inside(x: Tensor, progress: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return (x.abs() <= 1).to(x.dtype)
    magnitude = x.detach().abs()
    return torch.le(magnitude, 1, out=magnitude)


def _one(x: Tensor, progress: Tensor | None) -> Tensor:
    return torch.ones_like(x)


def _triangle(x: Tensor, progress: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return (2 - 2 * x.abs()).clamp_min(0)
    return x.abs().mul_(-2).add_(2).clamp_min_(0)  # one tensor, not four: this runs once a layer and step


def swish_slope(x: Tensor, progress: Tensor | None = None, beta: float = 5.0) -> Tensor:
    """beta (2 - r tanh(r/2)) / (1 + cosh r) with r = beta x; negative for |r| > 2.4."""
    r = (beta * x.float()).clamp(-_LARGEST, _LARGEST)  # an infinite r would make inf / inf of it
    return (beta * (2 - r * torch.tanh(r / 2)) / (1 + torch.cosh(r))).to(x.dtype)


def _tanh(x: Tensor, progress: Tensor | None) -> Tensor:
    """t runs geometrically from 0.1 to 10."""
    s = torch.ones((), device=x.device) if progress is None else progress.to(x.device, torch.float32)
    t = torch.pow(10.0, 2 * s - 1)
    return (torch.clamp_min(1 / t, 1) * t * (1 - torch.tanh(t * x.float()).square())).to(x.dtype)


_SLOPES: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "identity": _one,
    "htanh": _inside,
    "approx": _triangle,
    "swish": swish_slope,
    "annealed": _tanh,
}


def _times(slope: Tensor, g: Tensor) -> Tensor:
    """Their product, in the slope's own memory where nobody differentiates it again."""
    return slope * g if torch.is_grad_enabled() else slope.mul_(g)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]  # torch does not type it
    return result


def _signs(x: Tensor, u: Tensor | None) -> Tensor:
    return binary_sign(x) if u is None else probability_sign(x, u)


class _Through(torch.autograd.Function):
    """The plain straight-through estimator keeps nothing."""

    @staticmethod
    def forward(x: Tensor, u: Tensor | None) -> Tensor:
        return _signs(x, u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, u: Tensor | None, slope: Any, progress: Tensor | None) -> Tensor:
        return _signs(x, u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.slope, ctx.progress = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _times(ctx.slope(x, ctx.progress), g), None, None, None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(w: Tensor, signs: Tensor, scale: Tensor, slope: Any, grad: str) -> Tensor:
        return scale * signs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        w, signs, scale, ctx.slope, ctx.grad = inputs
        ctx.save_for_backward(w, signs, scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        w, signs, scale = ctx.saved_tensors
        passed = _times(ctx.slope(w, None), g)
        if ctx.grad == "unit":
            return passed, None, None, None, None
        passed = scale * passed
        if ctx.grad == "full":
            rest = tuple(range(1, w.dim())) if scale.dim() else tuple(range(w.dim()))
            count = math.prod(w.shape[axis] for axis in rest)
            passed = passed + signs / count * (g * signs).sum(rest, keepdim=bool(scale.dim()))
        return passed, None, None, None, None


class _Leaky(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, slope: Tensor) -> Tensor:
        return x.clamp_min(0).addcmul_(x.clamp_max(0), slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.where(x > 0, 1.0, slope) * g, (x.clamp_max(0) * g).sum_to_size(slope.shape)
        dx = torch.gt(x, 0, out=torch.empty_like(x)).mul_(1 - slope).add_(slope).mul_(g)
        return dx, x.clamp_max(0).mul_(g).sum_to_size(slope.shape)


class _Progressive(torch.autograd.Function):
    """hardtanh(x / width): forward a ramp that steepens, backward the identity (bitorch)."""

    @staticmethod
    def forward(x: Tensor, width: Tensor) -> Tensor:
        ramp = torch.clamp(x / width.clamp_min(torch.finfo(x.dtype).tiny), -1, 1)
        return torch.where(width > 0, ramp, binary_sign(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None
