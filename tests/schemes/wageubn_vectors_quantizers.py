"""WAGEUBN's golden vectors of the quantizers, as the publication's authors run them in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from schemes.vector_table import Comparison
from schemes.wageubn_vectors_nets import authors, converted, layer_like
from torch import Tensor, nn

from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.planes import values_of
from lightning_lowbit.numerics.constant import constant_codes_reference, constant_quantize
from lightning_lowbit.numerics.direct import direct_quantize, direct_quantize_reference
from lightning_lowbit.numerics.error_gate import flag_gate, shift_gate
from lightning_lowbit.numerics.flag import (
    FlagPlanes,
    flag_planes,
    flag_planes_reference,
    flag_quantize,
    flag_quantize_reference,
)
from lightning_lowbit.numerics.momentum import UpdateFormat, learning_rate_code
from lightning_lowbit.numerics.shift import shift_quantize, shift_quantize_reference
from lightning_lowbit.plugins.precision import lowbit_step

__all__ = ["check_quantizers", "gradient", "learning_rates", "value_of"]

GRADIENT_BITS = 15  # kGC: no key names it
DIRECT = (direct_quantize, direct_quantize_reference)


def gradient(fn: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """fn(x), and what becomes of g on its way back."""
    x = x.clone().requires_grad_()
    y = fn(x)
    return y.detach(), torch.autograd.grad(y, x, g)[0]


def value_of(planes: FlagPlanes) -> Tensor:
    """float64."""
    big, small = (
        torch.ldexp(codes.double(), exponent)
        for codes, exponent in ((planes.big, planes.exponent_big), (planes.small, planes.exponent_small))
    )
    return big + small


def learning_rates(lr: Tensor, bits: int = 10) -> Tensor:
    """Q(lr) with its clip below 1, as published: the package's codes, but 0 below half a unit."""
    published = direct_quantize(lr, bits, clipped=True)
    format = UpdateFormat(learning_rate=bits, exact=False)
    codes = torch.tensor([learning_rate_code(float(rate), format) for rate in lr])
    assert torch.equal(codes * 2.0 ** (1 - bits), published.clamp(min=2.0 ** (1 - bits)).where(lr > 0, 0.0))
    return published


def check_in_network(v: Comparison) -> None:
    """The same tensors through the quantizers that stand in a network."""
    x, act, g = v["x"], v["act"], v["gout"]
    for match in v.matching(r"(weight|act)_k(\d+)_y"):
        option = {"weight": "weight_bits", "act": "act_bits"}[match[1]]
        layer = converted(nn.Sequential(layer_like(act)), authors(**{option: int(match[2])}), act)[0]
        quantizer, read = (layer.lowbit_weight, x) if match[1] == "weight" else (layer.lowbit_input, act)
        y, dx = gradient(quantizer, read, g)
        v.exact(match[0], y)
        v.exact(match[0].removesuffix("y") + "grad_x", dx)
    for match in v.matching(r"(E1|E2flag)_k(\d+)_(err|err_sat)_out"):
        option, form = {"E1": ("e1", "shift"), "E2flag": ("e2", "flag")}[match[1]]
        scheme = authors(**{option: f"{form}{match[2]}"}, check=True)
        err = v[match[3]]
        net = converted(nn.Sequential(nn.ReLU(), layer_like(err)), scheme, torch.ones_like(err))
        if match[1] == "E1":
            v.exact(match[0], gradient(net[0], torch.ones_like(err), err)[1])
        else:
            gate = net[1].lowbit_error.gate
            v.exact(match[0], net[1].lowbit_error.quantize(err))
            v.exact(match[0], values_of(gate.operand(err, switch_of(net).run)))
    for match in v.matching(r"CQ_dr(\d+)_y"):
        check_gradients_in_network(v, match[0], int(match[1]))


def check_gradients_in_network(v: Comparison, key: str, dr: int) -> None:
    """Where the user's optimizer moves the weights, it finds their quantized gradients."""
    scheme = authors(update="float", dr=dr, dr_at=0, gradient_bits=GRADIENT_BITS)
    net = converted(nn.Sequential(layer_like(v["grad_w"])), scheme, torch.ones_like(v["grad_w"]))
    switch_of(net).run.injected = lambda path, purpose, samples, size: v["uniform"].reshape(samples, size)
    net[0].weight.grad = v["grad_w"]
    lowbit_step(net, torch.optim.SGD(net.parameters(), lr=1.0))
    v.exact(key, net[0].weight.grad)
    v.exact(key, -net[0].weight)


def check_quantizers(v: Comparison) -> None:
    check_in_network(v)
    x, g = v["x"], v["gout"]
    for match in v.matching(r"(weight|act)_k(\d+)_y"):
        clipped, bits = match[1] == "weight", int(match[2])
        for direct in DIRECT:
            y, dx = gradient(
                lambda t, q=direct, k=bits, c=clipped: q(t, k, clipped=c),  # type: ignore[misc]
                x if clipped else v["act"],
                g,
            )
            v.exact(match[0], y)
            v.exact(match[0].removesuffix("y") + "grad_x", dx)
    for match in v.matching(r"E1_k(\d+)_(err|err_sat)_out"):
        bits, err = int(match[1]), v[match[2]]
        for shift in (shift_quantize, shift_quantize_reference):
            v.exact(match[0], shift(err, bits, clip_to_one=True)[0])
        v.exact(match[0], gradient(lambda t, k=bits: shift_gate(t, k, clip_to_one=True), err, err)[1])  # type: ignore[misc]
    for match in v.matching(r"E2flag_k(\d+)_(err|err_sat)_out"):
        bits, err = int(match[1]), v[match[2]]
        for flag in (flag_quantize, flag_quantize_reference):
            v.exact(match[0], flag(err, bits)[0])
        for planes in (flag_planes, flag_planes_reference):
            v.exact(match[0], value_of(planes(err, bits)))
        v.exact(match[0], gradient(lambda t, k=bits: flag_gate(t, k), err, err)[1])  # type: ignore[misc]
    for match in v.matching(r"CQ_dr(\d+)_y"):
        dr = int(match[1])
        v.exact(match[0], constant_quantize(v["grad_w"], v["uniform"], dr=dr, bits=GRADIENT_BITS)[0])
        codes = constant_codes_reference(v["grad_w"], v["uniform"], dr=dr)[0]
        v.exact(match[0], codes * 2.0 ** (1 - GRADIENT_BITS))
    for match in v.matching(r"(gradbn|Q)_k(\d+)_y"):
        for direct in DIRECT:
            v.exact(match[0], direct(v["grad_bn"] if match[1] == "gradbn" else x, int(match[2])))
    for match in v.matching(r"lr_k(\d+)_y"):
        v.exact(match[0], learning_rates(v["lr"], int(match[1])))
