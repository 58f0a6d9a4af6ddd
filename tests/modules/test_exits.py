"""User code gets ordinary tensors in evaluation, and carriers where a loss or another layer must see integers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lowbit import convert
from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.calibrate import calibrate
from lightning_lowbit.modules.carrier import Carrier
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.exits import Exit
from lightning_lowbit.modules.revert import revert


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))
        return y


class Heads(nn.Module):
    """Tensors in a dict and a tuple; ``features`` feed a head and leave as well."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = self.body(x)
        return {"features": features, "pair": (self.head(features), 3)}


class Whole(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Body()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class Steps(LightningModule):
    """No forward: the step calls one part, and then another one on its result."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = Body(), nn.Linear(3, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.net(batch[0])), batch[1])


class Parts(LightningModule):
    """The step calls a decoder that forward does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Body(), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.encoder(x)
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.decoder(self.encoder(batch[0])).square().mean()  # type: ignore[no-any-return]


class Stages(nn.Module):
    """Activation checkpointing, which a trace does not follow."""

    def __init__(self, stages: nn.ModuleList, reentrant: bool | None) -> None:
        super().__init__()
        self.stages, self.reentrant = stages, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x) if self.reentrant is None else checkpoint(stage, x, use_reentrant=self.reentrant)
        return x


def images() -> Tensor:
    return torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def converted(net: nn.Module, call: Callable[[Any, Tensor], Any] = lambda net, x: net(x)) -> Any:
    """Calibrated, and in evaluation mode."""
    convert(net, "niti")

    def run() -> int:
        call(net, images())
        return 1

    calibrate(net, run)
    switch_of(net).managed = True
    return net.eval()


def exits(net: nn.Module) -> list[str]:
    return [path for path, m in net.named_modules() if any(isinstance(h, Exit) for h in m._forward_hooks.values())]


def step(net: Any, x: Tensor) -> Any:
    return net.training_step((x, torch.zeros(len(x), dtype=torch.int64)), 0)


# -- evaluation ------------------------------------------------------------------------------------------------
def test_a_forward_of_the_whole_and_of_the_part_that_it_calls() -> None:
    net = converted(Whole())
    with torch.no_grad():
        for result in (net(images()), net.net(images())):
            assert type(result) is Tensor
    with torch.inference_mode():
        assert type(net.net(images())) is Tensor
    assert type(net(images())) is Carrier  # gradients may be asked for
    assert type(net.train().net(images())) is Carrier
    assert torch.equal(net.eval()(images()).plain(), result)


def test_structures() -> None:
    net = converted(Heads())
    with torch.no_grad():
        result = net(images())
    assert type(result["features"]) is Tensor
    assert type(result["pair"]) is tuple
    assert type(result["pair"][0]) is Tensor
    assert result["pair"][1] == 3
    result = net.train()(images())
    assert type(result["features"]) is Carrier
    assert type(result["pair"][0]) is Carrier


def test_a_step_that_hands_on_what_a_part_returns() -> None:
    net = converted(Steps(), step)
    with torch.no_grad():
        features = net.net(images())
        assert type(net.head(features)) is Tensor  # the head reads integers, so the body hands them out
        step(net, images())
    assert exits(net) == ["", "head"]


def test_a_part_that_the_trace_does_not_connect_reads_the_same_codes_in_evaluation() -> None:
    torch.manual_seed(0)
    net = converted(Parts(), step)
    with torch.no_grad():
        net.encoder.conv.weight.mul_(64.0)  # far out of the range that was calibrated
    net.train()
    seen: list[Any] = []
    net.decoder.register_forward_hook(lambda module, args, result: seen.append((args[0], result)))
    for _ in range(2):
        step(net, images())
    for _, quantizer in quantizers(net):
        quantizer.settle(reset=True)
    net.eval()
    with torch.no_grad():
        step(net, images())
    (_, (carried, result), (given, found)) = seen
    assert type(carried) is Carrier
    assert type(given) is Tensor
    assert torch.equal(given, carried.plain())
    assert torch.equal(found, result.plain())


# -- training --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant: bool) -> None:
    """Also where the forward runs without gradients and once more in the backward."""
    torch.manual_seed(0)
    stages = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)) for _ in range(3))
    ends = []
    for how in (None, reentrant):
        net = converted(Stages(copy.deepcopy(stages), None), lambda net, x: net(torch.linspace(-1, 2, 40).view(8, 5)))
        net.reentrant = how
        net.train()
        x = torch.linspace(-1, 2, 40).view(8, 5).requires_grad_()
        loss = F.cross_entropy(net(x), torch.arange(8) % 5)
        loss.backward()
        assert switch_of(net).run.float_errors == set()
        ends.append((loss, {path: m.gathered for path, m in net.named_modules() if hasattr(m, "gathered")}))
    assert torch.equal(ends[0][0], ends[1][0])
    for path, gathered in ends[0][1].items():
        assert gathered.keys() == {"weight", "bias"}
        for name, (acc, exponent) in gathered.items():
            assert torch.equal(acc, ends[1][1][path][name][0])
            assert torch.equal(exponent, ends[1][1][path][name][1])


# -- where they stand ------------------------------------------------------------------------------------------
def test_copies_and_pickles_and_goes_again() -> None:
    net = converted(Whole())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with torch.no_grad():
            assert type(twin(images())) is Tensor
    assert exits(net) == ["", "net.fc"]
    revert(net)
    assert exits(net) == []


def test_float_carrying_schemes_have_none() -> None:
    net = Whole()
    convert(net, "tqt")
    assert exits(net) == []
