"""Bytes and products against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_lowbit.reports.cost import count_products, float_bytes, layers_of, product_kind, sizes
from lightning_lowbit.reports.summary import summarize
from lightning_lowbit.schemes import convert


class Net(nn.Module):
    """A convolution, a group of transposed ones, a norm that is merged, one weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        nn.init.constant_(self.norm.bias, 0.5)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 6, bias=False)
        self.two.weight = self.one.weight
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.norm(self.conv(x)).relu()).mean((2, 3))
        z: Tensor = self.two(self.one(y).relu())
        return z * self.scale[0]


def converted() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    convert(net, "tqt", torch.rand(2, 2, 4, 4), weight_bits=4, first_last_weight_bits=2, bias="own", bias_bits=16)
    return net


def test_codes_count_with_their_bits_and_shared_weights_once() -> None:
    assert sizes(converted()) == {
        "conv": 72 * 4 // 8 + 4 * 2,  # its norm leaves a bias of 4 channels
        "up": 4 * 3 * 4 * 4 // 8 + 6 * 2,
        "one": 36 * 4 // 8 + 6 * 2,
        "": 5 * 4,
    }


def test_the_float_network_has_its_norm_and_four_bytes_a_number() -> None:
    numbers = 72 + (4 + 4 + 4 + 4) + (48 + 6) + (36 + 6) + 5
    assert float_bytes(converted()) == 4 * numbers == summarize(converted()).float_size


def test_products_are_those_of_one_sample() -> None:
    net = converted().train()
    expected = {"conv": 16 * 4 * 18, "up": 64 * 6 * 2, "one": 36, "two": 36}  # stride = window: 2 channels an output
    assert count_products(net, torch.rand(3, 2, 4, 4)) == expected
    assert net.training


def test_kinds_of_products() -> None:
    layers = layers_of(converted())
    assert product_kind(layers["conv"], 15) == "8×4→15"
    assert product_kind(layers["conv"], None) == "8×4"
    signs = nn.Sequential(nn.Linear(4, 4), nn.Hardtanh(), nn.Linear(4, 4), nn.Hardtanh(), nn.Linear(4, 2))
    convert(signs, "bnn", torch.randn(3, 4))
    assert product_kind(layers_of(signs)["2"], 4) == "xnor→4"
    still_open = nn.Sequential(nn.Linear(4, 4))
    convert(still_open, "tqt")
    assert product_kind(layers_of(still_open)["0"], None) == "float"


def test_the_table_has_them() -> None:
    report = summarize(converted())
    (line,) = [line for line in report.lines if line.site == "up"]
    assert line.mac.startswith("8×4→")
    assert line.bytes == 36
    assert report.size == 44 + 36 + 30 + 20
    assert f"{report.size} bytes of parameters, {report.size / report.float_size:.2f} of float32" in report.notes


def test_a_table_that_an_embedding_and_a_head_share_is_stored_in_float() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 10, bias=False)
            self.table = nn.Embedding(10, 6)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.table(x))
            return out

    net = Tied().eval()
    convert(net, "tqt", torch.arange(10), first_last_weight_bits=4)
    assert sizes(net) == {"table": 60 * 4}


def test_a_quantizer_says_what_it_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    net = converted()
    weight = net.get_submodule("up.lowbit_weight")
    assert weight.stored_bits == weight.grid().bits == 4  # type: ignore[operator]  # a Quantizer
    monkeypatch.setattr(type(weight), "stored_bits", property(lambda self: 3 if self is weight else self.grid().bits))
    assert sizes(net)["up"] == 4 * 3 * 4 * 3 // 8 + 6 * 2
    assert sizes(net)["conv"] == 72 * 4 // 8 + 4 * 2
