"""The integer products by float convolutions and matrix products, wherever every partial sum is proved exact.

Codes of int8 are at most 128 in magnitude, those of uint8 at most 255. Where that number times the largest sum of
|other operand| over an accumulator stays below 2^24, float32 holds every partial sum in whatever order a library adds
(`numerics.guards`). Elsewhere the sum is split, the parts are added in int64, and what cannot be split runs in float64
(exact below 2^53).
"""

from __future__ import annotations

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
    if geo.weight_terms <= float32_terms(x.dtype):
        return _backward(err, x, None, geo, torch.float32)
    per_image = err.permute(0, 2, 3, 1).flatten(1, 2).to(torch.float32).abs().sum(1, dtype=torch.float64)
    return _weight_of_images(x, err, per_image, geo)


def _weight_of_images(x: Tensor, err: Tensor, per_image: Tensor, geo: Geometry) -> Tensor:
    """The gradient over some images; per_image (N, O) is the sum of |err| over each."""
    if float_sums_exact(per_image, CODE_MAX[x.dtype], out_axis=1):
        return _backward(err, x, None, geo, torch.float32)
    if geo.batch == 1:
        return _backward(err, x, None, geo, torch.float64).to(torch.int64)
    half = geo.batch // 2
    low, high = geo._replace(batch=half), geo._replace(batch=geo.batch - half)
    return _sum(
        _weight_of_images(x[:half], err[:half], per_image[:half], low),
        _weight_of_images(x[half:], err[half:], per_image[half:], high),
    )


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
    # The operand left out only lends its shape.
    shape = err.new_empty((), dtype=dtype)
    with _no_transforms(err):
        grads = torch.ops.aten.convolution_backward(
            err.to(dtype),
            shape.expand(size) if x is None else x.to(dtype),
            shape.expand(geo.weight_size) if w is None else w.to(dtype),
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
