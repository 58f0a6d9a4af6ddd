"""Weights and biases with their batch norm merged, on grids that follow from their present values."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lowbit.graph.fold import merge_factor, per_channel, per_output
from lightning_lowbit.modules.base import Site
from lightning_lowbit.modules.clipped import ClipQuantizer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.clipping import Limits
from lightning_lowbit.numerics.exponent import ceil_log2, clamp_exponent
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.merged import constrain_weight, inside, quantize_weight, unmerge, weight_scale
from lightning_lowbit.numerics.merged_bias import (
    holding_scale,
    own_scale,
    products_bias,
    quantize_bias,
    reduce_weight_scale,
    saturate_bias,
)
from lightning_lowbit.numerics.observers import AllReduce
from lightning_lowbit.numerics.through import pass_through

__all__ = ["BiasRule", "MergedBias", "MergedWeight", "WeightFormat", "merge_norm", "take_apart"]

BiasRule = Literal["int32", "tidl", "tidl_scale", "own", "float"]

_DEAD = 1e-6


def dead_channels(var: Tensor) -> Tensor:
    """Channels [C] whose running variance is nil beside the others': their normalized output is constant."""
    alive = torch.where(var > _DEAD * var.amax(), var, torch.nan)  # the median of a layer that is mostly dead is dead
    return var < _DEAD * alive.nanmedian()


def channel_factor(norm: Any, var: Tensor) -> Tensor:
    """gamma / sqrt(var + eps), [C]: what a batch norm multiplies its channels with."""
    factor = torch.rsqrt(var + norm.eps)  # as published, to the last bit
    return factor if norm.weight is None else norm.weight * factor


def merge_norm(layer: Any, weight: Tensor, mean: Tensor, var: Tensor, constant: bool) -> tuple[Tensor, Tensor]:
    """Wm = W s, bm = (b - mean) s + beta with s of ``channel_factor``.

    Args:
        layer: a LowBitLayer with a norm.
        weight: its weight.
        mean, var: the norm's moving statistics [C].
        constant: a dead channel is merged as beta alone. Its factor would be gamma / sqrt(eps), 316 times gamma, and
            one such channel takes all the range of a layer.
    """
    norm = layer.norm
    factor = channel_factor(norm, var)
    merged, bias = merge_factor(weight, layer.bias, factor, norm.bias, mean, layer.out_axis, layer.groups)
    if constant:
        dead = dead_channels(var)
        beta = torch.zeros_like(bias) if norm.bias is None else norm.bias
        rows = per_output(dead.to(weight.dtype), weight, layer.out_axis, layer.groups) > 0
        merged, bias = torch.where(rows, 0.0, merged), torch.where(dead, beta, bias)
    return merged, bias


@torch.no_grad()
def take_apart(layer: Any, merged: Tensor, master: Tensor, var: Tensor, floor: bool = False) -> Tensor:
    """A merged weight with its norm, at that variance, taken out again (numerics.merged.unmerge)."""
    factor = per_output(channel_factor(layer.norm, var), master, layer.out_axis, layer.groups)
    return unmerge(merged, factor, layer.norm.eps, master, floor=floor)


@dataclass(frozen=True)
class WeightFormat:
    """How merged weights are quantized.

    Attributes:
        bits: of a code.
        power2: ranges are rounded up to powers of two.
        per_channel: one scale an output channel.
        percent: of the weights that may fall off each end of the range.
        cap: the largest range, None without.
        constrain: clip outliers once, at the start.
        snap: put the float weights on the grid once, in the first training batch.
        constant: dead channels are merged as the constants that they are.
    """

    bits: int = 8
    power2: bool = True
    per_channel: bool = False
    percent: float = 0.0
    cap: float | None = None
    constrain: bool = True
    snap: bool = False
    constant: bool = True


class MergedWeight(Quantizer):
    """Codes -2^(b-1) .. 2^(b-1)-1 over the largest magnitude of the merged weight, ties away from zero.

    Args:
        site: where it stands.
        form: how weights are quantized.
        bias: rule of the layer's bias: one of them lowers the scale of the weights.

    Attributes:
        snapped: 1 once the float weights were put on the grid.
    """

    layer: Any
    snapped: Tensor

    def __init__(self, site: Site, form: WeightFormat, bias: BiasRule = "int32") -> None:
        super().__init__(site)
        self.form, self.bias = form, bias
        self.has_exponent = form.power2
        self.register_buffer("snapped", torch.zeros(()))
        self.has_snapped = False  # its copy, so that no forward reads a device

    def refresh(self) -> None:
        super().refresh()
        self.has_snapped = bool(self.snapped.round().item())

    def scale(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Codes per unit, 0-dim or shaped to multiply ``weight``; of the ``bias`` beside it (None: evaluation's)."""
        form, layer = self.form, self.layer
        scale = weight_scale(
            weight, form.bits, power2=form.power2, per_channel=form.per_channel, out_axis=layer.out_axis,
            groups=layer.groups, percent=form.percent, cap=form.cap,
        )  # fmt: skip
        if self.bias != "tidl_scale":
            return scale
        bias, source = layer.in_evaluation()[1] if bias is None else bias, _limits_of(layer)
        if bias is None or source is None:
            return scale
        limits, bits = source
        return reduce_weight_scale(scale, bias, limits.low, limits.high, form.bits, bits)

    def forward(self, x: Tensor, rectify: bool = False, scale: Tensor | None = None) -> Tensor:
        if not (self.switch.quantizing and self.ready):
            return x
        if self.switch.tally is not None:
            self.switch.tally.count(self, x)
        return self.quantize(x, rectify, scale)

    def quantize(self, x: Tensor, rectify: bool = False, scale: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            scale = self.scale(x) if scale is None else scale
            value = quantize_weight(x, scale, self.form.bits)
        return pass_through(x, value, self.mask(x, scale) if x.requires_grad else None)

    def mask(self, weight: Tensor, scale: Tensor) -> Tensor | None:
        """Where the merged weight lies inside its range; None where that is everywhere by construction."""
        narrower = self.form.percent > 0 or self.form.cap is not None
        return inside(weight.detach(), scale, self.form.bits) if narrower else None

    def _present_scale(self) -> Tensor:
        weight, bias = self.layer.in_evaluation()
        return self.scale(weight.detach(), bias)

    def exponent(self) -> Tensor:
        return -ceil_log2(self._present_scale())

    def grid(self) -> Grid:
        scale = per_channel(self._present_scale(), self.layer.out_axis, self.layer.groups)
        return _grid(self.form.bits, scale, self.form.power2, self.layer.out_axis)

    def saturated(self, x: Tensor) -> Tensor:
        return (~inside(x.detach(), self.scale(x.detach()), self.form.bits)).sum()

    @torch.no_grad()
    def _store(self, merged: Tensor, where: Tensor, floor: bool) -> None:
        """Write a merged weight back where told, its batch norm taken out again."""
        layer = self.layer
        master = getattr(layer, "weight_orig", layer.weight)  # a pruned one's own
        new = merged if layer.norm is None else take_apart(layer, merged, master, layer.norm.running_var, floor)
        # .data: the backward of the batch in which it happens then multiplies by these values, as published.
        master.data.copy_(torch.where(where, new, master))

    def constrain(self, merged: Tensor) -> None:
        """Clip outliers of the float weight, if it has any."""
        clipped = constrain_weight(merged)
        if not torch.equal(clipped, merged):
            warnings.warn(
                f"{self.layer.path}: merged weights up to {float(merged.abs().max()):.3g}, their median magnitude is "
                f"{float(merged.abs().median()):.3g}: clipped to {float(clipped.abs().max()):.3g} so that the others "
                "keep their bits. Leave them with constrain_weights=False.",
                stacklevel=2,
            )
            self._store(clipped, clipped != merged, floor=False)

    def snap(self, value: Tensor) -> None:
        """Put the float weight on the grid of ``value``, once, in the first training batch."""
        if not (self.form.snap and self.training) or self.has_snapped:
            return
        self.snapped.fill_(1.0)
        self.has_snapped = True
        self._store(value, self._alive(), floor=True)
        run = self.switch.run
        if run.world > 1:  # each process has merged its own batch's statistics
            self.layer.weight.data.copy_(run.reduce_sum(self.layer.weight.data) / run.world)

    def _dead(self) -> Tensor | None:
        """Which channels [C] were merged as constants; None where no layer's can be."""
        norm = self.layer.norm
        return None if norm is None or not self.form.constant else dead_channels(norm.running_var)

    def _alive(self) -> Tensor:
        """Where the weight is not of a channel that was merged as a constant, which would be stored as 0."""
        dead, layer = self._dead(), self.layer
        if dead is None:
            return torch.ones((), dtype=torch.bool, device=layer.weight.device)
        return per_output(dead.to(layer.weight.dtype), layer.weight, layer.out_axis, layer.groups) == 0

    def commit(self, all_reduce: AllReduce) -> None:
        layer = self.layer
        merged = layer.in_evaluation()[0].detach()
        self.require_finite(int((~torch.isfinite(merged)).sum()))
        if self.form.constrain and not self.form.per_channel:
            self.constrain(merged)
        found = self._dead()
        dead = 0 if found is None else int(found.sum())
        if dead:
            warnings.warn(
                f"{layer.path}: {dead} of {layer.norm.num_features} channels have no variance behind them; they are "
                "merged as constants, or their weights would take all the range.",
                stacklevel=2,
            )
        self.set_ready()


class MergedBias(Quantizer):
    """The merged bias by one of the accelerators' rules (docs/jacinto.md, section 2).

    int32: on the grid of the products. own: weight_bits on a grid of its own. tidl: that, then what an extra weight
    times a constant input can hold, where the input's range is known. tidl_scale: own, and weights give way to it.

    Args:
        site: where it stands.
        rule: which.
        bits: of a weight.
        power2: ranges are rounded up to powers of two.
    """

    layer: Any

    def __init__(self, site: Site, rule: BiasRule, bits: int, power2: bool) -> None:
        super().__init__(site)
        self.rule, self.bits, self.power2 = rule, bits, power2
        self.has_exponent = power2

    def forward(self, x: Tensor, rectify: bool = False, scale: Tensor | None = None) -> Tensor:
        return self.quantize(x, rectify, scale) if self.switch.quantizing and self.ready else x

    def quantize(self, x: Tensor, rectify: bool = False, scale: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            if scale is None:
                weight, bias = self.layer.in_evaluation()
                scale = self.layer.lowbit_weight.scale(weight.detach(), bias)
            value = self.by(x, scale)
        return pass_through(x, value)

    def by(self, bias: Tensor, scale_of_weight: Tensor) -> Tensor:
        """The quantized bias beside weights of that scale."""
        source, scale = _limits_of(self.layer), per_channel(scale_of_weight, self.layer.out_axis, self.layer.groups)
        if self.rule == "int32":
            return bias if source is None else products_bias(bias, source[0].scale * scale)
        own = own_scale(bias, self.bits, self.power2)
        value = quantize_bias(bias, own, self.bits)
        if self.rule != "tidl" or source is None:
            return value
        limits, act_bits = source
        return saturate_bias(value, own, limits.low, limits.high, scale, self.bits, act_bits)

    def codes_per_unit(self) -> Tensor:
        """Of the grid that it is on, 0-dim or [C]."""
        weight, bias = self.layer.in_evaluation()
        source = _limits_of(self.layer)
        if source is None or self.rule in ("own", "tidl_scale"):
            return own_scale(bias.detach(), self.bits, self.power2)
        scale = self.layer.lowbit_weight.scale(weight.detach(), bias)
        products = source[0].scale * per_channel(scale, self.layer.out_axis, self.layer.groups)
        if self.rule == "int32":
            return holding_scale(bias.detach(), products)
        return products

    def exponent(self) -> Tensor:
        return -ceil_log2(self.codes_per_unit())

    def grid(self) -> Grid:
        wide = 32 if self.rule == "int32" else 2 * self.bits if self.rule == "tidl" else self.bits
        return _grid(wide, self.codes_per_unit(), self.power2, axis=0)


def _grid(bits: int, codes_per_unit: Tensor, power2: bool, axis: int) -> Grid:
    """Signed codes; one number, or one a channel along ``axis``."""
    exponents, steps = clamp_exponent(-ceil_log2(codes_per_unit)), codes_per_unit.reciprocal()
    if codes_per_unit.dim() == 0:
        return Grid(bits, int(exponents)) if power2 else Grid(bits, scale=float(steps))
    if power2:
        return Grid(bits, tuple(exponents.tolist()), axis=axis)
    return Grid(bits, scale=tuple(steps.tolist()), axis=axis)


def _limits_of(layer: Any) -> tuple[Limits, int] | None:
    """Limits and bits of what a layer reads; None where it reads float."""
    source = layer.input_grid
    if not isinstance(source, ClipQuantizer) or not source.ready:
        return None
    return source.limits(), source.bits
