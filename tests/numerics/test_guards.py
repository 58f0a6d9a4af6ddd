"""The bound is reached and never passed, and what it calls exact is exact."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_lowbit.numerics.guards import FLOAT32_EXACT, accumulator_bound, float_sums_exact


@given(seed=st.integers(0, 2**20), outputs=st.integers(1, 4), inputs=st.integers(1, 40))
def test_the_bound_is_reached_by_the_worst_input(seed: int, outputs: int, inputs: int) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randint(-128, 128, (outputs, inputs), generator=g)
    b = torch.randint(-5000, 5000, (outputs,), generator=g)
    bound = accumulator_bound(w, 127, b)
    sign = b.sign() + (b == 0).long()
    worst = ((w.sign() * sign[:, None] * 127) * w).sum(1) + b
    assert worst.abs().max().item() == bound
    x = torch.randint(-127, 128, (16, inputs), generator=g)
    assert (x @ w.t() + b).abs().max().item() <= bound


def test_sums_called_exact_are_exact_in_any_order() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randint(-128, 128, (8, 1000), generator=g)
    x = torch.randint(0, 128, (32, 1000), generator=g)
    assert float_sums_exact(w, 127)
    for order in (torch.arange(1000), torch.randperm(1000, generator=g)):
        product = x[:, order].float() @ w[:, order].float().t()
        assert torch.equal(product.long(), x @ w.t())


def test_one_product_too_many_is_refused_for_a_reason() -> None:
    w = torch.full((1, 2), 2**12)
    assert not float_sums_exact(w, 2**11)
    assert float_sums_exact(w, 2**11 - 1)
    assert accumulator_bound(w, 2**11) == FLOAT32_EXACT
    # One code more and the sum has no float32.
    odd = torch.tensor([[2**12, 2**12, 1]])
    x = torch.tensor([2**11, 2**11, 1])
    assert (odd.float() @ x.float()).item() != (odd @ x).item()


def test_bias_axes_and_ranges() -> None:
    w = torch.tensor([[[1.0, -2.0]], [[3.0, 4.0]]])
    assert accumulator_bound(w, 2.0) == 14.0
    assert accumulator_bound(w.transpose(0, 1), 2.0, out_axis=1) == 14.0
    assert accumulator_bound(w, torch.tensor([10.0, 1.0])) == 34.0
    assert accumulator_bound(w, 2.0, torch.tensor([-100.0, 1.0])) == 106.0
    assert accumulator_bound(torch.zeros(2, 0), 255, torch.tensor([3, -4])) == 4.0
    assert not float_sums_exact(torch.tensor([[float("nan")]]), 1)
