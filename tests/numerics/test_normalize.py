"""Batch norm on grids: quotients at and beside ties, gradients against autograd, statistics, the integer form."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.normalize import NormFormat, batch_norm, norm_constants, normalize, running_update
from lightning_lowbit.numerics.rounding import shift_right_rounded
from lightning_lowbit.numerics.through import pass_through

_PAPER = NormFormat()
_NO_GRIDS = NormFormat(mean=32, deviation=32, xhat=32, gamma=32, beta=32)


def _statistics_of(divisor: int) -> tuple[Tensor, Tensor]:
    """Running mean 0 and the variance whose deviation plus 2^-15 is divisor 2^-15."""
    return torch.zeros(1, dtype=torch.float64), torch.tensor([(divisor - 1) ** 2 * 2.0**-30], dtype=torch.float64)


def _near_ties(divisor: int, limit: int, seed: int) -> list[int]:
    """a, |a| < limit, with a 2^15 / divisor on a tie or 1 / (2 odd) beside one, odd the odd part of the divisor."""
    twos = divisor & -divisor
    odd = divisor // twos
    if twos >= 2**16:  # only such divisors have ties
        first, step = [odd * (twos >> 16)], 2 * odd * (twos >> 16)
    else:  # 2^16 a = (2 k + 1) divisor +- twos
        inverse = pow(2**16 // twos, -1, odd)
        first, step = [inverse, odd - inverse], odd
    far = [seed * 7919 * n % (limit // step) for n in range(1, 9)]
    found = [a + step * n for a in first for n in (0, *far, limit // step - 1)]
    return [sign * a for a in found for sign in (1, -1) if a < limit]


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(st.integers(2, 2**12), st.integers(2**12, 2**20), st.integers(1, 64).map(lambda m: m << 16)),
    st.integers(0, 10**6),
)
def test_float64_divides_as_integers_do(divisor: int, seed: int) -> None:
    """Ties and their nearest neighbors, up to |x - mu| = 2^22: float form = integer form = fractions."""
    numerators = [*_near_ties(divisor, 2**37, seed), 0, 1, -1, 2**37 - 1]
    codes = torch.tensor(numerators)[:, None]
    mean, var = _statistics_of(divisor)
    y, _, _ = batch_norm(codes.double() * 2.0**-15, None, None, _PAPER, (mean, var))
    integers = normalize(codes, 15, norm_constants(mean, var, None, None, _PAPER), _PAPER)
    exact = [round(Fraction(a * 2**15, divisor)) for a in numerators]
    assert (integers[:, 0] // 2**7).tolist() == exact
    assert torch.equal(y * 2.0**22, integers.double())


def test_the_quotients_tried_are_adversarial() -> None:
    """They are as near to ties as said, and a float32 division takes some of them to the wrong side."""
    numerators, divisor = _near_ties(4099, 2**24, 5), 4099
    quotients = [Fraction(a * 2**15, divisor) for a in numerators]
    assert {abs(abs(q) % 1 - Fraction(1, 2)) for q in quotients} == {Fraction(1, 2 * divisor)}
    assert {abs(Fraction(a * 2**15, 3 << 17)) % 1 for a in _near_ties(3 << 17, 2**24, 5)} == {Fraction(1, 2)}
    single = torch.tensor(numerators).float() / torch.tensor(float(divisor))
    assert torch.round(single * 2**15).tolist() != [round(q) for q in quotients]


def test_every_small_quotient() -> None:
    format = NormFormat(xhat=4, deviation=4, mean=4, eps_exponent=-3)
    codes = torch.arange(-100, 101)[:, None]
    for divisor in range(1, 40):
        var = torch.tensor([((divisor - 1) / 8) ** 2])
        y, _, _ = batch_norm(codes / 8, None, None, format, (torch.zeros(1), var))
        want = [round(Fraction(a * 8, divisor)) for a in codes[:, 0].tolist()]
        assert (y[:, 0] * 8).tolist() == want
        integers = normalize(codes, 3, norm_constants(torch.zeros(1), var, None, None, format), format)
        assert torch.equal(integers.double() * 2.0**-format.fraction, y.double())


@pytest.mark.parametrize("x_fraction", [0, 7, 14, 15, 18])
@pytest.mark.parametrize(
    "format",
    [
        _PAPER,
        NormFormat(xhat=8),
        NormFormat(integer_bits=1),
        NormFormat(mean=12, deviation=10, xhat=5, gamma=4, beta=14, eps_exponent=-20),
        NormFormat(mean=4, deviation=24, xhat=3),
    ],
    ids=["paper", "xhat8", "clipped", "uneven", "coarse"],
)
def test_integers_equal_the_network(format: NormFormat, x_fraction: int) -> None:
    generator = torch.Generator().manual_seed(x_fraction)
    codes = torch.randint(-(2 ** (x_fraction + 3)), 2 ** (x_fraction + 3), (50, 6, 5), generator=generator)
    mean, beta = torch.randn(2, 6, generator=generator)
    var, gamma = torch.rand(6, generator=generator) * 4 + 0.1, torch.randn(6, generator=generator) * 2
    x = codes.float() * 2.0**-x_fraction
    integers = normalize(codes, x_fraction, norm_constants(mean, var, gamma, beta, format), format)
    exact, _, _ = batch_norm(x.double(), gamma, beta, format, (mean, var))
    assert torch.equal(exact * 2.0**format.fraction, integers.double())
    y, _, _ = batch_norm(x, gamma, beta, format, (mean, var))
    assert y.dtype == torch.float32
    for coarse in (5, 7, 8):  # an activation's grid, reached in two roundings here and in one there
        assert torch.equal(torch.round(y * 2.0**coarse).long(), shift_right_rounded(integers, format.fraction - coarse))


def test_a_float32_result_rounds_on_as_the_exact_one() -> None:
    """y = 16 + 2^-8 + 2^-22 is above a tie of the grid 2^-7; the nearest float32 is on it and would go to 16."""
    codes = torch.tensor([[2**22 + 1]])
    stats = torch.zeros(1), torch.tensor([(1 - 2.0**-15) ** 2], dtype=torch.float64)
    format = NormFormat(beta=9)
    gamma, beta = torch.tensor([2.0**-7]), torch.tensor([15 + 2.0**-8])
    x = codes.double() * 2.0**-15
    exact, _, _ = batch_norm(x, gamma, beta, format, stats)
    y, _, _ = batch_norm(x.float(), gamma, beta, format, stats)
    assert exact.item() == 16 + 2.0**-8 + 2.0**-22
    assert torch.round(exact.float() * 2**7).item() == 16 * 2**7
    assert torch.round(y * 2**7).item() == torch.round(exact * 2**7).item() == 16 * 2**7 + 1
    assert abs(y.item() - exact.item()) < 2.0**-19


def _reference(x: Tensor, gamma: Tensor, beta: Tensor, format: NormFormat) -> Tensor:
    """The formulas, differentiated by autograd; every grid is straight-through."""

    def on_grid(v: Tensor, bits: int) -> Tensor:
        return pass_through(v, torch.round(v.detach() * 2.0 ** (bits - 1)) * 2.0 ** (1 - bits))

    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    mean = x.mean(axes)
    deviation = (x - mean.reshape(shape)).square().mean(axes).sqrt()
    s = on_grid(deviation, format.deviation) + 2.0**format.eps_exponent
    xhat = on_grid((x - on_grid(mean, format.mean).reshape(shape)) / s.reshape(shape), format.xhat)
    return on_grid(gamma, format.gamma).reshape(shape) * xhat + on_grid(beta, format.beta).reshape(shape)


@pytest.mark.parametrize("shape", [(64, 5), (8, 5, 7), (70, 5, 9, 40)], ids=["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("xhat", [8, 16])
def test_training_is_the_formula_differentiated(shape: tuple[int, ...], xhat: int) -> None:
    """float64; the last shape takes several slices."""
    generator = torch.Generator().manual_seed(2)
    format = NormFormat(xhat=xhat)
    scale = torch.arange(1.0, 6).reshape(1, -1, *[1] * (len(shape) - 2))
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale + scale).requires_grad_()
    gamma, beta = (torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    results = []
    for function in (lambda *args: batch_norm(*args)[0], _reference):
        y = function(x, gamma, beta, format)
        results.append((y.detach(), *torch.autograd.grad(y, (x, gamma, beta), grad)))
    (y, *grads), (want, *wanted) = results
    assert torch.equal(y, want)
    for got, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_without_grids_the_gradient_is_the_derivative() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    gamma, beta = (torch.randn(2, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *args: batch_norm(*args, _NO_GRIDS)[0], (x, gamma, beta))


def test_frozen_statistics_pass_the_gradient_alone() -> None:
    x = torch.randn(6, 2, 3, requires_grad=True)
    gamma, beta = torch.tensor([0.5, -2.0], requires_grad=True), torch.zeros(2, requires_grad=True)
    running = torch.tensor([0.25, 1.0]), torch.tensor([4.0, 0.25])
    y, mean, var = batch_norm(x, gamma, beta, _PAPER, running)
    grad = torch.randn_like(x)
    y.backward(grad)
    assert torch.equal(mean, running[0].double())
    assert torch.equal(var, running[1].double())
    s = torch.tensor([2.0, 0.5], dtype=torch.float64) + 2.0**-15
    slope = (gamma.detach().double() / s)[None, :, None]
    assert x.grad is not None
    assert torch.equal(x.grad, (slope * grad.double()).float())
    xhat = (y.detach().double() / gamma.detach().double()[None, :, None] * grad.double()).sum((0, 2))
    torch.testing.assert_close(gamma.grad, xhat.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(beta.grad, grad.sum((0, 2)))


@pytest.mark.parametrize("constant", [0.0, 0.1, -3e4], ids=["zero", "tenth", "large"])
def test_a_constant_channel(constant: float) -> None:
    x = torch.full((8, 2, 3), constant)
    x[:, 1] = torch.arange(24.0).reshape(8, 3)
    x.requires_grad_()
    y, _, var = batch_norm(x, torch.ones(2), torch.tensor([0.5, 0.0]), _PAPER)
    y.backward(torch.randn(y.shape))
    assert var[0] < 2.0**-32
    assert ((y[:, 0] - 0.5).abs() <= 0.5).all()  # 0.1 is half a unit off the grid of the mean at most
    assert x.grad is not None
    assert x.grad.isfinite().all()
    if constant == 0.0:
        assert (y[:, 0] == 0.5).all()


def test_an_odd_value_in_a_constant_channel_is_held() -> None:
    x, running = torch.tensor([[1.0], [-1.0], [0.0]]), (torch.zeros(1), torch.zeros(1))
    assert batch_norm(x, None, None, _PAPER, running)[0][:, 0].tolist() == [2.0**15, -(2.0**15), 0.0]
    held = batch_norm(x, None, None, NormFormat(integer_bits=3), running)[0]
    assert held[:, 0].tolist() == [8 - 2.0**-15, -8 + 2.0**-15, 0.0]


def test_order_and_layout_change_no_bit() -> None:
    """Sums of values on a grid are exact: any order of samples, any memory format, any number of processes."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randint(-(2**17), 2**17, (40, 6, 20, 20), generator=generator).float() * 2.0**-14
    y, mean, var = batch_norm(x, None, None, _PAPER)
    order = torch.randperm(40, generator=generator)
    shuffled = batch_norm(x[order], None, None, _PAPER)
    assert torch.equal(shuffled[0], y[order])
    last = batch_norm(x.to(memory_format=torch.channels_last), None, None, _PAPER)
    assert torch.equal(last[0], y)
    assert last[0].is_contiguous(memory_format=torch.channels_last)
    for other in (shuffled, last):
        assert torch.equal(other[1], mean)
        assert torch.equal(other[2], var)


def test_processes_share_statistics_and_gradients() -> None:
    """Two processes with the same values are one batch that holds each twice."""
    x = torch.randn(5, 3, 4)
    gamma, beta = torch.randn(3), torch.randn(3)
    grad = torch.randn(5, 3, 4)
    one = x.clone().requires_grad_()
    y, mean, var = batch_norm(one, gamma, beta, _PAPER, reduce=lambda sums: 2 * sums)
    y.backward(grad)
    both = torch.cat([x, x]).requires_grad_()
    whole, whole_mean, whole_var = batch_norm(both, gamma, beta, _PAPER)
    whole.backward(torch.cat([grad, grad]))
    assert torch.equal(y, whole[:5])
    torch.testing.assert_close((mean, var), (whole_mean, whole_var))
    assert one.grad is not None
    assert both.grad is not None
    torch.testing.assert_close(one.grad, both.grad[:5])


def test_little_is_kept_for_backward() -> None:
    kept: list[int] = []
    x = torch.randn(16, 3, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        batch_norm(x, torch.ones(3), None, _PAPER)
    assert sum(kept) == x.numel() + 6 * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_short_floats_count_as_float32(dtype: torch.dtype) -> None:
    x = torch.randn(9, 2).to(dtype).requires_grad_()
    y, _, _ = batch_norm(x, None, None, _PAPER)
    assert torch.equal(y, batch_norm(x.detach().float(), None, None, _PAPER)[0])
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_running_statistics_decay() -> None:
    running = torch.tensor([0.5, -2.0])
    running_update(running, torch.tensor([1.5, 0.0], dtype=torch.float64))
    assert torch.equal(running, torch.tensor([0.503, -1.994]))
    running_update(running, torch.tensor([1.5, 0.0]), decay=0.9, bits=8)
    assert torch.equal(running * 128, torch.tensor([77.0, -230.0]))


def test_an_empty_batch_is_empty() -> None:
    y, mean, var = batch_norm(torch.zeros(0, 3, 2, requires_grad=True), None, None, _PAPER)
    y.sum().backward()
    assert y.shape == (0, 3, 2)
    assert torch.equal(mean, var)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"xhat": 1}, "xhat=1, expected an integer from 2 to 24, or 32"),
        ({"mean": 28}, "mean=28"),
        ({"eps_exponent": 0}, "eps_exponent=0"),
        ({"integer_bits": -1}, "integer_bits=-1"),
    ],
    ids=["xhat", "mean", "eps", "integer_bits"],
)
def test_impossible_formats_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NormFormat(**fields)


def test_integers_need_grids() -> None:
    with pytest.raises(ConfigError, match="xhat=32 or more, expected a grid"):
        norm_constants(torch.zeros(1), torch.ones(1), None, None, NormFormat(xhat=32))
