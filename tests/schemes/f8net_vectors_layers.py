"""F8Net's golden vectors of single layers: training steps without an optimizer, then evaluation and its integers."""

from __future__ import annotations

from typing import Any

import torch
from schemes.f8net_vectors_options import configuration, converted, input_of, scheme_of, set_alpha, set_fraclen
from schemes.vector_table import Comparison
from torch import Tensor, nn

from lightning_lowbit.export.fixed_point import integer_unit
from lightning_lowbit.modules.fixed_point import rescaling
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.modules.layers import LowBitLayer

__all__ = ["DOUBLE", "OWN_ALPHA", "check_layer", "check_linear", "compare_fraclen", "logit_scale"]

DOUBLE = 1e-9
FRACLEN = 1e-7  # the published code keeps moving fraclens in float32
OWN_ALPHA = 1e-10  # batch norm takes the scale of its input back: these gradients are rounding errors


class Toy(nn.Module):
    """The unit between layers that it is tied to; floating without a clip its rectifier is its own."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        inputs, outputs = cfg["cin"], cfg["cout"]
        self.before = nn.Identity() if cfg["weight_only"] else nn.Conv2d(inputs, inputs, 1)
        self.rectifier = nn.ReLU() if cfg.get("floating_wo_clip") else nn.Identity()
        self.conv = nn.Conv2d(inputs, outputs, cfg["k"], cfg["stride"], cfg["pad"], groups=cfg["groups"], bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.following = nn.Conv2d(outputs, 2, 1)
        self.end = nn.Conv2d(2, 2, 1)

    def unit(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(self.rectifier(x)))
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.end(self.following(self.unit(self.before(x))))
        return y


def toy_of(v: Comparison, **options: Any) -> Toy:
    cfg = configuration(v)
    net = Toy(cfg).double()
    converted(net, scheme_of(cfg, pixels=cfg["weight_only"], **options), v["t0_x"])
    with torch.no_grad():
        net.conv.weight.copy_(v["weight"])
        for name, value in {"weight": "gamma", "bias": "beta", "running_mean": "rm0", "running_var": "rv0"}.items():
            getattr(net.bn, name).copy_(v[value])
    for layer, alpha, fraclen in ((net.conv, "alpha", "fl0"), (net.following, "alpha_next", "fl_next")):
        source = layer.lowbit_input
        if isinstance(source, FraclenInput):
            source.set_signed(cfg["double_side"] and layer is net.conv)
            set_alpha(layer, v[alpha])
            if fraclen in v.arrays:
                set_fraclen(layer, v[fraclen])
    return net


def check_layer(v: Comparison) -> None:
    net = toy_of(v)
    steps = len(v.matching(r"t\d+_x"))
    net.train()
    for t in range(steps):
        train(v, net, f"t{t}")
    evaluate(v, net, "e_y_qbias")
    plain = toy_of(v, bias="float")
    plain.load_state_dict({k: value for k, value in net.state_dict().items() if "lowbit_bias" not in k}, strict=False)
    evaluate(v, plain, "e_y")
    check_evaluation(v, net)


def train(v: Comparison, net: Toy, step: str) -> None:
    net.zero_grad()
    x = v[f"{step}_x"].requires_grad_()
    y = net.unit(x)
    y.backward(v[f"{step}_go"])
    norm = net.bn
    results = {"y": y, "gx": x.grad, "gw": net.conv.weight.grad, "ggamma": norm.weight.grad, "gbeta": norm.bias.grad}
    for name, got in {**results, "rm": norm.running_mean, "rv": norm.running_var}.items():
        assert got is not None
        v.close(f"{step}_{name}", got, DOUBLE)
    for name, layer in (("galpha", net.conv), ("galpha_next", net.following)):
        alpha = layer.lowbit_input.alpha if isinstance(layer.lowbit_input, FraclenInput) else None
        grad = None if alpha is None else alpha.grad
        v.exact(f"{step}_{name}_none", float(grad is None))
        if grad is None:
            v.exact(f"{step}_{name}", torch.zeros(1))
        else:
            v.close(f"{step}_{name}", grad, DOUBLE, OWN_ALPHA)
    compare_fraclen(v, f"{step}_fl", "fl0", net.conv)


def compare_fraclen(v: Comparison, key: str, first: str, layer: nn.Module) -> None:
    """The moving average; the published code has one beside a fixed fraclen too, which stays as it was at ``first``."""
    if v.arrays[key].size == 0:  # floating: there is none
        v.exact(key, torch.empty(0))
    elif input_of(layer).fixed is None:
        v.close(key, input_of(layer).fraclen, FRACLEN)
    else:
        v.exact(key, v[first])


@torch.no_grad()
def evaluate(v: Comparison, net: Toy, key: str) -> None:
    net.eval()
    if key in v.arrays:
        v.close(key, net.unit(v["e_x"]), DOUBLE)


@torch.no_grad()
def check_evaluation(v: Comparison, net: Toy) -> None:
    layer = net.conv
    assert isinstance(layer, LowBitLayer)
    weight, bias = layer.in_evaluation()
    assert bias is not None
    results = {"e_float_weight": weight, "e_float_bias": bias}
    for key, reader in (("e_fix_scaling", layer), ("e_fix_scaling_next", net.following)):
        if key in v.arrays:
            unit = input_of(reader).unit()
            results[key] = torch.ones(()) if unit is None else unit
    for key in results.keys() & v.arrays.keys():
        v.close(key, results[key], DOUBLE)
    if layer.lowbit_weight is not None:
        layer.lowbit_weight(weight)
        v.exact("e_weight_fl", -layer.lowbit_weight.exponent())
    if "e_int_weight" in v.arrays:
        compare_integers(v, layer)


def compare_integers(v: Comparison, layer: nn.Module) -> None:
    assert isinstance(layer, LowBitLayer)
    integers = integer_unit(layer)
    assert integers.bias is not None
    v.exact("e_int_weight", integers.weight)
    v.exact("e_int_bias", integers.bias)
    v.exact("e_weight_fl", integers.fraclen_weight)


# -- linear --------------------------------------------------------------------------------------------------
def classifier_of(v: Comparison, **options: Any) -> nn.Module:
    cfg = configuration(v)
    outputs, inputs = v.arrays["weight"].shape
    net = nn.Sequential(nn.Linear(inputs, inputs), nn.Linear(inputs, outputs)).double()
    converted(net, scheme_of(cfg, **options), v["t0_x"])
    layer = net[1]
    with torch.no_grad():
        layer.weight.copy_(v["weight"])  # type: ignore[operator]
        layer.bias.copy_(v["bias"])  # type: ignore[operator]
    input_of(layer).set_signed(cfg["double_side"])
    set_alpha(layer, v["alpha"])
    set_fraclen(layer, v["fl0"])
    return layer


def check_linear(v: Comparison) -> None:
    cfg, layer = configuration(v), classifier_of(v)
    source = input_of(layer)
    for t in range(len(v.matching(r"t\d+_x"))):
        layer.zero_grad()
        source.zero_grad()
        x = v[f"t{t}_x"].requires_grad_()
        y = layer(x)
        y.backward(v[f"t{t}_go"])
        results = {"y": y, "gx": x.grad, "gw": layer.weight.grad, "gb": layer.bias.grad}
        if f"t{t}_galpha" in v.arrays:
            results["galpha"] = torch.zeros(1) if source.alpha is None else source.alpha.grad
        for name, got in results.items():
            v.close(f"t{t}_{name}", got, DOUBLE)
        compare_fraclen(v, f"t{t}_fl", "fl0", layer)
    plain = classifier_of(v, bias="float")
    plain.load_state_dict({k: value for k, value in layer.state_dict().items() if "lowbit_bias" not in k})
    with torch.no_grad():
        for key, net in (("e_y_qbias", layer), ("e_y", plain)):
            v.close(key, net.eval()(v["e_x"]) / logit_scale(net, cfg), DOUBLE)
        unit = source.unit()
        v.close("e_fix_scaling", torch.ones(()) if unit is None else unit, DOUBLE)
        compare_integers(v, layer)


def logit_scale(layer: nn.Module, cfg: dict[str, Any]) -> Tensor:
    """unit k: the published code leaves it out in evaluation, so that its logits are off by it."""
    assert isinstance(layer, LowBitLayer)
    assert layer.lowbit_weight is not None
    source, weight = input_of(layer), layer.weight
    kind = cfg.get("rescale_type", "constant") if cfg.get("rescale_forward", True) else "none"
    scale = rescaling(weight, layer.lowbit_weight(weight), kind)
    unit = source.unit()
    return scale if unit is None else scale * unit
