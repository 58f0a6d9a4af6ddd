"""A forward is followed without data and without a mark; what cannot be followed says where and why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from modules.zoo import ZOO, DenseBlock, Flags, build
from torch import Tensor, nn

from lightning_lowbit.graph.network import follow, placed_calls
from lightning_lowbit.graph.ops import Kind, classify, in_place, is_leaf
from lightning_lowbit.graph.trace import Untraceable, call_keys, constants, has_forward, trace_container


@pytest.mark.parametrize("name", sorted(ZOO))
def test_looking_leaves_no_mark(name: str) -> None:
    net, _ = build(name)
    before = {path: dict(vars(module)) for path, module in net.named_modules()}
    values = copy.deepcopy(net.state_dict())
    random = torch.get_rng_state()
    follow(net)
    for path, module in net.named_modules():
        assert vars(module).keys() == before[path].keys()
        assert all(value is before[path][key] for key, value in vars(module).items())
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in values.items())
    assert torch.equal(torch.get_rng_state(), random)


def test_every_mode_of_the_zoo_is_followed() -> None:
    for name in ZOO:
        assert follow(build(name)[0]).untraced == [], name


class Drawing(nn.Module):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        import random

        import numpy as np

        if self.source == "python" and random.random() < 2:
            return x
        if self.source == "numpy" and np.random.rand() < 2:
            return x
        if self.source == "torch" and torch.rand(()) < 2:
            return x
        return F.dropout(x, 0.5, self.training)  # drawn when it runs: recorded as a call


@pytest.mark.parametrize("source", ["python", "numpy", "torch"])
def test_random_numbers_drawn_while_looking(source: str) -> None:
    found = trace_container(Drawing(source), "drop", training=True)
    assert isinstance(found, Untraceable)
    assert "random" in found.reason
    assert isinstance(trace_container(Drawing("none"), "drop", training=True), torch.fx.Graph)


def test_cached_values_are_put_back() -> None:
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[str, Any] = {"x": 1}

        def forward(self, x: Tensor) -> Tensor:
            self.cache["x"] = x
            return x + 1

    module = Cache()
    found = trace_container(module)
    assert isinstance(found, Untraceable)
    assert "self.cache" in found.reason
    assert module.cache == {"x": 1}


def test_which_modules_have_a_forward() -> None:
    import lightning.pytorch as L

    class Holder(nn.Module):
        pass

    bare: list[nn.Module] = [nn.Module(), nn.ModuleList(), nn.ModuleDict(), L.LightningModule(), Holder()]
    assert not any(has_forward(module) for module in bare)
    assert all(has_forward(module) for module in (nn.Sequential(), nn.Linear(1, 1), DenseBlock(1, 2, 2)))


def test_constants() -> None:
    net, x = Flags(), torch.zeros(1)
    assert constants(net, (x,), {}) == {"mask": None, "flag": False, "times": 2}
    assert constants(net, (x, x, True, x), {"times": 3, "more": "a"}) == {"flag": True}
    assert constants(nn.Sequential(), (x,), {}) == {}
    assert constants(net, (), {"unknown": 1}) == {}


def test_children_of_an_earlier_conversion_are_not_met() -> None:
    block = DenseBlock(2, 4, 2)
    before = trace_container(block)
    block.add_module("lowbit_cat", nn.Identity())
    after = trace_container(block)
    assert isinstance(before, torch.fx.Graph)
    assert isinstance(after, torch.fx.Graph)
    assert placed_calls(before) == placed_calls(after)
    assert list(call_keys(before).values()) == list(call_keys(after).values())


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "kind"),
    [
        (F.pad, (None, (1, 1)), {}, Kind.KEEP),
        (F.pad, (None, (1, 1), "constant", 0.0), {}, Kind.KEEP),
        (F.pad, (None, (1, 1)), {"value": 1.0}, Kind.FLOAT),
        (F.pad, (None, (1, 1), "reflect"), {}, Kind.KEEP),
        (F.interpolate, (None, None, 2), {}, Kind.KEEP),
        (F.interpolate, (None, None, 2, "bilinear"), {}, Kind.FLOAT),
        (F.interpolate, (None,), {"mode": "bicubic"}, Kind.FLOAT),
        ("mean", (None,), {}, Kind.FLOAT),
        ("mean", (None, 1), {}, Kind.AVG_POOL),
        (torch.mean, (None,), {"dim": 1}, Kind.AVG_POOL),
        (torch.stack, (), {}, Kind.CAT),
        (nn.Upsample(scale_factor=2), (), {}, Kind.KEEP),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (), {}, Kind.FLOAT),
        (nn.ConstantPad2d(1, 0.0), (), {}, Kind.KEEP),
        (nn.ConstantPad2d(1, 1.0), (), {}, Kind.FLOAT),
        (nn.Dropout2d(), (), {}, Kind.KEEP),
        (nn.Softmax(-1), (), {}, Kind.FLOAT),
        ([], (), {}, Kind.FLOAT),
    ],
    ids=lambda value: (
        getattr(value, "__name__", None) or (type(value).__name__ if isinstance(value, nn.Module) else None)
    ),
)
def test_kinds(target: Any, args: Any, kwargs: Any, kind: Kind) -> None:
    assert classify(target, args, kwargs) is kind


def test_calls_in_place() -> None:
    import operator

    assert all(in_place(target, {}) for target in (F.relu_, torch.relu_, "add_", operator.iadd, nn.ReLU(True)))
    assert in_place(F.relu, {"inplace": True})
    assert not any(in_place(target, {}) for target in (F.relu, "__add__", operator.add, nn.ReLU(), "relu"))


def test_containers_and_leaves() -> None:
    assert is_leaf(nn.MultiheadAttention(2, 1))
    assert not any(is_leaf(m) for m in (nn.Sequential(), DenseBlock(1, 2, 2), nn.TransformerEncoderLayer(2, 1, 2)))


@pytest.mark.parametrize("name", ["T", "mT"])
def test_a_transposed_view_is_read_like_the_tensor(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(getattr(self.first(x), name))

    first, view, second = follow(Net()).calls
    assert (view.kind, view.inputs, second.inputs) == (Kind.KEEP, [first], [view])
