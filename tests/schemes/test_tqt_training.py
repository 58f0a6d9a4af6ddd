"""The parts of the recipe that the golden vectors do not reach: state, frozen thresholds, refusals."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.schemes.tqt_training import NormedSgd, next_to_freeze, staircase


def run(theta: torch.nn.Parameter, optimizer: NormedSgd, grads: list[float]) -> None:
    for g in grads:
        theta.grad = torch.full_like(theta, g)
        optimizer.step()


def test_a_step_is_the_formula_whatever_the_scale_of_the_gradient() -> None:
    moved = []
    for scale in (1e-6, 1.0, 1e6):
        theta = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        run(theta, NormedSgd([theta], lr=0.1, beta=0.9, eps=1e-30), [3 * scale, -1 * scale])
        moved.append(theta.item())
    v = 0.9 * 0.1 * 9 + 0.1 * 1
    want = -0.1 * (math.tanh(1.0) + math.tanh(-1 / math.sqrt(v / (1 - 0.9**2))))
    assert moved == pytest.approx([want] * 3, rel=1e-9)


def test_state_survives_a_checkpoint_bit_for_bit() -> None:
    straight, resumed = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    first, second = NormedSgd([straight]), NormedSgd([resumed])
    run(straight, first, [1.0, -0.5, 0.25])
    run(resumed, second, [1.0])
    third = NormedSgd([resumed])
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    run(resumed, third, [-0.5, 0.25])
    assert torch.equal(straight, resumed)


def test_a_zero_gradient_moves_nothing_and_none_is_skipped() -> None:
    still, absent = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    optimizer = NormedSgd([still, absent])
    run(still, optimizer, [0.0, 0.0])
    assert (still.item(), absent.item()) == (1.0, 1.0)
    assert absent not in optimizer.state


def test_the_closure_s_loss_comes_back_with_gradients_enabled() -> None:
    theta = torch.nn.Parameter(torch.ones(1))
    optimizer = NormedSgd([theta], lr=0.5)

    def closure() -> float:
        loss = (2 * theta).sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 2.0
    assert theta.item() == pytest.approx(1 - 0.5 * math.tanh(1))


@pytest.mark.parametrize("setting", [{"lr": -1.0}, {"beta": 1.0}, {"eps": 0.0}, {"lr": math.nan}])
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}={next(iter(setting.values()))}"):
        NormedSgd([torch.nn.Parameter(torch.ones(1))], **setting)


def test_staircase_falls_at_scaled_steps() -> None:
    every = 1000 * 24 / 64
    assert [staircase(n, 1e-2, every, 0.5) for n in (374, 375, 750)] == [1e-2, 5e-3, 2.5e-3]


def test_the_bin_counts_and_not_the_distance() -> None:
    gradient = torch.tensor([1.0, 2.0])
    free = torch.zeros(2, dtype=torch.bool)
    crossing = torch.tensor([0.01, 1.0]), torch.tensor([-0.01, 0.1])
    assert next_to_freeze(*crossing, gradient, free) == 1
    assert next_to_freeze(*crossing, gradient, torch.tensor([False, True])) is None
    # A power of two belongs to the bin below it.
    assert next_to_freeze(torch.tensor([1.0]), torch.tensor([0.5]), gradient[:1], free[:1]) == 0
