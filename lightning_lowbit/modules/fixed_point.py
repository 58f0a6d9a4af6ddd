"""What fixed-point layers and sums compute: in evaluation the very integers, by float arithmetic under a proof."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_lowbit.modules.elementwise import LowBitAvgPool, LowBitOp, LowBitReLU
from lightning_lowbit.modules.fixed_point_operands import FraclenWeight
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import on
from lightning_lowbit.numerics.exponent import pow2
from lightning_lowbit.numerics.fraclen import largest_code
from lightning_lowbit.numerics.guards import FLOAT32_EXACT, float_sums_exact
from lightning_lowbit.numerics.rectifier import rectify

__all__ = ["average", "classifier", "classify", "multiply", "operate", "proved", "rescaling"]


def multiply(layer: LowBitLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's products, in evaluation exactly the integers' sums: float64 where float32 is not proved to hold them.

    Args:
        x: input on its grid.
        weight, bias: on theirs; a float bias (or none) in training.
    """
    if layer.training or not layer.switch.quantizing or x.dtype == torch.float64:
        return layer.op(x, weight, bias)
    if proved(layer, weight, bias):
        y = layer.op(x, weight, bias)
        y = y.double() if layer.__dict__.get("overwritten") else y
    else:
        y = layer.op(x.double(), weight.double(), None if bias is None else bias.double())
    return _for_readers(layer, y)


def _for_readers(module: LowBitLayer | LowBitOp, y: Tensor) -> Tensor:
    """float64 goes to fixed-point readers alone: to others, and out of the network, in the network's own dtype."""
    like = module.__dict__.get("read_by_others")
    return y if like is None else y.to(like.weight.dtype)


def proved(layer: LowBitLayer, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether float32 holds every partial sum (numerics.guards), by the weights as they are."""
    source = layer.lowbit_input
    if not isinstance(source, FraclenInput) or source.exponent().dim() or layer.lowbit_weight is None:
        return False
    if torch.compiler.is_compiling():  # reads no value: the largest weight in every place
        if bias is not None or not isinstance(layer.lowbit_weight, FraclenWeight):
            return False
        terms = math.prod(weight.shape[1:]) if layer.out_axis == 0 else math.prod(weight.shape) // weight.shape[1]
        return terms * source.qmax * largest_code(layer.lowbit_weight.bits, signed=True) < FLOAT32_EXACT
    unit = layer.accumulator_exponent()
    if unit is None or layer.lowbit_weight.exponent().dim():
        return False
    codes = weight.double() * pow2(-layer.lowbit_weight.exponent(), torch.float64)
    biases = None if bias is None else bias.double() * pow2(-unit, torch.float64)
    return float_sums_exact(codes, source.qmax, biases, layer.out_axis, layer.groups)


def operate(op: LowBitOp, *operands: Any, **settings: Any) -> Tensor:
    """A sum, a mean or a rectifier: in evaluation on float64, which holds any sum of the int32 results before it.

    A rectifier that only unsigned readers follow (``rectified_by``) is left to their clip, which ends at 0.
    """
    if not op.switch.quantizing:
        return op.op(*operands, **settings)
    if isinstance(op, LowBitReLU):
        clips = op.__dict__.get("rectified_by", ())
        left = clips and all(q.ready and not q.signed for q in clips)
        if left:
            return _for_readers(op, operands[0])
        return _for_readers(op, op.op(*operands) if op.six else rectify(*operands))
    if op.training:
        return op.op(*operands, **settings)
    return _for_readers(op, op.op(*(_wide(operand) for operand in operands), **settings))


def _wide(operand: Any) -> Any:
    if isinstance(operand, (list, tuple)):
        return [_wide(item) for item in operand]
    return operand.double() if isinstance(operand, Tensor) and operand.dtype == torch.float32 else operand


def average(op: LowBitAvgPool, x: Tensor, *args: Any, **settings: Any) -> Tensor:
    """sum 2^-p with p = round(log2 n), for windows of n values: a mean by a shift, off by 2^p / n (section 7).

    Where weights make up for that (``FraclenInput.mean``) they find the factor on the op. Windows that count different
    numbers of values are divided exactly.
    """
    sums, count = op.sums(x if op.training else _wide(x), *args, **settings)
    if isinstance(count, Tensor):
        op.__dict__["factor"] = 1.0
        return _for_readers(op, sums / count)
    shift = 2.0 ** round(math.log2(count))
    op.__dict__["factor"] = shift / count
    return _for_readers(op, sums / shift)


def rescaling(weight: Tensor, codes: Tensor, kind: str) -> Tensor:
    """k, which multiplies a quantized classifier's products (section 5).

        constant    1 / (sqrt(outputs) std(codes))      as networks trained from scratch like it
        stddev      std(weight) / std(codes)            what quantization took from the weights; keeps a float network
        none        1

    Where all weights are equal (a head that begins with zeros) or round to equal codes it is 1, and they learn.

    Args:
        weight, codes: [outputs, inputs], before and after quantization.
    """
    one = torch.ones((), dtype=codes.dtype, device=codes.device)
    if kind == "none":
        return one
    spread, before = codes.detach().std(), weight.detach().std()
    k = 1 / (math.sqrt(codes.shape[0]) * spread) if kind == "constant" else before / spread
    return torch.where((spread > 0) & (before > 0), k, one)


def classify(layer: LowBitLayer, x: Tensor, kind: str) -> Tensor:
    """A rescaled classifier: integer products, times one float constant (section 5).

    y = unit k (q W_q) + b             training
    y = unit k (q W_q + b_q)           evaluation, b_q = b / (unit k) on the products' grid
    """
    assert layer.lowbit_input is not None
    q = layer.lowbit_input(x)
    weight, bias, scale = classifier(layer, kind)
    if layer.training:
        y = layer.op(q, weight, None) * scale
        return y if bias is None else y + bias
    return (multiply(layer, q, weight, bias) * scale).to(layer.weight.dtype)


def classifier(layer: LowBitLayer, kind: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """A rescaled classifier's weight and bias, and the factor unit k of its products; in training the bias is float."""
    source = layer.lowbit_input
    assert isinstance(source, FraclenInput)
    unit, mean = source.unit(), source.__dict__["mean"]
    weight = on(layer.lowbit_weight, source.absorb(layer.weight))
    scale = rescaling(layer.weight, weight, kind)
    if mean is not None and kind != "none":  # k takes a factor on the weights back
        scale = scale * mean.__dict__.get("factor", 1.0)
    scale = scale if unit is None else scale * unit
    if layer.training or layer.bias is None:
        return weight, layer.bias, scale
    return weight, on(layer.lowbit_bias, layer.bias / scale), scale
