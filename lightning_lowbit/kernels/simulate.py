"""The integer products by float convolutions and matrix products, wherever every partial sum is proved exact.

Codes of int8 are at most 128 in magnitude, those of uint8 at most 255. Where that number times the largest sum of
|other operand| over an accumulator stays below 2^24, float32 holds every partial sum in whatever order a library adds
(`numerics.guards`). Elsewhere the sum is split, the parts are added in int64, and what cannot be split runs in float64
(exact below 2^53).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lowbit.kernels.columns import weight_rows
from lightning_lowbit.kernels.geometry import CODE_MAX, Geometry
from lightning_lowbit.kernels.ledger import note
from lightning_lowbit.numerics.guards import FLOAT32_EXACT, float_sums_exact

__all__ = ["conv2d", "conv2d_input", "conv2d_weight", "float32_terms", "matmul", "rows_exact"]

_INT8_MAX = CODE_MAX[torch.int8]
_POSITIONS = 8192  # of the results of some images


def float32_terms(dtype: torch.dtype) -> int:
    """So many products of a code of this dtype and an int8 number are exact in float32 whatever the numbers.

    >>> float32_terms(torch.int8), float32_terms(torch.uint8)
    (1023, 514)
    """
    return (FLOAT32_EXACT - 1) // (CODE_MAX[dtype] * _INT8_MAX)


_FLOAT32_TERMS = float32_terms(torch.int8)


def rows_exact(rows: Tensor, dtype: torch.dtype) -> bool:
    """`float_sums_exact` of int8 weights (O, K) and codes of this dtype, several times faster.

    In float32, which decides alike: a sum of |weights| that has to round is beyond 2^24 itself.
    """
    return float(rows.to(torch.float32).abs_().sum(1).max()) * CODE_MAX[dtype] < FLOAT32_EXACT


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) int8 or uint8 times (K, N) int8: float32 where it is exact, else int64."""
    return _noted(_matmul(a, b))


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    terms = a.shape[1]
    if terms <= float32_terms(a.dtype) or rows_exact(b.t(), a.dtype):
        return a.to(torch.float32) @ b.to(torch.float32)
    half = terms // 2
    return _sum(_matmul(a[:, :half], b[:half]), _matmul(a[:, half:], b[half:]))


def conv2d(x: Tensor, w: Tensor, geo: Geometry, nonnegative: bool = False) -> Tensor:
    """Accumulators of the convolution, x int8 or uint8: float32 where it is exact, else int64."""
    return _noted(_conv2d(x, w, geo))


def _conv2d(x: Tensor, w: Tensor, geo: Geometry) -> Tensor:
    if geo.forward_terms <= float32_terms(x.dtype) or rows_exact(weight_rows(w), x.dtype):
        return _forward(x, w, geo, torch.float32)
    if geo.groups == 1 and geo.channels > 1:
        half = geo.channels // 2
        low, high = geo._replace(channels=half), geo._replace(channels=geo.channels - half)
        return _sum(_conv2d(x[:, :half], w[:, :half], low), _conv2d(x[:, half:], w[:, half:], high))
    return _forward(x, w, geo, torch.float64).to(torch.int64)


def conv2d_input(err: Tensor, w: Tensor, geo: Geometry) -> Tensor:
    """Gradient of the input: float32 where it is exact, else int64."""
    return _noted(_conv2d_input(err, w, geo))


def _conv2d_input(err: Tensor, w: Tensor, geo: Geometry) -> Tensor:
    if geo.input_terms <= _FLOAT32_TERMS or float_sums_exact(_by_input(w, geo), _INT8_MAX):
        return _backward(err, None, w, geo, torch.float32)
    if geo.groups == 1 and geo.outputs > 1:
        half = geo.outputs // 2
        low, high = geo._replace(outputs=half), geo._replace(outputs=geo.outputs - half)
        return _sum(_conv2d_input(err[:, :half], w[:half], low), _conv2d_input(err[:, half:], w[half:], high))
    return _backward(err, None, w, geo, torch.float64).to(torch.int64)


def conv2d_weight(x: Tensor, err: Tensor, geo: Geometry) -> Tensor:
    """Gradient of the weight, x int8 or uint8: float32 where it is exact, else int64."""
    return _noted(_conv2d_weight(x, err, geo))


def _conv2d_weight(x: Tensor, err: Tensor, geo: Geometry) -> Tensor:
    """Some images at a time, so that their floats stay in the cache; few of them have sums that are too large."""
    if geo.weight_terms <= float32_terms(x.dtype):
        return _backward(err, x, None, geo, torch.float32)
    size = max(1, _POSITIONS // math.prod(geo.out))
    total = torch.zeros(geo.weight_size, dtype=torch.float64, device=x.device)
    for codes, errors in zip(torch.split(x, size), torch.split(err, size), strict=True):
        _add_weight(total, codes.to(torch.float32), errors.to(torch.float32), geo._replace(batch=len(codes)))
    return total.to(torch.int64)


def _add_weight(total: Tensor, codes: Tensor, errors: Tensor, geo: Geometry) -> None:
    """Add the gradient over some images.

    A sum of products over any positions is at most the root of both sums of squares (Cauchy and Schwarz).
    """
    squares = float(_squares(codes)) * float(_squares(errors))
    if squares < FLOAT32_EXACT**2:
        total += _backward(errors, codes, None, geo, torch.float32)
    elif geo.batch == 1:
        total += _backward(errors, codes, None, geo, torch.float64)
    else:
        half = geo.batch // 2
        _add_weight(total, codes[:half], errors[:half], geo._replace(batch=half))
        _add_weight(total, codes[half:], errors[half:], geo._replace(batch=geo.batch - half))


def _squares(values: Tensor) -> Tensor:
    """At least the largest sum of squares over a channel."""
    sums = (values * values).flatten(2).sum(2).sum(0)
    return sums.max() * (1 + values[:, 0].numel() * 2.0**-22)  # more than float32 sums may lose


def _noted(acc: Tensor) -> Tensor:
    note("simulate", "int64 sums" if acc.dtype == torch.int64 else "float32")
    return acc


def _sum(first: Tensor, second: Tensor) -> Tensor:
    return first.to(torch.int64) + second.to(torch.int64)


def _by_input(w: Tensor, geo: Geometry) -> Tensor:
    """(O, C / groups, kh, kw) as one row of weights for each input channel."""
    in_groups = w.reshape(geo.groups, -1, *w.shape[1:])
    return in_groups.transpose(1, 2).flatten(0, 1)


def _forward(x: Tensor, w: Tensor, geo: Geometry, dtype: torch.dtype) -> Tensor:
    padding = (geo.top_bottom[0], geo.left_right[0])
    if not geo.symmetric:
        x, padding = F.pad(x, (*geo.left_right, *geo.top_bottom)), (0, 0)
    with _no_transforms(x):
        return F.conv2d(x.to(dtype), w.to(dtype), None, geo.stride, padding, geo.dilation, geo.groups)


def _backward(err: Tensor, x: Tensor | None, w: Tensor | None, geo: Geometry, dtype: torch.dtype) -> Tensor:
    """The gradient that is asked for by the operand left out: of the input (x None) or of the weight (w None)."""
    padding, size = [geo.top_bottom[0], geo.left_right[0]], geo.input_size
    if not geo.symmetric:
        padding, size = [0, 0], (geo.batch, geo.channels, *geo.padded)
        x = None if x is None else F.pad(x, (*geo.left_right, *geo.top_bottom))
    # The operand left out lends its shape, and the order of its axes in memory to the result.
    order = torch.channels_last if err.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    with _no_transforms(err):
        grads = torch.ops.aten.convolution_backward(
            err.to(dtype),
            torch.empty(size, dtype=dtype, device=err.device, memory_format=order) if x is None else x.to(dtype),
            torch.empty(geo.weight_size, dtype=dtype, device=err.device) if w is None else w.to(dtype),
            None,
            list(geo.stride),
            padding,
            list(geo.dilation),
            False,
            [0, 0],
            geo.groups,
            [x is None, w is None, False],
        )
    grad: Tensor = grads[1] if w is None else grads[0]
    if w is None or geo.symmetric:
        return grad
    top, left = geo.top_bottom[0], geo.left_right[0]
    return grad[:, :, top : top + geo.size[0], left : left + geo.size[1]]


def _no_transforms(x: Tensor) -> AbstractContextManager[None]:
    # cuDNN may choose Winograd or FFT algorithms, which leave the integers.
    return torch.backends.cudnn.flags(enabled=False) if x.is_cuda else nullcontext()
