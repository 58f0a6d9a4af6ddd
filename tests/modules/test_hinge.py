"""Hinge losses against numbers worked out by hand; the corner of the hinge has no gradient."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.hinge import HingeLoss, hinge_loss

Z = [[1.0, -3.0, 0.5], [-0.5, 0.0, 2.0]]  # of the right classes, 0 and 1: margins met exactly, and missed by 1
LABELS = torch.tensor([0, 1])
SIGNS = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0]])
# max(0, 1 - z t): [[0, 0, 1.5], [0.5, 1, 3]]
EXPECTED = {
    False: (6 / 6, [[0.0, 0.0, 1 / 6], [1 / 6, -1 / 6, 1 / 6]]),
    True: ((2.25 + 0.25 + 1 + 9) / 6, [[0.0, 0.0, 3 / 6], [1 / 6, -2 / 6, 6 / 6]]),
}


def logits(**options: Any) -> Tensor:
    return torch.tensor(Z, requires_grad=True, **options)


@pytest.mark.parametrize("squared", [False, True], ids=["hinge", "squared"])
@pytest.mark.parametrize("target", [LABELS, SIGNS, SIGNS.double()], ids=["labels", "signs", "double signs"])
def test_value_and_gradient(target: Tensor, squared: bool) -> None:
    z = logits()
    loss = HingeLoss(squared)(z, target)
    value, grad = EXPECTED[squared]
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, torch.tensor(value))
    loss.backward()
    torch.testing.assert_close(z.grad, torch.tensor(grad))


@pytest.mark.parametrize("squared", [False, True], ids=["hinge", "squared"])
def test_a_margin_that_is_met_exactly_gives_no_gradient(squared: bool) -> None:
    z = torch.tensor([[1.0, -1.0]], requires_grad=True)
    hinge_loss(z, torch.tensor([0]), squared).backward()
    assert z.grad is not None
    assert not z.grad.any()
    past = torch.nextafter(z.detach(), torch.zeros(1)).requires_grad_()
    hinge_loss(past, torch.tensor([0]), squared).backward()
    assert past.grad is not None
    assert past.grad.sign().tolist() == [[-1.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:])
def test_halves_are_summed_in_float32_and_doubles_stay(dtype: torch.dtype) -> None:
    z = logits(dtype=dtype)
    loss = hinge_loss(z, LABELS)
    assert loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert loss.item() == 1.0
    loss.backward()
    assert z.grad is not None
    assert z.grad.dtype is dtype


def test_a_softmax_without_margin_is_another_loss() -> None:
    """The trap of the docstring: log-probabilities cannot reach the margin of their class."""
    sure = torch.log_softmax(torch.tensor([[100.0, -100.0]]), 1)
    assert float(hinge_loss(sure, torch.tensor([0]))) == 0.5  # 0 is as near to +1 as it gets


REFUSED = {
    "rank of input": (torch.zeros(2, 3, 4), LABELS, r"input has shape \(2, 3, 4\), expected \[N, classes\]"),
    "length": (torch.zeros(3, 3), LABELS, r"target is int64 \[2\], expected class labels \(int64 \[3\]\)"),
    "integer signs": (torch.zeros(2, 3), SIGNS.long(), r"target is int64 \[2, 3\]"),
    "float labels": (torch.zeros(2, 3), LABELS.float(), r"target is float32 \[2\], .*target.long\(\)"),
    "int32": (torch.zeros(2, 3), LABELS.int(), r"target is int32 \[2\]"),
    "label beyond": (torch.zeros(2, 3), torch.tensor([0, 3]), r"labels 0 to 3, expected 0 to 2: input has 3 classes"),
    "label below": (torch.zeros(2, 3), torch.tensor([-100, 1]), r"labels -100 to 1, expected 0 to 2"),
    "zeros and ones": (torch.zeros(2, 3), SIGNS.relu(), r"must hold -1 and \+1 alone; this one has 0"),
    "nan": (torch.zeros(2, 3), SIGNS * float("nan"), r"this one has nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_targets_are_refused(case: str) -> None:
    z, target, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        hinge_loss(z, target)


def test_an_empty_batch_has_no_loss() -> None:
    assert hinge_loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).isnan()  # as torch's means


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles_copies_and_prints() -> None:
    loss = HingeLoss(squared=True)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(logits(), LABELS), loss(logits(), LABELS))
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for target in (LABELS, SIGNS):
        torch.testing.assert_close(compiled(logits(), target), loss(logits(), target))
    assert repr(nn.Sequential(loss)[0]) == "HingeLoss(squared=True)"
