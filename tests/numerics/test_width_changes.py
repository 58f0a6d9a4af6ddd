"""Hysteresis of widths: growth, idleness, freezing, ranks, and that the device is never waited for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.width_changes import Hysteresis
from lightning_lowbit.numerics.widths import Format


def steps(rule: Hysteresis, state: Tensor, *batches: Tensor) -> list[int]:
    seen = []
    for x in batches:
        rule.observe(state, x)
        rule.commit(state)
        seen.append(rule.format(state).integer)
    return seen


def filled(n: int, most: float, beyond: int = 0) -> Tensor:
    """n entries up to ``most``, of which ``beyond`` are 100."""
    x = torch.linspace(-most, most, n)
    x[:beyond] = 100.0
    return x


def test_grows_at_once_above_one_in_ten_thousand() -> None:
    rule, n = Hysteresis(), 20_000
    state = rule.start(0)
    assert steps(rule, state, filled(n, 0.9, 2)) == [0]  # exactly 1e-4
    assert steps(rule, state, filled(n, 0.9, 3)) == [1]
    assert int(rule.view(state).grown) == 1


def test_shares_are_those_of_the_whole_step() -> None:
    rule = Hysteresis()
    state = rule.start(0)
    rule.observe(state, filled(20_000, 0.9, 3))
    rule.observe(state, filled(20_000, 0.9))
    rule.commit(state)
    assert rule.format(state).integer == 0
    assert math.isclose(float(rule.view(state).share), 3 / 40_000, rel_tol=1e-6)


def test_shrinks_only_after_the_top_bit_was_idle_long_enough() -> None:
    rule = Hysteresis(patience=5)
    state = rule.start(2)
    idle, used = filled(100, 1.9), filled(100, 2.1)
    assert steps(rule, state, *[idle] * 4, used, *[idle] * 5) == [2] * 9 + [1]
    assert steps(rule, state, *[idle] * 10) == [1] * 10
    now = rule.view(state)
    assert (int(now.shrunk), int(now.grown), int(now.idle)) == (1, 0, 0)


def test_every_bit_less_takes_the_same_patience() -> None:
    rule = Hysteresis(patience=3)
    state = rule.start(3)
    assert steps(rule, state, *[filled(10, 0.3)] * 9) == [3, 3, 2, 2, 2, 1, 1, 1, 0]


def test_the_published_patience() -> None:
    rule = Hysteresis()
    state, x = rule.start(1), filled(10, 0.5)
    assert steps(rule, state, *[x] * 1000) == [1] * 999 + [0]


@given(st.integers(1, 9), st.booleans(), st.integers(-3, 3), st.booleans())
def test_an_entry_saturates_where_its_code_is_beyond_the_last(
    magnitude: int, signed: bool, integer: int, fixed: bool
) -> None:
    """Against the codes themselves, ties among them; the top bit is used where a code has it."""
    bits = magnitude + signed
    rule = Hysteresis(bits, signed, fraction=magnitude - integer if fixed else None)
    form = Format(bits, integer, signed)
    state = rule.start(integer)
    assert rule.format(state) == form
    most = form.limits[1]
    x = torch.arange(-4 * most - 4, 4 * most + 5) * form.step / 4
    code = torch.round((x.abs() if signed else x) / form.step)
    rule.observe(state, x)
    now = rule.view(state)
    assert (int(now.saturated), int(now.entries)) == (int((code > most).sum()), x.numel())
    for top in ((most + 1) // 2 - 1, (most + 1) // 2):
        state = rule.start(integer)
        rule.observe(state, torch.tensor([top * form.step]))
        rule.commit(state)
        assert int(rule.view(state).idle) == (top < (most + 1) // 2 and top > 0)


@pytest.mark.parametrize(
    "void", [torch.zeros(5), torch.zeros(0), torch.tensor([math.nan, 9.0]), torch.tensor([math.inf])]
)
def test_a_step_without_evidence_decides_nothing(void: Tensor) -> None:
    rule = Hysteresis(patience=3)
    state = rule.start(1)
    assert steps(rule, state, *[torch.tensor([0.5])] * 2) == [1, 1]
    assert steps(rule, state, *[void] * 5) == [1] * 5
    assert steps(rule, state, torch.tensor([0.5])) == [0]


def test_frozen_widths_stay_and_are_still_reported() -> None:
    rule = Hysteresis(patience=1)
    state = rule.start(1)
    rule.freeze(state)
    assert steps(rule, state, torch.tensor([0.1]), torch.tensor([9.0])) == [1, 1]
    assert float(rule.view(state).share) == 1.0
    rule.freeze(state, False)
    assert steps(rule, state, torch.tensor([9.0])) == [2]


def test_a_fixed_unit_changes_the_width() -> None:
    rule = Hysteresis(fraction=7, patience=2)
    state = rule.start(0)
    assert steps(rule, state, *[torch.tensor([6.0])] * 3) == [1, 2, 3]
    assert rule.format(state) == Format(11, 3)
    state = rule.start(-5)
    assert steps(rule, state, *[torch.tensor([2.0**-20])] * 8)[-1] == -6  # one magnitude bit is left
    assert rule.format(state).total == 2


def test_negatives_of_unsigned_tensors_do_not_count() -> None:
    rule = Hysteresis(signed=False)
    state = rule.start(0)
    assert steps(rule, state, torch.tensor([-100.0, 0.9]), torch.tensor([0.9, 1.0])) == [0, 1]
    rule = Hysteresis(signed=False, patience=1)
    assert steps(rule, state, torch.tensor([-100.0, 0.9])) == [0]


def test_the_width_stays_within_what_a_grid_can_say() -> None:
    rule = Hysteresis(patience=1)
    state = rule.start(126)
    assert steps(rule, state, *[torch.tensor([3e38])] * 3) == [127] * 3
    state = rule.start(-141)
    assert steps(rule, state, *[torch.tensor([1e-45])] * 4)[-1] == -142
    assert rule.format(state).grid().exponent == -149


def test_ranks_decide_like_one_that_sees_everything() -> None:
    rule = Hysteresis()
    parts = filled(20_000, 0.9, 5), filled(20_000, 0.9)
    alone = rule.start(0)
    rule.observe(alone, torch.cat(parts))
    states = [rule.start(0) for _ in parts]
    for state, part in zip(states, parts, strict=True):
        rule.observe(state, part)
    before = [state.clone() for state in states]

    def all_reduce(x: Tensor, op: str) -> Tensor:
        views = [rule.view(state) for state in before]
        if op == "max":
            return torch.stack([v.reach for v in views]).amax(0)
        return torch.stack([torch.stack([v.saturated, v.entries]) for v in views]).sum(0)

    for state in states:
        rule.reduce(state, all_reduce)
        assert torch.equal(state, alone)


def test_several_states_are_decided_in_one_go() -> None:
    rule = Hysteresis(patience=1)
    states = torch.stack([rule.start(i) for i in (0, 1, 4)])
    singles = states.clone()
    for each in (states, singles):
        for row in each:
            rule.observe(row, torch.tensor([1.5, 0.2]))
    rule.commit(states)
    for row in singles:
        rule.commit(row)
    assert torch.equal(states, singles)
    assert states[:, 0].tolist() == [1, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_value_is_read_on_a_device(dtype: torch.dtype) -> None:
    """Meta tensors have none: reading one raises."""
    rule = Hysteresis()
    state = rule.start(0, device="meta")
    rule.observe(state, torch.empty(4, 5, dtype=dtype, device="meta"))
    rule.reduce(state, lambda x, op: x)
    rule.commit(state)
    rule.freeze(state)
    with pytest.raises(RuntimeError):
        rule.format(state)


def test_an_averaged_state_is_read_as_a_whole_number() -> None:
    rule = Hysteresis()
    state = rule.start(0)
    state[0] = 1.3
    assert rule.format(state).integer == 1
    assert steps(rule, state, torch.tensor([5.0])) == [2]


# torch 2.13's compiler itself uses what torch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
def test_compiled_or_not_the_state_is_the_same(dtype: torch.dtype) -> None:
    rule = Hysteresis(patience=2)

    def step(state: Tensor, x: Tensor) -> None:
        rule.observe(state, x)
        rule.commit(state)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, graph = rule.start(0), rule.start(0)
    for x in (0.9, 3.0, 2.9, 2.9, 0.4, 0.4, 0.4):
        values = torch.tensor([x, -x / 3], dtype=dtype)
        step(eager, values)
        compiled(graph, values)
        assert torch.equal(eager, graph)
    assert int(rule.view(eager).grown) == 2
    assert int(rule.view(eager).shrunk) >= 1


@pytest.mark.parametrize("fields", [{"share": 1.0}, {"share": -0.1}, {"patience": 0}, {"bits": 1}], ids=str)
def test_rules_that_cannot_act_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"expected at least|expected a share"):
        Hysteresis(**fields)  # type: ignore[arg-type]  # one field at a time
