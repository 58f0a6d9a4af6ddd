"""The range of weights that learn from scratch: that of a Xavier draw, where theirs is smaller."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lowbit import Niti, convert


def made(recipe: str, scale: float) -> nn.Module:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.uniform_(-1, 1).mul_(scale).view(-1)[0] = scale
            layer.bias.zero_()
    convert(net, Niti(recipe=recipe), torch.rand(8, 64))
    return net


@pytest.mark.parametrize(
    ("recipe", "scale", "exponents"),
    [
        ("scratch", 2.0**-5, [-2 - 7, -1 - 7]),  # ceil(log2 sqrt(6/128)) = -2, ceil(log2 sqrt(6/74)) = -1
        ("scratch", 2.0**1, [1 - 7, 1 - 7]),  # larger than a draw: nothing is clipped
        ("finetune", 2.0**-5, [-5 - 7, -5 - 7]),  # what is pretrained keeps its last bit
    ],
)
def test_weights_that_learn_from_scratch_have_room_to_grow(recipe: str, scale: float, exponents: list[int]) -> None:
    net = made(recipe, scale)
    for layer, exponent in zip((net[0], net[2]), exponents, strict=True):
        assert int(layer.lowbit_weight.exponent()) == exponent
        assert layer.lowbit_weight.codes().abs().max() == min(127, scale * 2.0**-exponent)
        # A bias moves by the same share as the weights, so it has the same range on 15 bits.
        assert int(layer.lowbit_bias.exponent()) == exponent + 7 - 15
