"""Compact checkpoints: weights as the codes that evaluation multiplies with, everything else as it is.

A weight on a grid is int8 or int16 codes times a step, a binary one a bit. What a batch norm or a unit did to the float
weight is part of its codes, so the norm becomes the identity and the merged bias. Every layer is tried on a copy:
where evaluation would not multiply by the very same numbers, the float weight and its norm stay.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError, InvariantError, listed
from lightning_lowbit.graph.fold import per_output
from lightning_lowbit.kernels import pack_signs
from lightning_lowbit.kernels.words import unpack_signs
from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.binary import LatentSign
from lightning_lowbit.modules.block import WeightCodes
from lightning_lowbit.modules.fixed_point_operands import FraclenWeight
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.merged import MergedWeight
from lightning_lowbit.modules.quantizer import on
from lightning_lowbit.modules.running import RunningRange
from lightning_lowbit.modules.stored import StoredWeight
from lightning_lowbit.modules.thresholds import ThresholdQuantizer
from lightning_lowbit.numerics.binary import channel_mean
from lightning_lowbit.numerics.exponent import pow2

__all__ = ["Compact", "compact", "expand"]

_DIRECT = (WeightCodes, StoredWeight, RunningRange, LatentSign)  # of the layer's own weight
_MERGED = (ThresholdQuantizer, MergedWeight, FraclenWeight)  # of the weight with norm and units merged
_DTYPES = {8: torch.int8, 16: torch.int16}
_JOINED = "lowbit."


@dataclass(frozen=True)
class Compact:
    """What a compact file holds of a network.

    Attributes:
        state: all tensors of a type, end to end, as ``lowbit.<type>``.
        table: plain types that say how to read it. "tensors": by type and, part by part of its key, how many numbers a
            tensor takes (one where all are equal) and its shape. "codes": by key, the bits of a code (1: int64 words of
            64 signs) and the shape of a weight that is code * scale; its step is the tensor ``key:scale``, and
            ``key:index`` with ``key:value`` are floats that stand in it as they are.
        coded: paths of the layers whose weights are codes.
        kept: paths of the others, and why their weights stay floats.
    """

    state: dict[str, Tensor]
    table: dict[str, Any]
    coded: tuple[str, ...]
    kept: dict[str, str]

    def __str__(self) -> str:
        said = f"weights of {len(self.coded)} layers as codes"
        reasons = [f"{path} ({why})" for path, why in self.kept.items()]
        return f"{said}; as floats: {listed(reasons)}" if reasons else said


@torch.no_grad()
def compact(module: nn.Module) -> Compact:
    """The state of a trained network from which its evaluation is the same bit for bit; ``module`` is left alone.

    Training does not go on from it: latent weights, batch norms and the states of optimizers are gone.

    Raises:
        ConfigError: the module is not converted, or its quantizers were never calibrated.
    """
    if not switch_of(module).started:
        raise ConfigError(
            f"{type(module).__name__}: converted and neither trained nor calibrated, so that there are no codes yet. "
            "Train it with QuantCallback, or evaluate it once in a Trainer."
        )
    root = copy.deepcopy(module).eval()
    uses, norms = _uses(root)
    layers = [layer for layer in root.modules() if isinstance(layer, LowBitLayer)]
    before = {layer.path: _operands(layer) for layer in layers}
    tensors, codes, kept = dict(root.state_dict()), {}, {}
    for layer in layers:
        why = _why_float(layer, uses, norms)
        found = None if why else _coded(layer, before[layer.path])
        if found is None:
            kept[layer.path] = why or "evaluation would choose another grid for the codes than it chose for the floats"
        else:
            key = f"{layer.path}.weight".lstrip(".")
            codes[key] = {"bits": found.bits, "shape": list(layer.weight.shape)}
            tensors |= {key: found.codes, f"{key}:scale": found.scale}
            if found.index is not None and found.value is not None:
                tensors |= {f"{key}:index": found.index, f"{key}:value": found.value}
    for layer in layers:
        if not _same(before[layer.path], _operands(layer)):
            raise InvariantError(f"{layer.path}: compact weights elsewhere have changed its own. Please report this.")
    state, tree = _joined(tensors)
    coded = tuple(layer.path for layer in layers if layer.path not in kept)
    return Compact(state, {"tensors": tree, "codes": codes}, coded, kept)


def expand(state: dict[str, Any], table: Mapping[str, Any]) -> None:
    """Turn what `compact` made into the state dict of the converted network, in place, with floats for codes.

    Raises:
        ConfigError: tensors are missing, or of another shape or type than the table says.
    """
    _part(state, table["tensors"])
    for key, entry in table["codes"].items():
        shape, bits = tuple(entry["shape"]), entry["bits"]
        count, scale = torch.Size(shape).numel(), state.pop(f"{key}:scale", None)
        dtype, wanted = (torch.int64, (-(-count // 64),)) if bits == 1 else (_DTYPES[bits], shape)
        codes = state.get(key)
        if scale is None or codes is None or (codes.dtype, tuple(codes.shape)) != (dtype, wanted):
            raise _damaged(f"{key}: no scale, or no codes {wanted} of type {dtype}")
        numbers = unpack_signs(codes.contiguous(), count).reshape(shape) if bits == 1 else codes
        weight = numbers.to(scale.dtype) * scale
        if f"{key}:index" in state:
            weight.view(-1)[state.pop(f"{key}:index")] = state.pop(f"{key}:value")
        state[key] = weight


# -- many tensors in a few -----------------------------------------------------------------------------------------
def _joined(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors end to end, and what tells them apart: a file has some hundred bytes for each that it holds.

    >>> state, tree = _joined({"a.b": torch.ones(2, 3), "d": torch.tensor(7.0), "a.c": torch.arange(2.0)})
    >>> state, tree
    ({'lowbit.float32': tensor([1., 0., 1., 7.])}, {'float32': {'a': {'b': [1, 2, 3], 'c': [2, 2]}, 'd': [1]}})
    >>> _part(state, tree)
    >>> {key: value.tolist() for key, value in state.items()}
    {'a.b': [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], 'a.c': [0.0, 1.0], 'd': 7.0}
    """
    numbers_of: dict[str, Tensor] = {}
    tree: dict[str, Any] = {}
    for key, value in tensors.items():
        numbers, dtype = value.detach().cpu().reshape(-1), str(value.dtype).removeprefix("torch.")
        if numbers.numel() > 1 and bool((numbers == numbers[0]).all()):
            numbers = numbers[:1]
        numbers_of[key] = numbers
        *parents, name = map(sys.intern, key.split("."))  # pickle writes one object once
        node = tree.setdefault(dtype, {})
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = [numbers.numel(), *value.shape]
    flat = {dtype: torch.cat([numbers_of[key] for key, _ in _leaves("", node)]) for dtype, node in tree.items()}
    return {f"{_JOINED}{dtype}": value for dtype, value in flat.items()}, tree


def _part(state: dict[str, Any], tree: Mapping[str, Any]) -> None:
    """The way back, in place."""
    for dtype, node in tree.items():
        flat = state.pop(f"{_JOINED}{dtype}", None)
        leaves = list(_leaves("", node))
        sizes = [leaf[0] for _, leaf in leaves]
        if not isinstance(flat, Tensor) or flat.numel() != sum(sizes):
            raise _damaged(f"no {sum(sizes)} numbers of type {dtype}")
        for (key, leaf), part in zip(leaves, torch.split(flat, sizes), strict=True):
            state[key] = part.reshape(leaf[1:]) if leaf[0] == torch.Size(leaf[1:]).numel() else part.expand(leaf[1:])


def _leaves(prefix: str, node: Mapping[str, Any]) -> Iterator[tuple[str, list[int]]]:
    for name, child in node.items():
        if isinstance(child, Mapping):
            yield from _leaves(f"{prefix}{name}.", child)
        else:
            yield prefix + name, child


def _damaged(what: str) -> ConfigError:
    return ConfigError(f"compact checkpoint: damaged, {what}. Save it again with lightning_lowbit.save_compact.")


# -- one layer ---------------------------------------------------------------------------------------------------
def _operands(layer: Any) -> list[Tensor | None]:
    """All that evaluation takes from a layer's parameters and its norm's: weight, bias, and the weight's step."""
    quantizer = layer.lowbit_weight
    weight, bias = layer.in_evaluation() if isinstance(quantizer, _MERGED) else (layer.weight, layer.bias)
    values = on(quantizer, weight)
    bias = bias if bias is None else on(layer.lowbit_bias, bias)
    known = isinstance(quantizer, _MERGED + _DIRECT) and quantizer.ready
    step = _step(layer, layer.weight) if known else None
    gain = quantizer.gain if isinstance(quantizer, LatentSign) else None
    return [None if found is None else found.clone() for found in (values, bias, step, gain)]


def _same(a: Iterable[Tensor | None], b: Iterable[Tensor | None]) -> bool:
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(a, b, strict=True))


def _step(layer: Any, weight: Tensor) -> Tensor:
    """What a code is worth, 0-dim or shaped to multiply the weight; behind ``on``, which may have set it."""
    quantizer = layer.lowbit_weight
    if isinstance(quantizer, LatentSign):
        sizes = {"none": weight.new_ones(()), "max": weight.abs().amax(), "channel_mean": channel_mean(weight)}
        return sizes[quantizer.scaling]
    if isinstance(quantizer, MergedWeight):
        return quantizer.scale(*layer.in_evaluation()).reciprocal()
    step = pow2(quantizer.exponent(), weight.dtype)
    return step if step.dim() == 0 else per_output(step, weight, layer.out_axis, layer.groups)


def _uses(root: nn.Module) -> tuple[dict[int, int], dict[int, int]]:
    """How many modules hold a parameter, and how many layers have merged a norm, by id."""
    parameters: dict[int, int] = {}
    norms: dict[int, int] = {}
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            parameters[id(parameter)] = parameters.get(id(parameter), 0) + 1
        norm = getattr(module, "norm", None) if isinstance(module, LowBitLayer) else None
        if norm is not None:
            norms[id(norm)] = norms.get(id(norm), 0) + 1
    return parameters, norms


def _why_float(layer: LowBitLayer, uses: dict[int, int], norms: dict[int, int]) -> str | None:
    """Why a layer's weights cannot be codes; None where they may be."""
    quantizer, source = layer.lowbit_weight, layer.lowbit_input
    if not isinstance(quantizer, _MERGED + _DIRECT):
        return "its weights are on no grid" if quantizer is None else f"no compact form of {type(quantizer).__name__}"
    if not quantizer.ready:
        return "its weights are on no grid yet"
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "its weights are computed from other parameters"
    shared = uses[id(layer.weight)] > 1 or (layer.norm is not None and norms[id(layer.norm)] > 1)
    if shared:
        return "it shares parameters with another module"
    if isinstance(source, FraclenInput) and source.ready and not source.absorbs:
        return "the factor on its sums follows from the float weights"
    if isinstance(source, FraclenInput) and source.__dict__["mean"] is not None:
        return "its weights make up for a mean by a shift"
    return None


@dataclass(frozen=True)
class _Coded:
    """A weight: codes (words of signs where bits is 1) times scale, but for the floats ``value`` at ``index``."""

    bits: int
    codes: Tensor
    scale: Tensor
    index: Tensor | None
    value: Tensor | None


def _coded(layer: Any, before: list[Tensor | None]) -> _Coded | None:
    """A weight as codes and how to read them, and the layer so that they serve it; None, and nothing changed."""
    kept = {key: value.clone() for key, value in _own_state(layer).items()}
    values, quantizer = before[0], layer.lowbit_weight
    assert values is not None
    step = _step(layer, layer.weight)
    merged = layer.in_evaluation()[0].clone() if isinstance(quantizer, _MERGED) else layer.weight.clone()
    codes = torch.round(values / (1.0 if isinstance(quantizer, LatentSign) else step))
    if isinstance(quantizer, _MERGED):
        _unmerge(layer)
        layer.weight.fill_(1.0)
        factor = layer.in_evaluation()[0]  # of units: of 1 there is no other
        step = step / (factor.amax() if bool(factor.amin() == factor.amax()) else factor)
    index = None
    while True:
        weight = codes * step
        if index is not None:
            weight.view(-1)[index] = merged.reshape(-1)[index]
        layer.weight.copy_(weight)
        if (step.dim() == 0 or step.numel() < weight.numel()) and _same(before, _operands(layer)):
            return _packed(codes, step, index, weight)
        if index is not None or not isinstance(quantizer, MergedWeight):
            break
        index = _ends(layer, merged)
    for key, value in _own_state(layer).items():
        value.copy_(kept[key])
    return None


def _own_state(layer: Any) -> dict[str, Tensor]:
    of_norm = {} if layer.norm is None else layer.norm.state_dict(prefix="norm.")
    return {**layer.state_dict(), **of_norm}


def _unmerge(layer: Any) -> None:
    """The norm behind a layer as the identity and the merged bias; the layer's weight is what both were together."""
    norm = layer.norm
    if norm is None:
        return
    _, bias = layer.by_moving_statistics(layer.weight)
    norm.running_mean.copy_(-bias if norm.bias is None else torch.zeros_like(bias))
    norm.running_var.fill_(1.0 - norm.eps)
    if norm.weight is not None:
        norm.weight.fill_(1.0)
        norm.bias.copy_(bias)
    if layer.bias is not None:
        layer.bias.zero_()


def _ends(layer: Any, merged: Tensor) -> Tensor:
    """Where the weights stand that ranges are taken from, the largest of the layer or of each channel: int64 [n].

    Rounded, those of a range that ends close above a power of two would lose it an octave.
    """
    size = merged.abs()
    if layer.lowbit_weight.form.per_channel:
        channels = merged.shape[0] if layer.out_axis == 0 else merged.shape[1] * layer.groups
        owner = per_output(torch.arange(channels, device=merged.device), merged, layer.out_axis, layer.groups)
        owner = owner.expand(merged.shape).reshape(-1)
        most = size.new_zeros(channels).scatter_reduce(0, owner, size.reshape(-1), "amax")[owner].reshape(size.shape)
    else:
        most = size.amax()
    return (size == most).reshape(-1).nonzero().reshape(-1)


def _packed(codes: Tensor, step: Tensor, index: Tensor | None, weight: Tensor) -> _Coded:
    value = None if index is None else weight.reshape(-1)[index]
    if bool((codes.abs() == 1).all()):
        return _Coded(1, pack_signs(codes.reshape(-1)), step, index, value)
    bits = 8 if bool((codes >= -128).all()) and bool((codes <= 127).all()) else 16
    return _Coded(bits, codes.to(_DTYPES[bits]), step, index, value)
