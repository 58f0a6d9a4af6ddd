"""WAGEUBN's golden vectors of the other published implementation: its formats, composed of the package's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from schemes.vector_table import Comparison
from schemes.wageubn_vectors_quantizers import gradient
from torch import Tensor

from lightning_lowbit.numerics.constant import constant_quantize
from lightning_lowbit.numerics.direct import direct_quantize, fixed_width_values
from lightning_lowbit.numerics.shift import shift_quantize
from lightning_lowbit.numerics.ste import gate_backward

__all__ = ["check_package"]

RELATIVE = 1e-5
EPS = 1e-5
INPUT_SCALE = 4.0  # of x before a ReLU

Quantizer = Callable[[Tensor, int, int], Tensor]


def unit_only(x: Tensor, dec: int, total: int) -> Tensor:
    """The unit of ``dec`` bits, and as many bits in all as a value needs."""
    return direct_quantize(x, dec)


def clipped(x: Tensor, dec: int, total: int) -> Tensor:
    """The unit of ``dec`` bits, ``total`` in all."""
    return fixed_width_values(x, dec - 1, bits=total)


def untouched(x: Tensor, dec: int, total: int) -> Tensor:
    return x


QUANTIZERS: dict[str, Quantizer] = {"0": unit_only, "1": clipped}


def check_package(v: Comparison) -> None:
    for match in v.matching(r"(direct_k(\d+))_y"):
        compare(v, match[1], lambda x, k=int(match[2]): direct_quantize(x, k))  # type: ignore[misc]
    for match in v.matching(r"(alldirect_dec(\d+)_all(\d+))_y"):
        compare(v, match[1], lambda x, d=int(match[2]), a=int(match[3]): clipped(x, d, a))  # type: ignore[misc]
    for match in v.matching(r"(shift_k(\d+))_y"):
        compare(v, match[1], lambda x, k=int(match[2]): shift_quantize(x, k)[0])  # type: ignore[misc]
    check_gradients(v)
    for strict, quantize in QUANTIZERS.items():
        check_conv(v, strict, quantize)
        check_norm(v, strict, quantize)
        for name, rectify in (("relu", F.relu), ("relu6", F.relu6)):
            check_relu(v, f"{name}_iostrict{strict}", rectify, quantize, strict)


def compare(v: Comparison, prefix: str, fn: Callable[[Tensor], Tensor]) -> None:
    y, dx = gradient(fn, v["x"], v["gout"])
    v.exact(f"{prefix}_y", y)
    v.exact(f"{prefix}_grad_x", dx)


def check_gradients(v: Comparison) -> None:
    """Every product of the gradient with its range is whole, so no draw matters; dr is given as bits."""
    grad = v["grad_int"]
    for draws in (torch.zeros_like(grad), torch.full_like(grad, 0.75), None):
        for match in v.matching(r"const_dr(\d+)_k(\d+)_y"):
            v.exact(match[0], constant_quantize(grad, draws, dr=1 << (int(match[1]) - 1), bits=int(match[2]))[0])
        for match in v.matching(r"gwquant_gw(\d+)_dr(\d+)_grad_x"):
            bits, dr = int(match[1]), 1 << (int(match[2]) - 1)

            def constant(g: Tensor, dr: int = dr, bits: int = bits, draws: Tensor | None = draws) -> Tensor:
                return constant_quantize(g, draws, dr=dr, bits=bits)[0]

            v.exact(match[0], gradient(lambda x, q=constant: gate_backward(x, q), v["x"], grad)[1])  # type: ignore[misc]
    for match in v.matching(r"gbnquant_k(\d+)_grad_x"):

        def direct(g: Tensor, bits: int = int(match[1])) -> Tensor:
            return direct_quantize(g, bits)

        v.exact(match[0], gradient(lambda x, q=direct: gate_backward(x, q), v["x"], v["gout"])[1])  # type: ignore[misc]


def check_conv(v: Comparison, strict: str, quantize: Quantizer) -> None:
    around = quantize if strict == "1" else untouched
    x, w, b = (v[f"conv_{name}"].requires_grad_() for name in "xwb")
    size = w.shape[-1]
    padding = (v["conv_gout"].shape[-1] - x.shape[-1] + size - 1) // 2
    y = around(F.conv2d(around(x, 6, 8), quantize(w, 8, 8), quantize(b, 8, 16), padding=padding), 6, 10)
    results = (y, *torch.autograd.grad(y, (x, w, b), v["conv_gout"]))
    for name, result in zip(("y", "grad_x", "grad_w", "grad_b"), results, strict=True):
        v.close(f"conv_iostrict{strict}_{name}", result, RELATIVE)


def check_norm(v: Comparison, strict: str, quantize: Quantizer) -> None:
    """By running statistics; the output is put on its grid in either case."""
    around = quantize if strict == "1" else untouched
    x, gamma, beta = (v[f"bn_{name}"].requires_grad_() for name in ("x", "gamma", "beta"))
    mean, var = (quantize(v[f"bn_{name}"], 8, 10) for name in ("mean", "var"))
    y = F.batch_norm(around(x, 6, 10), mean, var, quantize(gamma, 8, 10), quantize(beta, 8, 10), eps=EPS)
    y = quantize(y, 6, 10)
    results = (y, *torch.autograd.grad(y, (x, gamma, beta), v["bn_gout"]))
    for name, result in zip(("y", "grad_x", "grad_gamma", "grad_beta"), results, strict=True):
        v.close(f"bn_eval_iostrict{strict}_{name}", result, RELATIVE)


def check_relu(
    v: Comparison, prefix: str, rectify: Callable[[Tensor], Tensor], quantize: Quantizer, strict: str
) -> None:
    around = quantize if strict == "1" else untouched
    y, dx = gradient(lambda x: quantize(rectify(around(x, 6, 8)), 6, 8), INPUT_SCALE * v["x"], v["gout"])
    v.exact(f"{prefix}_y", y)
    v.exact(f"{prefix}_grad_x", dx)
