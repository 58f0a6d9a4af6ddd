"""F8Net's golden vectors of integer networks: every layer's codes and sums, block results, logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import torch
from schemes.f8net_vectors_integers import Fixed, Products, integer_network
from schemes.f8net_vectors_models import (
    SINGLE,
    Model,
    check_evaluation,
    check_training,
    evaluated,
    published_logits,
)
from schemes.f8net_vectors_nets import Net, network
from schemes.f8net_vectors_options import input_of
from schemes.vector_table import Comparison
from torch import Tensor, nn

from lightning_lowbit.export.fixed_point import IntegerUnit, integer_unit
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import on

__all__ = ["check_model"]

TIE = 5e-3  # of a code: float32 leaves open to which side a value this near to a tie falls


def check_model(v: Comparison) -> None:
    check_training(v)
    model = evaluated(v)
    check_evaluation(v, model)
    check_integers(v, model)


@torch.no_grad()
def check_integers(v: Comparison, model: Model) -> None:
    flags = model.cfg["flags"]
    paths = [path for path, m in model.net.named_modules() if isinstance(m, LowBitLayer)]
    assert [stored_name(path) for path in paths] == json.loads(str(v.arrays["int/order"]))
    simulated = published_logits(model)  # runs the mean, so that its factor is known
    plain = {path: integer_unit(model.net.get_submodule(path)) for path in paths}  # type: ignore[arg-type]
    last = before_pool(model.net)
    published = {**plain, last: fused(model, last)} if flags["pool_fusing"] else dict(plain)
    ties = sum([settle(v, path, published) for path in paths])
    own = Deployed(v, model, {**published, last: plain[last]} if flags["pool_fusing"] else published).logits
    v.exact("eval/logits_qbias", own)
    if ties == 0:
        torch.testing.assert_close(simulated, own.float(), rtol=0, atol=SINGLE * float(own.abs().max()))
    deployed = Deployed(v, model, published)
    compare_run(v, deployed)
    # With pool fusing the published integer network is not the one that it evaluates; nor is it the one whose integers
    # it keeps in floats, where nobody reads the factor that it leaves on a block.
    assert flags["pool_fusing"] != torch.equal(deployed.logits, own)
    in_floats = deployed.logits if "tail.0" in model.units else own
    v.exact("eval/logits_int_infer", in_floats)
    v.exact("int/logits_integize_float", deployed.result.data)


def stored_name(path: str) -> str:
    """Of a layer in the file: there a body counts its rectifiers too.

    >>> stored_name("stage_0_layer_1.body.1.conv"), stored_name("head.0.conv"), stored_name("classifier.0")
    ('stage_0_layer_1.body.2', 'head.0', 'classifier.0')
    """
    name = path.removesuffix(".conv")
    owner, body, index = name.rpartition(".body.")
    return f"{owner}{body}{2 * int(index)}" if body else name


# -- units ---------------------------------------------------------------------------------------------------
def before_pool(net: Net) -> str:
    """The layer that the published code gives the factor of the mean to."""
    if len(net.tail):
        return "tail.0.conv"
    block = net.blocks[-1]
    return f"{block}.body.{len(net.get_submodule(block).body) - 1}.conv"  # type: ignore[arg-type]


def fused(model: Model, path: str) -> IntegerUnit:
    """Pool fusing as published: 2^p / k^2 on weight and bias of the last layer before the mean, not on a skip."""
    layer = model.net.get_submodule(path)
    assert isinstance(layer, LowBitLayer)
    input_of(layer).__dict__["mean"] = model.net.pool
    unit = integer_unit(layer)
    bias = layer.in_evaluation()[1]
    assert bias is not None
    bias = on(layer.lowbit_bias, bias * model.net.pool.__dict__["factor"])
    return replace(unit, bias=(bias.double() * 2.0**unit.label).to(torch.int32))


def settle(v: Comparison, path: str, units: dict[str, IntegerUnit]) -> int:
    """Compare a layer's integers; where a tie was open, go on with the stored ones.

    Returns:
        How many ties were open.
    """
    unit, key = units[path], f"int/{stored_name(path)}"
    v.exact(f"{key}/input_fl", unit.fraclen_in)
    v.exact(f"{key}/weight_fl", unit.fraclen_weight)
    v.exact(f"{key}/signed", float(unit.signed))
    assert unit.bias is not None
    weight, bias = v[f"{key}/weight"], v[f"{key}/bias"]
    open_ties = int((weight != unit.weight).sum() + (bias != unit.bias).sum())
    if open_ties:
        precise = exact_codes(v, path, unit)
        for name, got, want, exact in (
            ("weight", unit.weight, weight, precise[0]),
            ("bias", unit.bias, bias, precise[1]),
        ):
            near = (exact - exact.floor() - 0.5).abs() < TIE
            v.exact(f"{key}/{name}", torch.where(near & ((got - want).abs() == 1), want, got))
        v.notes.append(f"{key}: {open_ties} open ties")
    else:
        v.exact(f"{key}/weight", unit.weight)
        v.exact(f"{key}/bias", unit.bias)
    units[path] = replace(unit, weight=weight.to(torch.int8), bias=bias.to(torch.int32))
    return open_ties


def exact_codes(v: Comparison, path: str, unit: IntegerUnit) -> tuple[Tensor, Tensor]:
    """Weight and bias in codes, computed in float64 and not rounded."""
    model = evaluated(v, torch.float64)
    published_logits(model)
    layer = model.net.get_submodule(path)
    assert isinstance(layer, LowBitLayer)
    weight, bias = layer.in_evaluation()
    assert bias is not None
    if unit.scale is not None:
        assert layer.bias is not None
        weight, bias = layer.weight, layer.bias.div(unit.scale)
    elif model.cfg["flags"]["pool_fusing"] and path == before_pool(model.net):
        factor = model.net.pool.__dict__["factor"]
        weight, bias = (weight if "tail.0" in model.units else weight * factor), bias * factor
    return weight * 2.0**unit.fraclen_weight, bias * 2.0**unit.label


# -- running -------------------------------------------------------------------------------------------------
class Deployed:
    """A run of the toy on integers.

    Attributes:
        result: the classifier's sums.
        layers: with what they read and gave, by path.
        blocks: their results.
    """

    def __init__(self, v: Comparison, model: Model, units: dict[str, IntegerUnit]) -> None:
        toy = network(model.cfg)
        self.layers: dict[str, Products] = integer_network(toy, units, model.cfg["flags"]["quant_avgpool"])
        self.blocks: dict[str, Fixed] = {}
        for name in toy.blocks:
            toy.get_submodule(name).register_forward_hook(self._keep(name))
        self.result: Fixed = toy(v["eval/x"])

    def _keep(self, name: str) -> Callable[[nn.Module, object, Fixed], None]:
        def hook(module: nn.Module, args: object, result: Fixed) -> None:
            self.blocks[name] = result

        return hook

    @property
    def logits(self) -> Tensor:
        return self.result.data.double() * 2.0**-self.result.label


def compare_run(v: Comparison, deployed: Deployed) -> None:
    v.exact("int/x", deployed.layers["head.0.conv"].read)
    for path, layer in deployed.layers.items():
        v.exact(f"int/{stored_name(path)}/in", layer.read)
        v.exact(f"int/{stored_name(path)}/out", layer.gave)
    for match in v.matching(r"int/block/(.*)/out"):
        v.exact(match[0], deployed.blocks[match[1]].data)
        v.exact(f"{match[0]}_fl", deployed.blocks[match[1]].label)
    v.exact("int/logits", deployed.result.data)
    v.exact("int/logits_fl", deployed.result.label)
