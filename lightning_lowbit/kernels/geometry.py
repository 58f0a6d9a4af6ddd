"""Shapes of a convolution: sizes, padding on each side, and how far each of its three products sums."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError

__all__ = ["CODE_MAX", "INT32_TERMS", "Geometry", "Padding", "Size", "geometry", "int32_terms"]

Size = int | tuple[int, int]
Padding = Size | tuple[tuple[int, int], tuple[int, int]]

CODE_MAX = {torch.int8: 128, torch.uint8: 255}
"""The largest magnitude of a code: second operands are int8, a first one may be uint8 where it is an activation."""


def int32_terms(dtype: torch.dtype) -> int:
    """So many products of a code of this dtype and an int8 number fit int32 whatever the numbers.

    >>> int32_terms(torch.int8), int32_terms(torch.uint8)
    (131071, 65793)
    """
    return (2**31 - 1) // (CODE_MAX[dtype] * CODE_MAX[torch.int8])


INT32_TERMS = int32_terms(torch.int8)


class Geometry(NamedTuple):
    """One convolution: x (batch, channels, *size) and w (outputs, channels / groups, *kernel) to *out."""

    batch: int
    channels: int
    size: tuple[int, int]
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    top_bottom: tuple[int, int]
    left_right: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    out: tuple[int, int]

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the input with its zeros."""
        return self.size[0] + sum(self.top_bottom), self.size[1] + sum(self.left_right)

    @property
    def reach(self) -> tuple[int, int]:
        """How far the kernel's last tap lies from its first."""
        return self.dilation[0] * (self.kernel[0] - 1), self.dilation[1] * (self.kernel[1] - 1)

    @property
    def symmetric(self) -> bool:
        """Whether opposite sides are padded alike, as torch's own convolution asks."""
        return self.top_bottom[0] == self.top_bottom[1] and self.left_right[0] == self.left_right[1]

    @property
    def pointwise(self) -> bool:
        """Whether the convolution is one matrix product of its pixels."""
        return self.kernel == (1, 1) and self.groups == 1 and self.padded == self.size

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        """Shape of x."""
        return (self.batch, self.channels, *self.size)

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        """Shape of w."""
        return (self.outputs, self.channels // self.groups, *self.kernel)

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        """Shape of the accumulators."""
        return (self.batch, self.outputs, *self.out)

    @property
    def forward_terms(self) -> int:
        """Products in one accumulator of the convolution."""
        return self.channels // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def input_terms(self) -> int:
        """Products in one accumulator of the gradient of the input, at most."""
        return self.outputs // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def weight_terms(self) -> int:
        """Products in one accumulator of the gradient of the weight."""
        return self.batch * self.out[0] * self.out[1]

    def tap(self, padded: Tensor, i: int, j: int) -> Tensor:
        """The view of a padded input (N, C, H, W) that meets kernel position (i, j): (N, C, *out)."""
        top, left = i * self.dilation[0], j * self.dilation[1]
        bottom = top + (self.out[0] - 1) * self.stride[0] + 1
        right = left + (self.out[1] - 1) * self.stride[1] + 1
        return padded[:, :, top : bottom : self.stride[0], left : right : self.stride[1]]


@lru_cache(maxsize=4096)
def geometry(
    input_size: tuple[int, ...],
    weight_size: tuple[int, ...],
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Geometry:
    """The geometry of a convolution of an input (N, C, H, W) with a weight (O, C / groups, kh, kw).

    Args:
        input_size: N, C, H, W.
        weight_size: O, C / groups, kh, kw.
        stride: one number or (vertical, horizontal).
        padding: zeros around the input: one number, (vertical, horizontal) or ((top, bottom), (left, right)).
        dilation: one number or (vertical, horizontal).
        groups: as in torch.nn.Conv2d.

    Raises:
        ConfigError: the sizes do not fit each other.

    >>> geometry((8, 3, 32, 32), (16, 3, 3, 3), stride=2, padding=((0, 1), (0, 1))).out
    (16, 16)
    """
    if len(input_size) != 4 or len(weight_size) != 4:
        raise ConfigError(
            f"convolution: got an input of size {tuple(input_size)} and a weight of size {tuple(weight_size)}, "
            "expected (N, C, H, W) and (O, C / groups, kh, kw); add the batch axis"
        )
    batch, channels, *size = input_size
    outputs, per_group, *kernel = weight_size
    if groups < 1 or channels != per_group * groups or outputs % groups:
        raise ConfigError(
            f"convolution: {channels} input and {outputs} output channels in {groups} groups do not fit a weight "
            f"of size {tuple(weight_size)}; expected {per_group * groups} input channels and outputs in {groups}s"
        )
    steps, holes = _pair(stride), _pair(dilation)
    top_bottom, left_right = (_pair(sides) for sides in (padding if isinstance(padding, tuple) else (padding,) * 2))
    if min(*steps, *holes, *kernel) < 1 or min(*top_bottom, *left_right) < 0:
        raise ConfigError(
            f"convolution: stride {steps}, dilation {holes} and kernel {tuple(kernel)} must be at least 1 and "
            f"padding {top_bottom, left_right} at least 0"
        )
    out = []
    for length, sides, taps, step, hole in zip(size, (top_bottom, left_right), kernel, steps, holes, strict=True):
        room = length + sum(sides) - hole * (taps - 1) - 1
        if room < 0:
            raise ConfigError(
                f"convolution: a kernel of {tuple(kernel)} with dilation {holes} is larger than the padded input "
                f"{tuple(size)} + {top_bottom, left_right}; raise the padding or the input size"
            )
        out.append(room // step + 1)
    return Geometry(
        batch, channels, (size[0], size[1]), outputs, (kernel[0], kernel[1]), steps,
        top_bottom, left_right, holes, groups, (out[0], out[1]),
    )  # fmt: skip


def _pair(value: Size) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return first, second
