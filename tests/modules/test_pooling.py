"""Average pools are integer divisions with the tie rule of their quantizer."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit import Tqt, convert
from lightning_lowbit.modules.pooling import kind_of, pool
from lightning_lowbit.numerics.exponent import pow2
from lightning_lowbit.numerics.rounding import divide_rounded

ROUNDINGS = ["half_even", "half_up", "dpu"]


class Pooled(nn.Module):
    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.act, self.pool = nn.ReLU(), pool
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.conv(x)))


class Mean(nn.Module):
    def __init__(self, dim: Any, keepdim: bool) -> None:
        super().__init__()
        self.dim, self.keepdim = dim, keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dim, keepdim=self.keepdim)


def windows(pool: nn.Module, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and counts of every window, from torch's own pool in float64: mean of codes and of ones."""
    total = F.avg_pool2d if isinstance(pool, nn.AvgPool2d) else None
    codes = codes.double()
    if total is None:
        means = pool(codes)
        # n of a window is what makes its mean of unit impulses 1 / n
        size = codes.shape[-2:]
        impulses = torch.eye(size[0] * size[1], dtype=torch.float64).reshape(-1, 1, *size)
        counts = torch.round(1 / pool(impulses).amax(0)) if not isinstance(pool, Mean) else None
        if counts is None:
            dims = [pool.dim] if isinstance(pool.dim, int) else pool.dim
            counts = torch.tensor(float(torch.Size([codes.shape[d] for d in dims]).numel()))
        return torch.round(means * counts).long(), counts.long().expand_as(means)
    args = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)
    sums = total(codes, *args, True, 1)
    counts = torch.round(sums.new_ones(1) * total(torch.ones_like(codes), *args, True, 1))
    if pool.divisor_override:
        counts = torch.full_like(sums, pool.divisor_override)
    elif pool.count_include_pad:
        ones = F.pad(torch.ones_like(codes), [pool.padding] * 4, value=1.0)
        counts = total(ones, pool.kernel_size, pool.stride, 0, pool.ceil_mode, True, 1)[
            ..., : sums.shape[-2], : sums.shape[-1]
        ]
    return torch.round(sums).long(), torch.round(counts).long()


POOLS: dict[str, tuple[Any, int]] = {
    **{f"avg_{k}": ((lambda k=k: nn.AvgPool2d(k)), 16) for k in (2, 3, 5, 7, 13, 16)},
    "padded": (lambda: nn.AvgPool2d(3, 2, 1), 9),
    "padded_excluded": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), 9),
    "ceil": (lambda: nn.AvgPool2d(3, 2, ceil_mode=True), 10),
    "ceil_padded": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), 10),
    "ceil_padded_excluded": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), 10),
    "divisor": (lambda: nn.AvgPool2d(2, divisor_override=3), 8),
    "adaptive_1": (lambda: nn.AdaptiveAvgPool2d(1), 16),
    "adaptive_even": (lambda: nn.AdaptiveAvgPool2d((4, 2)), 8),
    "adaptive_ragged": (lambda: nn.AdaptiveAvgPool2d((3, None)), 7),
    "mean": (lambda: Mean((2, 3), False), 7),
    "mean_one": (lambda: Mean(-1, True), 6),
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", POOLS)
def test_exact_division(name: str, rounding: str) -> None:
    torch.manual_seed(0)
    make, size = POOLS[name]
    net = Pooled(make())
    x = torch.randn(3, 2, size, size)
    convert(net, Tqt(act_round=rounding), x)
    net.eval()
    source, target = (
        net.act.lowbit_output,
        net.pool.lowbit_output if hasattr(net.pool, "lowbit_output") else None,
    )
    if target is None:
        target = next(m for n, m in net.named_modules() if n.endswith("lowbit_avg_pool.lowbit_output"))
    with torch.no_grad():
        y = net(x)
        codes = (net.act(net.conv(x)) / pow2(source.exponent())).long()
    sums, counts = windows(make(), codes)
    shift = int(source.exponent() - target.exponent())  # f: fraction bits of the output minus those of the input
    numerator, denominator = (sums << max(shift, 0)), counts * 2 ** max(-shift, 0)
    expected = divide_rounded(numerator, denominator, rounding).clamp(0, target.grid().qmax)
    assert torch.equal((y / pow2(target.exponent())).long(), expected)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_quotient_of_a_window(rounding: str) -> None:
    """Float division of a window's sum rounds as the integers do: all sums for sides 1 to 16."""
    from lightning_lowbit.numerics.rounding import round_to

    for n, f in itertools.product([k * k for k in range(1, 17)], (0, 1, 3)):
        sums = torch.arange(-128 * n, 255 * n + 1)
        quotient = (sums.float() * 2.0**-7) / n
        codes = round_to(quotient / 2.0 ** (-7 - f), rounding)
        assert torch.equal(codes.long(), divide_rounded(sums << f, n, rounding)), (n, f)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pools_of_all_dimensions(dims: int) -> None:
    torch.manual_seed(0)
    x = torch.randint(-128, 128, (2, 3, 7, 6, 5)[: 2 + dims]).double()
    fixed, adaptive = getattr(F, f"avg_pool{dims}d"), getattr(F, f"adaptive_avg_pool{dims}d")
    kind = kind_of(fixed)
    for padding, ceil_mode, include in itertools.product((0, 1), (False, True), (False, True)):
        args = (3, 2, padding, ceil_mode, include)
        torch.testing.assert_close(pool(kind, x, *args), fixed(x, *args), rtol=1e-12, atol=1e-12)
    for size in (1, 2, 3, 4, 5):
        torch.testing.assert_close(pool(kind_of(adaptive), x, size), adaptive(x, size), rtol=1e-12, atol=1e-12)
    assert torch.equal(pool(kind, x[0], kernel_size=2), pool(kind, x, kernel_size=2)[0])  # unbatched
