"""What a call does to a grid: the one table of functions, methods and modules that the planner knows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_lowbit.graph.trace import IN_PLACE_OPERATORS

__all__ = [
    "BATCH_NORMS", "COMPUTE", "FLOAT_BY_NATURE", "PRODUCERS", "REWRITTEN", "Kind", "classify", "clips", "drops",
    "in_place", "is_leaf", "multiplies",
]  # fmt: skip


class Kind(StrEnum):
    COMPUTE = "compute"  # multiplies and adds: convolution, linear
    BATCH_NORM = "batch_norm"
    RELU = "relu"  # rectifiers: the result is unsigned
    ACTIVATION = "activation"  # other float elementwise functions of one tensor
    ADD = "add"
    CAT = "cat"
    AVG_POOL = "avg_pool"
    KEEP = "keep"  # moves or selects values: the grid stays
    META = "meta"  # sizes and shapes, no tensor
    FLOAT = "float"  # anything else


PRODUCERS = (Kind.COMPUTE, Kind.BATCH_NORM, Kind.RELU, Kind.ACTIVATION, Kind.ADD, Kind.AVG_POOL)
REWRITTEN = (Kind.RELU, Kind.ACTIVATION, Kind.ADD, Kind.CAT, Kind.AVG_POOL)

COMPUTE: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Linear: "linear",
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# Layers whose values are no sums of products on a grid: listed once in the report, left as they are.
FLOAT_BY_NATURE: tuple[type[nn.Module], ...] = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
    nn.Softmax,
    nn.LogSoftmax,
    nn.Bilinear,
)

_RELU_MODULES = (nn.ReLU, nn.ReLU6)
_ACTIVATION_MODULES = (
    nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.RReLU,
)  # fmt: skip
_AVG_POOL_MODULES = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)  # fmt: skip
_KEEP_MODULES = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.PixelShuffle, nn.PixelUnshuffle,
    nn.ChannelShuffle, nn.UpsamplingNearest2d, nn.modules.dropout._DropoutNd,
)  # fmt: skip

_FUNCTIONS: dict[Any, Kind] = {}


def _register(kind: Kind, *targets: Callable[..., Any] | str) -> None:
    _FUNCTIONS.update(dict.fromkeys(targets, kind))


# Methods are named by strings, as torch.fx records them.
_register(Kind.RELU, F.relu, F.relu_, F.relu6, torch.relu, torch.relu_, "relu", "relu_")
_register(
    Kind.ACTIVATION,
    F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh,
    F.softplus, F.sigmoid, F.tanh, torch.sigmoid, torch.tanh, torch.clamp, F.prelu, "sigmoid", "tanh",
    "clamp", "clamp_", F.leaky_relu_, F.elu_,
)  # fmt: skip
_register(Kind.ADD, operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__")
_register(Kind.CAT, torch.cat, torch.concat, torch.concatenate, torch.stack)
_register(
    Kind.AVG_POOL,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d, torch.mean, "mean",
)  # fmt: skip
_register(
    Kind.KEEP,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d, torch.flatten, torch.reshape,
    torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk, torch.split, torch.narrow,
    torch.flip, torch.roll, torch.unbind, torch.tensor_split, torch.tile, torch.movedim, torch.swapaxes,
    torch.select, torch.index_select, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.pixel_shuffle,
    F.channel_shuffle, F.pixel_unshuffle, operator.getitem, torch.clone, "view", "reshape", "flatten", "permute",
    "transpose", "contiguous", "squeeze", "unsqueeze", "chunk", "split", "narrow", "flip", "clone", "unflatten",
    "expand", "repeat", "to", "float", "t", "movedim", "swapaxes", "select", "type_as", "roll", "view_as", "reshape_as",
    "expand_as", "detach", "unbind", "tensor_split", "tile", "squeeze_", "unsqueeze_", "index_select",
    "double",
)  # fmt: skip
_MULTIPLYING = frozenset({
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d,
    F.conv_transpose3d, torch.conv1d, torch.conv2d, torch.conv3d, torch.matmul, torch.mm, torch.bmm,
    torch.addmm, torch.baddbmm, torch.einsum, F.scaled_dot_product_attention, operator.matmul, "matmul", "mm",
    "bmm", "addmm", "baddbmm",
})  # fmt: skip
_register(Kind.META, getattr, torch.numel, "size", "dim", "numel", "stride", len)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one operation to the planner: a torch.nn layer, not a container of the user's."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.TransformerEncoder, nn.Transformer)):
        return False
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerDecoder)):
        return False
    ours = hasattr(module, "lowbit_kind")
    return ours or type(module).__module__.startswith(("torch.nn.", "torchmetrics."))


def classify(target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Kind:
    """Kind of a call by its target: a module instance, a function or a method's name.

    ``F.pad`` keeps the grid unless it pads with a constant other than 0 (no grid holds that constant for
    sure); an interpolation keeps it in mode "nearest" only.
    """
    kwargs = kwargs or {}
    if isinstance(target, nn.Module):
        return _classify_module(target)
    if target in (F.pad, "pad"):
        mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
        value = kwargs.get("value", args[3] if len(args) > 3 else None)
        return Kind.FLOAT if mode == "constant" and value not in (None, 0, 0.0) else Kind.KEEP
    if target is F.interpolate:
        mode = kwargs.get("mode", args[3] if len(args) > 3 else "nearest")
        return Kind.KEEP if mode in ("nearest", "nearest-exact") else Kind.FLOAT
    if target is getattr:
        return Kind.KEEP if args[1:2] and args[1] in ("T", "mT", "H", "mH", "data") else Kind.META
    if target in ("mean", torch.mean):
        return Kind.AVG_POOL if len(args) > 1 or "dim" in kwargs else Kind.FLOAT
    try:
        return _FUNCTIONS.get(target, Kind.FLOAT)
    except TypeError:  # an unhashable callable is nothing that we know
        return Kind.FLOAT


def clips(target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> tuple[float, float] | None:
    """Between which two numbers a hardtanh clips its argument; None of other calls.

    A clamp is none: its bounds keep a network from accidents and say little of where its values are.
    """
    if isinstance(target, nn.Hardtanh):
        return float(target.min_val), float(target.max_val)
    if target is not F.hardtanh:
        return None
    given = {
        "min_val": -1.0,
        "max_val": 1.0,
        **dict(zip(("min_val", "max_val"), args[1:], strict=False)),
        **(kwargs or {}),
    }
    bounds = given["min_val"], given["max_val"]
    numbers = all(isinstance(bound, (int, float)) for bound in bounds)
    return (float(bounds[0]), float(bounds[1])) if numbers else None


def drops(target: Any) -> bool:
    """Whether a call is a dropout: training scales what it keeps, off any grid."""
    functions = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
    return isinstance(target, nn.modules.dropout._DropoutNd) or any(target is function for function in functions)


def in_place(target: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call puts its result into its first argument."""
    if isinstance(target, nn.Module):
        return bool(getattr(target, "inplace", False))
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    # A trailing underscore is torch's mark, two of them are Python's.
    marked = name.endswith("_") and not name.endswith("__")
    return bool(kwargs.get("inplace", False)) or marked or name.strip("_") in IN_PLACE_OPERATORS


def multiplies(target: Any) -> bool:
    """Whether a function multiplies tensors as a layer would, with nothing to convert."""
    try:
        return target in _MULTIPLYING
    except TypeError:
        return False


def _classify_module(module: nn.Module) -> Kind:
    kind: Kind | None = getattr(module, "lowbit_kind", None)
    if kind is not None:  # converted already: it says itself what it is
        return kind
    if type(module) in COMPUTE:
        return Kind.COMPUTE
    if type(module) in BATCH_NORMS:
        return Kind.BATCH_NORM
    if isinstance(module, _RELU_MODULES):
        return Kind.RELU
    if isinstance(module, _ACTIVATION_MODULES):
        return Kind.ACTIVATION
    if isinstance(module, _AVG_POOL_MODULES):
        return Kind.AVG_POOL
    if isinstance(module, nn.Upsample):
        return Kind.KEEP if module.mode == "nearest" else Kind.FLOAT
    if isinstance(module, (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)):
        return Kind.KEEP if module.value == 0 else Kind.FLOAT
    return Kind.KEEP if isinstance(module, _KEEP_MODULES) else Kind.FLOAT
