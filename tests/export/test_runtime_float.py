"""Float islands of a program against torch's own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lowbit.export.runtime import Array, Op, Program, ProgramError, Value, run
from lightning_lowbit.export.runtime_float import FUNCTIONS, PRODUCTS

Case = tuple[str, dict[str, Any], dict[str, Tensor], Callable[[Tensor], Tensor]]

A, B = torch.tensor([0.5, -1.5, 3.0]), torch.tensor([0.25, 0.0, -7.0])
GROUPED, BIAS = torch.arange(-27, 27.0).reshape(6, 1, 3, 3) / 32, torch.arange(6.0) / 3
UP = torch.arange(-24, 24.0).reshape(3, 2, 2, 4) / 16
WINDOW = {"stride": [2, 1], "dilation": [1, 1], "groups": 3}


def channels(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def grid_norm(x: Tensor, unit: float) -> Tensor:
    return torch.round((x.double() - channels(B)) / channels(A.abs()) / unit) * unit


EXACT: dict[str, Case] = {
    "affine": ("affine", {}, {"a": A, "b": B}, lambda x: x * channels(A) + channels(B)),
    "mul_channels": ("mul_channels", {}, {"a": A}, lambda x: x * channels(A)),
    "add a constant": ("add", {}, {"other": torch.tensor(0.1)}, lambda x: x + 0.1),
    "sub a constant": ("sub", {}, {"other": channels(A)}, lambda x: x - channels(A)),
    "mul a constant": ("mul", {}, {"other": torch.tensor(0.1)}, lambda x: x * 0.1),
    "div a constant": ("div", {}, {"other": torch.tensor(0.3)}, lambda x: x / 0.3),
    "relu": ("relu", {}, {}, F.relu),
    "relu6": ("relu6", {}, {}, F.relu6),
    "clamp": ("clamp", {"low": -0.3, "high": 0.7}, {}, lambda x: x.clamp(-0.3, 0.7)),
    "clamp below": ("clamp", {"low": -0.3, "high": None}, {}, lambda x: x.clamp(min=-0.3)),
    "leaky_relu": ("leaky_relu", {"slope": 0.01}, {}, lambda x: F.leaky_relu(x, 0.01)),
    "prelu": ("prelu", {}, {"slope": A}, lambda x: F.prelu(x, A)),
    "prelu of one": ("prelu", {}, {"slope": A[:1]}, lambda x: F.prelu(x, A[:1])),
    "hardsigmoid": ("hardsigmoid", {}, {}, lambda x: F.relu6(x + 3) / 6),
    "hardswish": ("hardswish", {}, {}, lambda x: x * F.relu6(x + 3) / 6),
    "sign": ("sign", {}, {}, lambda x: torch.where(x < 0, -1.0, 1.0)),
}
CLOSE: dict[str, Case] = {
    "hardswish of torch": ("hardswish", {}, {}, F.hardswish),
    "sigmoid": ("sigmoid", {}, {}, torch.sigmoid),
    "tanh": ("tanh", {}, {}, torch.tanh),
    "silu": ("silu", {}, {}, F.silu),
    "gelu": ("gelu", {"approximate": "none"}, {}, F.gelu),
    "gelu tanh": ("gelu", {"approximate": "tanh"}, {}, lambda x: F.gelu(x, approximate="tanh")),
    "elu": ("elu", {"alpha": 0.7}, {}, lambda x: F.elu(x, 0.7)),
    "softplus": ("softplus", {}, {}, F.softplus),
    "softmax": ("softmax", {"axis": 1}, {}, lambda x: x.softmax(1)),
    "log_softmax": ("log_softmax", {"axis": 3}, {}, lambda x: x.log_softmax(3)),
    "mean": ("mean", {"axes": [2, 3], "keepdims": False}, {}, lambda x: x.mean((2, 3))),
    "mean kept": ("mean", {"axes": [1], "keepdims": True}, {}, lambda x: x.mean(1, keepdim=True)),
    "layer_norm": (
        "layer_norm", {"axes": [2, 3], "eps": 1e-5},
        {"weight": torch.arange(20.0).reshape(4, 5), "bias": torch.ones(4, 5)},
        lambda x: F.layer_norm(x, (4, 5), torch.arange(20.0).reshape(4, 5), torch.ones(4, 5)),
    ),
    "grid_norm": (
        "grid_norm", {"unit": 2.0**-4, "limit": 1.5}, {"mean": B, "s": A.abs(), "gamma": A, "beta": B},
        lambda x: grid_norm(x, 2.0**-4).clamp(-1.5, 1.5) * channels(A) + channels(B),
    ),
    "grid_norm without a grid": (
        "grid_norm", {"unit": None, "limit": None}, {"mean": B, "s": A.abs(), "gamma": A, "beta": B},
        lambda x: grid_norm(x, 2.0**-40) * channels(A) + channels(B),
    ),
    "conv": (
        "conv", {**WINDOW, "padding": [[1, 1], [2, 2]]}, {"weight": GROUPED, "bias": BIAS},
        lambda x: F.conv2d(x, GROUPED, BIAS, (2, 1), (1, 2), groups=3),
    ),
    "conv_transpose": (
        "conv_transpose", {**WINDOW, "padding": [1, 0], "output_padding": [1, 0]}, {"weight": UP, "bias": BIAS},
        lambda x: F.conv_transpose2d(x, UP, BIAS, (2, 1), (1, 0), (1, 0), 3),
    ),
    "linear": (
        "linear", {}, {"weight": GROUPED.reshape(-1, 3)[:7].repeat(1, 2)[:, :5]},
        lambda x: x @ GROUPED.reshape(-1, 3)[:7].repeat(1, 2)[:, :5].T,
    ),
}  # fmt: skip


def images() -> Tensor:
    torch.manual_seed(3)
    x = torch.randn(2, 3, 4, 5) * 4
    x[0, 0, 0, :4] = torch.tensor([0.0, -0.0, 120.0, -120.0])
    return x


def island(name: str, attributes: dict[str, Any], constants: dict[str, Array], shape: Any, count: int = 1) -> Program:
    inputs = tuple(f"x{i}" for i in range(count))
    values = {key: Value(key, (-1, 3, 4, 5), "float32") for key in inputs}
    values["y"] = Value("y", (-1, *shape[1:]), "float32")
    op = Op("island", "part", inputs, "y", {"function": name, **attributes}, constants)
    return Program((op,), values, inputs, ("y",))


def both(case: Case) -> tuple[Array, Array]:
    name, attributes, constants, function = case
    expected = function(images())
    arrays = {key: tensor.numpy() for key, tensor in constants.items()}
    found = run(island(name, attributes, arrays, expected.shape), images())
    assert found.dtype == np.float32
    return found, expected.numpy()


@pytest.mark.parametrize("name", EXACT)
def test_single_float32_operations_give_torchs_bits(name: str) -> None:
    found, expected = both(EXACT[name])
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", CLOSE)
def test_others_are_close(name: str) -> None:
    found, expected = both(CLOSE[name])
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-5 if name in PRODUCTS else 1e-6)


def test_every_function_was_looked_at() -> None:
    assert {case[0] for case in (*EXACT.values(), *CLOSE.values())} == {*FUNCTIONS, *PRODUCTS}


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_two_tensors(name: str) -> None:
    a, b = images(), images().flip(0) + 0.5
    found = run(island(name, {}, {}, a.shape, count=2), a, b)
    assert np.array_equal(found, getattr(torch, name)(a, b).numpy())


def test_three_tensors_are_added() -> None:
    x = images()
    assert np.array_equal(run(island("add", {}, {}, x.shape, count=3), x, x, -x), x.numpy())


def test_an_unknown_function_is_named() -> None:
    with pytest.raises(ProgramError, match=r"part \(island\): 'warp'"):
        run(island("warp", {}, {}, (2, 3, 4, 5)), images())


@pytest.mark.parametrize("name", ["add", "relu"])
def test_an_islands_add_is_not_that_of_codes(name: str) -> None:
    x = torch.full((1, 3, 4, 5), 0.5)
    constants = {"other": np.float32([0.25])} if name == "add" else {}
    assert run(island(name, {}, constants, x.shape), x).max() == (0.75 if name == "add" else 0.5)
