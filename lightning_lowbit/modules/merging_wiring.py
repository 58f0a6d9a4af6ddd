"""Which layer computes which rectifier and quantizer together with itself, found in the data flow."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lowbit.errors import listed
from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.graph.units import others_read
from lightning_lowbit.modules.clipped import ClipQuantizer
from lightning_lowbit.modules.elementwise import LowBitReLU
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.merged import MergedBias
from lightning_lowbit.modules.merging import Group

if TYPE_CHECKING:
    from lightning_lowbit.graph.network import Call, Flow
    from lightning_lowbit.graph.plan import Plan
    from lightning_lowbit.graph.trace import CallKey

__all__ = ["group_layers"]


def group_layers(root: nn.Module, flow: Flow, plan: Plan) -> list[str]:
    """Give every converted layer its group.

    A quantizer belongs to a layer if nothing but its batch norm, a rectifier and identities stands between, and nobody
    else sees what stands there. Others (behind a sum, a pool, a dropout, in a layer that is called twice) quantize what
    reaches them.

    Returns:
        what a user should know: layers that read floats.
    """
    places = {(op.owner, op.key): op.path for op in plan.ops}
    calls: dict[str, list[Call]] = {}
    for call in flow.calls:
        if call.path is not None:
            calls.setdefault(call.path, []).append(call)
    floats = []
    for planned in plan.layers:
        layer = root.get_submodule(planned.path)
        assert isinstance(layer, LowBitLayer)
        layer.__dict__["group"] = group = Group()
        own = calls.get(planned.path, [])
        if len(own) == 1:
            _close(root, flow, own[0], planned.batch_norm, places, group)
        else:
            _fuse(group, _own_quantizer(root, planned.batch_norm or planned.path))
        if layer.input_grid is None:
            floats.append(planned.path)
            if isinstance(layer.lowbit_bias, MergedBias) and layer.lowbit_bias.rule == "int32":
                layer.lowbit_bias = None  # there is no grid of products
    _narrow(root, flow, plan, places)
    notes = _count_calls(root, flow, places)
    merged = {planned.batch_norm for planned in plan.layers}
    norms = [m for path, m in root.named_modules() if isinstance(m, _BatchNorm) and path not in merged]
    if plan.layers:
        root.get_submodule(plan.layers[0].path).__dict__["group"].norms = norms
    if floats:
        notes.append(f"no quantizer on what {listed(floats)} read{'s' * (len(floats) == 1)}")
    return notes


def _narrow(root: nn.Module, flow: Flow, plan: Plan, places: dict[tuple[str, CallKey], str]) -> None:
    """Mark what ends float64 sums: quantizers, and modules whose results are read by what knows one dtype alone."""
    layers = {planned.path for planned in plan.layers}
    like = root.get_submodule(plan.layers[0].path) if plan.layers else None
    for module in root.modules():
        if isinstance(module, ClipQuantizer):
            module.__dict__["like"] = like
    for call in flow.calls:
        path = places.get((call.owner, call.key), call.path if call.path in layers else None)
        if path is not None and others_read(call, flow, plan):
            root.get_submodule(path).__dict__["narrow"] = like


def _count_calls(root: nn.Module, flow: Flow, places: dict[tuple[str, CallKey], str]) -> list[str]:
    """Tell quantizers that stand in a part of the network that runs several times how often."""
    times = Counter(places.get((call.owner, call.key), call.path) for call in flow.calls)
    shared = {path: n for path, n in times.items() if path is not None and n > 1}
    for path, n in shared.items():
        for quantizer in root.get_submodule(path).children():
            if isinstance(quantizer, ClipQuantizer):
                quantizer.calls = n
    layers = [path for path in shared if isinstance(root.get_submodule(path), LowBitLayer)]
    return [f"{path} runs {shared[path]} times in a forward: its calls share one range" for path in layers]


def _close(
    root: nn.Module, flow: Flow, call: Call, norm: str | None, places: dict[tuple[str, CallKey], str], group: Group
) -> None:
    """Follow a layer's result to the quantizer that ends its group."""
    end = call
    while True:
        reader = end.readers[0] if len(end.readers) == 1 and end not in flow.exits else None
        if reader is None or not (
            reader.path == norm is not None or (reader.kind is Kind.KEEP and isinstance(reader.target, nn.Identity))
        ):
            break
        end = reader
    if reader is not None and reader.kind is Kind.RELU:
        rectifier = root.get_submodule(places[reader.owner, reader.key])
        assert isinstance(rectifier, LowBitReLU)
        _fuse(group, rectifier.lowbit_output, True, rectifier.six)
        return
    _fuse(group, _own_quantizer(root, norm or call.path or ""))


def _own_quantizer(root: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = getattr(root.get_submodule(path), "lowbit_output", None)
    return found


def _fuse(group: Group, quantizer: nn.Module | None, rectify: bool = False, six: bool = False) -> None:
    if isinstance(quantizer, ClipQuantizer):
        group.end, group.rectify, group.six, quantizer.fused = quantizer, rectify, six, True
