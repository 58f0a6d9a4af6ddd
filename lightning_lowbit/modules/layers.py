"""Convolutions and linear layers on a grid: the user's own objects, parameters and keys, another class."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.prune import BasePruningMethod

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.graph.fold import batch_statistics
from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.modules.base import LowBitModule, Mode
from lightning_lowbit.modules.lowering import Builder
from lightning_lowbit.modules.quantizer import Quantizer, on
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.ste import gate_backward

__all__ = ["LAYERS", "SLOTS", "LowBitLayer", "padding_of", "product_settings"]

SLOTS = ("input", "unit", "weight", "bias", "accumulator", "output", "error", "weight_grad")


class LowBitLayer(LowBitModule):
    """A layer that multiplies and adds. One forward serves every scheme.

    Slots ``lowbit_input`` ... ``lowbit_weight_grad`` hold quantizers or None. A folded batch norm stays where
    it is, under its name and with its parameters; the layer only refers to it.
    """

    lowbit_kind = Kind.COMPUTE
    weight: Tensor
    bias: Tensor | None
    out_axis = 0  # of the outputs, in the weight
    channel_axis = 1  # of the outputs, in the result
    groups = 1
    lowbit_input: Quantizer | None
    lowbit_unit: Quantizer | None  # divides weight and bias where the result is in other units than the float network's
    lowbit_weight: Quantizer | None
    lowbit_bias: Quantizer | None
    lowbit_accumulator: Quantizer | None
    lowbit_output: Quantizer | None
    lowbit_error: Quantizer | None
    lowbit_weight_grad: Quantizer | None
    lowbit_norm_frozen: Tensor
    norm: _BatchNorm | None
    input_grid: Quantizer | None  # declares the grid of what is multiplied: its own lowbit_input, or the producer's

    def prepare(self) -> None:
        """Empty slots on a module whose class has just become this one."""
        for slot in SLOTS:
            self.register_module(f"lowbit_{slot}", None)
        self.__dict__["norm"] = None  # not registered: they belong to their own places
        self.__dict__["input_grid"] = None
        self.norm_frozen = False

    def fold(self, norm: _BatchNorm) -> None:
        """Take over a batch norm that follows directly."""
        self.__dict__["norm"] = norm
        self.register_buffer("lowbit_norm_frozen", torch.zeros(()))

    # -- forward ------------------------------------------------------------------------------------------
    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float operation."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:  # torch's name for it
        x = input
        self.note_run()
        if not self.switch.folding:
            return self.op(x, self.weight, self.bias)
        if self.norm is not None and self.channel_axis == -1 and x.dim() > 2:
            raise UnsupportedModelError(
                f"{self.path}: its input has {x.dim()} axes, and the batch norm behind it counts channels "
                f"along axis 1, the layer along the last. Convert with skip=['{self.path}']."
            )
        with self.precision(x):
            if self.full_precision() and x.dtype != torch.float64:
                x = x.float()
            y = self.scheme.forward(self, x)
            if not self.switch.managed and y.requires_grad:
                y.register_hook(self._unmanaged)  # type: ignore[no-untyped-call]  # torch does not type it
            return y

    def quantized(self, x: Tensor) -> Tensor:
        """Operands quantized, multiplied and added, the result quantized: what Scheme.forward does by default."""
        x = on(self.lowbit_input, x)
        weight, bias = self.effective(x)
        if self.lowbit_weight_grad is not None:
            weight = gate_backward(weight, self.lowbit_weight_grad.quantize)
        weight = on(self.lowbit_weight, weight)
        if self.lowbit_accumulator is None:
            y = self.scheme.compute(self, x, weight, bias if bias is None else on(self.lowbit_bias, bias))
        else:
            y = on(self.lowbit_accumulator, self.scheme.compute(self, x, weight, None))
            if bias is not None:
                y = y + self._along_channels(on(self.lowbit_bias, bias))
        if self.lowbit_error is not None:
            y = gate_backward(y, self.lowbit_error.quantize)
        return on(self.lowbit_output, y)

    def lower(self, build: Builder, x: Any) -> Any:
        """``quantized`` of evaluation as integer operations."""
        x = build.snap(x, self.lowbit_input)
        weight, bias = self.in_evaluation()
        weight = on(self.lowbit_weight, weight)
        open_weight = self.lowbit_weight is None or not self.lowbit_weight.ready  # zeros only, left as they are
        in_floats = bias is not None and self.lowbit_bias is None
        apart = self.lowbit_accumulator is not None or self._finer_bias()
        if x.is_float or self.lowbit_weight is None or open_weight or (in_floats and not apart):
            y = build.island("layer", x, layer=self, weight=weight, bias=bias)
        else:
            bias = bias if bias is None else on(self.lowbit_bias, bias)
            y = build.product(self, x, weight, self.lowbit_weight.exponent(), None if apart else bias)
            y = build.snap(y, self.lowbit_accumulator)
            if apart and bias is not None and self.lowbit_bias is not None:
                y = build.constant(y, bias, self.lowbit_bias.exponent(), self.channel_axis)
            elif apart and bias is not None:
                y = build.island("add", y, constants={"other": self._along_channels(bias)})
        return build.snap(y, self.lowbit_output)

    def _finer_bias(self) -> bool:
        """Whether the bias is on a finer step than the products that it is added to."""
        unit = None if self.lowbit_bias is None else self.accumulator_exponent()
        return unit is not None and self.lowbit_bias is not None and bool((self.lowbit_bias.exponent() < unit).any())

    def _unmanaged(self, grad: Tensor) -> None:
        """Somebody trains, and nobody would apply the scheme's update rule: said once."""
        if not self.switch.managed:
            self.switch.managed = True
            warnings.warn(
                "a converted network is trained without its update rule: thresholds (or integer weights) do not move. "
                "Step with lightning_lowbit.lowbit_step(model, optimizer), or use a Trainer with QuantCallback().",
                stacklevel=2,
            )

    def effective(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that the layer multiplies with: batch norm merged (TQT section 5), in its tensors' units.

        Batch phase (the norm trains and is not frozen): statistics of this batch, gradients through them.
        Otherwise: moving statistics, as constants; gamma and beta still train.
        """
        weight = self.weight if self.lowbit_input is None else self.lowbit_input.absorb(self.weight)
        weight, bias = self._merged(x, weight)
        return on(self.lowbit_unit, weight), bias if bias is None else on(self.lowbit_unit, bias)

    def _merged(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """``weight`` and the bias with the batch norm that follows."""
        norm = self.norm
        if norm is None:
            return weight, self.bias
        self.renew_norm()
        if norm.training and not self.norm_frozen and self.switch.mode is Mode.LOWBIT:
            y = self.op(x, weight, self.bias).to(weight.dtype)
            norm._check_input_dim(y)  # type: ignore[no-untyped-call]
            if y.numel() == y.shape[self.channel_axis]:
                raise ValueError(f"{self.path}: expected more than one value per channel in training, got {y.shape}")
            mean, var, unbiased = batch_statistics(y, self.channel_axis)
            self._track(norm, mean.detach(), unbiased)
            return self.scheme.merge(self, weight, mean, var)
        return self.by_moving_statistics(weight)

    def by_moving_statistics(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """``weight`` and the bias with the batch norm that follows, as evaluation has it."""
        if self.norm is None:
            return weight, self.bias
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        return self.scheme.merge(self, weight, self.norm.running_mean, self.norm.running_var)

    def renew_norm(self) -> None:
        """A pruned norm's parameters: its own hook computes them, in a forward that comes after this one."""
        for hook in () if self.norm is None else self.norm._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                hook(self.norm, None)

    def in_evaluation(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the moving statistics merged, whatever mode the norm is in."""
        if self.norm is None:
            return self.effective(self.weight)
        training, self.norm.training = self.norm.training, False
        try:
            return self.effective(self.weight)
        finally:
            self.norm.training = training

    @staticmethod
    @torch.no_grad()
    def _track(norm: _BatchNorm, mean: Tensor, var: Tensor) -> None:
        """Moving averages, as torch's batch norm keeps them (momentum None: the plain average)."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            assert norm.num_batches_tracked is not None
            share = 1.0 / norm.num_batches_tracked.to(mean.dtype)
            norm.running_mean.add_((mean - norm.running_mean) * share)
            norm.running_var.add_((var - norm.running_var) * share)
        else:
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(var, norm.momentum)

    def full_precision(self) -> bool:
        """Whether autocast must leave this layer alone: evaluation, more than 8 bits, integer errors."""
        return not self.training or self.scheme.carries_errors or self.scheme.activation_bits() > 8

    @contextmanager
    def precision(self, x: Tensor) -> Iterator[None]:
        device = x.device.type
        if torch.is_autocast_enabled(device) and self.full_precision():
            with torch.autocast(device, enabled=False):
                yield
        else:
            yield

    def _along_channels(self, bias: Tensor) -> Tensor:
        return bias if self.channel_axis == -1 else bias.reshape(-1, *([1] * (self.weight.dim() - 2)))

    # -- over time, and for reports -----------------------------------------------------------------------
    def milestone(self, what: str, reached: bool) -> None:
        if what == "freeze_batch_norm" and self.norm is not None and self.norm_frozen != reached:
            self.norm_frozen = reached
            self.lowbit_norm_frozen.fill_(float(reached))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.norm is not None:
            self.norm_frozen = bool(self.lowbit_norm_frozen.round().item())

    def accumulator_exponent(self) -> Tensor | None:
        """log2 of one unit of the products' sum, ex + ew; None while a grid is open, or is of another kind."""
        source = self.input_grid
        weight = self.lowbit_weight
        if source is None or weight is None or not (source.ready and weight.ready):
            return None
        if not (source.has_exponent and weight.has_exponent) or source.exponent().numel() > 1:
            return None  # of channels on steps of their own, the products of one sum have no common unit
        return source.exponent() + weight.exponent()

    def result_grid(self) -> Grid | None:
        """Grid of the sums before any output quantizer."""
        if self.lowbit_accumulator is not None and self.lowbit_accumulator.ready:
            return self.lowbit_accumulator.grid()
        exponent = self.accumulator_exponent()
        return None if exponent is None or exponent.numel() > 1 else Grid(bits=32, exponent=int(exponent))


def padding_of(layer: Any) -> list[tuple[int, int]]:
    """(before, after) per axis, for padding in numbers, "same" (torch pads the odd one at the end) or "valid"."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in layer.padding]


def product_settings(layer: Any) -> dict[str, Any]:
    """What an integer product takes beside its operands: a convolution's geometry, numbers where it has one axis."""
    if isinstance(layer, nn.Linear):
        return {}
    sides = padding_of(layer)
    one = len(sides) == 1
    return {
        "stride": layer.stride[0] if one else layer.stride,
        "padding": sides[0] if one else tuple(sides),
        "dilation": layer.dilation[0] if one else layer.dilation,
        "groups": layer.groups,
    }


class LowBitConv1d(LowBitLayer, nn.Conv1d):
    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)  # type: ignore[no-any-return]


class LowBitConv2d(LowBitLayer, nn.Conv2d):
    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)  # type: ignore[no-any-return]


class LowBitConv3d(LowBitLayer, nn.Conv3d):
    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)  # type: ignore[no-any-return]


class LowBitLinear(LowBitLayer, nn.Linear):  # type: ignore[misc]  # bias: Tensor | None here
    channel_axis = -1

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class _Transposed(LowBitLayer):
    """Outputs stand on axis 1 of the weight; a call may ask for an output size."""

    out_axis = 1
    dims = 0
    function: Any
    _output_padding: Any

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        self.__dict__["requested"] = output_size
        return super().forward(input)

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self._output_padding(
            x,
            self.__dict__.get("requested"),
            self.stride,
            self.padding,
            self.kernel_size,
            self.dims,
            self.dilation,
        )
        # Not self.function(...): a builtin in a class attribute does not bind, which reads like a slip.
        y: Tensor = type(self).function(x, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)
        return y


class LowBitConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    dims, function = 1, staticmethod(F.conv_transpose1d)


class LowBitConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    dims, function = 2, staticmethod(F.conv_transpose2d)


class LowBitConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    dims, function = 3, staticmethod(F.conv_transpose3d)


LAYERS: dict[type[nn.Module], type[LowBitLayer]] = {
    nn.Conv1d: LowBitConv1d,
    nn.Conv2d: LowBitConv2d,
    nn.Conv3d: LowBitConv3d,
    nn.Linear: LowBitLinear,
    nn.ConvTranspose1d: LowBitConvTranspose1d,
    nn.ConvTranspose2d: LowBitConvTranspose2d,
    nn.ConvTranspose3d: LowBitConvTranspose3d,
}
