"""The seam carries a scheme that trains in integers: links both ways, accumulators, its own update."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from schemes.toy_integer import ToyInteger, codes, exponent_of
from schemes.toy_ranks import Net, data, trainer
from torch import Tensor, nn

from lightning_lowbit import convert
from lightning_lowbit.modules.base import Link, switch_of
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.numerics.exponent import pow2

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def converted(net: nn.Module) -> nn.Module:
    convert(net, ToyInteger())
    switch_of(net).started = True
    return net


def on_grid(layer: Any) -> bool:
    exponent = layer.lowbit_exponent.to(torch.int32)
    return torch.equal(layer.weight, (codes(layer.weight, exponent) * pow2(exponent)).float())


# -- links ---------------------------------------------------------------------------------------------------
def test_a_fork_takes_the_finest_error_and_is_quantized_once() -> None:
    torch.manual_seed(0)
    net = converted(Net())
    x = torch.randn(8, 6)
    a, b = net(x)
    (left_link,), (right_link,) = net.left.links.present, net.right.links.present
    assert left_link is not right_link
    assert torch.equal(left_link.exponent, right_link.exponent)  # one tensor, one grid
    (a.sum() + 1024 * b.sum()).backward()
    assert left_link.err_exponent < right_link.err_exponent
    (relu,) = (m for n, m in net.named_modules() if n == "lowbit_relu_2")
    (source,) = relu.links.present
    assert torch.equal(source.error_exponent(), left_link.err_exponent)
    assert len(net.left.accumulated) == len(net.right.accumulated) == 1


def test_a_layer_called_twice_takes_its_links_in_turn() -> None:
    torch.manual_seed(0)
    net = converted(Net())
    x = torch.randn(8, 6)
    assert len(net.again.links.calls) == 2
    seen: list[Link] = []
    net.again.register_forward_hook(lambda module, args, result: seen.append(module.links.present[0]))
    a, b = net(x)
    assert seen[0] is not seen[1]
    (a.sum() + b.sum()).backward()
    assert all(link.err_exponent is not None for link in seen)
    assert len(net.again.accumulated) == 2
    # An interrupted forward does not shift the turns: entering the network begins anew.
    net.again(torch.randn(8, 8))
    net(x)
    assert net.again.links.turn == 2


def test_two_forwards_before_one_backward_keep_their_links() -> None:
    """The error of each pass comes back on its own grid: the backward checks that it is integers."""
    torch.manual_seed(0)
    net, x = converted(Net()), torch.randn(8, 6)
    alone = copy.deepcopy(net)
    small, large = net(x * 1e-3), net(x * 1e3)
    loss = sum(1e-4 * t.square().sum() for t in small) + sum(t.square().sum() for t in large)
    loss.backward()
    for scale, factor in ((1e-3, 1e-4), (1e3, 1.0)):
        sum(factor * t.square().sum() for t in alone(x * scale)).backward()
    for layer, twin in ((net.first, alone.first), (net.again, alone.again)):
        together = sorted((int(e), acc.tolist()) for acc, e in layer.accumulated)
        assert together == sorted((int(e), acc.tolist()) for acc, e in twin.accumulated)


def test_links_pass_what_only_moves_values_and_stop_at_float_code() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 6, bias=False) for _ in range(3))
            self.flatten = nn.Flatten()

        def forward(self, x: Tensor) -> Tensor:
            x = self.flatten(self.a(x).view(-1, 2, 3)).relu()
            return self.c(torch.tanh(self.b(x)))

    torch.manual_seed(0)
    net = converted(Between())
    net(torch.randn(4, 6)).sum().backward()
    (into_b,), (into_c,) = net.b.links.present, net.c.links.present
    assert into_b is not None
    assert into_b.err_exponent is not None
    assert into_c is None  # tanh is float: its reader finds the exponent from the values
    assert net.a.links.present == [None]  # as does the first layer
    twin = copy.deepcopy(net)
    assert twin.b.links.calls[0][0][0] is not net.b.links.calls[0][0][0]
    twin(torch.randn(4, 6)).sum().backward()
    assert net.b.links.present == [into_b]


def test_values_between_layers_lie_on_the_linked_grid() -> None:
    torch.manual_seed(0)
    net, results = converted(Net()), []
    for layer in (net.again, net.left, net.right):
        layer.register_forward_hook(lambda m, args, result: results.append((args[0], m.links.present[0].exponent)))
    net(torch.randn(8, 6))
    assert len(results) == 4
    for x, exponent in results:
        assert torch.equal(x, (codes(x, exponent) * pow2(exponent)).float())


# -- runs -------------------------------------------------------------------------------------------------
def test_one_process(tmp_path: Path) -> None:
    net = Net()
    trainer(4, tmp_path).fit(net, data())
    layers = [m for m in net.modules() if isinstance(m, LowBitLayer)]
    assert len(layers) == 4
    for layer in layers:
        assert on_grid(layer)
        assert layer.weight.grad is None
        assert layer.accumulated == []
    assert sum(net.losses[-8:]) < 0.95 * sum(net.losses[:8])


def test_resume_is_bit_equal(tmp_path: Path) -> None:
    whole, second = Net(), Net()

    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)

    trainer(4, tmp_path, keep()).fit(whole, data())
    torch.manual_seed(99)
    trainer(4, tmp_path, keep()).fit(second, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert whole.losses[-16:] == second.losses[-16:]
    state = second.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())


def test_two_processes_with_different_data_end_with_equal_weights(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "toy_ranks.py"), str(tmp_path)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0]["losses"] != ranks[1]["losses"]
    for key, value in ranks[0]["state"].items():
        assert torch.equal(value, ranks[1]["state"][key]), key
    assert not torch.equal(ranks[0]["state"]["first.weight"], ranks[0]["start"]["first.weight"])
    # A gradient of one process alone would have led elsewhere.
    alone = Net()
    trainer(2, tmp_path).fit(alone, data(seed=0))
    assert not torch.equal(alone.first.weight, ranks[0]["state"]["first.weight"])
    assert exponent_of(alone.first.weight.detach()).dtype == torch.int32
