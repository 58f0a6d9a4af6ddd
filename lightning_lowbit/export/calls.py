"""Calls that no low-bit module makes: what moves values, pools, adds or rectifies integers, and float functions."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.export.builder import Held, ProgramBuilder
from lightning_lowbit.export.islands import float_function
from lightning_lowbit.export.moves import BATCHES, concrete
from lightning_lowbit.export.record import Node, Ref
from lightning_lowbit.export.windows import largest
from lightning_lowbit.graph.ops import Kind, classify, drops
from lightning_lowbit.modules.lowering import refuse
from lightning_lowbit.modules.pooling import WINDOW, kind_of

__all__ = ["joins", "lower_call", "name_of", "takes_sizes"]

_MAX_POOLS: dict[Any, tuple[int, bool]] = {
    F.max_pool1d: (1, False), F.max_pool2d: (2, False), F.max_pool3d: (3, False),
    torch.max_pool1d: (1, False), torch.max_pool2d: (2, False), torch.max_pool3d: (3, False),
    F.adaptive_max_pool1d: (1, True), F.adaptive_max_pool2d: (2, True), F.adaptive_max_pool3d: (3, True),
    nn.MaxPool1d: (1, False), nn.MaxPool2d: (2, False), nn.MaxPool3d: (3, False),
    nn.AdaptiveMaxPool1d: (1, True), nn.AdaptiveMaxPool2d: (2, True), nn.AdaptiveMaxPool3d: (3, True),
}  # fmt: skip
_POOL_FIELDS = (*WINDOW, "output_size", "dilation", "return_indices")
_OF_METHODS = {"__getitem__": "getitem", "__radd__": "add", "__add__": "add", "__iadd__": "add"}


def lower_call(
    build: ProgramBuilder, node: Node, twin: Node, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> Any:
    """The values of a call's results.

    Args:
        build: writes operations.
        node, twin: the call at the two batch sizes.
        args, kwargs: its arguments, tensors of the program as ``Held``.
        shapes: gives the shape of a ``Ref`` (``shapes.shape``).
    """
    target, name = node.target, name_of(node.target)
    own: Any = getattr(target, "lower", None) if isinstance(target, nn.Module) else None
    if own is not None:  # a module of ours that no conversion touches
        return own(build, *args, **kwargs)
    if _max_pool(target) is not None:
        dims, adaptive = _max_pool(target) or (0, False)
        x, *rest = args if args else (kwargs.pop("input"),)
        return largest(build, x, dims, adaptive, *rest, **kwargs, **_settings(target))
    kind = _classify(target, args, kwargs)
    operands = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Held)]
    if kind is Kind.KEEP:
        if drops(target) and not isinstance(target, nn.Module) and kwargs.get("training", (*args, 0.5, True)[2]):
            raise refuse(node.path, "it draws random numbers in evaluation", "Pass training=self.training.")
        return _moves(build, node, twin, args, kwargs)
    if name == "argmax":
        return _argmax(build, *args, **kwargs)
    if not any(x.is_float for x in operands) or kind is Kind.CAT or (kind is Kind.AVG_POOL and name != "mean"):
        exact = _integers(build, kind, target, name, args, kwargs)
        if exact is not None:
            return exact
    result = tree_flatten(node.result)[0]
    if len(result) == 1:
        found = float_function(build, target, name, args, kwargs, shapes.shape(result[0]))
        if found is not None:
            return found
    raise UnsupportedModelError(
        f"{node.path}: {name} has no integer form, and is none of the float functions that a program knows. Make it a "
        "module that stays outside, lower the parts before and behind it (lower(model.part, x)), or write it with "
        "other functions."
    )


def takes_sizes(target: Any) -> bool:
    """Whether a call's numbers may be sizes of tensors."""
    return not isinstance(target, nn.Module) and _classify(target, (), {}) is Kind.KEEP


def joins(target: Any) -> bool:
    """Whether a call is torch.cat, or another name of it."""
    return not isinstance(target, nn.Module) and _classify(target, (), {}) is Kind.CAT


def _classify(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind:
    """By the planner's table, in which methods of tensors stand by name."""
    name = name_of(target)
    method = isinstance(target, types.MethodDescriptorType) or str(getattr(target, "__qualname__", "")).startswith(
        "Tensor."
    )
    kind = classify(name) if method else classify(target, args, kwargs)
    return _as_function(name, args, kwargs, kind)


def name_of(target: Any) -> str:
    """Of a function or a method; of a module its class."""
    if isinstance(target, nn.Module):
        return type(target).__name__
    name = str(getattr(target, "__name__", target))
    if name == "__get__":
        name = str(target.__self__.__name__)
    return _OF_METHODS.get(name, name)


def _as_function(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], kind: Kind) -> Kind:
    """Kinds that depend on the arguments, by the rules of the planner."""
    if name == "getitem" or name in ("T", "mT", "H", "mH", "data"):
        return Kind.KEEP
    if name == "mean":
        return Kind.AVG_POOL
    if name == "add":
        tensors = [x for x in args if isinstance(x, Held)]
        return Kind.ADD if len(tensors) == 2 and "alpha" not in kwargs else Kind.FLOAT
    return kind


def _max_pool(target: Any) -> tuple[int, bool] | None:
    key = type(target) if isinstance(target, nn.Module) else target
    try:
        return _MAX_POOLS.get(key)
    except TypeError:  # an unhashable callable is none
        return None


def _settings(target: Any) -> dict[str, Any]:
    if not isinstance(target, nn.Module):
        return {}
    return {field: getattr(target, field) for field in _POOL_FIELDS if hasattr(target, field)}


def _moves(build: ProgramBuilder, node: Node, twin: Node, args: Any, kwargs: Any) -> Any:
    """Every result of a call that moves values, by calling it with places."""
    first = next(x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Held))
    results = tree_flatten(node.result)[0]

    def moving(position: int) -> Callable[[Tensor], Tensor]:
        def function(places: Tensor) -> Tensor:
            batch = places.shape[0] // -first.shape[0] if first.shape[0] < 0 else BATCHES[0]
            call = node if batch == BATCHES[0] else twin
            given, settings = _replayed(call, first, places, batch, args, kwargs)
            result: Tensor = tree_flatten(call.target(*given, **settings))[0][position]
            return result

        return function

    found = [build.move(first, moving(position)) for position in range(len(results))]
    return found if len(found) > 1 else found[0]


def _replayed(call: Node, first: Held, places: Tensor, batch: int, args: Any, kwargs: Any) -> Any:
    """The call's own arguments, with places for the tensor that moves and zeros for others that give their shape."""
    held = iter(x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Held))

    def replaced(value: Any) -> Any:
        if not isinstance(value, Ref):
            return value
        x = next(held)
        return places if x is first else torch.zeros(concrete(x.shape, batch), dtype=places.dtype)

    return tree_map(replaced, (call.args, call.kwargs))


def _argmax(build: ProgramBuilder, x: Held, dim: int | None = None, keepdim: bool = False) -> Held:
    if dim is None:
        raise UnsupportedModelError(f"{build.path}: argmax over the batch. Give it dim=.")
    axis = dim % len(x.shape)
    shape = [1 if a == axis else n for a, n in enumerate(x.shape) if keepdim or a != axis]
    return build.emit("argmax", [build.ordered(x)], shape, {"axis": axis, "keepdims": keepdim}, dtype="int64")


def _integers(build: ProgramBuilder, kind: Kind, target: Any, name: str, args: Any, kwargs: Any) -> Held | None:
    """Exact operations on integers; None where there is none."""
    if kind is Kind.RELU:
        six = "6" in name
        return build.snap(args[0] if args else kwargs["input"], None, True, 6.0 if six else None)
    if kind is Kind.ADD:
        return build.add([x for x in args if isinstance(x, Held)])
    if kind is Kind.CAT:
        tensors, *rest = args
        axis = rest[0] if rest else kwargs.get("dim", kwargs.get("axis", 0))
        return build.concat(list(tensors), axis, name == "stack")
    if kind is Kind.AVG_POOL:
        if isinstance(target, nn.Module):
            function = getattr(F, "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_"))
            given = {k: v for k, v in _settings(target).items() if k not in ("dilation", "return_indices")}
            return build.pool(args[0], kind_of(function), **given)
        pool = None if name == "mean" else kind_of(target)
        return build.pool(args[0], pool, *args[1:], **kwargs)
    return None
