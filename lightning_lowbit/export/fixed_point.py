"""A fixed-point network's layers and operations on integers alone (F8Net, arXiv:2202.05239).

An accumulator ``acc`` with ``label`` fraction bits is worth acc 2^-label. Layers multiply int8 or uint8 codes and give
int32 accumulators; who reads those shifts them onto codes of its own. Evaluation computes the same numbers in floats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowbit import kernels
from lightning_lowbit.errors import ConfigError, InvariantError, UnsupportedModelError
from lightning_lowbit.modules.fixed_point import classifier
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.modules.layers import LowBitLayer, product_settings
from lightning_lowbit.modules.quantizer import on
from lightning_lowbit.numerics.fraclen import largest_code
from lightning_lowbit.numerics.guards import accumulator_bound
from lightning_lowbit.numerics.rounding import divide_rounded, saturate, shift_right_rounded

__all__ = [
    "IntegerInput", "IntegerUnit", "add", "concat", "encode", "integer_input", "integer_unit", "mean", "relu6",
    "requantize", "run_unit", "shift_mean",
]  # fmt: skip

INT32_MAX = 2**31 - 1
_PER_CHANNEL = "has fractional lengths per channel", "Train with F8Net(per_channel=False)."
_PRODUCTS = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d"}


@dataclass(frozen=True)
class IntegerInput:
    """How a reader turns accumulators into codes.

    Attributes:
        fraclen: fraction bits of its codes, as its products count them.
        bits, signed: -M..M or 0..M.
        moved: by how much its fraclen exceeds the one that accumulators are requantized to (``ties="realign"``): codes
            stay, their value moves.
    """

    fraclen: int
    bits: int
    signed: bool
    moved: int = 0

    @property
    def fraclen_read(self) -> int:
        """The fraclen that accumulators are requantized to."""
        return self.fraclen - self.moved

    def codes(self, acc: Tensor, label: int) -> Tensor:
        """Codes of accumulators (`requantize`)."""
        return requantize(acc, label, self.fraclen_read, self.bits, self.signed)

    def mean(self, total: Tensor, label: int, count: int | Tensor) -> Tensor:
        """Codes of means (`mean`)."""
        return mean(total, label, count, self.fraclen_read, self.bits, self.signed)


@dataclass(frozen=True, eq=False)
class IntegerUnit:
    """A layer: acc = weight * codes + bias, and nothing else.

    Attributes:
        path: where it stands.
        kind: linear, conv1d or conv2d.
        weight: int8, int16 where its codes need more than 8 bits; [outputs, inputs / groups, *kernel].
        bias: int32 on the grid of the products, [outputs], or None.
        fraclen_weight: fraction bits of the weight.
        input: the format of its input codes.
        geometry: arguments of the kernel: a convolution's stride, padding, dilation and groups.
        bound: the largest magnitude that any of its accumulators can reach, below 2^31.
        scale: a rescaled classifier's logits are acc 2^-label * scale; None elsewhere.
    """

    path: str
    kind: str
    weight: Tensor
    bias: Tensor | None
    fraclen_weight: int
    input: IntegerInput
    geometry: Mapping[str, Any]
    bound: int
    scale: float | None = None

    @property
    def fraclen_in(self) -> int:
        return self.input.fraclen

    @property
    def signed(self) -> bool:
        """Of its input codes."""
        return self.input.signed

    @property
    def bits(self) -> int:
        """Of its input codes."""
        return self.input.bits

    @property
    def label(self) -> int:
        """Fraction bits of its accumulators."""
        return self.fraclen_in + self.fraclen_weight


def integer_input(source: FraclenInput) -> IntegerInput:
    """What a quantizer does in evaluation, as an integer operation.

    Raises:
        UnsupportedModelError: it was not calibrated, or has a fraclen per channel.
    """
    if not source.ready or not source.switch.quantizing:
        raise _unsupported(source.site.key, "is not calibrated", "Calibrate or train the network first.")
    fraclen = source.rounded()
    if fraclen.numel() > 1:
        raise _unsupported(source.site.key, *_PER_CHANNEL)
    return IntegerInput(int(fraclen), source.form.bits, source.signed, source.moved())


@torch.no_grad()
def integer_unit(layer: LowBitLayer) -> IntegerUnit:
    """The integers of a layer: of the very tensors that evaluation multiplies with.

    Args:
        layer: of a network that stands in evaluation.

    Raises:
        UnsupportedModelError: the layer has no integers, or needs more than 32 bits for sums of wider codes.
        ConfigError: it is in training mode, where the bias is float.
        InvariantError: a sum of 8-bit products could exceed int32.
    """
    source, kind = _checked(layer)
    form = integer_input(source)
    weight, bias, scale = _operands(layer, source)
    assert layer.lowbit_weight is not None
    fraclen_weight, weight_bits = -int(layer.lowbit_weight.exponent()), layer.lowbit_weight.grid().bits
    label = form.fraclen + fraclen_weight
    codes = weight.double() * 2.0**fraclen_weight
    biases = None if bias is None else bias.double() * 2.0**label
    bound = accumulator_bound(codes, largest_code(form.bits, form.signed), biases)
    if not bound <= INT32_MAX:
        narrow = max(form.bits, weight_bits) <= 8
        error = InvariantError if narrow else UnsupportedModelError
        raise error(
            f"{layer.path}: its sums can reach {bound:.0f}, expected at most {INT32_MAX}, which int32 holds. "
            + ("Look at its weights and its bias for outliers." if narrow else "Use F8Net(bits=8).")
        )
    return IntegerUnit(
        layer.path,
        kind,
        codes.to(torch.int8 if weight_bits <= 8 else torch.int16),
        None if biases is None else biases.to(torch.int32),
        fraclen_weight,
        form,
        product_settings(layer),
        int(bound),
        None if scale is None else float(scale),
    )


def _checked(layer: LowBitLayer) -> tuple[FraclenInput, str]:
    """The quantizer of the layer's input and the name of its product, where it has integers."""
    source = layer.lowbit_input
    if not isinstance(source, FraclenInput):
        raise _unsupported(layer.path, f"was converted with {type(layer.scheme).__name__}", "Convert it with F8Net().")
    kind = next((name for base, name in _PRODUCTS.items() if isinstance(layer, base)), None)
    if kind is None:
        raise _unsupported(layer.path, "is neither Linear, Conv1d nor Conv2d", f"Convert with skip=['{layer.path}'].")
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        raise _unsupported(
            layer.path, f"pads with padding_mode={layer.padding_mode!r}", "Integer products pad with zeros only."
        )
    if layer.training:
        raise ConfigError(f"{layer.path}: got a layer in training mode. Call eval() on the network first.")
    if layer.lowbit_weight is None:
        raise _unsupported(layer.path, "has float weights", "Convert with F8Net(floating=False).")
    if source.form.per_channel:
        raise _unsupported(layer.path, *_PER_CHANNEL)
    has_bias = layer.bias is not None or layer.norm is not None
    if has_bias and layer.lowbit_bias is None:
        raise _unsupported(layer.path, "has a float bias", 'Convert with F8Net(bias="int32").')
    open_slots = [slot for slot in ("input", "weight") if not getattr(layer, f"lowbit_{slot}").ready]
    if open_slots or (has_bias and layer.lowbit_bias is not None and not layer.lowbit_bias.ready):
        raise _unsupported(layer.path, "is not calibrated", "Calibrate or train the network first.")
    pool = source.__dict__["mean"]
    if pool is not None and "factor" not in pool.__dict__:
        raise _unsupported(
            layer.path,
            f"makes up for the mean of {pool.path}, which has not run yet",
            "Run one batch in evaluation first.",
        )
    return source, kind


def _operands(layer: LowBitLayer, source: FraclenInput) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight and bias on their grids, and the factor of a rescaled classifier, as evaluation has them."""
    scheme: Any = layer.scheme
    if source.absorbs:
        weight, bias = layer.in_evaluation()
        return on(layer.lowbit_weight, weight), bias if bias is None else on(layer.lowbit_bias, bias), None
    return classifier(layer, scheme.rescale)


def _unsupported(path: str, what: str, instead: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{path} {what}, so that it has no integers to compute with. {instead}")


def encode(x: Tensor, form: IntegerInput) -> Tensor:
    """Codes of float numbers, as evaluation quantizes the network's input.

    >>> encode(torch.tensor([-9.0, -0.75, 0.25, 0.75, 9.0]), IntegerInput(fraclen=1, bits=4, signed=True))
    tensor([-7, -2,  0,  2,  7], dtype=torch.int8)
    """
    most = largest_code(form.bits, form.signed)
    return _as_codes(torch.round(x * 2.0**form.fraclen_read).clamp(-most, most), form.bits, form.signed)


def run_unit(unit: IntegerUnit, codes: Tensor, backend: str | None = None) -> Tensor:
    """Accumulators of a layer, int32: proved to fit when the unit was made.

    Args:
        unit: of 8 bits.
        codes: int8 where the unit reads signed codes, else uint8; [N, C, *spatial], or [..., inputs] for linear.
        backend: see ``kernels.use``; None takes the fastest exact one.

    Raises:
        ConfigError: codes of another type, or more than 8 bits.
    """
    expected = torch.int8 if unit.signed else torch.uint8
    if unit.bits > 8 or unit.weight.dtype != torch.int8 or codes.dtype != expected:
        raise ConfigError(
            f"{unit.path}: got {codes.dtype} codes and {unit.weight.dtype} weights, expected {expected} and int8, "
            "at most 8 bits each. Convert with F8Net(bits=8), and make the codes with requantize."
        )
    if unit.kind == "linear":
        rows = kernels.int8_matmul(codes.reshape(-1, codes.shape[-1]), unit.weight.t(), backend=backend)
        acc, along = rows.reshape(*codes.shape[:-1], -1), -1
    else:
        product = kernels.int8_conv1d if unit.kind == "conv1d" else kernels.int8_conv2d
        acc, along = product(codes, unit.weight, **unit.geometry, backend=backend), 1
    acc = acc.to(torch.int32)
    if unit.bias is None:
        return acc
    return acc + (unit.bias if along == -1 else unit.bias.reshape(-1, *[1] * (acc.dim() - 2)))


def requantize(acc: Tensor, label: int, fraclen: int, bits: int, signed: bool) -> Tensor:
    """clip(round(acc 2^(fraclen - label)), -M or 0, M): a shift to the right, ties to even; to the left it saturates.

    Args:
        acc: integers of ``label`` fraction bits, any shape.
        fraclen, bits, signed: of the codes.
    Returns:
        Codes: int8 signed, uint8 unsigned, int32 above 8 bits.

    >>> acc = torch.tensor([-(2**31), -6, -5, -3, -2, -1, 0, 1, 2, 3, 5, 6, 2**31 - 1], dtype=torch.int32)
    >>> for label in (3, 2, 1, 0):
    ...     print(f"label {label}", requantize(acc, label, 1, 8, True).tolist())
    label 3 [-127, -2, -1, -1, 0, 0, 0, 0, 0, 1, 1, 2, 127]
    label 2 [-127, -3, -2, -2, -1, 0, 0, 0, 1, 2, 2, 3, 127]
    label 1 [-127, -6, -5, -3, -2, -1, 0, 1, 2, 3, 5, 6, 127]
    label 0 [-127, -12, -10, -6, -4, -2, 0, 2, 4, 6, 10, 12, 127]
    >>> requantize(acc, 2, 1, 8, False).tolist()
    [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 3, 255]
    """
    most = largest_code(bits, signed)
    wide = acc.to(torch.int64)
    wide = wide if label >= fraclen else saturate(wide, -most, most)  # what is beyond ends at the last code anyhow
    return _as_codes(shift_right_rounded(wide, label - fraclen), bits, signed)


def mean(total: Tensor, label: int, count: int | Tensor, fraclen: int, bits: int, signed: bool) -> Tensor:
    """clip(round(total 2^(fraclen - label) / count), -M or 0, M): one exact division, ties to even.

    Evaluation divides in float64 first and rounds the quotient later. That is the same: in units of a code, the exact
    quotient is a tie or at least 1 / (count 2^(label - fraclen + 1)) from one, and a float64 up to 2^bits errs by less
    as long as count 2^(label - fraclen) < 2^(52 - bits).

    Args:
        total: sums of ``count`` accumulators of ``label`` fraction bits each; int64 where int32 may not hold them.
        count: a number, or integers that broadcast against ``total``.
        fraclen, bits, signed: of the codes.

    >>> total = torch.tensor([-9, -6, -5, -3, 0, 3, 5, 6, 9, 10, 9999])
    >>> mean(total, 1, 3, 0, 8, True).tolist()  # / 6
    [-2, -1, -1, 0, 0, 0, 1, 1, 2, 2, 127]
    >>> mean(total, 0, 3, 1, 8, False).tolist()  # / 1.5
    [0, 0, 0, 0, 0, 2, 3, 4, 6, 7, 255]
    """
    shift = label - fraclen
    divided = divide_rounded(total.to(torch.int64) << max(-shift, 0), count << max(shift, 0))
    return _as_codes(divided, bits, signed)


def shift_mean(label: int, count: int) -> int:
    """The label under which a sum of ``count`` accumulators is their mean by a shift, 2^p for count: p more bits.

    >>> [shift_mean(10, count) for count in (1, 4, 49, 64)]  # 49: the sum stands for 49/64 of the mean
    [10, 12, 16, 16]
    """
    return label + round(torch.log2(torch.tensor(float(count), dtype=torch.float64)).item())


def add(a: Tensor, label_a: int, b: Tensor, label_b: int) -> tuple[Tensor, int]:
    """a + b with the label of the finer operand, int32; the other one shifts to the left. Saturates, never wraps.

    >>> a, b = torch.tensor([3, 2**30, 2**31 - 1], dtype=torch.int32), torch.tensor([1, 1, 1], dtype=torch.int32)
    >>> add(a, 2, b, 4)
    (tensor([        13, 2147483645, 2147483645], dtype=torch.int32), 4)
    >>> add(a, 2, b, 2)
    (tensor([         4, 1073741825, 2147483647], dtype=torch.int32), 2)
    """
    label = max(label_a, label_b)
    total = _relabeled(a, label - label_a) + _relabeled(b, label - label_b)
    return saturate(total, -INT32_MAX, INT32_MAX).to(torch.int32), label


def concat(tensors: Sequence[Tensor], labels: Sequence[int], dim: int) -> tuple[Tensor, int]:
    """Accumulators side by side under the largest of their labels, int32.

    >>> concat([torch.tensor([3]), torch.tensor([5])], [2, 3], 0)
    (tensor([6, 5], dtype=torch.int32), 3)
    """
    label = max(labels)
    moved = [_relabeled(x, label - own) for x, own in zip(tensors, labels, strict=True)]
    return torch.cat(moved, dim).to(torch.int32), label


def relu6(acc: Tensor, label: int) -> Tensor:
    """min(max(acc, 0), 6 2^label), where 6 is no clip's work.

    >>> relu6(torch.tensor([-1, 23, 25]), 2).tolist()
    [0, 23, 24]
    """
    return acc.clamp(0, 6 << label)


def _relabeled(acc: Tensor, shift: int) -> Tensor:
    """acc << shift in int64, within +-(2^31 - 1)."""
    most = INT32_MAX >> shift
    return saturate(acc.to(torch.int64), -most, most) << shift


def _as_codes(x: Tensor, bits: int, signed: bool) -> Tensor:
    most = largest_code(bits, signed)
    dtype = torch.int32 if bits > 8 else torch.int8 if signed else torch.uint8
    return saturate(x, -most if signed else 0, most).to(dtype)
