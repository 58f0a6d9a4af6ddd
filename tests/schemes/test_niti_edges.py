"""Inputs and states at the edges: nothing crashes without a name, and nothing stops learning unseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from schemes.niti_nets import Net, body, fit, images, loader, on_grid
from torch import Tensor, nn

from lightning_lowbit import Niti, convert, lowbit_step
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import Site, Tally, switch_of
from lightning_lowbit.modules.block import BlockInput
from lightning_lowbit.modules.carrier import plain
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.plugins.integer_run import run_notes
from lightning_lowbit.plugins.precision import rule_of

X, Y = images()


def trained(net: nn.Module, x: Tensor, y: Tensor, steps: int = 3, scheme: Niti | None = None) -> nn.Module:
    """A plain loop of few steps on one batch."""
    convert(net, Niti() if scheme is None else scheme, x)
    switch_of(net).managed = True
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(steps):
        switch_of(net).run.batch = step
        F.cross_entropy(net.train()(x), y).backward()
        lowbit_step(net, optimizer)
    return net


def finite(net: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return bool(torch.isfinite(plain(net.eval()(x))).all())


@pytest.mark.parametrize("x", [X * 0, X * 0 + 3.0, X * 1e30, X * 1e-30, X * 1e-42], ids=[
    "zeros", "constant", "huge", "tiny", "subnormal",
])  # fmt: skip
def test_inputs_of_any_size_train_without_a_crash(x: Tensor) -> None:
    net, *_ = fit(data=loader(x))
    assert on_grid(net)
    assert finite(net, x)
    assert switch_of(net).run.clamped == 0


@pytest.mark.parametrize("zero", ["weights", "biases", "both", "one layer"])
def test_a_network_of_zeros_trains(zero: str) -> None:
    def net() -> Net:
        made = Net()
        with torch.no_grad():
            for name, p in made.named_parameters():
                if zero == "both" or name.endswith({"weights": "weight", "biases": "bias"}.get(zero, "5.weight")):
                    p.zero_()
        return made

    after, _, callback = fit(net=net)
    assert on_grid(after)
    last = after.body[5]
    assert float(last.bias.detach().abs().max()) > 0
    if zero == "both":  # nothing comes out of the first layer, ever: the gradients are zero, and that is said
        assert callback.rule.stopped() == ["body.0", "body.5"]
    else:  # a weight of zeros has a range in which an update can be seen
        assert float(last.weight.detach().abs().max()) > 2.0**-8
        assert callback.rule.stopped() == []


@pytest.mark.parametrize("batch", [1, 43], ids=["one by one", "one left over"])
def test_batches_of_one(batch: int) -> None:
    net, *_ = fit(data=loader(batch=batch))
    assert on_grid(net)
    assert len(net.losses) >= 4


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2), (7, 5)], ids=str)
def test_odd_maps(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(5, 3, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3),
    )  # fmt: skip
    x = torch.randn(6, 1, *size)
    before = net[0].weight.detach().clone()
    trained(net, x, Y[:6])
    assert on_grid(net)
    assert finite(net, x)
    assert not torch.equal(net[0].weight, before)


def test_a_dead_layer_is_named() -> None:
    def net() -> Net:
        made = Net()
        with torch.no_grad():
            made.body[0].bias.fill_(-50)  # type: ignore[index, union-attr, operator]
        return made

    after, _, callback = fit(net=net)
    assert callback.rule.stopped() == ["body.0", "body.5"]
    (note,) = [note for note in run_notes(after, callback.rule) if "no longer learning" in note]
    assert "body.0, body.5" in note
    alive = fit()[2].rule
    assert alive.stopped() == []


def test_a_layer_that_learns_again_is_no_longer_named() -> None:
    net = trained(body(), X[:8] * 0, Y[:8], steps=12)
    rule: Any = rule_of(net)
    assert rule.stopped() == ["0"]
    F.cross_entropy(net.train()(X[:8]), Y[:8]).backward()
    lowbit_step(net, torch.optim.SGD(net.parameters(), 0.1))
    assert rule.stopped() == []


# -- exponents -------------------------------------------------------------------------------------------------
def deep(exponent: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0**exponent)
    return net, torch.randn(6, 4)


@pytest.mark.parametrize("exponent", [-60, -40, 20, 30])
def test_exponents_at_the_limits_are_clamped_and_counted(exponent: int) -> None:
    net, x = deep(exponent)
    trained(net, x, torch.tensor([0, 1, 2, 0, 1, 2]), scheme=Niti(recipe="finetune"))
    assert on_grid(net)
    clamped = int(switch_of(net).run.clamped)
    assert (clamped > 0) == (exponent == -60)
    assert bool([note for note in run_notes(net, rule_of(net)) if f"{clamped} exponents left" in note]) == bool(clamped)


def test_a_network_beyond_float32_is_refused_in_calibration() -> None:
    net, x = deep(60)
    with pytest.raises(ConfigError, match="lowbit_accumulator: 24 NaN or infinite values in calibration"):
        convert(net, Niti(), x)


# -- what is no number -----------------------------------------------------------------------------------------
class Late(Net):
    """``spoil`` acts on one batch of the second epoch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        now = self.trainer.training and self.trainer.global_step == 8
        x, factor = self.spoil(batch[0].clone()) if now else (batch[0], 1.0)
        return super().training_step([x, batch[1]], batch_idx) * factor

    def spoil(self, x: Tensor) -> tuple[Tensor, float]:
        raise NotImplementedError


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_value_in_a_batch_that_is_no_number_is_an_error_with_a_name(value: float) -> None:
    class Spoiled(Late):
        def spoil(self, x: Tensor) -> tuple[Tensor, float]:
            x[0, 0, 0, 0] = value
            return x, 1.0

    with pytest.raises(ConfigError, match=r"body\.0\.lowbit_input: got NaN, infinite values.*earlier checkpoint"):
        fit(net=Spoiled)


def test_the_same_in_calibration() -> None:
    x = X.clone()
    x[3] = float("nan")
    with pytest.raises(ConfigError, match=r"body\.0\.lowbit_input: 36 NaN or infinite values in calibration"):
        fit(data=loader(x))


def test_a_float_loss_that_is_no_number_is_an_error_with_a_name() -> None:
    class Spoiled(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            factor = float("nan") if self.trainer.global_step == 8 else 1.0
            return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).float()) * factor

    with pytest.raises(ConfigError, match=r"body\.5\.lowbit_error.*: got NaN, infinite values"):
        fit(net=Spoiled)


@pytest.mark.parametrize(("factor", "moves"), [(float("nan"), False), (float("inf"), True), (0.0, False)], ids=str)
def test_the_integer_loss_ignores_a_factor_of_any_kind(factor: float, moves: bool) -> None:
    """The value is the user's to look at; no weight is spoiled, and a layer that gets nothing is named."""

    class Spoiled(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * factor

    net, _, callback = fit(net=Spoiled)
    assert on_grid(net)
    assert finite(net, X)
    assert callback.rule.stopped() == ([] if moves else ["body.0", "body.5"])


# -- batches and classes ---------------------------------------------------------------------------------------
def test_an_empty_batch_moves_nothing() -> None:
    net = trained(body(), X[:8], Y[:8])
    before = [p.detach().clone() for p in net.parameters()]
    ranges = {name: b.clone() for name, b in net.named_buffers()}
    for loss in (lambda y: F.cross_entropy(y, Y[:0]), lambda y: y.sum()):
        loss(net(X[:0])).backward()
        lowbit_step(net, torch.optim.SGD(net.parameters(), 0.1))
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    changed = {
        name: (float(ranges[name]), float(b)) for name, b in net.named_buffers() if not torch.equal(b, ranges[name])
    }
    assert changed == {}
    with torch.no_grad():
        assert net.eval()(X[:0]).shape == (0, 3)


@pytest.mark.parametrize("classes", [1, 2, 1000, 3000])
def test_any_number_of_classes(classes: int) -> None:
    torch.manual_seed(0)
    x, y = X.flatten(1), torch.arange(len(X)) * max(classes // len(X), 1) % classes
    net = nn.Sequential(nn.Linear(36, classes))
    start = float(F.cross_entropy(net(x), y).detach())
    before = net[0].weight.detach().clone()
    trained(net, x, y, steps=8)
    if classes == 1:
        return
    assert not torch.equal(net[0].weight, before)
    with torch.no_grad():
        assert float(F.cross_entropy(plain(net.eval()(x)), y)) < start


def test_equal_logits_of_many_classes_send_errors() -> None:
    """1 / 3000 of 2^11 is nothing: many classes get more bits."""
    net = nn.Sequential(nn.Linear(4, 3000))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    convert(net, Niti(), torch.ones(2, 4))
    switch_of(net).managed = True
    F.cross_entropy(net.train()(torch.ones(2, 4)), torch.tensor([0, 1])).backward()
    layer: Any = net[0]
    err = layer.gathered["bias"][0]
    assert (err[:2] < 0).all()
    assert err[2:].any()


def test_saturated_are_codes_at_the_ends_of_what_is_counted() -> None:
    net = Net()
    convert(net.eval(), Niti(), X)
    switch, x = switch_of(net), 3 * X
    switch.tally = Tally()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(4)
        net(x)
    tally, switch.tally = switch.tally, None
    shares = {key: tally.share(key) for key in tally.seen}
    made = {q.site.key: q for _, q in quantizers(net)}
    for key in ("body.0.lowbit_weight", "body.5.lowbit_weight"):
        codes: Any = made[key]
        assert shares[key] == float((codes.codes().abs() == 127).double().mean()) > 0
    assert shares["body.0.lowbit_accumulator"] > 0
    rounded = torch.round(x * 2.0 ** -float(made["body.0.lowbit_input"].exponent()))
    assert shares["body.0.lowbit_input"] == float((rounded.abs() >= 127).double().mean()) > 0


def test_what_cannot_be_counted_has_no_share() -> None:
    class Silent(BlockInput):
        saturated = Quantizer.saturated

    tally, site = Tally(), Site("a", "input", "linear")
    tally.count(Silent(site), X)
    assert tally.share(site.key) is None
    tally.count(BlockInput(site), torch.zeros(4))
    assert tally.share(site.key) == 0
