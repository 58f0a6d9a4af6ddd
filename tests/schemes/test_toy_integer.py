"""The seam carries a scheme that trains in integers: carriers both ways, accumulators, its own update."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_script
from lightning.pytorch.callbacks import ModelCheckpoint
from schemes.toy_integer import ToyInteger, codes, exponent_of
from schemes.toy_ranks import GLOBAL_BATCH, SAMPLES, Net, data, trainer
from torch import Tensor, nn

from lightning_lowbit import convert
from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.carrier import Carrier
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
    switch_of(net).started = switch_of(net).managed = True
    return net


def on_grid(layer: Any) -> bool:
    exponent = layer.lowbit_exponent.to(torch.int32)
    return torch.equal(layer.weight, (codes(layer.weight, exponent) * pow2(exponent)).float())


def value(x: Any) -> Tensor:
    """Exact, of codes of any width."""
    return x.payload.double() * pow2(x.exponent, torch.float64)


# -- carriers ------------------------------------------------------------------------------------------------
def test_the_errors_of_a_fork_add_up_exactly_and_are_rounded_once() -> None:
    torch.manual_seed(0)
    net, x = converted(Net()), torch.randn(8, 6)
    before: list[Any] = []
    forked: list[Any] = []
    net.again.register_forward_hook(lambda module, args, result: before.append(result))
    net.relu.register_forward_hook(lambda module, args, result: forked.append(result))
    (a, b), arrived, left_behind = net(x), [], []
    forked[-1].register_hook(arrived.append)
    before[-1].register_hook(left_behind.append)
    losses = (a.square().sum(), 1024 * b.square().sum())
    for loss in (losses[0] + losses[1], *losses):
        loss.backward(retain_graph=True)
    total, left, right = arrived
    assert [part.payload.dtype for part in arrived] == [torch.int32, torch.int8, torch.int8]
    assert int(left.exponent) < int(right.exponent)
    assert torch.equal(value(total), value(left) + value(right))
    finest = exponent_of(total.payload)
    assert int(finest) > 0
    rounded = codes(total.payload, finest) * (forked[-1].payload > 0)
    assert torch.equal(left_behind[0].payload.double(), rounded)
    assert int(left_behind[0].exponent) == int(total.exponent + finest)


def test_a_layer_called_twice_has_an_error_for_each_call() -> None:
    torch.manual_seed(0)
    net, x, exponents = converted(Net()), torch.randn(8, 6), []
    net.again.register_forward_hook(lambda module, args, result: exponents.append(args[0].exponent))
    a, b = net(x)
    assert len(exponents) == 2
    (a.sum() + b.sum()).backward()
    (last, _), (first, _) = net.again.accumulated
    assert last.shape == first.shape == net.again.weight.shape
    assert not torch.equal(last, first)


def test_two_forwards_before_one_backward_keep_their_exponents() -> None:
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


class Between(nn.Module):
    """A view, a rectifier, and float code between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.flatten = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(self.a(x).view(-1, 2, 3)).relu()
        return self.c(torch.tanh(self.b(x)))


def test_carriers_pass_what_only_moves_values_and_end_at_float_code() -> None:
    torch.manual_seed(0)
    net = converted(Between())
    inputs: dict[str, Any] = {}
    for name in "abc":
        getattr(net, name).register_forward_hook(lambda module, args, result, name=name: inputs.update({name: args[0]}))
    net(torch.randn(4, 6)).sum().backward()
    assert {name: type(x) for name, x in inputs.items()} == {"a": Tensor, "b": Carrier, "c": Tensor}
    assert all(len(layer.accumulated) == 1 for layer in (net.a, net.b, net.c))


def test_values_between_layers_are_their_codes() -> None:
    torch.manual_seed(0)
    net, inputs = converted(Net()), []
    for layer in (net.again, net.left, net.right):
        layer.register_forward_hook(lambda module, args, result: inputs.append(args[0]))
    net(torch.randn(8, 6))
    assert len(inputs) == 4
    for x in inputs:
        assert x.payload.dtype is torch.int8
        assert torch.equal(x.plain().double(), value(x))
        assert torch.equal(x + 0.0, x.plain())


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


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_script(Path(__file__).with_name("toy_ranks.py"), folder, ranks=2, timeout=120)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_with_different_data_end_with_equal_weights(ranks: list[Any], tmp_path: Path) -> None:
    assert ranks[0]["losses"] != ranks[1]["losses"]
    for key, value in ranks[0]["state"].items():
        assert torch.equal(value, ranks[1]["state"][key]), key
    assert not torch.equal(ranks[0]["state"]["first.weight"], ranks[0]["start"]["first.weight"])
    # A gradient of one process alone would have led elsewhere.
    alone = Net()
    trainer(2, tmp_path).fit(alone, data(seed=0))
    assert not torch.equal(alone.first.weight, ranks[0]["state"]["first.weight"])
    assert exponent_of(alone.first.weight.detach()).dtype == torch.int32


def test_two_processes_compute_what_one_does(ranks: list[Any], tmp_path: Path) -> None:
    """The same global batches, the last of them with one sample; its repetition on the second process is no sample."""
    alone = Net()
    trainer(2, tmp_path).fit(alone, data(samples=SAMPLES, batch=GLOBAL_BATCH))
    for key, value in alone.state_dict().items():
        assert torch.equal(value, ranks[0]["shared"][key]), key
        assert torch.equal(value, ranks[1]["shared"][key]), key
