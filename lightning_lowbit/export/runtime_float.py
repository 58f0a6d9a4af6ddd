"""The float stretches of an integer program, numpy and the standard library alone; `runtime` reads this file.

A function takes the attributes and the constants of its operation and float32 arrays; what a library approximates
(exp, tanh, erf, divisions in a row) is computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FUNCTIONS", "PRODUCTS"]

Array = NDArray[Any]
PRODUCTS = ("conv", "conv_transpose", "linear")
"""Functions that the runtime computes itself, as it does those of integers."""


def _wide(x: Array) -> Array:
    return x.astype(np.float64)


def _channels(values: Array, x: Array) -> Array:
    """[C] along axis 1."""
    return values if values.ndim == 0 else values.reshape(-1, *[1] * (x.ndim - 2))


def _both(xs: tuple[Array, ...], c: Mapping[str, Array]) -> tuple[Array, Array]:
    """Two inputs, or one and the constant ``other``."""
    return (xs[0], xs[1]) if len(xs) == 2 else (xs[0], c["other"].astype(np.float32))


def _softplus(x: Array, beta: float = 1.0) -> Array:
    v = _wide(x) * beta
    return np.asarray((np.log1p(np.exp(-np.abs(v))) + np.maximum(v, 0)) / beta)


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(_wide(x)))  # never overflows
    return np.where(x < 0, e, 1.0) / (1.0 + e)


def _gelu(x: Array, approximate: str) -> Array:
    v = _wide(x)
    if approximate == "tanh":
        return np.asarray(0.5 * v * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (v + 0.044715 * v**3))))
    erf = np.array([math.erf(one) for one in (v / math.sqrt(2.0)).flat]).reshape(v.shape)
    return np.asarray(0.5 * v * (1.0 + erf))


def _log_softmax(x: Array, axis: int) -> Array:
    v = _wide(x) - x.max(axis, keepdims=True)
    return np.asarray(v - np.log(np.exp(v).sum(axis, keepdims=True)))


def _layer_norm(a: Mapping[str, Any], c: Mapping[str, Array], x: Array) -> Array:
    v, axes = _wide(x), tuple(a["axes"])
    d = v - v.mean(axes, keepdims=True)
    y = d / np.sqrt((d * d).mean(axes, keepdims=True) + a["eps"])
    return np.asarray(y * c["weight"] + c["bias"])


def _grid_norm(a: Mapping[str, Any], c: Mapping[str, Array], x: Array) -> Array:
    """gamma xhat + beta, xhat = (x - mean) / s rounded to ``unit`` and clipped at ``limit`` where there are any."""
    mean, s, gamma, beta = (_wide(_channels(c[name], x)) for name in ("mean", "s", "gamma", "beta"))
    xhat = (_wide(x) - mean) / s
    xhat = xhat if a["unit"] is None else np.rint(xhat / a["unit"]) * a["unit"]
    return np.asarray((xhat if a["limit"] is None else np.clip(xhat, -a["limit"], a["limit"])) * gamma + beta)


def _mean(a: Mapping[str, Any], x: Array) -> Array:
    return np.asarray(_wide(x).mean(tuple(a["axes"]), keepdims=a.get("keepdims", False)))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "affine": lambda a, c, x: x * _channels(c["a"], x) + _channels(c["b"], x),  # product and sum rounded to float32
    "mul_channels": lambda a, c, x: x * _channels(c["a"], x),
    "add": lambda a, c, *xs: sum(xs[1:], xs[0]) + (c["other"].astype(np.float32) if "other" in c else np.float32(0)),
    "sub": lambda a, c, *xs: np.subtract(*_both(xs, c)),
    "mul": lambda a, c, *xs: np.multiply(*_both(xs, c)),
    "div": lambda a, c, *xs: np.divide(*_both(xs, c)),
    "sign": lambda a, c, x: np.where(x < 0, np.float32(-1), np.float32(1)),
    "relu": lambda a, c, x: np.maximum(x, np.float32(0)),
    "relu6": lambda a, c, x: np.clip(x, np.float32(0), np.float32(6)),
    "clamp": lambda a, c, x: np.clip(
        x,
        np.float32(-np.inf if a.get("low") is None else a["low"]),
        np.float32(np.inf if a.get("high") is None else a["high"]),
    ),
    "leaky_relu": lambda a, c, x: np.where(x > 0, x, x * np.float32(a["slope"])),
    "prelu": lambda a, c, x: np.where(x > 0, x, x * _channels(c["slope"].reshape(-1), x)),
    "sigmoid": lambda a, c, x: _sigmoid(x),
    "tanh": lambda a, c, x: np.tanh(_wide(x)),
    "silu": lambda a, c, x: _wide(x) * _sigmoid(x),
    "gelu": lambda a, c, x: _gelu(x, a.get("approximate", "none")),
    "elu": lambda a, c, x: np.where(x > 0, x, a.get("alpha", 1.0) * np.expm1(np.minimum(_wide(x), 0))),
    "softplus": lambda a, c, x: _softplus(x, a.get("beta", 1.0)),
    "hardsigmoid": lambda a, c, x: np.clip(x + np.float32(3), np.float32(0), np.float32(6)) / np.float32(6),
    "hardswish": lambda a, c, x: x * np.clip(x + np.float32(3), np.float32(0), np.float32(6)) / np.float32(6),
    "softmax": lambda a, c, x: np.exp(_log_softmax(x, a["axis"])),
    "log_softmax": lambda a, c, x: _log_softmax(x, a["axis"]),
    "layer_norm": _layer_norm,
    "grid_norm": _grid_norm,
    "mean": lambda a, c, x: _mean(a, x),
}
