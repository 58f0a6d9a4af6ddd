"""The integer products on CUDA devices: `torch._int_mm` on padded operands, patches gathered on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lowbit.kernels import simulate
from lightning_lowbit.kernels.columns import add_patches, images, matrix, pad_or_crop, patches, pixels, weight_rows
from lightning_lowbit.kernels.geometry import INT32_TERMS, Geometry
from lightning_lowbit.kernels.ledger import note

__all__ = ["conv2d", "conv2d_input", "conv2d_weight", "matmul"]

# The products in one chunk of a sum, a multiple of 8 as the kernel asks.
_CHUNK = INT32_TERMS - INT32_TERMS % 8


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) int8 times (K, N) int8: int32, or int64 from chunks of K where int32 might wrap; uint8 by floats."""
    if a.dtype is torch.uint8:
        return simulate.matmul(a, b)
    if a.shape[1] <= INT32_TERMS:
        note("cuda", "_int_mm")
        return _product(a, b)
    note("cuda", "_int_mm in int64 chunks")
    acc = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int64, device=a.device)
    for left, right in zip(torch.split(a, _CHUNK, 1), torch.split(b, _CHUNK, 0), strict=True):
        acc += _product(left, right)
    return acc


def conv2d(x: Tensor, w: Tensor, geo: Geometry, nonnegative: bool = False) -> Tensor:
    """Accumulators of the convolution: patches times weights; of groups and of uint8 by floats."""
    if geo.groups > 1 or x.dtype is torch.uint8:
        return simulate.conv2d(x, w, geo)
    return images(matmul(_patches(x, geo), weight_rows(w).t()), geo.out)


def conv2d_input(err: Tensor, w: Tensor, geo: Geometry) -> Tensor:
    """Gradient of the input: errors times weights, each product added to its pixel."""
    if geo.groups > 1:
        return simulate.conv2d_input(err, w, geo)
    rows = matmul(pixels(err).flatten(0, 2), weight_rows(w))
    dtype = torch.int32 if geo.input_terms <= INT32_TERMS else torch.int64
    acc = torch.zeros(geo.batch, *geo.padded, geo.channels, dtype=dtype, device=err.device)
    add_patches(rows, acc, geo)
    top, left = geo.top_bottom[0], geo.left_right[0]
    return acc[:, top : top + geo.size[0], left : left + geo.size[1]].permute(0, 3, 1, 2)


def conv2d_weight(x: Tensor, err: Tensor, geo: Geometry) -> Tensor:
    """Gradient of the weight: errors times patches; of groups and of uint8 by floats."""
    if geo.groups > 1 or x.dtype is torch.uint8:
        return simulate.conv2d_weight(x, err, geo)
    rows = matmul(pixels(err).flatten(0, 2).t(), _patches(x, geo))
    return rows.view(geo.outputs, *geo.kernel, geo.channels).permute(0, 3, 1, 2)


def _patches(x: Tensor, geo: Geometry) -> Tensor:
    return patches(pad_or_crop(pixels(x), geo.top_bottom, geo.left_right), geo)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The device's kernel asks for more than 16 rows, and columns and terms in eights; zeros change no sum."""
    (m, k), n = a.shape, b.shape[1]
    left = F.pad(a, (0, -k % 8, 0, max(0, 17 - m)))
    right = F.pad(b.t(), (0, -k % 8, 0, -n % 8))
    return torch._int_mm(matrix(left.contiguous()), matrix(right.contiguous()).t())[:m, :n]
