"""Learning rates against the distance that they allow."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.step_size import finetune_lr, suggest_lr

UNIT = 1 / 512


@given(st.floats(1e-4, 1.0), st.integers(1, 10**7), st.sampled_from([128, 32, 2]), st.sampled_from([0.0, 0.25, 0.75]))
def test_a_run_goes_the_deviations_asked_for(std: float, steps: int, dr: int, momentum: float) -> None:
    lr = suggest_lr(std, steps, dr, momentum, deviations=20)
    assert UNIT <= lr <= 1 - UNIT
    way = steps * lr * dr * 2**-14 / (1 - momentum)
    assert math.isclose(way, 20 * std) or (lr == UNIT and way > 20 * std) or (lr == 1 - UNIT and way < 20 * std)


def test_the_published_setting_moves_a_weight_by_at_most() -> None:
    """0.05 * 127/16384 / 0.75 = 5.2e-4 a step: 264 of them are 2.3 deviations of 0.06, far too few."""
    assert suggest_lr(0.06, 264, deviations=264 * 0.05 * 128 / 16384 / 0.75 / 0.06) == pytest.approx(0.05)
    assert suggest_lr(0.06, 264) > 10 * 0.05


@given(st.floats(1e-3, 0.5), st.sampled_from([128, 32]))
def test_one_gradient_of_a_fine_tuning_moves_thousandths_of_a_deviation(std: float, dr: int) -> None:
    lr = finetune_lr(std, dr)
    move = lr * dr * 2**-14
    assert math.isclose(move, 3e-3 * std) or (lr == UNIT and move > 3e-3 * std) or (lr == 1 - UNIT)


@pytest.mark.parametrize("std", [0.0, 1e-12])
def test_a_rate_is_at_least_what_its_format_holds(std: float) -> None:
    assert suggest_lr(std, 100) == finetune_lr(std) == UNIT
    assert finetune_lr(std, lr_bits=12) == 1 / 2048


@pytest.mark.parametrize("wrong", [{"momentum": 1.0}, {"steps": 0}, {"dr": 0}, {"weight_std": math.nan}], ids=str)
def test_what_gives_no_rate_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"got .*expected"):
        suggest_lr(**{"weight_std": 0.1, "steps": 100, **wrong})  # type: ignore[arg-type]  # one field at a time
