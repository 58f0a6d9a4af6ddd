"""Layers and operands that the tests of the integer products draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit import kernels
from lightning_lowbit.kernels.geometry import Geometry, Padding, geometry


@dataclass(frozen=True)
class Layer:
    """One convolution with operands of full range, and its three products by a backend."""

    x: Tensor
    w: Tensor
    err: Tensor
    geo: Geometry
    stride: tuple[int, int]
    padding: Padding
    dilation: tuple[int, int]
    groups: int

    def products(self, backend: str, exact_float: bool = False) -> list[Tensor]:
        """Accumulators, gradient of the input, gradient of the weight."""
        how = {
            "stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups,
            "backend": backend, "exact_float": exact_float,
        }  # fmt: skip
        return [
            kernels.int8_conv2d(self.x, self.w, **how),
            kernels.int8_conv2d_input(self.err, self.w, self.x.shape, **how),
            kernels.int8_conv2d_weight(self.x, self.err, self.w.shape, **how),
        ]


def codes(*size: int, seed: int = 0, low: int = -128) -> Tensor:
    """int8 numbers of the whole range, -128 among them."""
    return torch.randint(low, 128, size, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def layer(
    x: tuple[int, ...], w: tuple[int, ...], stride: tuple[int, int] = (1, 1), padding: Padding = 0,
    dilation: tuple[int, int] = (1, 1), groups: int = 1, seed: int = 0, channels_last: bool = True,
) -> Layer:  # fmt: skip
    """A layer of these sizes with random operands."""
    geo = geometry(x, w, stride, padding, dilation, groups)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    operands = (codes(*size, seed=seed + n) for n, size in enumerate((x, w, geo.output_size)))
    images, weight, err = (operand.contiguous(memory_format=memory) for operand in operands)
    return Layer(images, weight, err, geo, stride, padding, dilation, groups)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Small layers of every kind: odd sizes, uneven padding, strides, holes and groups beyond reason included."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8, 16]))
    channels = groups * draw(st.sampled_from([1, 2, 3, 5, 8, 16, 24]) if groups < 4 else st.sampled_from([1, 2]))
    outputs = groups * draw(st.sampled_from([1, 2, 3, 8]) if groups < 4 else st.sampled_from([1, 2]))
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = draw(pairs), draw(pairs), draw(pairs)
    side = st.integers(0, 4)
    padding = draw(side | st.tuples(side, side) | st.tuples(st.tuples(side, side), st.tuples(side, side)))
    size = []
    for axis in range(2):
        sides = padding if isinstance(padding, int) else padding[axis]
        zeros = 2 * sides if isinstance(sides, int) else sum(sides)
        least = max(1, dilation[axis] * (kernel[axis] - 1) + 1 - zeros)
        size.append(draw(st.integers(least, least + 5)))
    return layer(
        (draw(st.integers(1, 3)), channels, *size), (outputs, channels // groups, *kernel), stride, padding,
        dilation, groups, draw(st.integers(0, 9)), draw(st.booleans()),
    )  # fmt: skip
