"""Which layer computes which rectifier and quantizer together with itself, found in the data flow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lowbit.graph.ops import Kind
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

_NAMED = 8  # layers that one note names


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
        if layer.input_grid is None:
            floats.append(planned.path)
            if isinstance(layer.lowbit_bias, MergedBias) and layer.lowbit_bias.rule == "int32":
                layer.lowbit_bias = None  # there is no grid of products
    merged = {planned.batch_norm for planned in plan.layers}
    norms = [m for path, m in root.named_modules() if isinstance(m, _BatchNorm) and path not in merged]
    if plan.layers:
        root.get_submodule(plan.layers[0].path).__dict__["group"].norms = norms
    if not floats:
        return []
    more = f" and {len(floats) - _NAMED} more" if len(floats) > _NAMED else ""
    return [f"no quantizer on what {', '.join(floats[:_NAMED])}{more} read{'s' * (len(floats) == 1)}"]


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
        _fuse(group, rectifier.lowbit_output, rectifier.six)
        return
    last = norm if norm is not None else call.path
    _fuse(group, getattr(root.get_submodule(last or ""), "lowbit_output", None))


def _fuse(group: Group, quantizer: nn.Module | None, six: bool = False) -> None:
    if isinstance(quantizer, ClipQuantizer):
        group.end, group.six, quantizer.fused = quantizer, six, True
