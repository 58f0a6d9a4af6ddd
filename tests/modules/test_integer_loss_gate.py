"""Which losses send integers back, what a factor on them does, and the gate by which float errors enter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules.integer_twin import Watch, carrier, codes, grad_of, low, values
from torch import Tensor, nn

from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.block import stable_hash
from lightning_lowbit.modules.carrier import Carrier, apply
from lightning_lowbit.numerics.integer_loss import cross_entropy_error
from lightning_lowbit.numerics.noise import combine, counter_bits

TARGET = torch.tensor([0, 1, 2, 3, 0, 1])
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: F.cross_entropy(x, TARGET, reduction="sum"),
    "class weights": lambda x: F.cross_entropy(x, TARGET, weight=torch.tensor([1.0, 2.0, 0.5, 1.0])),
    "label smoothing": lambda x: F.cross_entropy(x, TARGET, label_smoothing=0.1),
    "ignored targets": lambda x: F.cross_entropy(x, torch.tensor([0, 1, -100, 3, 0, -100])),
    "probabilities": lambda x: F.cross_entropy(x, F.one_hot(TARGET, 4).float()),
    "unreduced": lambda x: (F.cross_entropy(x, TARGET, reduction="none") * torch.arange(6.0)).sum(),
    "another loss": lambda x: F.mse_loss(x, F.one_hot(TARGET, 4).float()),
    "binary": lambda x: F.binary_cross_entropy_with_logits(x, F.one_hot(TARGET, 4).float()),
    "sum of two": lambda x: F.cross_entropy(x, TARGET) + 0.01 * x.square().mean(),
    "negative log likelihood": lambda x: F.nll_loss(x.log_softmax(1), TARGET),
}
INTEGER = {"sum"}


def error(loss: Callable[[Tensor], Tensor], exponent: int = -5, shape: tuple[int, ...] = (6, 4)) -> Any:
    kept: list[Tensor] = []
    loss(apply(Watch, carrier(codes(*shape), exponent, grad=True), kept)).backward()
    return kept[0]


@pytest.mark.parametrize("exponent", [-20, -7, -5, 0])
def test_the_error_is_the_integer_one(exponent: int) -> None:
    err = error(lambda x: F.cross_entropy(x, TARGET), exponent)
    key = combine(0, 0, stable_hash("somewhere:loss"))
    noise = counter_bits(key, torch.arange(6), 4)
    want = cross_entropy_error(codes(6, 4), torch.tensor(exponent), TARGET, noise)
    assert torch.equal(err.payload, want)
    # About p - y, as torch's gradient: powers of two stand for those of e.
    x = (codes(6, 4).double() * 2.0**exponent).requires_grad_()
    F.cross_entropy(x, TARGET).backward()
    assert F.cosine_similarity(err.payload.double().flatten(), x.grad.flatten(), 0) > 0.97  # type: ignore[union-attr]


def test_the_value_is_torch_s() -> None:
    x = carrier(codes(6, 4), -5)
    for reduction in ("mean", "sum"):
        assert F.cross_entropy(x, TARGET, reduction=reduction) == F.cross_entropy(
            x.plain(), TARGET, reduction=reduction
        )


@pytest.mark.parametrize("factor", [1.0, 0.25, 3.0, 1e-6, 1e6])
def test_a_positive_factor_goes_into_the_exponent_alone(factor: float) -> None:
    one, scaled = (error(lambda x, f=f: F.cross_entropy(x, TARGET) * f) for f in (1.0, factor))
    assert torch.equal(one.payload, scaled.payload)
    moved = int(scaled.exponent) - int(one.exponent)
    assert abs(moved - torch.tensor(factor).log2().item()) <= 1


def test_a_negative_factor_turns_the_errors_around_and_zero_stops_them() -> None:
    one, turned, none = (error(lambda x, f=f: F.cross_entropy(x, TARGET) * f) for f in (1.0, -2.0, 0.0))
    assert torch.equal(one.payload, -turned.payload)
    assert not none.payload.any()


@pytest.mark.parametrize("name", LOSSES)
def test_what_has_no_integer_form_comes_back_as_float_gradients(name: str) -> None:
    err = error(LOSSES[name])
    assert (type(err) is Carrier) == (name in INTEGER)
    x = carrier(codes(6, 4), -5).plain().requires_grad_()
    LOSSES[name](x).backward()
    if name not in INTEGER:
        want = x.grad if name != "sum of two" else None
        if want is not None:
            torch.testing.assert_close(err, want, rtol=1e-6, atol=1e-9)


def test_a_sum_of_losses_on_one_tensor_is_the_sum_of_gradients() -> None:
    """The integer error takes its real size, (p - y) / n up to a factor of two, where it meets float ones."""
    err = error(LOSSES["sum of two"])
    x = carrier(codes(6, 4), -5).plain().requires_grad_()
    (2 * F.cross_entropy(x, TARGET) + 0.01 * x.square().mean()).backward()
    assert type(err) is Tensor
    assert F.cosine_similarity(err.flatten(), x.grad.flatten(), 0) > 0.98  # type: ignore[union-attr]


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.body(x))
        return self.one(x), self.two(x)


def test_two_heads_send_integers_that_add_up_in_the_body() -> None:
    x = torch.randn(6, 5)
    net = low(Heads(), x)
    one, two = net(x)
    (F.cross_entropy(one, TARGET.clamp(max=2)) + 0.5 * F.cross_entropy(two, TARGET % 2)).backward()
    assert all(layer.gathered["weight"][0].any() for layer in (net.body, net.one, net.two))  # type: ignore[union-attr, index]
    assert switch_of(net).run.float_errors == set()


def test_logits_of_a_segmentation() -> None:
    target = codes(2, 3, 4, low=0, high=4, seed=5).long()
    err = error(lambda x: F.cross_entropy(x, target), shape=(2, 5, 3, 4))
    assert (err.payload.shape, err.payload.dtype) == ((2, 5, 3, 4), torch.int8)
    x = (codes(2, 5, 3, 4).double() * 2.0**-5).requires_grad_()
    F.cross_entropy(x, target).backward()
    assert F.cosine_similarity(err.payload.double().flatten(), x.grad.flatten(), 0) > 0.95  # type: ignore[union-attr]
    rows = codes(2, 5, 3, 4).movedim(1, -1).reshape(-1, 5)
    noise = counter_bits(combine(0, 0, stable_hash("somewhere:loss")), torch.arange(2), 60).reshape(-1, 5)
    want = cross_entropy_error(rows, torch.tensor(-5), target.flatten(), noise)
    assert torch.equal(err.payload.movedim(1, -1).reshape(-1, 5), want)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e20])
def test_the_gate_rounds_float_gradients_without_bias(scale: float) -> None:
    net = low(nn.Sequential(nn.Linear(4, 4000, bias=False)), torch.randn(2, 4))
    layer: Any = net[0]  # type: ignore[index]
    grad = torch.full((1, 4000), 0.3) * scale
    grad[0, 0] = scale
    layer(carrier(torch.eye(4, dtype=torch.int8)[:1] * 64, -6)).backward(grad)
    found, exponent = layer.gathered["weight"]
    err = found[:, 0].double() / 64 * 2.0 ** (int(exponent) + 6)
    unit = 2.0 ** (int(exponent) + 6)
    assert ((err - grad[0].double()).abs() <= unit).all()
    bound = 5 * unit / 2 / 4000**0.5 + unit * 2.0**-15
    assert abs(float((err - grad[0].double())[1:].mean())) <= bound
    assert switch_of(net).run.float_errors == {"0"}


def test_the_class_of_every_sample_gets_its_own_random_numbers() -> None:
    err = error(lambda x: F.cross_entropy(x, torch.zeros(64, dtype=torch.int64)), -7, (64, 4))
    x = carrier(torch.zeros((64, 3), dtype=torch.int8), -7, grad=True)
    F.cross_entropy(x, torch.zeros(64, dtype=torch.int64)).backward()
    assert err.payload.unique(dim=0).shape[0] > 16
    assert 1 < len(grad_of(x).unique(dim=0)) < 10  # equal logits: the same error, rounded either way
    assert values(x).abs().sum() == 0
