"""Convolution by matrix products: pixels in rows, patches in rows (im2col), and rows added back (col2im).

A pixel is a row of its channels, so all of it works on (N, H, W, C) with C contiguous: the memory of a
channels_last tensor, taken without a copy. Eight channels move as one 64-bit word.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lowbit.kernels.geometry import Geometry

__all__ = ["add_patches", "images", "matrix", "pad_or_crop", "patch_rows", "patches", "pixels", "weight_rows"]


def pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) as contiguous (N, H, W, C); a copy only where x is not channels_last."""
    rows = x.permute(0, 2, 3, 1).contiguous()
    # Through one axis, because axes of length 1 may have any stride.
    return rows.view(-1).view(rows.shape)


def images(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """(N * H * W, C) as (N, C, H, W) in channels_last memory, without a copy."""
    return rows.view(-1, *size, rows.shape[-1]).permute(0, 3, 1, 2)


def matrix(x: Tensor) -> Tensor:
    """x (rows, columns) as `torch._int_mm` reads it rightly: the same tensor or a copy.

    From strides that repeat or overlap rows, and from the free stride of an axis of length 1, it computes other
    numbers and says nothing (torch 2.13).
    """
    (rows, columns), (down, across) = x.shape, x.stride()
    if (across == 1 and down >= columns) or (down == 1 and across >= rows > 1):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def weight_rows(w: Tensor) -> Tensor:
    """(O, C, kh, kw) as (O, kh * kw * C); a copy only where w is not channels_last."""
    return w.permute(0, 2, 3, 1).reshape(w.shape[0], -1)


def pad_or_crop(x: Tensor, top_bottom: tuple[int, int], left_right: tuple[int, int]) -> Tensor:
    """(N, H, W, C) with so many rows and columns of zeros more on each side; negative numbers cut away."""
    if (*top_bottom, *left_right) == (0, 0, 0, 0):
        return x
    return F.pad(x, (0, 0, *left_right, *top_bottom)).contiguous()


def patches(padded: Tensor, geo: Geometry) -> Tensor:
    """All patches of a padded (N, H, W, C): (N * H' * W', kh * kw * C), new memory wherever patches overlap."""
    return _gather(padded, geo, geo.kernel[0], geo.stride[0], geo.dilation[0], geo.out[0])


def patch_rows(padded: Tensor, geo: Geometry) -> Tensor:
    """One row of each patch, at every row of the image: (N * H * W', kw * C)."""
    return _gather(padded, geo, 1, 1, 1, padded.shape[1])


def _gather(padded: Tensor, geo: Geometry, taps: int, step: int, hole: int, height: int) -> Tensor:
    batch, channels = padded.shape[0], padded.shape[3]
    words = padded.view(torch.int64) if channels % 8 == 0 else padded
    image, line, pixel, _ = words.stride()
    size = [batch, height, geo.out[1], taps, geo.kernel[1], words.shape[3]]
    strides = [image, step * line, geo.stride[1] * pixel, hole * line, geo.dilation[1] * pixel, 1]
    if geo.dilation[1] == 1:
        # The pixels of a row are neighbors: one longer piece.
        size[4:], strides[4:] = [size[4] * size[5]], [1]
    # Materialized, never a view: reshape may keep overlapping rows, and matrix products read those wrongly.
    found = words.as_strided(size, strides, words.storage_offset()).contiguous()
    return found.view(padded.dtype).view(-1, taps * geo.kernel[1] * channels)


def add_patches(rows: Tensor, acc: Tensor, geo: Geometry) -> None:
    """Add each patch (N * H' * W', kh * kw * C) to the pixels of a padded acc (N, H, W, C) that it covers."""
    found = rows.view(acc.shape[0], *geo.out, *geo.kernel, acc.shape[3])
    image = acc.permute(0, 3, 1, 2)
    for i in range(geo.kernel[0]):
        for j in range(geo.kernel[1]):
            geo.tap(image, i, j).permute(0, 2, 3, 1).add_(found[:, :, :, i, j])
