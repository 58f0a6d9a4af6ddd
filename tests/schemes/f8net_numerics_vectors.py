"""F8Net's golden vectors below the layers: quantization, choice of the fraclen, integer requantization, pooling."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from schemes.vector_table import Comparison, Kind, VectorFile
from torch import Tensor

from lightning_lowbit.numerics.fraclen import fix_quant, largest_code
from lightning_lowbit.numerics.fraclen_choice import (
    METRICS,
    fraclen_by_metric,
    fraclen_of,
    measure,
    metric_of,
    quantization_errors,
)
from lightning_lowbit.numerics.rounding import saturate, shift_right_rounded

FLOAT_SUM = 1e-5
BLUR = 1e-6
POOLED_POINT = 9  # bits behind the point of the integers that are pooled
SMALL_ACC = 2**20  # accumulators are clipped to this where they are shifted left
DATA = {
    "gauss": lambda base: base,
    "relu": torch.relu,
    "bias": lambda base: base + 0.7,
    "laplace": lambda base: base.sign() * base * base,
}


def check_fix_quant(v: Comparison) -> None:
    x, g = v["x"].requires_grad_(), v["grad_out"]
    for match in v.matching(r"(s([01])_wl(\d+)_fl(\d+)(_float)?)_y"):
        prefix, signed, bits, fraclen = match[1], match[2] == "1", int(match[3]), int(match[4])
        y = fix_quant(x, fraclen, bits=bits, signed=signed, rounding=match[5] is None)
        v.exact(f"{prefix}_y", y)
        v.exact(f"{prefix}_gx", torch.autograd.grad(y, x, g)[0])
    for match in v.matching(r"pc([01])_fl"):
        axis, prefix = int(match[1]), match[0].removesuffix("_fl")
        y = fix_quant(x, v[match[0]], signed=axis == 1, axis=axis)
        v.exact(f"{prefix}_y", y)
        v.exact(f"{prefix}_mask", torch.autograd.grad(y, x, torch.ones_like(x))[0])


def published_fraclen(value: Tensor, c: float, signed: bool) -> Tensor:
    """floor(log2(c / value)) in float32, where log2 of a value just below a power of two rounds up to the integer."""
    return (c / value).double().log2().float().floor().clamp(0, 8 - int(signed))


def limit(metric: str, signed: bool) -> float:
    """c of the closed form, read off where its fraclen falls from 1 to 0: at c / 2."""
    values = torch.arange(1, 200, dtype=torch.float64)
    return 2.0 * int((fraclen_by_metric(values, metric, signed) >= 1).sum())


def metric(x: Tensor, name: str) -> Tensor:
    """The statistic of x as it is, as published: mae and rms of unsigned formats are not rectified."""
    return metric_of(measure(x, name), name)


def published_errors(x: Tensor, bits: int, signed: bool) -> Tensor:
    """Those of x as it is: of unsigned codes with the negative part, which adds the same to every fraclen."""
    negative = 0.0 if signed else x.clamp(max=0).double().square().mean()
    return (quantization_errors(x, bits, signed).square() + negative).sqrt()


def compare_grid(v: Comparison, key: str, data: list[Tensor], bits: int, signed: bool) -> None:
    """Exact, but where the negative part leaves less than float32 tells apart between two fraclens."""
    errors = torch.stack([published_errors(x, bits, signed) for x in data])
    ours = torch.stack([fraclen_of(x, "grid", bits, signed) for x in data])
    both = errors.gather(1, torch.stack([ours, v[key].long()], 1))
    blurred = (ours != v[key]) & ((both[:, 0] / both[:, 1] - 1).abs() < BLUR) & (not signed)
    v.exact(key, torch.where(blurred, v[key], ours))
    if blurred.any():
        v.notes.append(f"{key}: {int(blurred.sum())} of {len(ours)} within {BLUR} of each other")


def check_fraclen_select(v: Comparison) -> None:
    scales = v["sigma"]
    for match in v.matching(r"((\w+)_s([01]))_rmse"):
        prefix, signed = match[1], match[3] == "1"
        data = [(DATA[match[2]](v["base"]) * scale).float() for scale in scales]
        v.close(match[0], torch.stack([published_errors(x, 8, signed) for x in data]), FLOAT_SUM)
        compare_grid(v, f"{prefix}_grid", data, 8, signed)
        for name in METRICS:
            values = torch.stack([metric(x, name) for x in data])
            v.close(f"{prefix}_{name}_value", values, FLOAT_SUM)
            v.exact(f"{prefix}_{name}", fraclen_by_metric(values, name, signed))
    for match in v.matching(r"grid_wl(\d+)_s([01])"):
        data = [(v["base"] * scale).float() for scale in scales]
        compare_grid(v, match[0], data, int(match[1]), match[2] == "1")
    for match in v.matching(r"(edge_[a-z0-9.]+)_s([01])_(\w+)"):
        x, signed, name = v[match[1]], match[2] == "1", match[3]
        if name == "grid":
            v.exact(match[0], fraclen_of(x, name, signed=signed))
        else:
            v.exact(match[0], fraclen_by_metric(metric(x, name), name, signed))
    for match in v.matching(r"thr_(\w+)_s([01])_value"):
        values, signed = v[match[0]], match[2] == "1"
        c, key = limit(match[1], signed), match[0].removesuffix("value") + "fl"
        v.exact(key, published_fraclen(values, c, signed))
        ours = fraclen_by_metric(values, match[1], signed)
        nearest = (values.double() / c).log2().round().exp2() * c
        near = (values / nearest - 1).abs() <= 1e-6
        v.exact(key, torch.where(near, v[key], ours))
        aside = int((ours != v[key]).sum())
        v.notes.append(f"{key}: the published logarithm is an ulp aside for {aside} of {len(ours)}")


def requantized(acc: Tensor, point: int, fraclen: int, signed: bool) -> Tensor:
    """Accumulators with ``point`` bits behind the point as 8-bit codes with ``fraclen``."""
    most = largest_code(8, signed)
    return saturate(shift_right_rounded(acc, point - fraclen), -most if signed else 0, most)


def check_int_requant(v: Comparison) -> None:
    for match in v.matching(r"s([01])_in(\d+)_out(\d+)"):
        point, fraclen = int(match[2]), int(match[3])
        acc = v["acc"] if point >= fraclen else v["acc"].clamp(-SMALL_ACC, SMALL_ACC)
        v.exact(match[0], requantized(acc, point, fraclen, match[1] == "1"))


def check_pools(v: Comparison) -> None:
    for match in v.matching(r"(avg\d+)_x"):
        prefix, x = match[1], v[match[0]]
        area = x[0, 0].numel()
        shift = round(math.log2(area))
        v.exact(f"{prefix}_shift", shift)
        v.close(f"{prefix}_y", x.sum((2, 3)) * 2.0**-shift, FLOAT_SUM)
        v.close(f"{prefix}_scale", 2.0**shift / area, FLOAT_SUM)
        v.exact(f"{prefix}_int_y", v[f"{prefix}_int_x"].sum((2, 3)))
        v.exact(f"{prefix}_int_fl", POOLED_POINT + shift)
    v.exact("max_y", F.max_pool2d(v["max_x"], 3, stride=2, padding=1))


FILES_NUMERICS = {
    "fix_quant": VectorFile(
        {
            r"x|grad_out|pc[01]_fl": Kind.INPUT,
            r"s[01]_wl\d+_fl\d+(_float)?_(y|gx)|pc[01]_(y|mask)": Kind.OUTPUT,
        },
        check_fix_quant,
    ),
    "fraclen_select": VectorFile(
        {
            r"base|sigma|edge_[a-z0-9.]+|thr_\w+_value": Kind.INPUT,
            r"thr_\w+_fl": Kind.QUIRK,
            r"(gauss|relu|bias|laplace)_s[01]_(rmse|grid|(std|mae|rms)(_value)?)": Kind.OUTPUT,
            r"grid_wl\d+_s[01]|edge_[a-z0-9.]+_s[01]_(grid|std|mae|rms)": Kind.OUTPUT,
        },
        check_fraclen_select,
    ),
    "int_requant": VectorFile({"acc": Kind.INPUT, r"s[01]_in\d+_out\d+": Kind.OUTPUT}, check_int_requant),
    "pools": VectorFile(
        {r"avg\d+(_int)?_x|max_x": Kind.INPUT, r"avg\d+_(y|shift|scale|int_y|int_fl)|max_y": Kind.OUTPUT},
        check_pools,
    ),
}
