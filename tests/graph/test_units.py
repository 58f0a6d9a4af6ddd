"""What is added, joined or only moved is in one unit; where somebody unknown reads or writes, that unit is 1."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph import unit_nets as nets
from modules.zoo import ZOO, build, tensors
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_lowbit.graph.network import follow
from lightning_lowbit.graph.ops import COMPUTE
from lightning_lowbit.graph.patterns import make_plan
from lightning_lowbit.graph.plan import Plan
from lightning_lowbit.graph.units import EdgeClass, edge_classes
from lightning_lowbit.modules.exits import Exit

OUTSIDE = "it comes from outside the network"
Row = tuple[str, str, str | None]


def track(
    net: nn.Module, skip: Collection[str] = (), kept: Collection[str] = (), unplanned: Collection[str] = ()
) -> tuple[Plan, list[EdgeClass]]:
    flow = follow(net)
    layers = {path for path, module in net.named_modules() if type(module) in COMPUTE}
    plan = make_plan(net, flow, layers - set(skip), set(kept))
    plan.layers = [layer for layer in plan.layers if layer.path not in unplanned]
    return plan, edge_classes(net, flow, plan)


def rows(net: nn.Module, **how: Collection[str]) -> list[Row]:
    """Producers, consumers and reason of each class; lines of code without their number."""
    found = track(net, **how)[1]
    return [
        (" ".join(c.producers), " ".join(c.consumers), c.open and re.sub(r"\.py:\d+ in", ".py in", c.open))
        for c in found
    ]  # fmt: skip


def leaves(path: str, function: str = "forward") -> str:
    return f"{path} (unit_nets.py in {function}) is a result of the network"


def following(net: nn.Module) -> dict[str, str]:
    return {producer: consumer for found in track(net)[1] for producer, consumer in found.following.items()}


def test_basic_resnet() -> None:
    assert rows(nets.basic_resnet()) == [
        ("", "conv1", OUTSIDE),
        (
            "conv1 layer1.0.conv2 layer1.1.conv2",
            "layer1.0.conv1 layer1.1.conv1 layer2.0.conv1 layer2.0.downsample.0",
            None,
        ),
        ("layer1.0.conv1", "layer1.0.conv2", None),
        ("layer1.1.conv1", "layer1.1.conv2", None),
        ("layer2.0.conv1", "layer2.0.conv2", None),
        # The tie of the last block's reader and the classifier is the one that F8Net's own wiring lacks.
        ("layer2.0.conv2 layer2.0.downsample.0 layer2.1.conv2", "layer2.1.conv1 fc", None),
        ("layer2.1.conv1", "layer2.1.conv2", None),
        ("fc", "", leaves("fc")),
    ]


def test_what_follows_in_a_resnet() -> None:
    assert following(nets.basic_resnet()) == {
        "conv1": "layer1.0.conv1",
        "layer1.0.conv1": "layer1.0.conv2",
        "layer1.0.conv2": "layer1.1.conv1",
        "layer1.1.conv1": "layer1.1.conv2",
        "layer1.1.conv2": "layer2.0.conv1",
        "layer2.0.conv1": "layer2.0.conv2",
        "layer2.0.conv2": "layer2.1.conv1",
        "layer2.0.downsample.0": "layer2.1.conv1",
        "layer2.1.conv1": "layer2.1.conv2",
        "layer2.1.conv2": "fc",
    }


def test_what_follows_many_sums_is_found_at_once() -> None:
    class Sums(nets.Chain):
        def middle(self, x: Tensor) -> Tensor:
            for _ in range(64):  # 2^64 ways from b to c
                x = x + x
            return x

    assert following(Sums()) == {"a": "b", "b": "c"}


def test_bottleneck_resnet() -> None:
    net = nets.bottleneck_resnet()
    assert rows(net) == [
        ("", "conv1", OUTSIDE),
        ("conv1", "layer1.0.conv1 layer1.0.shortcut", None),
        ("layer1.0.conv1", "layer1.0.conv2", None),
        ("layer1.0.conv2", "layer1.0.conv3", None),
        ("layer1.0.conv3 layer1.0.shortcut layer2.0.conv3", "layer2.0.conv1 fc", None),
        ("layer2.0.conv1", "layer2.0.conv2", None),
        ("layer2.0.conv2", "layer2.0.conv3", None),
        ("fc", "", leaves("fc")),
    ]
    assert following(net).items() >= {
        "layer1.0.conv3": "layer2.0.conv1", "layer1.0.shortcut": "layer2.0.conv1", "layer2.0.conv3": "fc",
    }.items()  # fmt: skip


CHAINS = {
    "mobilenet_v1": (nets.mobilenet_v1, ["0", "3", "6", "9", "12", "17"]),
    "vgg": (nets.VGG, ["features.0", "features.2", "classifier.0", "classifier.3"]),
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)), ["0", "3"]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_has_no_ties(name: str) -> None:
    make, layers = CHAINS[name]
    inner = [(writer, reader, None) for writer, reader in itertools.pairwise(layers)]
    end = f"{layers[-1]} is a result of the network"
    assert rows(make()) == [("", layers[0], OUTSIDE), *inner, (layers[-1], "", end)]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_mobilenet_v2(activation: type[nn.Module]) -> None:
    net = nets.MobileNetV2(activation)
    inner = [
        (f"blocks.{block}.{layer}", f"blocks.{block}.{reader}", None)
        for block in range(3)
        for layer, reader in [("expand", "depthwise"), ("depthwise", "project")]
    ]
    stream = (
        "blocks.0.project blocks.1.project blocks.2.project",
        "blocks.1.expand blocks.2.expand tail.0",
        None,
    )
    assert rows(net) == [
        ("", "stem", OUTSIDE), ("stem", "blocks.0.expand", None), *inner[:2], stream, *inner[2:],
        ("tail.0", "fc", None), ("fc", "", leaves("fc")),
    ]  # fmt: skip
    six = [[call.path for call in found.rectified_at_six] for found in track(net)[1]]
    names = [["act"], ["blocks.0.act1"], ["blocks.0.act2"], [], ["blocks.1.act1"], ["blocks.1.act2"]]
    names += [["blocks.2.act1"], ["blocks.2.act2"], ["tail.2"], []]
    assert six == ([[], *names] if activation is nn.ReLU6 else [[] for _ in six])


def test_relu6_as_a_function() -> None:
    found = track(nets.Chain(between=nn.Sequential(nets.Tap(), nets.Six())))[1]
    assert [[call.name for call in edge.rectified_at_six] for edge in found] == [[], [], ["between.1.relu6"], []]


def test_dense_concat() -> None:
    net = nets.Dense()
    assert rows(net) == [
        ("", "stem", OUTSIDE),
        ("stem first second", "first second transition", None),
        ("transition", "head", None),
        ("head", "", leaves("head")),
    ]
    assert following(net) == {"stem": "first", "first": "second", "second": "transition", "transition": "head"}


def test_squeeze_and_excite() -> None:
    """The product opens what it multiplies, what it multiplies with and what it makes; inside the gate all is known."""
    product = "between.mul (unit_nets.py in forward) computes with true values"
    assert rows(nets.Chain(between=nets.Excite())) == [
        ("", "a", OUTSIDE),
        ("a", "b", None),
        ("b", "between.squeeze", product),
        ("between.squeeze", "between.excite", None),
        ("between.excite", "", "between.sigmoid (unit_nets.py in forward) computes with true values"),
        ("", "c", product),
        ("c", "", leaves("c")),
    ]


def cut(reason: str) -> list[Row]:
    """A chain with something between ``b`` and ``c`` that the unit does not pass."""
    return [
        ("", "a", OUTSIDE), ("a", "b", None), ("b", "", reason), ("", "c", reason), ("c", "", leaves("c")),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "activation", [nn.Sigmoid(), nn.LeakyReLU(), nn.Hardtanh(0, 6)], ids=lambda m: type(m).__name__
)
def test_activations_need_true_values(activation: nn.Module) -> None:
    found = rows(nets.Chain(between=activation))
    assert found == cut("between (unit_nets.py in middle) computes with true values")


def test_a_norm_that_is_not_folded() -> None:
    """Whether it has no layer of its own or is kept from it; a folded one passes the unit."""
    reason = "between (unit_nets.py in middle) is not folded into a layer"
    assert rows(nets.Chain(between=nn.BatchNorm2d(4))) == cut(reason)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    assert rows(net, kept=["1"])[1:3] == [
        ("0", "", "1 is not folded into a layer"), ("", "3", "1 is not folded into a layer"),
    ]  # fmt: skip


def test_parameters_that_are_added_or_joined() -> None:
    added = "add (unit_nets.py in middle) computes with true values"
    assert rows(nets.Positioned()) == cut(added)
    joined = "cat (unit_nets.py in middle) joins a parameter or a constant to it"
    assert rows(nets.Extended())[2] == ("b", "c", joined)


def test_an_auxiliary_head_is_a_result() -> None:
    assert rows(nets.Auxiliary())[1:] == [("a", "b", None), ("b", "c", leaves("relu")), ("c", "", leaves("c"))]


def test_a_layer_called_twice() -> None:
    net = nets.Twice()
    assert rows(net) == [("", "a", OUTSIDE), ("a b", "b c", None), ("c", "", leaves("c"))]
    assert following(net) == {"a": "b", "b": "b"}


def test_a_layer_that_is_skipped() -> None:
    reason = "b (unit_nets.py in forward) is not converted"
    assert rows(nets.Chain(), skip=["b"]) == [
        ("", "a", OUTSIDE), ("a", "", reason), ("", "c", reason), ("c", "", leaves("c")),
    ]  # fmt: skip
    assert rows(nets.Chain(), unplanned=["b"]) == rows(nets.Chain(), skip=["b"])


def test_nothing_is_known_behind_code_that_was_not_followed() -> None:
    found = rows(nets.Chain(between=nets.Branching()))
    assert [row[:2] for row in found] == [("", "a"), ("a", "b"), ("b", ""), ("", "c"), ("c", "")]
    (reason,) = {row[2] for row in found}
    assert reason is not None
    assert reason.startswith("between (unit_nets.py in forward) cannot be followed: control flow")


def test_a_layer_that_the_forward_does_not_reach_is_apart() -> None:
    found = rows(nets.Chain(spare=nn.Linear(4, 4)))
    assert found[:2] == [("", "a", OUTSIDE), ("", "spare", OUTSIDE)]
    assert found[2] == ("a", "b", None)
    assert found[-1] == ("spare", "", "spare is a result of the network")


def test_a_result_that_nothing_reads() -> None:
    class Idle(nets.Chain):
        def middle(self, x: Tensor) -> Tensor:
            self.spare(x)
            return x

    net = Idle(spare=nets.conv(4, 4))
    assert ("spare", "", "no converted layer reads it") in rows(net)
    assert rows(net)[2] == ("b", "spare c", None)


def look(*args: Any) -> None:
    """A hook."""


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda module: module.register_forward_hook(look),
    "pre": lambda module: module.register_forward_pre_hook(look),
    "backward": lambda module: module.register_full_backward_hook(look),
    "backward_pre": lambda module: module.register_full_backward_pre_hook(look),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_opens_what_its_module_reads_and_writes(kind: str) -> None:
    net = nets.basic_resnet()
    closed = [row for row in rows(net) if row[2] is None]
    HOOKS[kind](net.layer1[0].conv2)
    reason = "a hook on layer1.0.conv2 looks at it"
    opened = [(*row[:2], reason) for row in closed if "layer1.0.conv2" in f"{row[0]} {row[1]}".split()]
    assert [row for row in rows(net) if row[2] == reason] == opened
    assert len([row for row in rows(net) if row[2] is None]) == len(closed) - len(opened) == 4


def test_a_hook_on_a_rectifier() -> None:
    """Also once a low-bit one has taken its place, and its hooks."""
    net = nets.mobilenet_v1()
    HOOKS["forward"](net[2])
    flow = follow(net)
    plan = make_plan(net, flow, {"0", "3", "6"}, set())
    net[2] = nn.Identity()
    found = [(edge.consumers, edge.open) for edge in edge_classes(net, flow, plan)]
    assert found[:3] == [(("0",), OUTSIDE), (("3",), "a hook on 2 looks at it"), (("6",), None)]


def test_a_hook_on_a_container_opens_all_inside() -> None:
    net = nets.basic_resnet()
    HOOKS["forward"](net.layer2[1])
    reason = "a hook on layer2.1 looks at it"
    assert [row[2] for row in rows(net)] == [OUTSIDE, None, None, None, None, reason, reason, leaves("fc")]


def test_a_hook_on_containers_of_containers() -> None:
    net = nets.basic_resnet()
    HOOKS["forward"](net.layer2)
    reason = "a hook on layer2 looks at it"
    assert [row[2] for row in rows(net)] == [OUTSIDE, reason, None, None, *[reason] * 3, leaves("fc")]
    HOOKS["pre"](net)
    assert {row[2] for row in rows(net)} == {OUTSIDE, "a hook on ResNet looks at it"}
    net = nn.Sequential(*[nets.Basic(4, 4) for _ in range(11)])
    HOOKS["forward"](net[1])
    found = {row[0]: row[2] for row in rows(net)}
    assert (found["1.conv1"], found["10.conv1"]) == ("a hook on 1 looks at it", None)


def test_a_hook_on_what_hands_on_its_input() -> None:
    """No call tells which tensor a module without calls is given."""
    net = nets.Chain(between=nets.Tap())
    assert rows(net)[2] == ("b", "c", None)
    HOOKS["forward"](net.between)
    assert {row[2] for row in rows(net)} == {"a hook on between looks at it"}


def test_pruning_is_no_look_at_a_tensor() -> None:
    net = nets.Chain()
    prune.l1_unstructured(net.b, "weight", amount=0.5)
    net.register_forward_hook(Exit())  # nor is a hook of this package's
    assert rows(net)[1:3] == [("a", "b", None), ("b", "c", None)]


def test_pools() -> None:
    found = {pool.call.name: pool for edge in track(nets.TwoPools())[1] for pool in edge.pools}
    assert {name: (pool.consumers, pool.exclusive) for name, pool in found.items()} == {
        "avg_pool2d": (("shared",), False),  # which reads another pool too
        "mean": (("shared", "own"), False),
        "adaptive_avg_pool2d": (("free",), True),
    }


def test_a_pool_that_others_read() -> None:
    class Returned(nets.Chain):
        def forward(self, x: Tensor) -> Any:
            pooled = F.avg_pool2d(self.a(x), 2)
            moved = pooled.contiguous()
            return (self.b(moved), moved) if self.leaks else (self.b(moved), self.c(F.relu(pooled)))

    for leaks in (True, False):
        (pool,) = [pool for edge in track(Returned(leaks=leaks))[1] for pool in edge.pools]
        assert (pool.consumers, pool.exclusive) == (("b",), False)


@torch.no_grad()
def rescale(net: nn.Module) -> int:
    """Put each class that is not open into a power of two of its own; how many these are.

    The clip of an F.relu6 is out of reach here, that of an nn.ReLU6 moves with the unit.
    """
    plan, found = track(net)
    free = [edge.open is None and all(call.alias for call in edge.rectified_at_six) for edge in found]
    units = [2.0 ** (number % 5 - 7) if closed else 1.0 for number, closed in enumerate(free)]
    for layer in plan.layers:
        module = net.get_submodule(layer.path)
        before = [eta for eta, edge in zip(units, found, strict=True) if layer.path in edge.consumers]
        behind = [eta for eta, edge in zip(units, found, strict=True) if layer.path in edge.producers]
        assert len(before) == len(behind) == 1
        module.weight = nn.Parameter(module.weight * before[0])  # a new one: another layer may share the old
        writer = module if layer.batch_norm is None else net.get_submodule(layer.batch_norm)
        for name in ("weight", "bias"):
            if getattr(writer, name) is not None:
                setattr(writer, name, nn.Parameter(getattr(writer, name) / behind[0]))
    for eta, edge in zip(units, found, strict=True):
        for call in edge.rectified_at_six:
            net.set_submodule(str(call.alias), nn.Hardtanh(0.0, 6.0 / eta))
    return sum(free)


IMAGES = {
    "basic_resnet": nets.basic_resnet, "bottleneck_resnet": nets.bottleneck_resnet, "vgg": nets.VGG,
    "mobilenet_v1": nets.mobilenet_v1, "mobilenet_v2": nets.MobileNetV2, "dense": nets.Dense,
    "excite": lambda: nets.Chain(between=nets.Excite()), "extended": nets.Extended, "twice": nets.Twice,
    "pools": nets.TwoPools, "auxiliary": nets.Auxiliary,
}  # fmt: skip


@pytest.mark.parametrize("name", [*IMAGES, *sorted(ZOO)])
def test_units_leave_the_function_as_it_is(name: str) -> None:
    """With powers of two no rounding differs: the same bits leave the network."""
    torch.manual_seed(0)
    net, x = (IMAGES[name](), torch.randn(4, 3, 8, 8)) if name in IMAGES else build(name)
    expected = tensors(nets.settle(net)(x))
    assert rescale(net) or name not in IMAGES
    for got, want in zip(tensors(net(x)), expected, strict=True):
        assert torch.equal(got, want)
