"""WAGEUBN's evaluation in an integer program: the twin of `plane_layers`, `plane_ops` and `fixed_norm`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_lowbit.modules.elementwise import LowBitAdd, LowBitAvgPool
from lightning_lowbit.modules.fixed_norm import NormGrids
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.lowering import Builder, refuse
from lightning_lowbit.modules.norm import LowBitBatchNorm
from lightning_lowbit.modules.plane_layers import multiplies_integers, passes_wide
from lightning_lowbit.modules.quantizer import on
from lightning_lowbit.modules.widths import WidthQuantizer
from lightning_lowbit.numerics.affine import affine_parameters
from lightning_lowbit.numerics.guards import FLOAT32_EXACT, FLOAT64_EXACT, quotients_exact
from lightning_lowbit.numerics.normalize import NormConstants, NormFormat, norm_constants
from lightning_lowbit.numerics.normalize_format import OFF, on_grid, statistics_of

__all__ = ["lower_plane"]

_STRICT = "Convert with io='strict', which rounds every result to at most 16 bits."


def lower_plane(build: Builder, module: Any, *operands: Any, **settings: Any) -> Any:
    """What a module does in evaluation."""
    if isinstance(module, LowBitBatchNorm):
        return _norm(build, module, *operands)
    if isinstance(module, LowBitLayer):
        return _layer(build, module, *operands)
    if isinstance(module, LowBitAdd):
        return _add(build, module, *operands, **settings)
    if isinstance(module, LowBitAvgPool):
        return _average(build, module, *operands, **settings)
    return module.lower(build, *operands, **settings)


def _layer(build: Builder, layer: Any, x: Any) -> Any:
    x = build.snap(x, layer.lowbit_input)
    if multiplies_integers(layer):
        x = build.snap(x, layer.input_grid)
    weight, bias = on(layer.lowbit_weight, layer.weight), layer.bias
    bias = None if bias is None else on(layer.lowbit_bias, bias)
    if x.is_float or layer.lowbit_weight is None:
        y = build.island("layer", x, layer=layer, weight=weight, bias=bias)
    else:
        y = _sums(build, layer, x, weight, bias)
    return build.snap(build.snap(y, layer.lowbit_accumulator), layer.lowbit_output)


def _sums(build: Builder, layer: Any, x: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """Products and the bias, whose step may be finer than theirs."""
    exponent = layer.lowbit_weight.exponent()
    finer = bias is not None and int(layer.lowbit_bias.exponent()) < x.exponent + int(exponent)
    y = build.product(layer, x, weight, exponent, None if finer else bias)
    if finer and bias is not None:
        y = build.constant(y, bias, layer.lowbit_bias.exponent(), layer.channel_axis)
    _require(build, y, FLOAT64_EXACT if isinstance(layer.input_grid, WidthQuantizer) else FLOAT32_EXACT)
    rounded = layer.lowbit_accumulator is not None or layer.lowbit_output is not None
    return y if rounded or passes_wide(layer) else build.in_float32(y, "nearest", _STRICT)


def _add(build: Builder, op: LowBitAdd, input: Any, other: Any) -> Any:
    total = build.add([op.snapped(build, i, x) for i, x in enumerate((input, other))])
    if op.lowbit_output is None:
        return build.in_float32(total, "nearest", _STRICT)
    _require(build, total, FLOAT64_EXACT)
    return build.snap(total, op.lowbit_output)


def _average(build: Builder, op: LowBitAvgPool, input: Any, *args: Any, **kwargs: Any) -> Any:
    sums = build.pool(op.snapped(build, 0, input), op.kind, *args, **{**op.settings, **kwargs})
    if sums.is_float:
        return build.snap(sums, op.lowbit_output)
    _require(build, sums, FLOAT32_EXACT if op.lowbit_output is None else FLOAT64_EXACT)
    if op.lowbit_output is not None and sums.count is not None:
        to = op.lowbit_output.as_snap()
        if not quotients_exact(sums.count, to.exponent - sums.exponent, max(to.high, 1).bit_length()):
            raise refuse(build.path, "its averages have more bits than float64 divides exactly", "Average less.")
    return build.snap(sums, op.lowbit_output)


def _norm(build: Builder, norm: Any, x: Any) -> Any:
    grids = norm.lowbit_accumulator
    if norm.running_mean is None:
        raise refuse(
            norm.path, "it normalizes by the batch that it is given", "Train it with track_running_stats=True."
        )
    if not isinstance(grids, NormGrids) or not grids.on:
        a, b = affine_parameters(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        return build.snap(build.island("affine", x, constants={"a": a, "b": b}, nearly=True), norm.lowbit_output)
    format = grids.present
    if x.is_float or max(format.mean, format.deviation, format.xhat, format.gamma, format.beta) >= OFF:
        return build.snap(_float_norm(build, norm, x, format), norm.lowbit_output)
    constants = norm_constants(norm.running_mean, norm.running_var, norm.weight, norm.bias, format, grids.power)
    most = None if format.integer_bits is None else (1 << (format.integer_bits + format.xhat - 1)) - 1
    attributes = {
        "fraction_in": grids.power - x.exponent, "mean_fraction": format.mean - 1, "s_fraction": constants.s_fraction,
        "xhat_fraction": format.xhat - 1, "out_fraction": format.fraction,
        "product_fraction": format.gamma + format.xhat - 2, "limit": most,
    }  # fmt: skip
    _require_quotients(build, x, attributes, constants)
    named = {name: getattr(constants, name) for name in ("mean", "s", "gamma", "beta")}
    y = build.normalize(x, attributes, named, format.fraction)
    _require(build, y, FLOAT64_EXACT)
    return build.snap(build.in_float32(y, "odd", _STRICT), norm.lowbit_output)


def _float_norm(build: Builder, norm: Any, x: Any, format: NormFormat) -> Any:
    """The same of floats, or on grids that no integer has."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    mean_q, s = statistics_of(mean, var, format, norm.lowbit_accumulator.power)[:2]
    gamma = on_grid((mean.new_ones(len(mean)) if norm.weight is None else norm.weight).double(), format.gamma)
    beta = on_grid((mean.new_zeros(len(mean)) if norm.bias is None else norm.bias).double(), format.beta)
    unit = None if format.xhat >= OFF else format.xhat_unit
    constants = {"mean": mean_q, "s": s, "gamma": gamma, "beta": beta}
    return build.island("grid_norm", x, constants=constants, unit=unit, limit=format.xhat_limit)


def _require(build: Builder, x: Any, most: int) -> None:
    """Evaluation computes x in floats that hold integers up to ``most``."""
    if not x.is_float and max(-x.low, x.high) > most:
        most = max(-x.low, x.high)
        raise refuse(build.path, f"its sums reach {most:.3g}, more than evaluation's floats hold", _STRICT)


def _require_quotients(build: Builder, x: Any, attributes: dict[str, Any], constants: NormConstants) -> None:
    """Evaluation divides in float64: a quotient of integers a / b is nearer to no tie than 1/(2b), so |a| < 2^52.

    Those beyond the limit are clipped, whatever they are exactly.
    """
    f = max(attributes["fraction_in"], attributes["mean_fraction"])
    left = attributes["xhat_fraction"] + attributes["s_fraction"] - f
    for mean, s in zip(constants.mean.tolist(), constants.s.tolist(), strict=True):
        center = mean << (f - attributes["mean_fraction"])
        d = max(abs((code << (f - attributes["fraction_in"])) - center) for code in (x.low, x.high)) << max(left, 0)
        clipped = d if attributes["limit"] is None else (attributes["limit"] + 1) * (s << max(-left, 0))
        if min(d, clipped) >= FLOAT64_EXACT // 2 or d > 1 << 62:
            raise refuse(build.path, "its quotients have more bits than float64 divides exactly", _STRICT)
