"""Rectifiers, sums, concats and dropout in integers, forward and backward (NITI section 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lowbit import kernels
from lightning_lowbit.kernels.sums import aligned_sum
from lightning_lowbit.modules.carrier import Carrier, apply, is_codes
from lightning_lowbit.modules.elementwise import LowBitAdd, LowBitCat, LowBitOp, LowBitReLU
from lightning_lowbit.modules.integer_rounding import error_codes, lower_entry, lower_rounded, random_bits, rounded
from lightning_lowbit.modules.lowering import Builder, Codes, Snap, refuse
from lightning_lowbit.numerics.block import NARROW_ROOM, WIDE_ROOM
from lightning_lowbit.numerics.exponent import pow2
from lightning_lowbit.numerics.guards import FLOAT32_EXACT
from lightning_lowbit.numerics.rounding import Rounding

__all__ = [
    "integer_add", "integer_cat", "integer_dropout", "integer_dropout_channels", "integer_relu", "lower_add",
    "lower_cat", "lower_operands", "lower_relu",
]  # fmt: skip


def integer_relu(op: LowBitReLU, x: Tensor) -> Tensor:
    """max(q, 0) on the same exponent; for ReLU6 at most the largest code below 6."""
    return apply(_ReLU, x, op) if isinstance(x, Carrier) else op.op(x)


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Carrier, op: LowBitReLU) -> Tensor:
        codes = torch.relu(x.payload)
        ctx.six = None
        if op.six:
            # floor(6 / 2^e), at most 127: as an integer, on the device.
            ctx.six = (6 * pow2(-x.exponent, torch.float64)).floor().clamp(max=127).to(torch.int8)
            codes = torch.minimum(codes, ctx.six)
        ctx.op = op
        ctx.save_for_backward(codes)
        return Carrier(codes, x.exponent, op)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (codes,) = ctx.saved_tensors
        err, exponent = error_codes(grad, ctx.op, ctx.op.lowbit_error)
        # Codes are 0 or more: clamped to 1 they are the mask (int8 throughout, which the CPU vectorizes).
        passed = codes.clamp(max=1)
        if ctx.six is not None:
            passed = passed * (codes < ctx.six)
        return Carrier(err * passed, exponent, ctx.op), None


def lower_relu(build: Builder, op: LowBitReLU, input: Codes, inplace: bool = False) -> Codes:
    """``integer_relu`` of evaluation."""
    if not input.word:
        return build.snap(input, None, True, 6.0 if op.six else None)
    return build.clip(input, 0, min(math.floor(math.ldexp(6, -input.exponent)), 127) if op.six else None)


def integer_add(op: LowBitAdd, a: Tensor, b: Tensor) -> Tensor:
    """Both operands on one exponent, added, rounded once; the error goes to both as it is."""
    if isinstance(a, Carrier) and isinstance(b, Carrier) and a.shape == b.shape:
        return apply(_Add, a, b, op)
    return op.op(a, b)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Carrier, b: Carrier, op: LowBitAdd) -> Tensor:
        total, exponent = aligned_sum(a.payload, a.exponent, b.payload, b.exponent)
        ctx.op = op
        return rounded(total, exponent, op, op.lowbit_accumulator, "act")  # type: ignore[arg-type]  # a BlockRange

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        err, exponent = error_codes(grad, ctx.op, ctx.op.lowbit_error)
        return Carrier(err, exponent, ctx.op), Carrier(err, exponent, ctx.op), None


def lower_add(build: Builder, op: LowBitAdd, input: Codes, other: Codes) -> Codes:
    """``integer_add`` of evaluation; what it leaves to float code is exact there too, or made of floats here."""
    a, b = lower_operands(build, op, (input, other))
    if a.word and b.word and a.shape == b.shape:
        # As in numerics.block.align: what lies too far below the other is shifted right first.
        common = max(a.exponent, b.exponent) - (NARROW_ROOM if a.word == b.word == 8 else WIDE_ROOM)
        terms = [_at_least(build, x, common) for x in (a, b)]
        return lower_rounded(build, build.add(terms), op, op.lowbit_accumulator)  # type: ignore[arg-type]  # a BlockRange
    if not (a.is_float or b.is_float):
        step = min(a.exponent, b.exponent)
        largest = sum(max(-x.low, x.high) << (x.exponent - step) for x in (a, b))
        a, b = (a, b) if largest < FLOAT32_EXACT else (build.floats(a), b)
    return lower_entry(build, build.add([a, b]), op.lowbit_accumulator)  # type: ignore[arg-type]


def lower_operands(build: Builder, op: LowBitOp, operands: Sequence[Codes]) -> list[Codes]:
    """Operands of an operation as it quantizes them."""
    slots: list[Any] = [op._modules.get(f"lowbit_operand_{index}") for index in range(len(operands))]
    if any(isinstance(x, (Tensor, int, float)) for x in operands):
        raise refuse(op.path, "it reads a value that no layer made", "Leave that operation in float, behind the model.")
    return [lower_entry(build, x, slot) for x, slot in zip(operands, slots, strict=True)]


def _at_least(build: Builder, x: Codes, exponent: int) -> Codes:
    """x on this exponent where its own is finer: shifted right, ties away from zero."""
    if x.exponent >= exponent:
        return x
    return build.snap(x, Snap(exponent, min(x.low, 0), max(x.high, 0), Rounding.HALF_AWAY))


def integer_cat(op: LowBitCat, tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Side by side on the coarsest exponent of all; finer operands are shifted right, ties away from zero."""
    if not all(map(is_codes, tensors)):
        return op.op(tensors, dim)
    return apply(_Cat, op, dim, *tensors)


class _Cat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: LowBitCat, dim: int, *tensors: Carrier) -> Tensor:
        exponent = torch.stack([x.exponent for x in tensors]).amax()
        moved = [kernels.requantize(x.payload.to(torch.int32), exponent - x.exponent) for x in tensors]
        ctx.op, ctx.dim, ctx.sizes = op, dim, None
        if op.function is torch.cat:
            ctx.sizes = [x.shape[dim] for x in tensors]
        return Carrier(op.function(moved, dim), exponent, op)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        err, exponent = error_codes(grad, ctx.op, ctx.op.lowbit_error)
        parts = err.unbind(ctx.dim) if ctx.sizes is None else torch.split(err, ctx.sizes, ctx.dim)
        return None, None, *(Carrier(part, exponent, ctx.op) for part in parts)


def lower_cat(build: Builder, op: LowBitCat, tensors: Sequence[Codes], dim: int = 0, axis: int | None = None) -> Codes:
    """``integer_cat`` of evaluation; floats, and sums that nobody followed, stay what they are."""
    parts = lower_operands(build, op, tensors)
    if all(x.word == 8 for x in parts):
        exponent = max(x.exponent for x in parts)
        parts = [build.snap(x, Snap(exponent, -127, 127, Rounding.HALF_AWAY)) for x in parts]
    elif all(x.word for x in parts):  # as carriers of any width are joined: numerics.block.align_all
        parts = [_at_least(build, x, max(x.exponent for x in parts) - WIDE_ROOM) for x in parts]
    return build.concat(parts, dim if axis is None else axis, op.function is torch.stack)


def integer_dropout(input: Carrier, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """F.dropout by a mask that is a function of (seed, batch, layer, global sample) and kept nowhere (Decision 6).

    Values that stay are multiplied by 1 / (1 - p) as an 8-bit integer over a power of two.
    """
    return _drop(input, p, training, input.dim())


def integer_dropout_channels(input: Carrier, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """F.dropout1d, 2d and 3d: whole channels of a sample."""
    return _drop(input, p, training, 2)


def _drop(x: Carrier, p: float, training: bool, axes: int) -> Any:
    if not training or p == 0.0:
        return x
    if not 0.0 < p < 1.0 or x.dim() < 2:
        return NotImplemented
    return apply(_Dropout, x, p, axes)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Carrier, p: float, axes: int) -> Tensor:
        ctx.p, ctx.axes, ctx.origin, ctx.batch = p, axes, x.origin, x.origin.switch.run.batch
        return Carrier(*_dropped(x.payload, x.exponent, ctx), x.origin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if isinstance(grad, Carrier):
            return Carrier(*_dropped(grad.payload, grad.exponent, ctx), ctx.origin), None, None
        return grad * _mask(grad, ctx) / (1.0 - ctx.p), None, None


def _dropped(codes: Tensor, exponent: Tensor, ctx: Any) -> tuple[Tensor, Tensor]:
    factor, fraction_bits = _inverse(1.0 - ctx.p)
    kept = codes * _mask(codes, ctx)
    if factor == 1:
        return kept, exponent - fraction_bits
    product = kept.to(torch.int32 if codes.dtype is torch.int8 else torch.int64) * factor
    if codes.dtype is not torch.int8:  # a sum of errors stays exact until it is rounded
        return product, exponent - fraction_bits
    return kernels.requantize(product, 8), exponent + (8 - fraction_bits)  # |127 * 255| >> 8 fits a code


def _mask(x: Tensor, ctx: Any) -> Tensor:
    shared = ctx.origin.scheme.shared_dropout
    per_sample = math.prod(x.shape[1 : ctx.axes])
    bits = random_bits(
        ctx.origin, "dropout", 1 if shared else len(x), per_sample, x.device, batch=ctx.batch, shared=shared
    )
    keep = bits >= int(ctx.p * 2**31)
    return keep.reshape(-1, *x.shape[1 : ctx.axes], *([1] * (x.dim() - ctx.axes)))


def _inverse(share: float) -> tuple[int, int]:
    """1 / share as m / 2**f: m is 1 where share is a power of two, else an integer in [128, 255].

    >>> _inverse(0.5), _inverse(0.25), _inverse(0.9), _inverse(0.8)
    ((1, -1), (1, -2), (142, 7), (160, 7))
    """
    whole = math.floor(math.log2(1.0 / share))
    m = round(2 ** (7 - whole) / share)
    return (1, -whole) if m == 128 else (1, -whole - 1) if m == 256 else (m, 7 - whole)
