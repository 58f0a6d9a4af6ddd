"""WAGEUBN's golden vectors of the other published implementation: its formats, composed of the package's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from schemes.vector_table import Comparison
from schemes.wageubn_vectors_nets import BACKENDS, converted, layer_like, same
from schemes.wageubn_vectors_quantizers import gradient
from torch import Tensor, nn

from lightning_lowbit.numerics.constant import constant_quantize
from lightning_lowbit.numerics.direct import direct_quantize, fixed_width_values
from lightning_lowbit.numerics.shift import shift_quantize
from lightning_lowbit.numerics.ste import gate_backward
from lightning_lowbit.numerics.widths import Format, integer_bits_of_max
from lightning_lowbit.schemes.wageubn import Wageubn

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
        (check_network_strictly if strict == "1" else check_network)(v)
        check_norm(v, strict, quantize)
        for name, rectify in (("relu", F.relu), ("relu6", F.relu6)):
            check_relu(v, f"{name}_iostrict{strict}", rectify, quantize, strict)
            check_relu_in_network(v, name, strict)


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
    y = around(F.conv2d(around(x, 6, 8), quantize(w, 8, 8), quantize(b, 8, 16), padding=padding(v)), 6, 10)
    results = (y, *torch.autograd.grad(y, (x, w, b), v["conv_gout"]))
    for name, result in zip(("y", "grad_x", "grad_w", "grad_b"), results, strict=True):
        v.close(f"conv_iostrict{strict}_{name}", result, RELATIVE)


def padding(v: Comparison) -> int:
    return int(v["conv_gout"].shape[-1] - v["conv_x"].shape[-1] + v["conv_w"].shape[-1] - 1) // 2


def package(**options: Any) -> Wageubn:
    return Wageubn(preset="pypi", **options)


def conv_in_network(v: Comparison, scheme: Wageubn, example: Tensor, *before: nn.Module) -> Any:
    """The convolution behind ``before``, converted with weights in +-1, then with the file's."""
    w, b = v["conv_w"], v["conv_b"]
    layer = layer_like(w, bias=True, padding=padding(v))
    net = nn.Sequential(*before, layer)
    with torch.no_grad():
        layer.weight.copy_(clipped(w, 8, 8))
        layer.bias.copy_(b)
        converted(net, scheme, example)
        layer.weight.copy_(w)
    return net


def run(v: Comparison, net: Any) -> list[Tensor]:
    x = v["conv_x"].requires_grad_()
    y = net(x)
    return [y, *torch.autograd.grad(y, (x, net[-1].weight, net[-1].bias), v["conv_gout"])]


def check_network(v: Comparison) -> None:
    """Weights and biases alone are quantized: the input has no grid yet; with one of 16 bits, integers are multiplied.

    The package's weights have no end in this form, those of a network always: larger ones are another computation.
    """
    x, w, b = (v[f"conv_{name}"] for name in "xwb")
    if not torch.equal(unit_only(w, 8, 8), clipped(w, 8, 8)):
        v.notes.append("conv_iostrict0: weights beyond 1, not run through a network")
        return
    wide = Format(16, int(integer_bits_of_max(x.abs().max(), 16)))
    codes = fixed_width_values(x.double(), wide.fraction, bits=wide.total)
    sums = F.conv2d(codes, clipped(w.double(), 8, 8), padding=padding(v))
    exact = sums.float() + unit_only(b, 8, 16).reshape(-1, 1, 1)
    for backend in BACKENDS:
        form = {"act_format": (wide.total, wide.integer)}
        net = conv_in_network(v, package(io="none", overrides={"0": form}, backend=backend), x)
        with torch.no_grad():
            same(f"conv_iostrict0_y of 16 bits, {backend}", net(x), exact)
        net[0].lowbit_input.set_ready(False)
        for name, result in zip(("y", "grad_x", "grad_w", "grad_b"), run(v, net), strict=True):
            v.close(f"conv_iostrict0_{name}", result, RELATIVE)


def check_network_strictly(v: Comparison) -> None:
    """The input on the grid of a pool over single values, the result on that of the layer.

    A network's layer rounds its sums to 16 bits before, the package does not: where those are a tie of the result's
    grid, it may round the other way.
    """
    scheme = package(overrides={"0": {"act_format": (8, 2)}, "1": {"act_format": (10, 4)}})
    net = conv_in_network(v, scheme, 2 * v["conv_x"], nn.AvgPool2d(1))
    y, *gradients = run(v, net)
    for name, result in zip(("grad_x", "grad_w", "grad_b"), gradients, strict=True):
        v.close(f"conv_iostrict1_{name}", result, RELATIVE)
    x, w, b = (v[f"conv_{name}"].double() for name in "xwb")
    sums = F.conv2d(clipped(x, 6, 8), clipped(w, 8, 8), clipped(b, 8, 16), padding=padding(v))
    format = net[1].lowbit_accumulator.format
    same("conv_iostrict1_y", y, clipped(fixed_width_values(sums, format.fraction, bits=format.total), 6, 10))
    least, most = (clipped(sums + sign * format.step / 2, 6, 10) for sign in (-1, 1))
    given = v["conv_iostrict1_y"]
    v.exact("conv_iostrict1_y", torch.where((given >= least) & (given <= most) & (y >= least) & (y <= most), given, y))


def check_relu_in_network(v: Comparison, name: str, strict: str) -> None:
    """Without a width of the input, as many bits as the values need; with one, a layer before has it for its result."""
    x = (INPUT_SCALE * v["x"]).reshape(1, 1, -1)
    relu = {"relu": nn.ReLU, "relu6": nn.ReLU6}[name]()
    if strict == "1":
        scheme = package(weight_range="fit", overrides={"[01]": {"act_format": (8, 2)}})
        identity = nn.Conv1d(1, 1, 1, bias=False)
        nn.init.ones_(identity.weight)
        net = nn.Sequential(identity, relu, nn.Linear(x.numel(), 1))
    else:
        scheme = package(io="outputs", act_format="fixed_unit", act_bits=6)
        net = nn.Sequential(relu, nn.Linear(x.numel(), 1))
    converted(net, scheme, x)
    y, dx = gradient(net[:-1], x, v["gout"].reshape(x.shape))
    for key, result in (("y", y), ("grad_x", dx)):
        v.exact(f"{name}_iostrict{strict}_{key}", result.reshape(v["x"].shape))


# A network's batch norm has no counterpart there, whatever the preset: it rounds the deviation, not the variance, adds
# its small number to that, and trains by the statistics of the batch. So that stays a comparison of formats.
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
