"""A toy scheme whose training is integer arithmetic: int8 weights, activations, errors and updates.

Tensors and errors are carriers, each with one exponent; all exponents are maxima over the processes, so that two of
them compute what one would. Weight gradients are integer accumulators that never enter ``.grad``; its rule adds them
up over processes and moves the weights' codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lowbit.modules.base import Scheme, StepContext, UpdateRule
from lightning_lowbit.modules.carrier import Carrier, apply, carry, plain
from lightning_lowbit.modules.elementwise import LowBitReLU
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.numerics.exponent import ceil_log2, pow2

__all__ = ["ToyInteger"]


def exponent_of(x: Tensor, bits: int = 8) -> Tensor:
    """The finest exponent on which all of ``x`` fits signed codes of ``bits`` bits."""
    return ceil_log2(x.abs().max().float() / (2 ** (bits - 1) - 1)).clamp(-100, 100).to(torch.int32)


def codes(x: Tensor, exponent: Tensor, bits: int = 8) -> Tensor:
    limit = 2 ** (bits - 1) - 1
    return torch.round(x.double() / pow2(exponent, torch.float64)).clamp(-limit, limit)


def carried(x: Tensor, exponent: Tensor | int, origin: Any, training: bool, lowest: int = -100) -> Carrier:
    """``x`` * 2^exponent as int8 codes on the finest exponent that fits; in training that of all processes."""
    run = origin.switch.run
    finest = exponent_of(x).clamp_min(lowest)
    if training:
        finest = run.reduce_max(torch.full_like(finest, lowest) if run.blank else finest)
    return carry(codes(x, finest).to(torch.int8), exponent + finest, origin)


def error(grad: Tensor, origin: Any) -> tuple[Tensor, Tensor]:
    """Codes and exponent of an error: one carrier, the sum of several, or what a float loss hands back."""
    if not isinstance(grad, Carrier):
        grad = carried(torch.zeros_like(grad) if origin.switch.run.blank else grad, 0, origin, training=True)
    elif grad.payload.dtype is not torch.int8:
        grad = carried(grad.payload, grad.exponent, origin, training=True, lowest=0)
    return grad.payload, grad.exponent


class Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        return carried(x, 0, layer, layer.training)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return plain(grad), None


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Carrier, weight: Tensor, layer: Any) -> Tensor:
        w_exponent = layer.lowbit_exponent.to(torch.int32)
        x_int, w_int = x.payload.long(), codes(weight, w_exponent).long()
        ctx.layer, ctx.w_exponent, ctx.x_exponent = layer, w_exponent, x.exponent
        ctx.save_for_backward(x_int, w_int)
        return carried(x_int @ w_int.T, x.exponent + w_exponent, layer, layer.training, lowest=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x_int, w_int = ctx.saved_tensors
        err, exponent = error(grad, ctx.layer)
        ctx.layer.accumulated.append((err.long().T @ x_int, exponent + ctx.x_exponent))
        back = None
        if ctx.needs_input_grad[0]:
            back = carried(err.long() @ w_int, exponent + ctx.w_exponent, ctx.layer, training=True, lowest=0)
        return back, None, None


class ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Carrier, op: Any) -> Tensor:
        ctx.op, rectified = op, x.payload.clamp_min(0)
        ctx.save_for_backward(rectified > 0)
        return Carrier(rectified, x.exponent, op)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        err, exponent = error(grad, ctx.op)
        return Carrier(err * ctx.saved_tensors[0], exponent, ctx.op), None


class ToyRule(UpdateRule):
    def __init__(self, scheme: ToyInteger, modules: dict[str, nn.Module]) -> None:
        self.scheme = scheme
        self.layers: dict[str, Any] = {p: m for p, m in modules.items() if isinstance(m, LowBitLayer)}

    @torch.no_grad()
    def step(self, owned: set[str], context: StepContext) -> None:
        for path in sorted(owned & self.layers.keys()):
            layer = self.layers[path]
            finest = torch.stack([exponent for _, exponent in layer.accumulated]).min()
            total = sum(acc << int(exponent - finest) for acc, exponent in layer.accumulated)
            layer.accumulated.clear()
            total = context.reduce_sum(total)
            update = codes(total, exponent_of(total, self.scheme.update_bits), self.scheme.update_bits)
            exponent = layer.lowbit_exponent.to(torch.int32)
            moved = (codes(layer.weight, exponent) - update).clamp(-127, 127)
            layer.weight.copy_(moved * pow2(exponent, torch.float64))


@dataclass(frozen=True)
class ToyInteger(Scheme):
    name: ClassVar[str] = "toy_integer"
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
            x, weight, _ = operands
            return apply(Linear, x if isinstance(x, Carrier) else apply(Enter, x, layer), weight, layer)
        if isinstance(layer, LowBitReLU) and isinstance(operands[0], Carrier):
            return apply(ReLU, operands[0], layer)
        return layer.op(*operands, **settings)  # type: ignore[no-any-return]

    def update_rule(self, modules: dict[str, nn.Module]) -> UpdateRule:
        return ToyRule(self, modules)
