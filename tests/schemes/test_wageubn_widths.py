"""How many bits WAGEUBN's tensors have: what calibration gives, what training changes, what is reported."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from schemes.conformance import loader, net, trainer
from schemes.wageubn_nets import (
    Wired,
    chain,
    converted,
    images,
    leave,
    on_grid,
    reach,
    rule,
    sgd,
    step,
    train,
    weights,
    widths,
)
from torch import Tensor, nn

from lightning_lowbit import QuantCallback, Wageubn, summarize
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.numerics.widths import integer_bits

IN = "0.lowbit_input"
RELU = "1.lowbit_output"
SMALL: dict[str, Any] = {"io": "none"}


def linear(*sizes: int) -> Any:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def still(net: Any, x: Tensor, steps: int = 1) -> None:
    """Steps that move no weight."""
    for _ in range(steps):
        step(net, sgd(net, 0.0), x)


# -- calibration ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", ["fixed_width", "fixed_unit"])
@pytest.mark.parametrize("criterion", ["max", "percentile", "mse", "kl_j"])
def test_calibration_gives_the_integer_bits_of_its_criterion(criterion: Any, policy: Any) -> None:
    x = torch.full((2000, 5), 0.1)
    x[7, 3] = -8.0
    options = {"act_init": criterion, "percentile": 90.0, "act_format": policy, "act_bits": 4}
    quantizer = widths(converted(linear(5, 8, 4), x, **options))[IN]
    fraction = 3 if policy == "fixed_unit" else None
    want = integer_bits(x, criterion, 4, True, 90.0, fraction)
    most = integer_bits(x, "max", 4, True, 90.0, fraction)
    assert abs(quantizer.integer - want) <= (criterion in ("percentile", "kl_j"))  # those by a histogram
    assert quantizer.integer < most or criterion == "max" or policy == "fixed_unit"
    assert quantizer.format.fraction == (3 if policy == "fixed_unit" else 3 - quantizer.integer)
    assert quantizer.format.total == (4 + quantizer.integer if policy == "fixed_unit" else 4)


@pytest.mark.parametrize(("largest", "signed", "integer"), [
    (0.99, True, 0), (0.998, True, 1), (1.0, True, 1), (2.85, True, 2), (0.06, True, -4),
    (0.998, False, 0), (1.0, False, 1), (2.85, False, 2), (0.06, False, -4),
])  # fmt: skip
def test_signed_and_unsigned_values_get_what_they_need(largest: float, signed: bool, integer: int) -> None:
    x = torch.tensor([[largest, -largest / 2 if signed else 0.0, 0.0]])
    net = converted(nn.Sequential(nn.ReLU(), nn.Linear(3, 2)) if not signed else linear(3, 4, 2), x)
    quantizer = widths(net)["0.lowbit_output" if not signed else IN]
    assert (quantizer.signed, quantizer.integer) == (signed, integer)
    assert quantizer.format.fraction == 8 - signed - integer
    y = quantizer(x)
    assert on_grid(y, quantizer.format.fraction, 127 if signed else 255, -127 if signed else 0)
    assert float((y - x).abs().max()) <= quantizer.format.step / 2


# -- training ------------------------------------------------------------------------------------------------
def test_widths_grow_at_once_and_shrink_after_long_idleness() -> None:
    x = images(64, 6)
    x /= x.abs().max()
    net = converted(linear(6, 8, 4), 0.9 * x, width_patience=3)
    quantizer = widths(net)[IN]
    assert quantizer.integer == 0
    still(net, 1.9 * x)
    assert (quantizer.integer, float(quantizer.width[0])) == (1, 1.0)
    still(net, 7 * x)  # by one bit a step
    assert quantizer.integer == 2
    still(net, 7 * x)
    assert quantizer.integer == 3
    still(net, 0.9 * x, 2)
    still(net, 5 * x)  # the top bit is used: idleness begins anew
    still(net, 0.9 * x, 2)
    assert quantizer.integer == 3
    still(net, 0.9 * x)
    assert quantizer.integer == 2
    still(net, 0.9 * x, 3)
    assert quantizer.integer == 1
    assert quantizer.width[2:4].tolist() == [3.0, 2.0]


def test_a_share_of_saturated_values_is_borne() -> None:
    x = torch.full((50, 6), 0.5)
    rare = x.clone()
    rare[0, 0] = 9.0  # one of 300
    grown = []
    for share in (0.003, 0.004):
        net = converted(linear(6, 8, 4), x, width_share=share)
        before = widths(net)[IN].integer
        still(net, rare)
        grown.append(widths(net)[IN].integer - before)
    assert grown == [1, 0]


def test_frozen_widths_stand_still_until_they_are_free() -> None:
    x = images(64, 6)
    net = converted(linear(6, 8, 4), x)
    before = {path: q.integer for path, q in widths(net).items()}
    reach(net, "freeze_widths")
    still(net, 32 * x, 3)
    assert {path: q.integer for path, q in widths(net).items()} == before
    leave(net, "freeze_widths")
    still(net, 32 * x, 3)
    assert all(q.integer == before[path] + 3 for path, q in widths(net).items() if path == IN)


def test_evaluation_and_float_steps_look_at_nothing() -> None:
    net = converted(linear(6, 8, 4), images(64, 6))
    before = {name: b.clone() for name, b in net.named_buffers()}
    net.eval()(1e3 * images(64, 6)).sum().backward()
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())


def test_a_width_that_is_given_in_full_stays() -> None:
    overrides = {"0": {"act_format": (6, 1)}, "1": {"act_format": [7, -1]}, "2": {"weight_bits": 4}}
    x = 10 * images(64, 6)
    net = converted(linear(6, 8, 4), x, overrides=overrides)
    found = widths(net)
    for _ in range(3):
        assert (found[IN].format.total, found[IN].format.integer, found[IN].format.fraction) == (6, 1, 4)
        assert (found[RELU].format.total, found[RELU].format.integer, found[RELU].format.fraction) == (7, -1, 8)
        still(net, x)
        leave(net, "freeze_widths")
    assert weights(net)["2.lowbit_weight"].grid().bits == 4
    assert weights(net)["0.lowbit_weight"].grid().bits == 8
    codes = weights(net)["2.lowbit_weight"](net[2].weight) * 2.0 ** weights(net)["2.lowbit_weight"].fraction
    assert codes.abs().max() <= 7


def test_overrides_are_taken_by_pattern_and_strange_ones_refused() -> None:
    x = images(64, 6)
    net = converted(linear(6, 8, 8, 4), x, overrides={"[02]": {"act_bits": 5, "weight_bits": 3}})
    assert [q.form.bits for q in widths(net).values()] == [5, 5, 8]  # layer 2 reads what the rectifier 1 gives
    assert [q.bits for q in weights(net).values()] == [3, 3, 8]
    with pytest.raises(ConfigError, match="nothing that is converted has such a path"):
        converted(linear(6, 8, 4), x, overrides={"layer9.*": {"act_bits": 5}})


@pytest.mark.parametrize("io", ["none", "outputs", "strict"])
def test_what_is_concatenated_has_one_format_and_what_is_added_its_own(io: str) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        y: Tensor = net.fc(torch.cat([F.relu(net.a(x)), F.relu(net.b(x))], 1) + net.c(x).repeat(1, 2))
        return y

    torch.manual_seed(0)
    layers = {name: nn.Linear(8, 8) for name in "abc"}
    net = Wired(forward, stem=nn.Linear(6, 8), **layers, fc=nn.Linear(16, 4))
    with torch.no_grad():
        net.b.weight.mul_(20.0)
    x = images(64, 6)
    net = converted(net, x, io=io)
    outputs = [q for path, q in widths(net).items() if "relu" in path]
    assert len(outputs) == 3
    stem, a, b = sorted(outputs, key=lambda q: q.site.path)
    assert a.leader is b.leader
    assert a.format == b.format != stem.format
    assert sum(q.leader is a.leader for q in rule(net).widths) == 1
    before = a.integer
    for _ in range(3):
        still(net, 8 * x)
    assert a.integer == b.integer > before
    assert a.width[0] == b.width[0] == a.integer
    found = {path.split(".")[0] for path in widths(net)}
    assert "lowbit_add" in found  # a layer reads it
    assert ("c" in found) == (io == "strict")


def two(join: Any) -> Any:
    torch.manual_seed(0)
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(6, 8), "fc": nn.Linear(16, 4)}
    return Wired(lambda net, x: net.fc(join(F.relu(net.a(x)), F.relu(net.b(x)))), **layers)


def test_what_is_added_keeps_the_format_that_its_values_need() -> None:
    net = two(lambda a, b: (a + b).repeat(1, 2))
    with torch.no_grad():
        net.b.weight.mul_(20.0)
    found = widths(converted(net, images(64, 6)))
    a, b = found["lowbit_relu.lowbit_output"], found["lowbit_relu_1.lowbit_output"]
    assert a.leader is a
    assert b.leader is b
    assert b.integer >= a.integer + 3


def test_a_dead_tensor_takes_no_bits_from_what_it_is_joined_with() -> None:
    net = two(lambda a, b: torch.cat([a, b], 1))
    with torch.no_grad():
        net.a.weight.mul_(0.01)
        net.a.bias.zero_()
        net.b.weight.zero_()
        net.b.bias.fill_(-1.0)
    a = widths(converted(net, images(64, 6)))["lowbit_relu.lowbit_output"]
    assert a.integer < -3


def test_io_says_which_results_are_rounded() -> None:
    found = {}
    for io in ("none", "outputs", "strict"):
        net = chain()
        net.append(nn.Identity())
        found[io] = set(widths(converted(net, io=io)))
    base = {"0.lowbit_input", "1.lowbit_output", "4.lowbit_output", "6.lowbit_output"}
    assert found["none"] == base | {"7.lowbit_output"}  # a layer multiplies the mean
    assert found["outputs"] == found["none"]
    layers = {f"{path}.lowbit_accumulator" for path in "0259"}
    assert found["strict"] >= base | layers
    net = converted(chain(), io="strict")
    assert {q.format.total for path, q in widths(net).items() if path in layers} == {16}


def test_strict_results_are_on_their_grids() -> None:
    net = converted(chain(), io="strict", check=True)
    seen: dict[str, Tensor] = {}
    for name in "0259":
        net[int(name)].register_forward_hook(lambda m, a, y, name=name: seen.update({name: y.detach()}))
    net(images(seed=3))
    for name, y in seen.items():
        q = widths(net)[f"{name}.lowbit_accumulator"]
        assert on_grid(y, q.format.fraction, 2**15 - 1) or f"{name}.lowbit_output" in widths(net)


# -- more than 8 bits ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["int8", "simulate", "reference"])
def test_activations_wider_than_8_bits_are_two_planes_with_the_same_sums(backend: str) -> None:
    x = 5 * images(16, 6)
    net = converted(linear(6, 8, 4), x, act_format="fixed_unit", backend=backend, check=True)
    source = widths(net)[IN]
    assert source.format.total > 8
    assert source.format.fraction == 7
    assert len(source.operand(source(x)).planes) == 2
    seen: list[Tensor] = []
    net[0].register_forward_hook(lambda m, a, y: seen.append(y))
    net(x).sum().backward()
    layer = net[0]
    a, w = source(x).double(), layer.lowbit_weight(layer.weight).double()
    bias = (layer.bias.double() * 2.0**15).round() * 2.0**-15
    assert torch.equal(seen[0].double(), F.linear(a, w, bias))
    assert on_grid(a, 7, 2**source.format.total)
    assert float((a - x).abs().max()) <= 2.0**-8


def test_wide_activations_train_alike_on_all_backends() -> None:
    found = []
    for backend in ("int8", "simulate", "reference"):
        net = converted(chain(), 4 * images(), act_format="fixed_unit", weight_bits=10, e2="flag12", backend=backend)
        train(net, 3)
        found.append({name: p.detach().clone() for name, p in net.named_parameters()})
    assert len(weights(net)["2.lowbit_weight"].operand(net[2].weight).planes) == 2
    assert all(torch.equal(found[0][k], found[n][k]) for n in (1, 2) for k in found[0])


# -- reports -------------------------------------------------------------------------------------------------
def test_the_summary_has_a_row_for_every_format() -> None:
    net = train(converted(chain()), 2)
    report = summarize(net)
    rows = {row.name: row for row in report.widths().rows}
    for path, quantizer in widths(net).items():
        row = next(r for r in rows.values() if r.site == path.rsplit(".", 1)[0] and r.grid == quantizer.grid())
        assert (row.total, row.integer, row.fraction) == (8, quantizer.integer, quantizer.format.fraction)
    for path, weight in weights(net).items():
        row = rows[f"{path.rsplit('.', 1)[0]}.weight"]
        assert (row.total, row.integer, row.signed) == (8, weight.power, True)
    assert all(rows[f"{path}.bias"].fraction == 15 for path in "059")
    for symbol, fraction in {"mean": 15, "deviation": 15, "gamma": 7, "beta": 7}.items():
        assert rows[f"3.{symbol}"].fraction == fraction, symbol
    assert all(rows[f"{path}.sum"].accumulator_bits is not None for path in "0259")
    assert "integer" in str(report.widths())


def test_the_callback_reports_widths_and_saturation() -> None:
    module = net()
    callback = QuantCallback(Wageubn(first_last="int8"), start=0, evaluate=False)
    trainer(callback).fit(module, loader(), loader())
    rows = {row.name: row for row in callback.width_report().rows}
    assert rows["conv2.weight"].total == 8
    assert any(row.saturation is not None for row in rows.values())


def test_freezing_comes_with_the_schedule() -> None:
    module = net()
    scheme = Wageubn(freeze_widths="3 steps", width_patience=1)
    trainer(QuantCallback(scheme, start=0, evaluate=False), max_epochs=1).fit(module, loader(), loader())
    assert all(bool(q.width[5]) for q in rule(module).widths)
    assert switch_of(module).started
