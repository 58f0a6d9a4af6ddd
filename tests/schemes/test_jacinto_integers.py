"""Evaluation is an integer computation: every value of a network equals what int64 gives, hop by hop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from schemes.jacinto_integers import Codes, add, codes, joined, layer, mean, pooled
from schemes.jacinto_nets import Wired, clips, converted, images, train
from torch import Tensor, nn


def block(self: Any, x: Tensor) -> Any:
    """A residual sum of two grids, a strided convolution without norm, a mean, a classifier."""
    x = F.relu(self.bn1(self.conv1(x)))
    x = F.relu(self.bn2(self.conv2(x)) + x)
    x = F.relu(self.conv3(x))
    return self.fc(self.pool(x).flatten(1))


def residual() -> nn.Module:
    torch.manual_seed(1)
    return Wired(
        block,
        conv1=nn.Conv2d(3, 6, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(6),
        conv2=nn.Conv2d(6, 6, 3, padding=1), bn2=nn.BatchNorm2d(6),
        conv3=nn.Conv2d(6, 8, 3, stride=2), pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(8, 4),
    )  # fmt: skip


def residual_in_integers(net: Any, x: Tensor, bits: int) -> dict[str, Codes]:
    q, hop = clips(net), {}
    hop["in"] = codes(x, q["conv1.lowbit_input"])
    hop["relu1"] = layer(hop["in"], net.conv1, q["lowbit_relu.lowbit_output"], bits)
    hop["bn2"] = layer(hop["relu1"], net.conv2, q["bn2.lowbit_output"], bits)
    hop["relu2"] = add(hop["bn2"], hop["relu1"], q["lowbit_relu_1.lowbit_output"])
    hop["relu3"] = layer(hop["relu2"], net.conv3, q["lowbit_relu_2.lowbit_output"], bits)
    hop["pool"] = mean(hop["relu3"], q["pool.lowbit_output"])
    flat = Codes(hop["pool"].values.flatten(1), hop["pool"].fraction)
    hop["fc"] = layer(flat, net.fc, q.get("fc.lowbit_output"), bits)
    return hop


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (8, 4), (5, 6)], ids=str)
@pytest.mark.parametrize("quantize_out", [True, False], ids=["codes_out", "sums_out"])
def test_a_residual_network_equals_int64_hop_by_hop(bits: tuple[int, int], quantize_out: bool) -> None:
    net = converted(residual(), weight_bits=bits[0], act_bits=bits[1], quantize_out=quantize_out)
    train(net, 4, gain=1.5)
    found: dict[str, Tensor] = {}
    places = {"relu1": "lowbit_relu", "bn2": "bn2", "relu2": "lowbit_relu_1", "relu3": "lowbit_relu_2", "pool": "pool",
              "fc": "fc"}  # fmt: skip
    for name, path in places.items():
        net.get_submodule(path).register_forward_hook(lambda m, a, y, name=name: found.update({name: y}))
    x = images(16, 3, 8, 8, seed=5, gain=1.3)
    with torch.no_grad():
        net.eval()(x)
    want = residual_in_integers(net, x, bits[0])
    assert [name for name in found if not torch.equal(found[name].double(), want[name].real())] == []
    assert all(len(want[name].values.unique()) > 5 for name in found)


def test_a_joined_network_equals_int64_hop_by_hop() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = F.max_pool2d(F.relu(self.bn(self.stem(x))), 2)
        y = torch.cat([F.relu(self.a(x)), self.b(x), x], 1)
        return self.out(y)

    torch.manual_seed(3)
    net = converted(Wired(
        forward, stem=nn.Conv2d(3, 6, 3, padding=1), bn=nn.BatchNorm2d(6), a=nn.Conv2d(6, 4, 1),
        b=nn.Conv2d(6, 4, 3, padding=1, groups=2), out=nn.Conv2d(14, 5, 3, bias=False),
    ))  # fmt: skip
    x, q = images(6, 3, 8, 8, seed=5), clips(net)
    first = codes(x, q["stem.lowbit_input"])
    stem = pooled(layer(first, net.stem, q["lowbit_relu.lowbit_output"], rectify=True), 2)
    a = layer(stem, net.a, q["lowbit_relu_1.lowbit_output"], rectify=True)  # on a grid with b's negative codes
    y = joined(a, layer(stem, net.b, q["b.lowbit_output"]), stem)
    want = layer(y, net.out, q["out.lowbit_output"])
    with torch.no_grad():
        assert torch.equal(net.eval()(x).double(), want.real())
