"""FraclenInput, ResultUnit and FraclenWeight alone: who follows, who shares, what a unit is, and what a file brings."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lowbit.modules.base import Mode, Site, Switch, mode
from lightning_lowbit.modules.fixed_point_operands import FraclenWeight, ResultUnit
from lightning_lowbit.modules.fraclen import ALPHA_MIN, FraclenInput, InputFormat, Ties
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.fraclen import fix_quant
from lightning_lowbit.numerics.fraclen_choice import fraclen_of


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def member(path: str, kind: type[Any] = FraclenInput, form: InputFormat | None = None, signed: bool = True) -> Any:
    site = Site(path, "input" if kind is FraclenInput else "unit", "linear", "linear", signed)
    return kind(site, form or InputFormat()) if kind is FraclenInput else kind(site)


def tied(*kinds: type[Any], ties: Ties = "shared", signed: bool = True, **form: Any) -> list[Any]:
    """One tie of a switched on, ready network."""
    switch = Switch(started=True)
    group: list[Quantizer] = [
        member(f"{number}", kind, InputFormat(ties=ties, **form), signed) for number, kind in enumerate(kinds)
    ]
    for quantizer in group:
        quantizer.switch, quantizer.group = switch, group
    group[0].share(group, False)
    group[0].set_ready()
    return group


def alone(**form: Any) -> FraclenInput:
    quantizer: FraclenInput = member("alone", form=InputFormat(**form))
    quantizer.switch = Switch(started=True)
    quantizer.set_ready()
    return quantizer


# -- one quantizer -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("select", ["rms", "std", "mae", "grid", "histogram"])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_training_goes_by_the_batch_and_evaluation_by_the_rounded_average(select: str, signed: bool) -> None:
    quantizer: FraclenInput = member("x", form=InputFormat(select=select), signed=signed)
    quantizer.switch = Switch(started=True)
    quantizer.set_ready()
    quantizer.fraclen.fill_(2.6)
    x = randn(4, 50) * 30
    own = fraclen_of(x, select, 8, signed)
    assert int(own) != 3
    assert torch.equal(quantizer(x), fix_quant(x, own, signed=signed))
    assert torch.equal(quantizer.eval()(x), fix_quant(x, 3, signed=signed))
    assert float(quantizer.fraclen) == pytest.approx(2.6)  # the optimizer's step moves it


def test_statistics_add_up_until_somebody_takes_them() -> None:
    quantizer, x, y = alone(select="rms"), randn(4, 5), randn(2, 5, seed=1) * 9
    quantizer(x)
    quantizer(y)
    both = torch.cat([x.flatten(), y.flatten()]).double()
    assert quantizer.sums.tolist() == pytest.approx([30, 0, float(both.square().sum())])
    assert quantizer.ran


@pytest.mark.parametrize("where", ["evaluation", "no_grad", "frozen", "float", "fixed", "not_started"])
def test_nothing_is_learned_elsewhere(where: str) -> None:
    quantizer = alone()
    if where == "fixed":
        quantizer.fixed = 6
    quantizer.frozen = where == "frozen"
    quantizer.switch.started = where != "not_started"
    quantizer.train(where != "evaluation")
    with torch.set_grad_enabled(where != "no_grad"), mode(
        [quantizer.switch], Mode.FLOAT if where == "float" else Mode.LOWBIT
    ):  # fmt: skip
        quantizer(randn(3, 4) * 50)
    assert not quantizer.ran
    assert not quantizer.sums.any()
    assert float(quantizer.current) == (0.0 if where == "no_grad" else 6.0)  # that batch's own
    assert float(quantizer.fraclen) == 6.0


@pytest.mark.parametrize("select", ["rms", "std", "mae", "grid", "histogram"])
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 4),
        torch.full((3, 4), math.nan),
        torch.full((3, 4), math.inf),
        torch.zeros(0, 4),
        -torch.ones(3, 4),
    ],
    ids=["zero", "nan", "inf", "empty", "negative"],
)
def test_what_says_nothing_is_quantized_by_the_average(x: Tensor, select: str) -> None:
    quantizer: FraclenInput = member("x", form=InputFormat(select=select), signed=False)
    quantizer.switch = Switch(started=True)
    quantizer.set_ready()
    quantizer.fraclen.fill_(2.6)
    quantizer(randn(3, 4).abs() * 1000)  # another batch's fraclen is not the one
    before = quantizer.sums.clone()
    y = quantizer(x)
    assert torch.equal(y, fix_quant(x, 3, signed=False)) or bool(x.isnan().any())
    assert torch.equal(quantizer.sums, before)


@pytest.mark.parametrize("fraclen", [-3.0, 99.0, 7.5, 2.5, 3.5])
def test_a_fraclen_out_of_range_is_brought_into_it(fraclen: float) -> None:
    quantizer = alone().eval()
    quantizer.load_state_dict({**quantizer.state_dict(), "fraclen": torch.tensor([fraclen])})
    want = {-3.0: 0, 99.0: 7, 7.5: 7, 2.5: 2, 3.5: 4}[fraclen]
    assert torch.equal(quantizer(randn(3, 4)), fix_quant(randn(3, 4), want))
    assert quantizer.grid().exponent == -want


def test_a_checkpoint_holds_the_average_alone() -> None:
    quantizer = alone()
    quantizer(randn(3, 4))
    assert {"fraclen", "initialized", "negative"} == quantizer.state_dict().keys()


# -- ties ----------------------------------------------------------------------------------------------------
def test_a_unit_is_the_clip_over_the_codes() -> None:
    leader, result, reader = tied(FraclenInput, ResultUnit, FraclenInput, signed=False)
    leader.fraclen.fill_(4.6)
    with torch.no_grad():
        leader.alpha.fill_(-3.0)  # its size counts
    assert leader.alpha is reader.alpha
    want = 2**5 * 3.0 / 255
    assert [float(q.unit().detach()) for q in (leader, reader)] == pytest.approx([want] * 2)
    weight, row = torch.ones(2, 3), torch.ones(2)
    assert torch.equal(leader.absorb(weight), weight * leader.unit())
    assert torch.equal(result(weight), weight / leader.unit())
    assert result(row).shape == row.shape
    leader.switch.mode = Mode.FLOAT
    assert leader.unit() is None
    assert torch.equal(result(weight), weight)


def test_a_clip_of_zero_divides_nothing_by_zero() -> None:
    leader, result = tied(FraclenInput, ResultUnit)
    with torch.no_grad():
        leader.alpha.fill_(0.0)
    assert float(leader.unit().detach()) == pytest.approx(2**6 * ALPHA_MIN / 127)
    assert bool(torch.isfinite(result(torch.ones(3))).all())


def test_a_result_is_counted_in_the_unit_of_the_last_reader_before_it() -> None:
    first, a, second, b = tied(FraclenInput, ResultUnit, FraclenInput, ResultUnit, ties="reference")
    first.fraclen.fill_(3.0)
    second.fraclen.fill_(5.0)
    assert a.reader is first
    assert b.reader is second
    assert torch.equal(a(torch.ones(())), 4 * b(torch.ones(())))
    assert ResultUnit(Site("x", "unit", "linear")).reader is None


def test_a_shared_fraclen_is_the_leader_s_and_it_alone_follows() -> None:
    leader, reader = tied(FraclenInput, FraclenInput)
    x = randn(4, 50) * 8
    y = leader(x)
    assert torch.equal(reader(x), y)
    assert (leader.ran, reader.ran) == (True, False)
    leader.fraclen.fill_(1.0)
    assert torch.equal(reader.eval()(x), fix_quant(x, 1))


def test_private_fraclens_are_each_reader_s_own() -> None:
    for ties in ("realign", "reference"):
        leader, reader = tied(FraclenInput, FraclenInput, ties=ties)
        leader.fraclen.fill_(5.0)
        reader.fraclen.fill_(3.0)
        x = randn(4, 50)
        assert torch.equal(reader.unit(), leader.unit() / 4)
        assert torch.equal(leader.eval()(x), fix_quant(x, 5))
        assert torch.equal(reader.eval()(x), fix_quant(x * (4 if ties == "realign" else 1), 3))
        leader.train()(x)
        reader.train()(x)
        assert leader.ran
        assert reader.ran


def test_all_members_of_a_tie_take_the_sign_of_one() -> None:
    group = [member("a", signed=None), member("b", signed=None)]  # type: ignore[arg-type]  # the data decide
    for quantizer in group:
        quantizer.switch, quantizer.group = Switch(mode=Mode.OBSERVE), group
    group[0].share(group, False)
    for quantizer, x in zip(group, (randn(50).abs(), randn(50)), strict=True):
        quantizer(x)
    group[0].close_pass(lambda tensor, op: tensor)
    assert [quantizer.signed for quantizer in group] == [True, True]


def test_a_copy_is_a_tie_of_its_own() -> None:
    holder = nn.Module()
    holder.members = nn.ModuleList(tied(FraclenInput, ResultUnit, FraclenInput))
    other: Any = copy.deepcopy(holder)
    first, result, second = other.members
    assert first.alpha is second.alpha is not holder.members[0].alpha
    assert first.leader is second.leader is first
    assert result.reader is first
    first.fraclen.fill_(2.0)
    assert float(holder.members[2].rounded()) == 6.0  # type: ignore[operator]
    assert float(second.rounded()) == 2.0


# -- weights -------------------------------------------------------------------------------------------------
def test_a_weight_s_fraclen_follows_from_the_weight_in_both_modes() -> None:
    quantizer = FraclenWeight(Site("w", "weight", "linear"), small=False)
    quantizer.switch = Switch(started=True)
    quantizer.set_ready()
    for training in (True, False):
        for scale in (0.01, 0.5, 20.0):
            weight = randn(8, 9) * scale
            want = fraclen_of(weight, "grid")
            assert torch.equal(quantizer.train(training)(weight), fix_quant(weight, want))
            assert int(quantizer.exponent()) == -int(want)
    assert [key for key in quantizer.state_dict() if "fraclen" in key] == []
