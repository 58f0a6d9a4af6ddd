"""A toy scheme whose training is integer arithmetic: int8 weights, activations, errors and updates.

Exponents travel with the tensors in links, forward and backward. Weight gradients are integer accumulators
that never enter ``.grad``; its rule adds them up over processes and moves the weights' codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lowbit.modules.base import Link, Scheme, StepContext, UpdateRule
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.numerics.exponent import ceil_log2, pow2

__all__ = ["ToyInteger"]


def exponent_of(x: Tensor, bits: int = 8) -> Tensor:
    """The finest exponent on which all of ``x`` fits signed codes of ``bits`` bits."""
    return ceil_log2(x.abs().max().float() / (2 ** (bits - 1) - 1)).clamp(-100, 100).to(torch.int32)


def codes(x: Tensor, exponent: Tensor, bits: int = 8) -> Tensor:
    limit = 2 ** (bits - 1) - 1
    return torch.round(x.double() / pow2(exponent, torch.float64)).clamp(-limit, limit)


class IntegerLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Any) -> Tensor:
        (ctx.source,) = layer.links.receive() or (None,)
        x_exponent = exponent_of(x) if ctx.source is None else ctx.source.exponent
        w_exponent = layer.lowbit_exponent.to(torch.int32)
        x_int, w_int = codes(x, x_exponent), codes(weight, w_exponent)
        acc = x_int @ w_int.T  # integers below 2^53
        shift = exponent_of(acc).clamp_min(0)
        ctx.result = Link(x_exponent + w_exponent + shift)
        layer.links.send(ctx.result)
        ctx.layer = layer
        ctx.save_for_backward(x_int, w_int, x_exponent, w_exponent)
        return (codes(acc, shift) * pow2(ctx.result.exponent, torch.float64)).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x_int, w_int, x_exponent, w_exponent = ctx.saved_tensors
        known = ctx.result.error_exponent()
        exponent = exponent_of(grad)
        if known is not None:  # exact integers already; a sum at a fork may need a coarser step
            assert torch.equal(grad.double() / pow2(known, torch.float64) % 1, torch.zeros_like(grad.double()))
            exponent = torch.maximum(exponent, known)
        err = codes(grad, exponent)
        ctx.layer.accumulated.append((err.T @ x_int, exponent + x_exponent))
        acc = err @ w_int
        shift = exponent_of(acc).clamp_min(0)
        result = exponent + w_exponent + shift
        if ctx.source is not None:
            ctx.source.err_exponent = result
        return (codes(acc, shift) * pow2(result, torch.float64)).float(), None, None


class ToyRule(UpdateRule):
    def __init__(self, scheme: ToyInteger, modules: dict[str, nn.Module]) -> None:
        self.scheme = scheme
        self.layers: dict[str, Any] = {p: m for p, m in modules.items() if isinstance(m, LowBitLayer)}

    @torch.no_grad()
    def step(self, owned: set[str], context: StepContext) -> None:
        for path in sorted(owned & self.layers.keys()):
            layer = self.layers[path]
            finest = -context.reduce_max(torch.stack([-exponent for _, exponent in layer.accumulated]).max())
            total = torch.zeros(layer.weight.shape, dtype=torch.int64)
            for acc, exponent in layer.accumulated:  # on the finest step that any process has
                total += acc.long() << int(exponent - finest)
            layer.accumulated.clear()
            total = context.reduce_sum(total)
            update = codes(total, exponent_of(total, self.scheme.update_bits), self.scheme.update_bits)
            exponent = layer.lowbit_exponent.to(torch.int32)
            moved = (codes(layer.weight, exponent) - update).clamp(-127, 127)
            layer.weight.copy_(moved * pow2(exponent, torch.float64))


@dataclass(frozen=True)
class ToyInteger(Scheme):
    name: ClassVar[str] = "toy_integer"
    links: ClassVar[bool] = True
    carries_errors: ClassVar[bool] = True
    reproducible: ClassVar[bool] = True
    update_bits: int = 4

    def prepare(self, layer: nn.Module) -> None:
        assert isinstance(layer, LowBitLayer)
        assert layer.bias is None
        exponent = exponent_of(layer.weight.detach())
        layer.register_buffer("lowbit_exponent", exponent.float())
        layer.weight.data = (codes(layer.weight.detach(), exponent) * pow2(exponent)).float()
        layer.ungraded = ("weight",)
        layer.__dict__["accumulated"] = []

    def compute(self, layer: Any, *operands: Any, **settings: Any) -> Tensor:
        if isinstance(layer, LowBitLayer):
            return IntegerLinear.apply(operands[0], operands[1], layer)  # type: ignore[no-any-return]
        (link, *others) = layer.links.receive()
        # A rectifier keeps the grid and its error; other operations leave theirs to be found from the values.
        layer.links.send(link if not others and "relu" in layer.pattern else None)
        return layer.op(*operands, **settings)  # type: ignore[no-any-return]

    def update_rule(self, modules: dict[str, nn.Module]) -> UpdateRule:
        return ToyRule(self, modules)
