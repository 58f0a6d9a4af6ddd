"""WAGEUBN's golden vectors of layers and of a block: the converted network, and a float64 twin equal to it in all bits.

The twin's products and sums are exact; the network's are rounded to float32 once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from schemes.vector_table import Comparison
from schemes.wageubn_vectors_nets import BACKENDS, Block, authors, close, converted, layer_like, same
from schemes.wageubn_vectors_norm import allowance, norm_format, per_channel
from torch import Tensor, nn

from lightning_lowbit.numerics.direct import direct_quantize
from lightning_lowbit.numerics.error_gate import flag_gate, shift_gate
from lightning_lowbit.numerics.normalize import batch_norm
from lightning_lowbit.numerics.through import pass_through

__all__ = ["check_layers"]

BITS, PADDING = 8, 1


class Results(NamedTuple):
    """Of a layer."""

    y: Tensor
    grad_x: Tensor
    grad_w: Tensor


def weight_of(w: Tensor) -> Tensor:
    """As a layer multiplies with it."""
    return direct_quantize(w, BITS, clipped=True)


def conv(x: Tensor, w: Tensor, stride: int = 1) -> Tensor:
    return F.conv2d(x, w, stride=stride, padding=PADDING)


def check_layers(v: Comparison) -> None:
    for match in v.matching(r"(conv_E2k(\d+))_grad_x"):
        inputs = ("conv_x", "conv_w_oihw", "conv_gout")
        check_layer(v, inputs, conv, ("conv_y", f"{match[1]}_grad_x", f"{match[1]}_grad_w_oihw"), int(match[2]))
    for match in v.matching(r"(conv_s(\d+))_y"):
        stride, inputs = int(match[2]), ("conv_x", "conv_w_oihw", f"{match[1]}_gout")
        outputs = (match[0], f"{match[1]}_grad_x", f"{match[1]}_grad_w_oihw")
        check_layer(v, inputs, lambda x, w, s=stride: conv(x, w, s), outputs, BITS, stride=stride)  # type: ignore[misc]
    check_layer(v, ("lin_x", "lin_w", "lin_gout"), F.linear, ("lin_y", "lin_grad_x", "lin_grad_w"), BITS)
    for match in v.matching(r"block_kx(\d+)_y"):
        check_block(v, int(match[1]))


# -- one layer -----------------------------------------------------------------------------------------------
def check_layer(
    v: Comparison,
    inputs: tuple[str, str, str],
    product: Callable[[Tensor, Tensor], Tensor],
    outputs: tuple[str, str, str],
    error_bits: int,
    stride: int = 1,
) -> None:
    """A layer with its weight quantized, and its error in flag form of ``error_bits``."""
    x, w, g = (v[key] for key in inputs)
    settings: dict[str, Any] = {"stride": stride, "padding": PADDING} if w.dim() > 2 else {}
    want = twin(product, x.double(), w.double(), g.double(), error_bits)
    for backend in BACKENDS:
        scheme = authors(e2=f"flag{error_bits}", backend=backend, check=True)
        net = converted(nn.Sequential(layer_like(w, **settings)), scheme, x)
        got = through(net, x, w, g)
        for key, have, exact in zip(outputs, got, want, strict=True):
            same(f"{key}, {backend}", have, exact)
            close(v, key, have)
        with torch.no_grad():
            same(f"{outputs[0]} without gradients, {backend}", net(x), want.y)
        net[0].lowbit_error.gate.on = False
        close(v, outputs[0], net(x))  # of floats, as long as errors are not rounded


def twin(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, g: Tensor, bits: int) -> Results:
    x, w = x.requires_grad_(), w.requires_grad_()
    y = flag_gate(product(x, weight_of(w)), bits)
    return Results(y, *torch.autograd.grad(y, (x, w), g))


def through(net: Any, x: Tensor, w: Tensor, g: Tensor) -> Results:
    """Of a network that is one layer; its weights may have grown beyond +-1 since it was converted."""
    with torch.no_grad():
        net[0].weight.copy_(w)
    x = x.clone().requires_grad_()
    y = net(x)
    return Results(y, *torch.autograd.grad(y, (x, net[0].weight), g))


# -- the block -----------------------------------------------------------------------------------------------
class Passed(NamedTuple):
    """What passes through the block: forward, and back."""

    act: Tensor
    y: Tensor
    err_before_E1: Tensor
    grad_x: Tensor
    grad_gamma: Tensor
    grad_beta: Tensor
    grad_w_oihw: Tensor


def check_block(v: Comparison, bits: int) -> None:
    """BN, ReLU, A, E1, convolution, E2.

    An activation that a batch norm in float32 rounds to the other side of a tie is taken as the file has it, and so
    is the error before E1, once it was compared: what follows is then exact again.
    """
    tag, format = f"block_kx{bits}", norm_format(v, bits)
    x, gamma, beta = (v[key].double() for key in ("block_x", "block_gamma", "block_beta"))
    normed, mean, var = batch_norm(x, gamma, beta, format)
    allowed = allowance(x, mean, var, gamma, normed, format)
    least, most = (direct_quantize(F.relu(normed + sign * allowed.y), BITS) for sign in (-1, 1))
    given = v[f"{tag}_act"]

    def taken(act: Tensor) -> Tensor:
        return torch.where((given >= least) & (given <= most), given.to(act.dtype), act.detach())

    want = twin_of_block(v, tag, bits, taken)
    v.exact(f"{tag}_act", taken(want.act))
    turned = int((taken(want.act) != want.act).sum())
    if turned:
        v.notes.append(f"{tag}_act: {turned} of {given.numel()} a tie aside")
    for backend in BACKENDS:
        got = through_block(v, tag, authors(xhat_bits=bits, backend=backend, check=True), mean, var, taken)
        for name, have, exact in zip(Passed._fields, got, want, strict=True):
            same(f"{tag}_{name}, {backend}", have, exact)
    for name in ("y", "err_before_E1", "grad_beta", "grad_w_oihw"):
        close(v, f"{tag}_{name}", getattr(want, name))
    close(v, f"{tag}_grad_x", want.grad_x, allowed.slope * float(want.grad_x.abs().max()))
    error = v[f"{tag}_err_before_E1"].double().abs()
    close(v, f"{tag}_grad_gamma", want.grad_gamma, float(per_channel(error * allowed.xhat).max()))


def twin_of_block(v: Comparison, tag: str, bits: int, taken: Callable[[Tensor], Tensor]) -> Passed:
    names = ("block_x", "block_gamma", "block_beta", "conv_w_oihw")
    x, gamma, beta, w = (v[name].double().requires_grad_() for name in names)
    act = direct_quantize(F.relu(batch_norm(x, gamma, beta, norm_format(v, bits))[0]), BITS)
    gated = shift_gate(pass_through(act, taken(act)), BITS, clip_to_one=True)
    errors = replaced(gated, v[f"{tag}_err_before_E1"])
    y = flag_gate(conv(gated, weight_of(w)), BITS)
    dx, dgamma, dbeta, dw = torch.autograd.grad(y, (x, gamma, beta, w), v["conv_gout"].double())
    return Passed(act.detach(), y, errors[0], dx, dgamma, dbeta, dw)


def through_block(
    v: Comparison, tag: str, scheme: Any, mean: Tensor, var: Tensor, taken: Callable[[Tensor], Tensor]
) -> Passed:
    net: Any = Block(v["conv_w_oihw"], padding=PADDING)
    with torch.no_grad():
        for parameter, name in ((net.norm.weight, "gamma"), (net.norm.bias, "beta")):
            parameter.copy_(v[f"block_{name}"])
        net.norm.running_mean.copy_(mean)
        net.norm.running_var.copy_(var / 4)  # calibrates twice as wide as a training batch is,
        net.norm.num_batches_tracked.fill_(1)  # as a norm that has trained: a new one takes the batch's
    converted(net, scheme, v["block_x"])
    with torch.no_grad():
        net.conv.weight.copy_(v["conv_w_oihw"])
    acts: list[Tensor] = []
    errors: list[list[Tensor]] = []

    def between(module: nn.Module, args: Any, act: Tensor) -> Tensor:
        acts.append(act.detach())
        passed = pass_through(act, taken(act))
        errors.append(replaced(passed, v[f"{tag}_err_before_E1"]))
        return passed

    net.relu.register_forward_hook(between)
    x = v["block_x"].requires_grad_()
    y = net(x)
    wanted = (x, net.norm.weight, net.norm.bias, net.conv.weight)
    dx, dgamma, dbeta, dw = torch.autograd.grad(y, wanted, v["conv_gout"])
    return Passed(acts[0], y, errors[0][0], dx, dgamma, dbeta, dw)


def replaced(x: Tensor, given: Tensor) -> list[Tensor]:
    """Where the error that comes back to ``x`` will be found; ``given`` goes on in its place."""
    errors: list[Tensor] = []

    def keep(g: Tensor) -> Tensor:
        errors.append(g)
        return given.to(g.dtype)

    x.register_hook(keep)  # type: ignore[no-untyped-call]
    return errors
