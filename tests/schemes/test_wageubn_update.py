"""WAGEUBN's update: integers that close, settings of the user's optimizer, noise, and what a run's checkpoint keeps."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from schemes.wageubn_nets import (
    chain,
    constant,
    converted,
    direct,
    draws,
    images,
    labels,
    on_grid,
    rule,
    sgd,
    step,
    train,
    weights,
)
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from lightning_lowbit import Wageubn, lowbit_step
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import StepContext, switch_of
from lightning_lowbit.numerics.momentum import UpdateFormat, float_step

LAYERS = ("0.weight", "2.weight", "5.weight", "9.weight")
OTHERS = ("0.bias", "3.weight", "3.bias", "5.bias", "9.bias")


def gradients(net: Any, x: Tensor) -> dict[str, Tensor]:
    """Of cross entropy, in float32, as the rule finds them."""
    twin = copy.deepcopy(net)
    switch_of(twin).managed = True
    F.cross_entropy(twin(x), labels(len(x))).backward()
    return {name: p.grad.clone() for name, p in twin.named_parameters()}


def moved(net: Any, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}


def own(net: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def injected(net: Any) -> Any:
    switch_of(net).run.injected = draws
    return net


# -- the formula ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.75])
@pytest.mark.parametrize("lr", [0.05, 0.75])
def test_two_steps_are_the_formula_of_gradients_that_are_at_hand(lr: float, momentum: float) -> None:
    net = injected(converted(chain(), weight_range="one"))
    optimizer, format = sgd(net, lr, momentum), UpdateFormat()
    rates = round(lr * 512), round(momentum * 4)
    acc: dict[str, Tensor] = {}
    for number in range(2):
        x = images(seed=number)
        found, before = gradients(net, x), own(net)
        step(net, optimizer, x)
        for name, p in net.named_parameters():
            exact = found[name].double()
            draw = draws(name, "gradient", 1, exact.numel()).reshape(exact.shape)
            g = constant(exact, draw) if name in LAYERS else direct(exact, 15)
            w, old = direct(before[name].double(), 24), acc.get(name, torch.zeros_like(exact))
            w, acc[name], _ = float_step(w, old, g, *rates, format, bits=8 if name in LAYERS else None)
            assert torch.equal(p.double(), w), name
            assert torch.equal(rule(net).accumulators[name].double() * 2.0**-12, acc[name]), name


def test_weights_decay_and_nothing_else_does() -> None:
    net = injected(converted(chain()))
    before = own(net)
    step(net, sgd(net, 0.5, 0.0, weight_decay=0.1), images(), lambda y: y.sum() * 0.0)
    for name in OTHERS:
        assert torch.equal(net.get_parameter(name).double(), direct(before[name].double(), 24))
    for name in LAYERS:
        towards = (before[name].abs() - net.get_parameter(name).detach().abs())[
            before[name].abs() > 0.5 * before[name].abs().max()
        ]
        assert bool((towards > 0).all()), name


def test_each_group_s_rate_and_momentum_are_its_own() -> None:
    net = injected(converted(chain()))
    groups = [{"params": [net[2].weight]}, {"params": [net[5].weight], "lr": 0.5, "momentum": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.125, momentum=0.0)
    codes = []
    for number in range(2):
        before = own(net)
        step(net, optimizer, images(seed=number))
        change = {
            name: (before[name] - net.get_parameter(name).detach())
            / 2.0 ** weights(net)[f"{name.split('.')[0]}.lowbit_weight"].power
            for name in ("2.weight", "5.weight")
        }
        codes.append({name: value * 2.0**14 for name, value in change.items()})
    for number in range(2):
        assert float((codes[number]["2.weight"] / 0.125).abs().max()) < 128
        assert on_grid(codes[1]["2.weight"] / 0.125, 0)
    assert float((codes[1]["5.weight"] / 0.5).abs().max()) > 128  # the gradient, and half the one before
    assert moved(net, own(net)) == set()
    assert {"2.weight", "5.weight"} == rule(net).accumulators.keys()  # the others are in no group


def test_schedulers_set_the_rate() -> None:
    net = injected(converted(chain()))
    optimizer = sgd(net, 0.5, 0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.25)
    largest = []
    for number in range(3):
        before = own(net)
        step(net, optimizer, images(seed=number))
        largest.append(float((before["2.weight"] - net[2].weight.detach()).abs().max()))
        scheduler.step()
    unit = 2.0 ** (weights(net)["2.lowbit_weight"].power - 14)
    for rate, change in zip((0.5, 0.125, 16 / 512), largest, strict=True):
        assert 64 * unit * rate < change <= 127 * unit * rate


def test_a_rate_below_the_grid_moves_by_a_unit_and_is_named() -> None:
    net = converted(chain())
    before, said = own(net), "learning rate 0.0001 rounds to 0 and is raised to 0.001953125"
    step(net, sgd(net, 1e-4), images())
    assert moved(net, before) >= set(LAYERS)
    assert any(said in words for words in rule(net).news())
    with pytest.warns(UserWarning, match=said):  # no schedule that passes by
        step(net, sgd(net, 1e-4), images())
    step(net, sgd(net, 1e-4), images())  # said once
    assert rule(net).news() == []
    before = own(net)
    step(net, sgd(net, 0.0), images())
    assert moved(net, before) == set()


def test_a_rate_and_a_momentum_beyond_the_grid_are_named() -> None:
    net = converted(chain())
    step(net, sgd(net, 1.5, 0.9), images())
    told = rule(net).news()
    assert any("learning rate 1.5 is lowered to 0.998" in words for words in told)
    assert any("momentum 0.9 is lowered to 0.75" in words for words in told)
    assert rule(net).news() == []


def test_the_scheme_s_momentum_replaces_the_group_s() -> None:
    results = []
    for given, group in ((0.5, 0.9), (None, 0.5), (None, 0.75)):
        net = injected(converted(chain(), momentum=given))
        optimizer = sgd(net, 0.25, group)
        for number in range(3):
            step(net, optimizer, images(seed=number))
        results.append(own(net))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not torch.equal(results[0]["2.weight"], results[2]["2.weight"])


def test_widths_that_do_not_close_are_refused_unless_they_may_round() -> None:
    for options in ({"accumulator_bits": 12}, {"lr_bits": 8}, {"stored_bits": 28}, {"momentum_bits": 4}):
        with pytest.raises(ConfigError, match=r"expected (gradient|weight) = .*exact=False"):
            Wageubn(**options)  # type: ignore[arg-type]  # widths
        net = train(converted(chain(), exact=False, **options), 1)
        assert on_grid(net[2].weight.detach() * 2.0 ** -weights(net)["2.lowbit_weight"].power, 27)
    Wageubn(momentum_bits=5, accumulator_bits=11)


# -- variants ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight_range", ["one", "fit"])
def test_fake_is_the_user_s_optimizer_on_the_stored_grid(weight_range: str) -> None:
    net = injected(converted(chain(), update="fake", weight_range=weight_range))
    twin = [torch.zeros_like(p, dtype=torch.float64) for p in net.parameters()]
    optimizer = sgd(net, 0.1, 0.9, 0.01)
    for number in range(2):
        x = images(seed=number)
        found, before = gradients(net, x), own(net)
        step(net, optimizer, x)
        for place, (name, p) in enumerate(net.named_parameters()):
            g = found[name].double()
            if name in LAYERS:
                g = constant(g, draws(name, "gradient", 1, g.numel()).reshape(g.shape))
            twin[place] = 0.9 * twin[place] + g + 0.01 * before[name].double()
            torch.testing.assert_close(
                p.detach().double(), before[name].double() - 0.1 * twin[place], atol=1e-6, rtol=0
            )
            assert on_grid(p * 2.0 ** -rule(net).stored[name].power, 23)
    assert rule(net).masters == rule(net).accumulators == {}


def test_float_leaves_weights_where_the_optimizer_puts_them() -> None:
    for gradients_too in (True, False):
        net = injected(converted(chain(), update="float", gradients=gradients_too))
        x = images()
        found, before = gradients(net, x), own(net)
        step(net, sgd(net, 0.1, 0.0), x)
        for name, p in net.named_parameters():
            g = found[name]
            if name in LAYERS and gradients_too:
                g = constant(g.double(), draws(name, "gradient", 1, g.numel()).reshape(g.shape)).float()
            torch.testing.assert_close(p.detach(), before[name] - 0.1 * g, atol=1e-7, rtol=1e-6)
        assert not on_grid(net[2].weight, 23)


def test_nearest_rounding_is_without_noise() -> None:
    net = converted(chain(), rounding="nearest", weight_range="one")
    x = images()
    found, before = gradients(net, x), own(net)
    step(net, sgd(net, 0.5, 0.0), x)
    for name in LAYERS:
        g = found[name].double()
        exponent = torch.round(torch.log2(g.abs().max()))
        codes = torch.round(128 * g / 2.0**exponent).clamp(-127, 127)
        assert torch.equal(net.get_parameter(name).double(), direct(before[name].double(), 24) - codes * 2.0**-15)


@pytest.mark.parametrize("dr", [2, 8, 32])
def test_gradients_stay_below_dr(dr: int) -> None:
    net = converted(chain(), dr=dr, check=True, weight_range="one")
    before = own(net)
    step(net, sgd(net, 0.5, 0.0), images())
    for name in LAYERS:
        codes = (direct(before[name].double(), 24) - net.get_parameter(name).double()) * 2.0**15
        assert dr // 2 < int(codes.abs().max()) < dr or dr == 2
        assert on_grid(codes, 0, dr - 1)


# -- noise ---------------------------------------------------------------------------------------------------
def change(seed: int, at: int, name: str = "2.weight") -> Tensor:
    net = converted(chain(), seed=seed)
    before = own(net)[name]
    step(net, sgd(net, 0.5, 0.0), images(), context=StepContext(at, 100))
    result: Tensor = before - net.get_parameter(name).detach()
    return result


def test_noise_is_of_the_seed_the_step_and_the_parameter() -> None:
    assert torch.equal(change(0, 3), change(0, 3))
    torch.manual_seed(77)
    assert torch.equal(change(0, 3), change(0, 3))  # not of torch's generator
    assert not torch.equal(change(0, 3), change(0, 4))
    assert not torch.equal(change(0, 3), change(1, 3))
    net = converted(chain())
    seen = [rule(net)._draws(name, net[2].weight, StepContext(0, 1)) for name in ("2.weight", "5.weight")]
    assert seen[0] is not None
    assert seen[1] is not None
    assert not torch.equal(*seen)
    assert abs(float(seen[0].mean()) - 0.5) < 0.05


# -- what the optimizer holds --------------------------------------------------------------------------------
def test_accumulated_gradients_are_quantized_once() -> None:
    net = injected(converted(chain(), norms=False))
    with torch.no_grad():
        net[3].eval()  # the sum is then that of the two batches
    x = images(16, 3, 8, 8)
    found = [gradients(net, part) for part in x.chunk(2)]
    before, optimizer = own(net), sgd(net, 0.5, 0.0)
    switch_of(net).managed = True
    for part in x.chunk(2):
        F.cross_entropy(net(part), labels(8)).backward()
    lowbit_step(net, optimizer)
    for name in LAYERS:
        g = (found[0][name] + found[1][name]).double()
        codes = constant(g, draws(name, "gradient", 1, g.numel()).reshape(g.shape))
        unit = 2.0 ** weights(net)[f"{name.split('.')[0]}.lowbit_weight"].power
        want = direct(before[name].double() / unit, 24).clamp(-127 / 128, 127 / 128) - 0.5 * codes
        assert torch.equal(net.get_parameter(name).double() / unit, want.clamp(-127 / 128, 127 / 128)), name


def test_frozen_parameters_stay_and_the_rest_learns() -> None:
    net = converted(chain())
    frozen = {"2.weight", "3.weight", "9.bias"}
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    before = own(net)
    train(net, 2)
    assert moved(net, before) == {*LAYERS, *OTHERS} - frozen
    assert not frozen & rule(net).accumulators.keys()


def test_tied_weights_are_one_and_their_gradients_are_summed() -> None:
    def tied() -> Any:
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)))
        net[2].weight = net[1].weight
        return injected(converted(net, images(8, 6)))

    net = tied()
    assert [name for name in rule(net).stored if name.split(".")[0] in "12"] == ["1.weight"]
    x = images(8, 6)
    twin, before = copy.deepcopy(net), own(net)
    switch_of(twin).managed = True
    F.cross_entropy(twin(x), labels(8, 6)).backward()
    step(net, sgd(net, 0.5, 0.0), x)
    g = twin[1].weight.grad.double()
    unit = 2.0 ** weights(net)["1.lowbit_weight"].power
    want = direct(before["1.weight"].double() / unit, 24) - 0.5 * constant(
        g, draws("1.weight", "", 1, 36).reshape(6, 6)
    )
    assert torch.equal(net[1].weight.double() / unit, want.clamp(-127 / 128, 127 / 128))
    assert net[2].weight is net[1].weight


def test_a_pruned_layer_keeps_its_zeros_and_learns() -> None:
    net = chain()
    l1_unstructured(net[2], "weight", 0.5)
    net = converted(net)
    zero = net[2].weight_mask == 0
    before = net[2].weight_orig.detach().clone()
    train(net, 3)
    assert "2.weight" in rule(net).masters
    assert not torch.equal(net[2].weight_orig, before)
    assert bool((net[2].weight[zero] == 0).all())
    assert torch.equal(net[2].weight_orig[zero], net[2].weight_orig[zero])
    assert on_grid(net[2].weight_orig.detach() * 2.0 ** -weights(net)["2.lowbit_weight"].power, 23)


def test_two_optimizers_step_what_they_hold() -> None:
    net = converted(chain())
    first = torch.optim.SGD(net[:5].parameters(), 0.25)
    second = torch.optim.SGD(net[5:].parameters(), 0.25)
    before = own(net)
    step(net, first, images())
    half = {name for name in before if int(name.split(".")[0]) < 5}
    assert moved(net, before) == half
    before = own(net)
    step(net, second, images())
    assert moved(net, before) == before.keys() - half


def test_weights_written_by_hand_between_steps_are_where_integers_go_on() -> None:
    net = train(converted(chain()), 2)
    with torch.no_grad():
        net[2].weight.mul_(0.5)
    before = net[2].weight.detach().clone()
    train(net, 1)
    assert float((net[2].weight.detach() - before).abs().max()) < 0.25 * 300 * 2.0**-14


def test_maximize_goes_up() -> None:
    losses = {}
    for up in (False, True):
        net = converted(chain())
        optimizer = torch.optim.SGD(net.parameters(), 0.1, maximize=up)
        losses[up] = [float(step(net, optimizer, images())) for _ in range(6)]
    assert losses[False][-1] < losses[False][0] < losses[True][-1]


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, 0.5, nesterov=True), "nesterov"),
        (lambda p: torch.optim.SGD(p, 0.1, 0.5, dampening=0.5), "dampening"),
        (lambda p: torch.optim.Adam(p, 0.1), "betas"),
    ],
    ids=["nesterov", "dampening", "Adam"],
)
def test_settings_that_integers_do_not_know_are_named(make: Any, word: str) -> None:
    net = converted(chain())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        step(net, make(net.parameters()), images())
    said = [str(w.message) for w in told] + rule(net).news()
    assert any(word in words and "fake" in words for words in said)


def test_every_group_s_rate_and_momentum_are_named() -> None:
    net = converted(chain())
    groups = [{"params": net[:5].parameters()}, {"params": net[5:].parameters(), "lr": 1e-5, "momentum": 0.9}]
    optimizer = torch.optim.SGD(groups, 0.25, 0.25)
    step(net, optimizer, images())
    told = rule(net).news()
    assert any("learning rate 1e-05 rounds to 0" in words for words in told)
    assert any("momentum 0.9 is lowered to 0.75" in words for words in told)
    with pytest.warns(UserWarning, match="learning rate 1e-05 rounds to 0"):
        step(net, optimizer, images())


def test_layout_in_memory_changes_no_bit() -> None:
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = converted(chain().to(memory_format=layout))
        for number in range(2):
            step(net, sgd(net, 0.25), images(seed=number).to(memory_format=layout))
        found.append(own(net))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
