"""Float functions between integer stretches: which of torch's a program knows, under the runtime's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowbit.export.builder import Held, ProgramBuilder
from lightning_lowbit.numerics.affine import affine_parameters

__all__ = ["float_function"]

Write = Callable[..., Held | None]
_PLAIN = {
    "relu": "relu", "relu_": "relu", "ReLU": "relu", "relu6": "relu6", "ReLU6": "relu6", "sigmoid": "sigmoid",
    "Sigmoid": "sigmoid", "tanh": "tanh", "Tanh": "tanh", "silu": "silu", "SiLU": "silu", "hardswish": "hardswish",
    "Hardswish": "hardswish", "hardsigmoid": "hardsigmoid", "Hardsigmoid": "hardsigmoid", "sigmoid_": "sigmoid",
    "silu_": "silu",
}  # fmt: skip
_PAIRS = {
    "add": "add", "iadd": "add", "add_": "add", "sub": "sub", "__sub__": "sub", "mul": "mul", "__mul__": "mul",
    "__rmul__": "mul", "div": "div", "__truediv__": "div", "true_divide": "div", "subtract": "sub", "multiply": "mul",
    "divide": "div", "mul_": "mul", "sub_": "sub", "div_": "div", "imul": "mul", "__imul__": "mul", "__isub__": "sub",
    "__itruediv__": "div",
}  # fmt: skip
# name -> runtime's name, and its numbers: (our name, torch's name, default)
_WITH_NUMBERS: dict[str, tuple[str, tuple[tuple[str, str, Any], ...]]] = {
    "leaky_relu": ("leaky_relu", (("slope", "negative_slope", 0.01),)),
    "elu": ("elu", (("alpha", "alpha", 1.0),)),
    "hardtanh": ("clamp", (("low", "min_val", -1.0), ("high", "max_val", 1.0))),
    "clamp": ("clamp", (("low", "min", None), ("high", "max", None))),
    "gelu": ("gelu", (("approximate", "approximate", "none"),)),
    "softmax": ("softmax", (("axis", "dim", None),)),
    "log_softmax": ("log_softmax", (("axis", "dim", None),)),
}
_MODULES_WITH_NUMBERS = {
    nn.LeakyReLU: "leaky_relu", nn.ELU: "elu", nn.Hardtanh: "hardtanh", nn.GELU: "gelu", nn.Softmax: "softmax",
    nn.LogSoftmax: "log_softmax",
}  # fmt: skip


def float_function(
    build: ProgramBuilder, target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any],
    shape: tuple[int, ...],
) -> Held | None:  # fmt: skip
    """The operation of a float function, of integers as their values; None of functions that a program has not."""
    if isinstance(target, nn.Module):
        found = _module(build, target, args[0], shape)
        if found is not None:
            return found
    if name in _PLAIN:
        return build.island(_PLAIN[name], args[0] if args else kwargs["input"])
    if name in ("neg", "negative", "__neg__"):
        return build.island("mul", args[0], constants={"other": torch.tensor(-1.0)})
    if name in ("rsub", "__rsub__") and not isinstance(args[1], (Tensor, Held)):  # a - x = -x + a, to the last bit
        negated = build.island("mul", args[0], constants={"other": torch.tensor(-1.0)})
        return build.island("add", negated, constants={"other": torch.tensor(float(args[1]))})
    if name in _PAIRS and not kwargs:
        return _pair(build, name, args[0], args[1], shape)
    if name.rstrip("_") in _WITH_NUMBERS:
        function, numbers = _WITH_NUMBERS[name.rstrip("_")]
        given = dict(zip([theirs for _, theirs, _ in numbers], args[1:], strict=False)) | kwargs
        return _numbered(build, function, args[0] if args else kwargs["input"], numbers, given)
    if name == "mean" and isinstance(args[0], Held):
        return _mean(build, args[0], shape, *args[1:], **kwargs)
    return None


def _numbered(
    build: ProgramBuilder, function: str, x: Held, numbers: tuple[tuple[str, str, Any], ...], given: dict[str, Any]
) -> Held:
    attributes = {ours: given.get(theirs, default) for ours, theirs, default in numbers}
    if "axis" in attributes:
        attributes["axis"] %= len(x.shape)
    return build.island(function, x, **attributes)


def _module(build: ProgramBuilder, module: nn.Module, x: Held, shape: tuple[int, ...]) -> Held | None:
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return build.island("layer", x, layer=module, weight=module.weight, bias=module.bias)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        assert module.running_var is not None
        a, b = affine_parameters(module.running_mean, module.running_var, module.weight, module.bias, module.eps)
        return build.island("affine", x, constants={"a": a, "b": b}, nearly=True)
    if isinstance(module, nn.PReLU):
        return build.island("prelu", x, constants={"slope": module.weight})
    if isinstance(module, nn.LayerNorm):
        ones = torch.ones(module.normalized_shape)
        weight = ones if module.weight is None else module.weight
        bias = torch.zeros(module.normalized_shape) if module.bias is None else module.bias
        axes = list(range(len(x.shape) - len(module.normalized_shape), len(x.shape)))
        constants = {"weight": weight, "bias": bias}
        return build.island("layer_norm", x, constants=constants, eps=module.eps, axes=axes)
    name = _MODULES_WITH_NUMBERS.get(type(module))
    if name is not None:
        function, numbers = _WITH_NUMBERS[name]
        given = {theirs: getattr(module, theirs) for _, theirs, _ in numbers if hasattr(module, theirs)}
        return _numbered(build, function, x, numbers, given)
    if isinstance(module, nn.Softplus) and module.beta == 1:
        return build.island("softplus", x)
    return None


def _pair(build: ProgramBuilder, name: str, a: Any, b: Any, shape: tuple[int, ...]) -> Held | None:
    """Two tensors, or one and a number or a tensor that does not depend on the inputs."""
    function = _PAIRS[name]
    if isinstance(a, Held) and isinstance(b, Held):
        return build.island(function, a, b, shape=shape)
    x, other = (a, b) if isinstance(a, Held) else (b, a)
    turned = x is b or name.startswith("__r")
    if turned and function not in ("add", "mul"):
        return None
    other = other if isinstance(other, Tensor) else torch.tensor(float(other))
    return build.island(function, x, shape=shape, constants={"other": other})


def _mean(
    build: ProgramBuilder, x: Held, shape: tuple[int, ...], dim: Any = None, keepdim: bool = False, axis: Any = None
) -> Held | None:
    dim = dim if axis is None else axis
    if dim is None:
        return None
    axes = [axis % len(x.shape) for axis in ([dim] if isinstance(dim, int) else dim)]
    return build.island("mean", x, shape=shape, axes=axes, keepdims=keepdim)
