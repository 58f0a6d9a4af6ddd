"""WAGEUBN's golden vectors in the publication's form: float64 values, codes, data widths, an integer layer."""

from __future__ import annotations

from typing import Any

import torch
from schemes.vector_table import Comparison
from schemes.wageubn_vectors_nets import BACKENDS, converted, layer_like
from schemes.wageubn_vectors_quantizers import value_of
from torch import Tensor, nn

from lightning_lowbit.kernels import int8_matmul
from lightning_lowbit.modules.base import Site, Switch, switch_of
from lightning_lowbit.modules.calibrate import alone
from lightning_lowbit.modules.widths import WidthForm, WidthQuantizer
from lightning_lowbit.numerics.constant import constant_codes_reference, constant_quantize
from lightning_lowbit.numerics.direct import direct_quantize, direct_quantize_reference
from lightning_lowbit.numerics.flag import (
    flag_planes,
    flag_planes_reference,
    flag_quantize,
    flag_quantize_reference,
)
from lightning_lowbit.numerics.observers import RangeStats
from lightning_lowbit.numerics.shift import (
    shift_codes,
    shift_codes_reference,
    shift_quantize,
    shift_quantize_reference,
)
from lightning_lowbit.numerics.widths import Criterion, Format, integer_bits, integer_bits_of_max
from lightning_lowbit.schemes.wageubn import Wageubn

__all__ = ["check_publication"]

BITS = 8
LARGEST = 127


def check_publication(v: Comparison) -> None:
    for match in v.matching(r"(direct|weight)_k(\d+)"):
        for direct in (direct_quantize, direct_quantize_reference):
            v.exact(match[0], direct(v["x"], int(match[2]), clipped=match[1] == "weight"))
    check_errors(v)
    check_codes(v)
    check_widths(v)
    check_layer(v)


def check_errors(v: Comparison) -> None:
    for match in v.matching(r"(zeros_)?shift_k(\d+)"):
        for shift in (shift_quantize, shift_quantize_reference):
            v.exact(match[0], shift(v["zeros" if match[1] else "err"], int(match[2]))[0])
    for match in v.matching(r"(zeros_)?flagE2_k(\d+)"):
        for flag in (flag_quantize, flag_quantize_reference):
            v.exact(match[0], flag(v["zeros" if match[1] else "err"], int(match[2]))[0])
    for match in v.matching(r"const_dr(\d+)_kgc(\d+)"):
        dr, bits = int(match[1]), int(match[2])
        v.exact(match[0], constant_quantize(v["err"], v["uniform"], dr=dr, bits=bits)[0])
        codes = constant_codes_reference(v["err"], v["uniform"], dr=dr)[0]
        v.exact(match[0], codes * 2.0 ** (1 - bits))
    for match in v.matching(r"zeros_const_dr(\d+)"):
        for draws in (torch.zeros_like(v["zeros"]), None):
            v.exact(match[0], constant_quantize(v["zeros"], draws, dr=int(match[1]))[0])


def check_codes(v: Comparison) -> None:
    err = v["err"]
    for match in v.matching(r"(shift_k(\d+))_int"):
        for of_shift in (shift_codes, shift_codes_reference):
            codes, exponent, _ = of_shift(err, int(match[2]))
            v.exact(match[0], codes)
            v.exact(f"{match[1]}_exp", exponent)
            v.exact(match[1], torch.ldexp(codes.double(), exponent))
    for match in v.matching(r"(flagE2_k(\d+))_int"):
        prefix, bits = match[1], int(match[2])
        for of_flag in (flag_planes, flag_planes_reference):
            planes = of_flag(err, bits)
            v.exact(f"{prefix}_exp_big", planes.exponent_big)
            v.exact(f"{prefix}_exp_small", planes.exponent_small)
            v.exact(prefix, value_of(planes))
            flag = planes.big != 0
            codes = torch.where(flag, planes.big, planes.small).to(torch.int16)
            # Just below one unit, 2^(k-1) small ones are a big one: both are written.
            below = flag & (err.abs() < torch.ldexp(torch.ones_like(err), planes.exponent_big))
            in_small = below & (v[f"{prefix}_flag"] == 0)
            v.exact(f"{prefix}_flag", flag & ~in_small)
            v.exact(f"{prefix}_int", torch.where(in_small, codes << (bits - 1), codes))


def check_widths(v: Comparison) -> None:
    rows = v["obs_x"]
    reach = []
    for x in rows:
        stats = RangeStats()
        stats.observe(x)
        reach.append(stats.abs_max())
    v.exact("obs_absmax", torch.stack(reach))
    for match in v.matching(r"obs_int_bits_(max|mse)_(un)?signed_k(\d+)"):
        signed, bits = match[2] is None, int(match[3])
        criterion: Criterion = "max" if match[1] == "max" else "mse"
        magnitudes = rows if signed else rows.abs()  # an unsigned range counts no negative number
        v.exact(match[0], torch.tensor([integer_bits(x, criterion, bits, signed) for x in magnitudes]))
        if criterion == "max":
            v.exact(match[0], integer_bits_of_max(v["obs_absmax"], bits, signed))
        form = WidthForm(bits, criterion=criterion)
        v.exact(match[0], torch.tensor([calibrated(x, form, signed) for x in magnitudes]))


def calibrated(x: Tensor, form: WidthForm, signed: bool) -> int:
    """Integer bits of a quantizer that has seen ``x``, in as many passes as it asks for."""
    quantizer = WidthQuantizer(Site("layer", "input", "linear", signed=signed), form)
    quantizer.switch = Switch()
    quantizer.observe(x)
    if quantizer.close_pass(alone):
        quantizer.observe(x)
    quantizer.commit(alone)
    assert quantizer.format == Format(form.bits, quantizer.integer, signed)
    return quantizer.integer


def check_layer(v: Comparison) -> None:
    """Forward and both products behind it, of int8 codes."""
    a, w, e = (v[f"il_{name}"].to(torch.int8) for name in "awe")
    exponent_a, exponent_w, exponent_e = v["il_exp"].tolist()
    products: list[tuple[str, Tensor, Tensor, int]] = [
        ("y", a, w.t(), exponent_a + exponent_w),
        ("dx", e, w, exponent_e + exponent_w),
        ("dw", e.t(), a, exponent_e + exponent_a),
    ]
    v.exact("il_exp_out", torch.tensor([exponent for *_, exponent in products]))
    for name, first, second, exponent in products:
        acc = int8_matmul(first, second)
        v.exact(f"il_{name}_acc", acc)
        v.exact(f"il_{name}", acc.double() * 2.0**exponent)
    for backend in BACKENDS:
        check_converted_layer(v, backend)


def check_converted_layer(v: Comparison, backend: str) -> None:
    """The same layer in a network.

    One row more, of a zero input and largest errors, sets the unit of the errors and adds nothing; a weight of
    largest codes sets the range of the weights.
    """
    a, w, e = (v[f"il_{name}"].float() for name in "awe")
    unit_a, unit_w, unit_e = (2.0 ** int(exponent) for exponent in v["il_exp"])
    scheme = Wageubn(
        first_last="int8", weight_range="fit", e2="shift8", e1="off", backend=backend, check=True,  # type: ignore[arg-type]
        overrides={"0": {"act_format": (BITS, BITS - 1 + int(v["il_exp"][0]))}},
    )  # fmt: skip
    layer: Any = layer_like(w)
    layer.weight.data.fill_(LARGEST * unit_w)
    x = torch.cat([a, torch.zeros_like(a[:1])]) * unit_a
    net = converted(nn.Sequential(layer), scheme, x)
    layer.weight.data.copy_(w * unit_w)
    x = x.requires_grad_()
    y = net(x)
    error = torch.cat([e, torch.full_like(e[:1], LARGEST)]) * unit_e
    dx, dw = torch.autograd.grad(y, (x, layer.weight), error)
    operand = layer.lowbit_error.gate.operand(error, switch_of(net).run)
    exponents = (int(layer.input_grid.exponent()), int(layer.lowbit_weight.exponent()), int(operand.exponent))
    assert exponents == tuple(v["il_exp"].tolist()), f"il_exp: got {exponents}"
    results = {"y": y[:-1], "dx": dx[:-1], "dw": dw}
    for (name, result), exponent in zip(results.items(), v["il_exp_out"], strict=True):
        v.exact(f"il_{name}", result)
        v.exact(f"il_{name}_acc", result.double() * 2.0 ** -int(exponent))
    assert int(layer.accumulator_exponent()) == int(v["il_exp_out"][0])
