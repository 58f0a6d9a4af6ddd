"""Integer modules beside an obvious twin in Python integers and float64: how tests make tensors, run and round."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowbit import Niti, convert
from lightning_lowbit.modules.base import Scheme, Switch, switch_of
from lightning_lowbit.modules.carrier import Carrier, plain


@dataclass
class Origin:
    """A module that makes carriers, for tensors that no network made."""

    scheme: Scheme = field(default_factory=Niti)
    switch: Switch = field(default_factory=Switch)
    path: str = "somewhere"
    training: bool = True


class Watch(torch.autograd.Function):
    """The identity; keeps the gradient that comes back."""

    @staticmethod
    def forward(ctx: Any, x: Carrier, kept: list[Tensor]) -> Tensor:
        ctx.kept = kept
        return Carrier(x.payload, x.exponent, x.origin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.kept.append(grad)
        return grad, None


def codes(*shape: int, seed: int = 0, low: int = -127, high: int = 127) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=generator)


def carrier(payload: Tensor, exponent: int = -7, origin: Any = None, grad: bool = False) -> Carrier:
    made = Carrier(payload, torch.tensor(exponent, dtype=torch.int32), Origin() if origin is None else origin)
    return made.requires_grad_(grad)


def low(net: nn.Module, x: Any, **options: Any) -> nn.Module:
    """``net`` converted to integers, in training mode, its update rule somebody else's business."""
    convert(net, Niti(**options), x)
    switch_of(net).managed = True
    return net.train()


def send_back(y: Tensor, err: Tensor, exponent: int = -7) -> None:
    """An integer error into the backward of ``y``."""
    y.backward(carrier(err, exponent))


def grad_of(x: Tensor) -> Tensor:
    """The values of a tensor's gradient, float64."""
    assert x.grad is not None
    return plain(x.grad).double()  # type: ignore[no-any-return]


# -- the twin: float64 holds every integer here ----------------------------------------------------------------
def half_away(x: Tensor) -> Tensor:
    """Nearest integers, ties away from zero."""
    return x.double().sign() * (x.double().abs() + 0.5).floor()


def width(acc: Tensor) -> int:
    """ceil(log2 max|acc|), 0 for zeros."""
    largest = int(acc.abs().max()) if acc.numel() else 0
    return (largest - 1).bit_length() if largest else 0


def to_codes(acc: Tensor) -> tuple[Tensor, int]:
    """Integer sums to at most 7 bits and sign, and by how many bits they were shifted."""
    shift = max(width(acc) - 7, 0)
    return half_away(acc.double() / 2**shift).clamp(-127, 127), shift


def values(x: Tensor) -> Tensor:
    return plain(x.detach()).double()  # type: ignore[no-any-return]


class Ops(nn.Module):
    """Two layers and a function of what they make: conversion puts operations into the function."""

    def __init__(self, function: Any, conv: bool = False) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)) if conv else (nn.Linear(4, 4), nn.Linear(4, 4))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.a(x), self.b(x))


def op_of(kind: type[nn.Module], function: Any, conv: bool = False, **options: Any) -> Any:
    """The operation of that kind that conversion puts in the place of a call in ``function(a, b)``."""
    x = torch.randn(2, 2, 8, 8) if conv else torch.randn(2, 4)
    net = low(Ops(function, conv), x, **options)
    return next(module for module in net.modules() if isinstance(module, kind))
