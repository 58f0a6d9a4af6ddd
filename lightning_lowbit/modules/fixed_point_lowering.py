"""Fixed-point layers and operations in an integer program: what ``modules.fixed_point`` computes in evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lightning_lowbit.modules.elementwise import LowBitAdd, LowBitAfter, LowBitAvgPool, LowBitCat, LowBitOp, LowBitReLU
from lightning_lowbit.modules.fixed_point import classifier, proved
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.lowering import Builder, Codes, refuse
from lightning_lowbit.modules.quantizer import on
from lightning_lowbit.numerics.guards import FLOAT32_EXACT, FLOAT64_EXACT, quotients_exact

__all__ = ["lower_layer", "lower_operation"]

_FLOAT32_DIGITS = 24


@torch.no_grad()
def lower_layer(build: Builder, layer: LowBitLayer, x: Codes, rescale: str) -> Codes:
    """Twin of ``LowBitLayer.quantized`` with ``multiply``, and of ``classify`` where the input's unit is no weight's.

    Args:
        rescale: kind of the classifier's factor.
    """
    source = _source(layer)
    codes = _read(build, source, x)
    assert layer.lowbit_weight is not None
    if source.absorbs:
        weight, bias = layer.in_evaluation()
        weight = on(layer.lowbit_weight, weight)
        bias = bias if bias is None else on(layer.lowbit_bias, bias)
        return _handed_on(build, layer, build.product(layer, codes, weight, layer.lowbit_weight.exponent(), bias))
    weight, bias, scale = classifier(layer, rescale)
    sums = build.product(layer, codes, weight, layer.lowbit_weight.exponent(), bias)
    single = proved(layer, weight, bias) and not layer.__dict__.get("overwritten")
    single = single or layer.__dict__.get("read_by_others") is not None
    return build.floats(sums, float(scale.detach()), "float32" if single else "float64")


def _source(layer: LowBitLayer) -> FraclenInput:
    """The quantizer of the layer's input; UnsupportedModelError where its products are no integers."""
    if layer.lowbit_weight is None:
        raise refuse(
            layer.path, "its weights are float", "Convert with F8Net(floating=False), from this one's weights."
        )
    assert isinstance(layer.lowbit_input, FraclenInput)
    if layer.lowbit_input.form.per_channel:
        raise refuse(layer.path, "it has a fractional length per channel", "Train with F8Net(per_channel=False).")
    if layer.lowbit_bias is None and (layer.bias is not None or layer.norm is not None):
        raise refuse(layer.path, "its bias is float", "Convert with F8Net(bias='int32').")
    return layer.lowbit_input


def _read(build: Builder, source: FraclenInput, x: Codes) -> Codes:
    """Codes of what a layer or a sum reads; a moved fraclen (ties="realign") changes what they are worth."""
    to, moved = source.as_snap(), source.moved()
    to = replace(to, exponent=to.exponent + moved)
    if not x.is_float and x.count is not None:
        digits = 53 if x.precision == "float64" else _FLOAT32_DIGITS
        if not quotients_exact(x.count, to.exponent - x.exponent, source.form.bits, digits):
            if digits == 53:
                raise refuse(build.path, "it reads a mean with more digits than float64 holds", "Use F8Net(bits=8).")
            x = build.floats(x, None, "float64")
    codes = build.snap(x, to)
    return build.scaled(codes, -moved) if moved else codes


def _handed_on(build: Builder, module: LowBitLayer | LowBitOp, y: Codes) -> Codes:
    """Exact to fixed-point readers; where others read it too, all have it rounded to float32."""
    if y.is_float:
        return y
    largest = max(-y.low, y.high)
    if largest > FLOAT64_EXACT:
        raise refuse(module.path, f"its sums can reach {largest:.3g}, beyond float64", "Use F8Net(bits=8).")
    if module.__dict__.get("read_by_others") is None:
        return replace(y, precision="float64")
    return build.floats(y, None, "float64") if largest > FLOAT32_EXACT else y


def lower_operation(build: Builder, op: LowBitOp, *operands: Any, by_shift: bool, **settings: Any) -> Codes:
    """Twin of ``operate`` and ``average``.

    Args:
        by_shift: means divide by a power of two.
    """
    if isinstance(op, LowBitReLU):
        return _handed_on(build, op, _rectified(build, op, *operands, **settings))
    if isinstance(op, LowBitAvgPool):
        y = _handed_on(build, op, _mean(build, op, *operands, by_shift=by_shift, **settings))
    elif isinstance(op, LowBitAdd):
        terms = [_operand(build, op, index, x) for index, x in enumerate((*operands, *settings.values()))]
        y = _handed_on(build, op, build.add(terms))
    elif isinstance(op, LowBitCat):
        y = _handed_on(build, op, _joined(build, op, *operands, **settings))
    else:
        assert isinstance(op, LowBitAfter)
        (y,) = operands
    return y if op.lowbit_output is None else _read(build, _fixed(op.lowbit_output), y)


def _operand(build: Builder, op: LowBitOp, index: int, x: Codes) -> Codes:
    quantizer = op._modules.get(f"lowbit_operand_{index}")
    return x if quantizer is None else _read(build, _fixed(quantizer), x)


def _fixed(quantizer: Any) -> FraclenInput:
    assert isinstance(quantizer, FraclenInput)
    return quantizer


def _rectified(build: Builder, op: LowBitReLU, input: Codes, inplace: bool = False) -> Codes:
    clips = op.__dict__.get("rectified_by", ())
    left = clips and all(q.ready and not q.signed for q in clips)
    return input if left else build.snap(input, None, True, 6.0 if op.six else None)


def _mean(build: Builder, op: LowBitAvgPool, input: Codes, *args: Any, by_shift: bool, **settings: Any) -> Codes:
    sums = build.pool(_operand(build, op, 0, input), op.kind, *args, **{**op.settings, **settings})
    count = sums.count
    if not isinstance(count, int):
        return sums
    factor = op.__dict__.get("factor", 1.0) if by_shift else 1.0  # 1 where windows count different numbers of values
    divisor = round(count * factor)
    if divisor & (divisor - 1):
        return sums
    return replace(build.scaled(sums, 1 - divisor.bit_length()), count=None)


def _joined(build: Builder, op: LowBitCat, tensors: Any, dim: int = 0, axis: int | None = None) -> Codes:
    parts = [_operand(build, op, index, x) for index, x in enumerate(tensors)]
    return build.concat(parts, dim if axis is None else axis, op.function is torch.stack)
