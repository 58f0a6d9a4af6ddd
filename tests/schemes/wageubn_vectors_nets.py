"""WAGEUBN's golden vectors: the small networks in low bits that they are run through."""

from __future__ import annotations

from typing import Any

from schemes.vector_table import Comparison
from torch import Tensor, nn

from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.schemes import convert
from lightning_lowbit.schemes.wageubn import Wageubn

__all__ = ["BACKENDS", "Beside", "Block", "authors", "close", "converted", "layer_like", "same"]

BACKENDS = ("int8", "simulate", "reference")
RELATIVE, ABSOLUTE = 1e-5, 1e-6


def authors(**options: Any) -> Wageubn:
    """The publication's code, its first and last layers in low bits too."""
    return Wageubn(preset="authors", first_last="int8", **options)


def layer_like(weight: Tensor, bias: bool = False, **settings: Any) -> Any:
    """A layer with a weight of this shape, which is zero: converted, its range is +-1 whatever it holds later."""
    kind: Any = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}[weight.dim()]
    kernel = (tuple(weight.shape[2:]),) if weight.dim() > 2 else ()
    layer = kind(weight.shape[1], weight.shape[0], *kernel, bias=bias, **settings)
    nn.init.zeros_(layer.weight)
    return layer


def converted(net: nn.Module, scheme: Wageubn, *example: Tensor) -> Any:
    """``net`` in low bits and in training, with formats that hold the example."""
    convert(net, scheme, example)
    switch_of(net).managed = True
    return net.train()


class Beside(nn.Module):
    """A layer, and beside it a norm whose result no layer multiplies."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.norm(z)


class Block(nn.Module):
    """Batch norm, ReLU, convolution."""

    def __init__(self, weight: Tensor, **settings: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(weight.shape[1])
        self.relu = nn.ReLU()
        self.conv = layer_like(weight, **settings)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.relu(self.norm(x)))
        return y


def same(what: str, got: Tensor | None, want: Tensor) -> None:
    """Equal to a float64 twin, rounded once; -0 equals 0."""
    assert got is not None
    wrong = int((got.detach() != want.detach().to(got.dtype)).sum())
    assert got.shape == want.shape
    assert wrong == 0, f"{what}: {wrong} of {want.numel()} differ from the twin"


def close(v: Comparison, key: str, got: Tensor, turned: float = 0.0) -> None:
    v.close(key, got, RELATIVE, ABSOLUTE + turned)
