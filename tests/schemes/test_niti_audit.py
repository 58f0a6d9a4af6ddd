"""Between the first rounding of the data and the new weights of a step, no float is computed with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from schemes.audit import INTEGER_PRODUCTS, FloatAudit
from torch import Tensor, nn

from lightning_lowbit import Niti, convert, kernels, lowbit_step
from lightning_lowbit.kernels.requantize import compile_policy
from lightning_lowbit.modules.block import BlockInput, WeightCodes
from lightning_lowbit.modules.carrier import Carrier, carry
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.elementwise import LowBitAdd
from lightning_lowbit.schemes import niti


class Stem(nn.Module):
    """A ResNet's first layers: a pool with overlapping windows, then a block whose shortcut is a convolution."""

    def __init__(self, norms: bool) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels) if norms else nn.Identity()

        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=not norms), norm(8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, 2, 1, bias=not norms), norm(12)
        self.conv3, self.bn3 = nn.Conv2d(12, 12, 3, 1, 1, bias=not norms), norm(12)
        self.shortcut, self.bn4 = nn.Conv2d(8, 12, 1, 2, bias=not norms), norm(12)
        self.fc = nn.Linear(12 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        y = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(y)) + self.bn4(self.shortcut(x)))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def audited_step(norms: bool = False, **options: Any) -> FloatAudit:
    """One training step of a converted network; looks from the first input quantizer on."""
    torch.manual_seed(0)
    x, target = torch.randn(6, 3, 12, 12), torch.arange(6) % 5
    net: Any = Stem(norms)
    if norms:  # statistics that have seen data: folded
        net(x)
    convert(net, Niti(**options), x)
    inputs = [q for _, q in quantizers(net) if isinstance(q, BlockInput)]
    assert len(inputs) == 1
    optimizer, audit = torch.optim.SGD(net.parameters(), 0.1), FloatAudit()
    inputs[0].register_forward_hook(audit.arm)
    net.train()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), target)
        loss.backward()
        return loss

    lowbit_step(net, optimizer, closure)  # the first choice of a kernel tries it out
    audit.armed = False
    before = [q.codes().clone() for _, q in quantizers(net) if isinstance(q, WeightCodes)]
    with audit, compile_policy("never"):
        lowbit_step(net, optimizer, closure)
    after = [q.codes() for _, q in quantizers(net) if isinstance(q, WeightCodes)]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return audit


@pytest.mark.parametrize("options", [{}, {"accumulate_bits": 8, "momentum": 8, "weight_decay": True}], ids=str)
@pytest.mark.parametrize("norms", [False, True], ids=["no norms", "folded norms"])
@pytest.mark.parametrize("backend", ["reference", "int8"])
def test_a_step_computes_with_integers_alone(backend: str, norms: bool, options: dict[str, Any]) -> None:
    with kernels.use(backend):
        audit = audited_step(norms, **options)
    assert list(audit.found) == []
    assert audit.seen > 500  # operations on the integers of carriers come by, too
    assert "displayed_loss" in audit.passed


def test_products_return_integers_where_they_return_floats() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, err = (
        torch.randint(-127, 128, size, dtype=torch.int8, generator=generator)
        for size in ((4, 8, 6, 6), (12, 8, 3, 3), (4, 12, 6, 6))
    )
    given = {
        "int8_matmul": lambda f: f(x.flatten(1), x.flatten(1).t(), exact_float=True),
        "int8_conv2d": lambda f: f(x, w, padding=1, exact_float=True),
        "int8_conv2d_input": lambda f: f(err, w, x.shape, padding=1, exact_float=True),
        "int8_conv2d_weight": lambda f: f(x, err, w.shape, padding=1, exact_float=True),
    }
    assert {function.__name__ for function in INTEGER_PRODUCTS} == given.keys()
    for function in INTEGER_PRODUCTS:
        for backend in ("reference", "simulate", "int8"):
            with kernels.use(backend):
                acc = given[function.__name__](function)
            assert torch.equal(acc.double(), acc.double().round())
            assert float(acc.double().abs().max()) < 2**24 or acc.dtype in (torch.int32, torch.int64)


def _add(forward: bool) -> Any:
    """integer_add with a float sum in its forward, or in its backward."""

    class Add(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Carrier, b: Carrier, op: Any) -> Tensor:
            ctx.op = op
            exponent = torch.maximum(a.exponent, b.exponent) + 1
            codes = (a.payload >> (exponent - a.exponent)) + (b.payload >> (exponent - b.exponent))
            total = a.plain() + b.plain() if forward else None
            assert total is None or total.shape == codes.shape
            return carry(codes, exponent, op)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            assert forward or (grad.plain() + 1.0).shape == grad.shape
            return grad, grad, None

    return lambda op, a, b: Add.apply(a, b, op)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_planted_float_sum_is_found(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The audit is worth what it finds."""
    monkeypatch.setitem(niti._OPERATIONS, LowBitAdd, _add(where == "forward"))
    assert [found.partition(" ")[0] for found in audited_step().found] == ["add"]


@pytest.mark.parametrize(
    ("operation", "free"),
    [
        (lambda x: x * 0.25, True),
        (lambda x: x / 4, True),
        (lambda x: x * torch.tensor(-8.0), True),
        (lambda x: x * (x > 0), True),
        (lambda x: torch.relu(x).reshape(-1)[1:], True),
        (lambda x: F.pad(x, (1, 1)).amax(), True),
        (lambda x: x.round().to(torch.int8), False),
        (lambda x: (x * 2).to(torch.int8), False),
        (lambda x: x.amax().item(), False),
        (lambda x: x * 3.0, False),
        (lambda x: x * x, False),
        (lambda x: x + 1, False),
        (lambda x: x.sum(), False),
        (lambda x: x @ x, False),
        (lambda x: torch.exp(x), False),
    ],
)
def test_what_is_free_and_what_is_found(operation: Any, free: bool) -> None:
    x = torch.tensor([[0.3, -1.7], [2.5, 0.0]])
    with FloatAudit() as audit:
        audit.arm()
        operation(x)
    assert (list(audit.found) == []) == free
