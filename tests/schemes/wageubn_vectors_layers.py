"""WAGEUBN's golden vectors of layers and of a block, composed of torch's layers and the package's quantizers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from schemes.vector_table import Comparison
from schemes.wageubn_vectors_norm import allowance, norm_format, per_channel
from torch import Tensor

from lightning_lowbit.kernels import int8_conv2d_input, int8_conv2d_weight
from lightning_lowbit.numerics.direct import direct_quantize, fixed_width_codes
from lightning_lowbit.numerics.error_gate import flag_gate, shift_gate
from lightning_lowbit.numerics.flag import flag_planes
from lightning_lowbit.numerics.normalize import batch_norm
from lightning_lowbit.numerics.through import pass_through

__all__ = ["check_layers"]

BITS, PADDING = 8, 1
RELATIVE, ABSOLUTE = 1e-5, 1e-6


def weight_of(w: Tensor) -> Tensor:
    """As a layer multiplies with it."""
    return direct_quantize(w, BITS, clipped=True)


def close(v: Comparison, key: str, got: Tensor, turned: float = 0.0) -> None:
    v.close(key, got, RELATIVE, ABSOLUTE + turned)


def check_layers(v: Comparison) -> None:
    for match in v.matching(r"(conv_E2k(\d+))_grad_x"):
        bits = int(match[2])
        check_product(v, conv(1), ("conv_x", "conv_w_oihw", "conv_gout"), "conv_y", match[1], "w_oihw", bits)
        if bits == BITS:
            check_integers(v, match[1], v["conv_gout"], 1)
    check_product(v, conv(2), ("conv_x", "conv_w_oihw", "conv_s2_gout"), "conv_s2_y", "conv_s2", "w_oihw", BITS)
    check_integers(v, "conv_s2", v["conv_s2_gout"], 2)
    check_product(v, F.linear, ("lin_x", "lin_w", "lin_gout"), "lin_y", "lin", "w", BITS)
    for match in v.matching(r"block_kx(\d+)_y"):
        check_block(v, int(match[1]))


def conv(stride: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: F.conv2d(x, w, stride=stride, padding=PADDING)


def check_product(
    v: Comparison,
    product: Callable[[Tensor, Tensor], Tensor],
    inputs: tuple[str, str, str],
    output: str,
    prefix: str,
    weight: str,
    bits: int,
) -> None:
    """A layer with its weight quantized, and its error in flag form of ``bits``."""
    x, w = (v[key].requires_grad_() for key in inputs[:2])
    y = flag_gate(product(x, weight_of(w)), bits)
    close(v, output, y)
    dx, dw = torch.autograd.grad(y, (x, w), v[inputs[2]])
    close(v, f"{prefix}_grad_x", dx)
    close(v, f"{prefix}_grad_{weight}", dw)


def check_integers(v: Comparison, prefix: str, error: Tensor, stride: int) -> None:
    """The products behind a convolution as those of int8 codes: of both planes of the error.

    The inputs go beyond 1, hence beyond int8 at this unit: they too are two planes.
    """
    x, w = v["conv_x"], v["conv_w_oihw"]
    codes = torch.round(x * 2.0 ** (BITS - 1)).to(torch.int16)
    low = ((codes + 128) % 256 - 128).to(torch.int8)
    high = ((codes - low) >> 8).to(torch.int8)
    weight = fixed_width_codes(w, BITS - 1, bits=BITS)
    planes = flag_planes(error, BITS)
    dx, dw = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(w, dtype=torch.float64)
    for plane, exponent in ((planes.big, planes.exponent_big), (planes.small, planes.exponent_small)):
        unit = torch.ldexp(torch.tensor(1.0, dtype=torch.float64), exponent - (BITS - 1))
        dx += unit * int8_conv2d_input(plane, weight, x.shape, stride=stride, padding=PADDING)
        for part, worth in ((low, 1), (high, 256)):
            dw += unit * worth * int8_conv2d_weight(part, plane, w.shape, stride=stride, padding=PADDING)
    close(v, f"{prefix}_grad_x", dx)
    close(v, f"{prefix}_grad_w_oihw", dw)


def check_block(v: Comparison, bits: int) -> None:
    """BN, ReLU, A, E1, convolution, E2.

    An activation that a batch norm in float32 rounds to the other side of a tie is taken as the file has it, and so
    is the error before E1, once it was compared: what follows is then exact again.
    """
    tag, format = f"block_kx{bits}", norm_format(v, bits)
    x, gamma, beta, w = (v[key].requires_grad_() for key in ("block_x", "block_gamma", "block_beta", "conv_w_oihw"))
    normed, mean, var = batch_norm(x, gamma, beta, format)
    allowed = allowance(x.detach(), mean, var, gamma.detach(), normed.detach(), format)
    act = direct_quantize(F.relu(normed), BITS)
    least, most = (direct_quantize(F.relu(normed.detach().double() + sign * allowed.y), BITS) for sign in (-1, 1))
    given = v[f"{tag}_act"]
    taken = torch.where((given >= least) & (given <= most), given, act.detach())
    v.exact(f"{tag}_act", taken)
    turned = int((taken != act.detach()).sum())
    if turned:
        v.notes.append(f"{tag}_act: {turned} of {act.numel()} a tie aside")
    gated = shift_gate(pass_through(act, taken), BITS, clip_to_one=True)
    errors: list[Tensor] = []

    def before(g: Tensor) -> Tensor:
        errors.append(g)
        return v[f"{tag}_err_before_E1"]

    gated.register_hook(before)  # type: ignore[no-untyped-call]
    y = flag_gate(F.conv2d(gated, weight_of(w), padding=PADDING), BITS)
    close(v, f"{tag}_y", y)
    dx, dgamma, dbeta, dw = torch.autograd.grad(y, (x, gamma, beta, w), v["conv_gout"])
    close(v, f"{tag}_err_before_E1", errors[0])
    close(v, f"{tag}_grad_x", dx, allowed.slope * float(dx.abs().max()))
    error = v[f"{tag}_err_before_E1"].double().abs()
    close(v, f"{tag}_grad_gamma", dgamma, float(per_channel(error * allowed.xhat).max()))
    close(v, f"{tag}_grad_beta", dbeta)
    close(v, f"{tag}_grad_w_oihw", dw)
