"""The integer products as their definitions read, in int64: slow, and what every other backend must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lowbit.kernels.geometry import Geometry
from lightning_lowbit.kernels.ledger import note

__all__ = ["conv2d", "conv2d_input", "conv2d_weight", "matmul"]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) int8 or uint8 times (K, N) int8: (M, N) int64."""
    note("reference", "int64")
    return (_wide(a) @ _wide(b)).to(a.device)


def conv2d(x: Tensor, w: Tensor, geo: Geometry, nonnegative: bool = False) -> Tensor:
    """acc[n, o, h, w] = sum over c, i, j of x[n, c, h s + i d, w s + j d] * w[o, c, i, j], in int64."""
    note("reference", "int64")
    padded, weight = _padded(x, geo), _grouped(_wide(w), 0, geo)
    acc = _grouped(torch.zeros(geo.output_size, dtype=torch.int64), 1, geo)
    for i in range(geo.kernel[0]):
        for j in range(geo.kernel[1]):
            patch = _grouped(geo.tap(padded, i, j), 1, geo)
            acc += torch.einsum("ngchw,goc->ngohw", patch, weight[..., i, j])
    return acc.flatten(1, 2).to(x.device)


def conv2d_input(err: Tensor, w: Tensor, geo: Geometry) -> Tensor:
    """Each product of the convolution, sent back to the pixel that it came from, in int64."""
    note("reference", "int64")
    errors, weight = _grouped(_wide(err), 1, geo), _grouped(_wide(w), 0, geo)
    acc = torch.zeros((geo.batch, geo.channels, *geo.padded), dtype=torch.int64)
    for i in range(geo.kernel[0]):
        for j in range(geo.kernel[1]):
            patch = geo.tap(acc, i, j)
            patch += torch.einsum("ngohw,goc->ngchw", errors, weight[..., i, j]).flatten(1, 2)
    top, left = geo.top_bottom[0], geo.left_right[0]
    return acc[:, :, top : top + geo.size[0], left : left + geo.size[1]].to(err.device)


def conv2d_weight(x: Tensor, err: Tensor, geo: Geometry) -> Tensor:
    """Each product of the convolution, sent back to the weight that it came from, in int64."""
    note("reference", "int64")
    padded, errors = _padded(x, geo), _grouped(_wide(err), 1, geo)
    acc = torch.zeros(geo.weight_size, dtype=torch.int64)
    for i in range(geo.kernel[0]):
        for j in range(geo.kernel[1]):
            patch = _grouped(geo.tap(padded, i, j), 1, geo)
            acc[:, :, i, j] = torch.einsum("ngchw,ngohw->goc", patch, errors).flatten(0, 1)
    return acc.to(x.device)


def _wide(x: Tensor) -> Tensor:
    # On the host: no accelerator multiplies int64 matrices.
    return x.to("cpu", torch.int64)


def _grouped(x: Tensor, axis: int, geo: Geometry) -> Tensor:
    """The axis of channels as (groups, channels of each)."""
    return x.reshape(*x.shape[:axis], geo.groups, -1, *x.shape[axis + 1 :])


def _padded(x: Tensor, geo: Geometry) -> Tensor:
    return F.pad(_wide(x), (*geo.left_right, *geo.top_bottom))
