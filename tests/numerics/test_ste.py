from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit.numerics import ste
from lightning_lowbit.numerics.rounding import Rounding
from lightning_lowbit.numerics.ste import (
    fake_quantize,
    gate_backward,
    open_interval,
    threshold_quantize,
    threshold_quantize_reference,
)

GRIDS = {
    "s8": {"qmin": -128, "qmax": 127, "point": 7},
    "narrow8": {"qmin": -127, "qmax": 127, "point": 7},
    "u8": {"qmin": 0, "qmax": 255, "point": 8},
    "s2": {"qmin": -2, "qmax": 1, "point": 1},
    "u1": {"qmin": 0, "qmax": 1, "point": 1},
    "s16": {"qmin": -32768, "qmax": 32767, "point": 15},
    "u16": {"qmin": 0, "qmax": 65535, "point": 16},
}


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ste, "_SLICE", 1000)


def grads(fn, x: Tensor, log2_t: Tensor, g: Tensor, **grid) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    log2_t = log2_t.detach().clone().requires_grad_()
    y = fn(x, log2_t, **grid)
    y.backward(g.to(y.dtype))
    return y.detach(), x.grad, log2_t.grad


def ties_and_noise(seed: int, step: float, shape: tuple[int, ...]) -> Tensor:
    """Half of the values on exact ties of the grid, around and beyond its ends."""
    generator = torch.Generator().manual_seed(seed)
    ties = (torch.randint(-600, 600, shape, generator=generator) + 0.5) * step
    noise = torch.randn(shape, generator=generator) * 200 * step
    return torch.where(torch.rand(shape, generator=generator) < 0.5, ties, noise)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("log2_t", [-40.0, -1.3, 0.0, 1e-6, 3.0, 40.0])
@pytest.mark.parametrize("grid", GRIDS)
def test_fast_form_equals_the_formula(grid: str, log2_t: float, rectify: bool) -> None:
    step = 2.0 ** (min(max(math.ceil(log2_t), -32), 32) - GRIDS[grid]["point"])
    x = ties_and_noise(1, step, (3, 8, 17, 9)).to(memory_format=torch.channels_last)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([log2_t])
    y, dx, dt = grads(threshold_quantize, x, t, g, **GRIDS[grid], rectify=rectify)
    y_ref, dx_ref, _ = grads(threshold_quantize_reference, x, t, g, **GRIDS[grid], rectify=rectify)
    dt_ref = grads(threshold_quantize_reference, x.double(), t.double(), g, **GRIDS[grid], rectify=rectify)[2]
    assert torch.equal(y, y_ref)
    assert torch.equal(dx, dx_ref)
    assert y.stride() == x.stride()
    torch.testing.assert_close(dt.double(), dt_ref, rtol=1e-5, atol=0.0)


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.integers(-40, 40),
    st.sampled_from(sorted(GRIDS)),
    st.booleans(),
)
def test_fast_form_equals_the_formula_on_any_float(values: list[float], t: int, grid: str, rectify: bool) -> None:
    # A value below 2^-100 over a step of 2^32 underflows in x / s, which the fast form never computes.
    x = torch.tensor([0.0 if abs(v) < 2.0**-100 else v for v in values])
    g = torch.linspace(0.5, 2.0, len(values))
    log2_t = torch.tensor([float(t)])
    fast = grads(threshold_quantize, x, log2_t, g, **GRIDS[grid], rectify=rectify)
    slow = grads(threshold_quantize_reference, x, log2_t, g, **GRIDS[grid], rectify=rectify)
    torch.testing.assert_close(fast[0], slow[0], rtol=0.0, atol=0.0, equal_nan=True)
    assert torch.equal(fast[1], slow[1])
    assert bool(fast[2].isfinite())


def test_worked_example() -> None:
    # s = 2^(ceil(0.4) - 1) = 1, codes -2..1; the tie 1.5 goes to 2 and is outside, -2.5 to -2 and is inside.
    x = torch.tensor([-9.0, -2.5, -1.5, 0.25, 1.25, 1.5, 9.0])
    g = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    y, dx, dt = grads(threshold_quantize, x, torch.tensor([0.4]), g, qmin=-2, qmax=1, point=1)
    assert y.tolist() == [-2, -2, -2, 0, 1, 1, 1]
    assert dx.tolist() == [0, 2, 3, 4, 5, 0, 0]
    expected = 1 * -2 + 2 * 0.5 + 3 * -0.5 + 4 * -0.25 + 5 * -0.25 + 6 * 1 + 7 * 1
    assert dt.item() == pytest.approx(expected * math.log(2.0), rel=1e-6)


@pytest.mark.parametrize("fn", [threshold_quantize, threshold_quantize_reference])
def test_rectify_is_relu_before(fn) -> None:
    x = ties_and_noise(3, 2.0**-8, (4000,))
    g = torch.randn(4000, generator=torch.Generator().manual_seed(4))
    grid = GRIDS["u8"]
    fused = grads(fn, x, torch.tensor([0.0]), g, **grid, rectify=True)
    chained = grads(lambda x, t, **k: fn(torch.relu(x), t, **k), x, torch.tensor([0.0]), g, **grid)
    assert torch.equal(fused[0], chained[0])
    assert torch.equal(fused[1], chained[1])
    torch.testing.assert_close(fused[2], chained[2], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("fn", [threshold_quantize, threshold_quantize_reference])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_leave_the_threshold_gradient_alone(fn, bad: float) -> None:
    x = torch.randn(2500, generator=torch.Generator().manual_seed(5))
    g = torch.ones(2500)
    clean = torch.where(torch.arange(2500) == 1700, 0.0, x)  # exactly on the grid: adds 0 as well
    y, dx, dt = grads(fn, torch.where(torch.arange(2500) == 1700, bad, x), torch.tensor([0.0]), g, **GRIDS["s8"])
    torch.testing.assert_close(dt, grads(fn, clean, torch.tensor([0.0]), g, **GRIDS["s8"])[2])
    assert dx[1700] == 0
    assert y[1700].isnan() if math.isnan(bad) else y[1700] == math.copysign(1.0, bad) * (127 + (bad < 0)) / 128


@pytest.mark.parametrize("fn", [threshold_quantize, threshold_quantize_reference])
def test_a_nan_threshold_is_not_a_quiet_zero(fn) -> None:
    y, _, dt = grads(fn, torch.ones(3), torch.tensor([math.nan]), torch.ones(3), **GRIDS["s8"])
    assert bool(y.isnan().all())
    assert bool(dt.isnan().all())


@pytest.mark.parametrize("rectify", [False, True])
def test_without_a_trained_threshold(rectify: bool) -> None:
    x = ties_and_noise(6, 2.0**-7, (2500,))
    x[3] = math.nan
    x.requires_grad_()
    log2_t = torch.tensor([0.0])
    g = torch.ones(2500)
    threshold_quantize(x, log2_t, **GRIDS["s8"], rectify=rectify).backward(g)
    assert log2_t.grad is None
    assert torch.equal(x.grad, grads(threshold_quantize_reference, x, log2_t, g, **GRIDS["s8"], rectify=rectify)[1])


@pytest.mark.parametrize("fn", [threshold_quantize, threshold_quantize_reference])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(fn, dtype: torch.dtype) -> None:
    x = torch.randn(2100, generator=torch.Generator().manual_seed(7)).to(dtype)
    g = torch.randn(2100, generator=torch.Generator().manual_seed(8))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    y, dx, dt = grads(fn, x, torch.tensor([1.0]), g, **GRIDS["s8"])
    y32, dx32, dt32 = grads(fn, x.to(compute), torch.tensor([1.0]), g, **GRIDS["s8"])
    assert (y.dtype, dx.dtype, dt.dtype) == (compute, dtype, torch.float32)
    assert torch.equal(y, y32)
    assert torch.equal(dx, dx32.to(dtype))
    assert torch.equal(dt, dt32)


@pytest.mark.parametrize("rounding", list(Rounding))
def test_every_rounding(rounding: Rounding) -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    y, dx, _ = grads(
        threshold_quantize, x, torch.tensor([3.0]), torch.ones(5), qmin=-8, qmax=2, point=3, rounding=rounding
    )
    expected = {
        "half_even": [-2, 0, 0, 2, 2],
        "half_up": [-1, 0, 1, 2, 2],
        "half_away": [-2, -1, 1, 2, 2],
        "dpu": [-1, 0, 0, 2, 2],
        "floor": [-2, -1, 0, 1, 2],
        "truncate": [-1, 0, 0, 1, 2],
    }[rounding.value]
    assert y.tolist() == expected
    assert dx[4] == (rounding.value not in ("half_up", "half_away"))  # 2.5 rounds to 3 there: outside


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (), (1,), (1001,), (2, 3, 5, 4, 3)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    fast = grads(threshold_quantize, x, torch.tensor([0.0]), torch.ones(shape), **GRIDS["s8"])
    slow = grads(threshold_quantize_reference, x, torch.tensor([0.0]), torch.ones(shape), **GRIDS["s8"])
    assert fast[0].shape == fast[1].shape == shape
    assert fast[2].shape == (1,)
    assert torch.equal(fast[0], slow[0])
    assert torch.equal(fast[1], slow[1])
    torch.testing.assert_close(fast[2], slow[2], rtol=1e-5, atol=1e-7)


def test_layouts_that_are_not_dense_or_differ_between_x_and_its_gradient() -> None:
    x = torch.randn(4, 6, 5, 8, generator=torch.Generator().manual_seed(10))
    for x_i in (x[:, ::2], x.transpose(1, 3), x.to(memory_format=torch.channels_last), x[2:]):
        for g in (
            torch.ones(()).expand(x_i.shape),
            torch.rand(x_i.shape).to(memory_format=torch.channels_last),
        ):
            leaf, t = torch.empty_strided(x_i.shape, x_i.stride()).copy_(x_i).requires_grad_(), torch.zeros(1)
            y = threshold_quantize(leaf, t, **GRIDS["s8"])
            y.backward(g)
            y_ref, dx_ref, _ = grads(threshold_quantize_reference, x_i, t, g, **GRIDS["s8"])
            assert torch.equal(y, y_ref)
            assert torch.equal(leaf.grad, dx_ref)


def test_keeps_only_x_for_backward() -> None:
    x, t = torch.randn(5000, requires_grad=True), torch.zeros(1, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: kept.append(s) or s, lambda s: s):
        threshold_quantize(x, t, **GRIDS["u8"], rectify=True)
    assert sum(s.numel() for s in kept if s.data_ptr() != x.data_ptr()) == 0
    assert any(s.data_ptr() == x.data_ptr() for s in kept)


def test_output_may_be_changed_in_place() -> None:
    x, t = torch.randn(50, requires_grad=True), torch.zeros(1, requires_grad=True)
    y = threshold_quantize(x, t, **GRIDS["s8"])
    y += 1.0
    y.sum().backward()
    assert t.grad is not None


@pytest.mark.parametrize("exponent", [-149, -100, -5, 0, 90, 120])
@pytest.mark.parametrize("grid", [(-128, 127), (-(2**31), 2**31 - 1)])
def test_fake_quantize(exponent: int, grid: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(11)
    codes = torch.randint(-150, 150, (2500,), generator=generator) * 0.5
    x = (codes * 2.0**exponent if exponent > -149 else codes.double() * 2.0**-149).float().requires_grad_()
    y = fake_quantize(x, torch.tensor(exponent, dtype=torch.int32), qmin=grid[0], qmax=grid[1])
    y.backward(torch.ones_like(x))
    v = x.detach().double() / 2.0**exponent
    assert torch.equal(y.double(), v.round().clamp(*grid) * 2.0**exponent)
    assert torch.equal(x.grad, ((v.round() >= grid[0]) & (v.round() <= grid[1])).float())


def test_fake_quantize_per_channel() -> None:
    x = torch.tensor([[0.3, 9.0], [0.3, 9.0]], requires_grad=True)
    y = fake_quantize(x, torch.tensor([[0], [-2]], dtype=torch.int32), qmin=-8, qmax=7)
    y.sum().backward()
    assert y.tolist() == [[0.0, 7.0], [0.25, 1.75]]
    assert x.grad.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_gate_backward() -> None:
    x = torch.randn(7, requires_grad=True)
    y = gate_backward(x, lambda g: g.round())
    assert torch.equal(y, x)
    y.backward(torch.linspace(-2.0, 2.0, 7))
    assert torch.equal(x.grad, torch.linspace(-2.0, 2.0, 7).round())


@pytest.mark.parametrize("channel", [False, True])
def test_fake_quantize_upcasts_half_precision(channel: bool) -> None:
    x = torch.tensor([[1.0, 3.0e4]], dtype=torch.bfloat16, requires_grad=True)
    exponent = torch.zeros((1, 1) if channel else (), dtype=torch.int32)
    y = fake_quantize(x, exponent.expand(1, 2) if channel else exponent, qmin=-128, qmax=127)
    y.sum().backward()
    assert (y.dtype, y.tolist()) == (torch.float32, [[1.0, 127.0]])
    assert (x.grad.dtype, x.grad.tolist()) == (torch.bfloat16, [[1.0, 0.0]])


# torch 2.13's compiler itself uses what torch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("rectify", [False, True])
def test_compiled_equals_eager(rectify: bool) -> None:
    pytest.importorskip("torch._inductor")
    x = ties_and_noise(12, 2.0**-7, (2, 8, 9, 7))
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(13))
    compiled = torch.compile(threshold_quantize, fullgraph=True)
    try:
        fast = grads(compiled, x, torch.tensor([0.3]), g, **GRIDS["s8"], rectify=rectify)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no working C++ compiler: {error}")
    eager = grads(threshold_quantize, x, torch.tensor([0.3]), g, **GRIDS["s8"], rectify=rectify)
    assert torch.equal(fast[0], eager[0])
    assert torch.equal(fast[1], eager[1])
    torch.testing.assert_close(fast[2], eager[2], rtol=1e-5, atol=0.0)


WINDOWS = {"codes -3..5": (-3.5, 5.5), "above 0": (0.0, 7.0), "none": (0.5, 0.5)}


@pytest.mark.parametrize("form", ["one", "channel", "int32 codes"])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_decides_the_gradient_and_not_the_values(window: str, form: str) -> None:
    step, bounds = 2.0**-3, WINDOWS[window]
    x = ties_and_noise(14, step, (60, 50))
    x = torch.cat([x, torch.tensor([*bounds, math.nan, math.inf, -math.inf] * 10)[None] * step]).requires_grad_()
    exponent = torch.full((50,) if form == "channel" else (), -3, dtype=torch.int32)
    grid = {"qmin": -(2**31), "qmax": 2**31 - 1} if form == "int32 codes" else {"qmin": -8, "qmax": 7}
    y = fake_quantize(x, exponent, **grid, window=bounds)
    torch.testing.assert_close(y, fake_quantize(x, exponent, **grid), rtol=0.0, atol=0.0, equal_nan=True)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(15))
    (dx,) = torch.autograd.grad(y, x, g)
    v = x.detach() / step
    assert torch.equal(dx, torch.where((v > bounds[0]) & (v < bounds[1]), g, 0.0))


def test_a_window_over_all_codes_is_the_default() -> None:
    for dtype in (torch.float32, torch.float64):
        for qmin, qmax in ((-128, 127), (-127, 127), (0, 255)):
            x = ties_and_noise(16, 2.0**-7, (3000,)).to(dtype).requires_grad_()
            x = torch.cat([x, x.nextafter(x + 1), x.nextafter(x - 1)]).detach().requires_grad_()
            window = open_interval(qmin, qmax, dtype)
            exponent = torch.tensor(-7)
            ys = [fake_quantize(x, exponent, qmin=qmin, qmax=qmax, window=w) for w in (window, None)]
            assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in ys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_open_interval_is_tight(dtype: torch.dtype) -> None:
    for qmin, qmax in ((-128, 127), (-127, 126), (1, 254), (0, 0), (-65535, 65534), (2, 6)):
        low, high = open_interval(qmin, qmax, dtype)
        bounds = torch.tensor([low, high], dtype=dtype)
        assert bounds.tolist() == [low, high]
        inner = torch.stack([bounds[0].nextafter(bounds[1]), bounds[1].nextafter(bounds[0])]).round()
        outer = bounds.round()
        assert inner.tolist() == [qmin, qmax]
        assert outer[0] < qmin
        assert outer[1] > qmax
