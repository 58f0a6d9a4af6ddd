"""From data flow to sites: what merges, what is quantized where, what is tied, what stays float."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from modules.zoo import build
from torch import Tensor, nn

from lightning_lowbit import convert, summarize
from lightning_lowbit.graph.network import follow
from lightning_lowbit.graph.ops import COMPUTE
from lightning_lowbit.graph.patterns import make_plan
from lightning_lowbit.graph.plan import Plan


def plan(net: nn.Module) -> Plan:
    layers = {path for path, module in net.named_modules() if type(module) in COMPUTE}
    return make_plan(net, follow(net), layers, set())


def keys(found: Plan) -> set[str]:
    return {site.key for site in found.sites}


def test_resnet20() -> None:
    net, _ = build("resnet20")
    found = plan(net)
    assert len(found.layers) == 20
    assert all(layer.batch_norm for layer in found.layers if layer.op == "conv2d")
    assert [layer.path for layer in found.layers if layer.first] == ["conv1"]
    assert [layer.path for layer in found.layers if layer.last] == ["linear"]
    # Each add ties its operands; the rectifier behind it has a grid of its own. Slice and pad keep grids.
    assert len(found.ties) == 9
    assert ["layers.2.lowbit_relu_1.lowbit_output", "layers.3.bn2.lowbit_output"] in found.ties
    assert {site.pattern for site in found.sites if site.op == "relu"} >= {"conv2d+bn+relu", "add+relu"}


class Readers(nn.Module):
    """A tensor that a layer, a sum and, through a pool and a concat, another layer read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
        self.act, self.pool = nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        y: Tensor = self.c(self.pool(torch.cat([x, self.b(x) + x], 1)))
        return y


def test_who_reads_a_tensor() -> None:
    found = {site.key: site for site in plan(Readers()).sites}
    assert found["act.lowbit_output"].readers == ("b", "c")
    assert found["act.lowbit_output"].operations == ("lowbit_add",)
    assert found["lowbit_add.lowbit_output"].readers == ("c",)
    assert found["b.lowbit_input"].arrives == found["act.lowbit_output"]
    assert found["a.lowbit_input"].arrives is None


def test_depthwise_and_ends() -> None:
    net, _ = build("mobilenet_v2")
    found = plan(net)
    assert sum(layer.depthwise for layer in found.layers) == 4
    assert all(layer.pattern.startswith(layer.op) for layer in found.layers)


class Norm(nn.Module):
    """A layer norm by hand: means, sums and products of float code."""

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class HandMade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 6), Norm(), nn.Linear(6, 2)
        self.position = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.b.weight.sum() * x) + x)
        return self.b(self.norm(F.softmax(self.a(x), -1)))


def test_float_code_is_left_alone() -> None:
    """A mean between float functions is read by no layer: rounding it would only hurt."""
    torch.manual_seed(0)
    net, x = HandMade(), torch.randn(5, 6)
    found = plan(net)
    assert not any(site.op == "avg_pool" for site in found.sites)
    assert not any(op.owner == "norm" for op in found.ops)
    convert(net, "tqt", x)
    assert "forward" not in vars(net.norm)


def test_a_mean_of_a_layer_is_rounded_where_it_leaves_the_network() -> None:
    class Fully(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).relu().mean((2, 3))

    torch.manual_seed(0)
    net, x = Fully(), torch.randn(2, 3, 5, 5)
    convert(net, "tqt", x)
    row = summarize(net)["lowbit_avg_pool.output"]
    assert row.grid is not None
    assert row.grid.contains(net.eval()(x))


def test_a_layer_read_from_two_grids_quantizes_by_itself() -> None:
    net, x = build("twice")
    found = plan(net)
    (site,) = (site for site in found.sites if site.key == "block.0.lowbit_input")
    assert site.source is None
    convert(net, "tqt", x)
    assert net.block[0].lowbit_input is not None


def test_sum_of_a_list_is_a_chain_of_adds() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
            self.last = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(sum(part(x) for part in self.parts))

    net = Sum()
    found = plan(net)
    assert {"parts.0.lowbit_output", "parts.1.lowbit_output", "parts.2.lowbit_output"} <= keys(found)
    assert not any("operand" in key for key in keys(found))
    assert len(found.ties) >= 1
