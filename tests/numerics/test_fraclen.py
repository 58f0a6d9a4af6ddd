from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics import fraclen_choice as module
from lightning_lowbit.numerics.fraclen import fix_quant, largest_code, largest_fraclen
from lightning_lowbit.numerics.fraclen_choice import (
    METRICS,
    SELECTORS,
    choose,
    fraclen_by_metric,
    fraclen_of,
    measure,
    metric_of,
    quantization_errors,
)

FORMATS = [(8, True), (8, False), (4, True), (4, False), (2, True), (2, False), (16, True), (16, False)]
formats = st.sampled_from(FORMATS)
BY_ERROR = ("grid", "histogram")


def formula(x: Tensor, fraclen: Tensor, bits: int, signed: bool, ste: str, rounding: bool) -> tuple[Tensor, Tensor]:
    """Values and mask of fix_quant, one operation per symbol."""
    most = 2 ** (bits - signed) - 1
    v = x * 2.0**fraclen
    z = torch.round(v) if rounding else v
    if ste == "strict":
        mask = (z.abs() < most) if signed else (z > 0) & (z < most)
    else:
        mask = (x.abs() <= most * 2.0**-fraclen) if signed else (x > 0) & (x <= most * 2.0**-fraclen)
    return z.clamp(-most if signed else 0, most) / 2.0**fraclen, mask


def edges(bits: int, signed: bool, fraclen: int) -> Tensor:
    """Around 0, the ends of the codes and every kind of tie, with their float neighbors; and what has no code."""
    most = largest_code(bits, signed)
    codes = [0.0, 0.5, 1.0, 1.5, 2.5, most - 1.5, most - 1.0, most - 0.5, most, most + 0.5, most + 1.0, 2.0 * most]
    v = torch.tensor(codes)
    v = torch.cat([v, v.nextafter(v + 1), v.nextafter(v - 1)])
    v = torch.cat([v, -v]) * 2.0**-fraclen
    return torch.cat([v, torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-30, -1e-30])])


def run(x: Tensor, fraclen: Tensor | int, **options) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    g = torch.linspace(0.5, 2.0, x.numel(), dtype=x.dtype).reshape(x.shape)
    y = fix_quant(x, fraclen, **options)
    (dx,) = torch.autograd.grad(y, x, g)
    return y.detach(), dx, g


def check(x: Tensor, fraclen: Tensor | int, bits: int, signed: bool, ste: str, rounding: bool = True, axis: int = 0):
    y, dx, g = run(x, fraclen, bits=bits, signed=signed, ste=ste, rounding=rounding, axis=axis)
    per_channel = torch.as_tensor(fraclen).to(x.dtype)
    if per_channel.dim():
        per_channel = per_channel.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])
    want, mask = formula(x, per_channel, bits, signed, ste, rounding)
    torch.testing.assert_close(y, want, rtol=0.0, atol=0.0, equal_nan=True)
    assert torch.equal(dx, torch.where(mask, g, 0.0))
    assert y.dtype == x.dtype


class TestFixQuant:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("rounding", [True, False])
    @pytest.mark.parametrize("ste", ["strict", "clip"])
    @pytest.mark.parametrize(("bits", "signed"), FORMATS)
    def test_edges(self, bits: int, signed: bool, ste: str, rounding: bool, dtype: torch.dtype) -> None:
        for fraclen in range(largest_fraclen(bits, signed) + 1):
            check(edges(bits, signed, fraclen).to(dtype), fraclen, bits, signed, ste, rounding)

    @given(
        st.lists(st.floats(width=32), min_size=1, max_size=40),
        formats,
        st.data(),
        st.sampled_from(["strict", "clip"]),
        st.booleans(),
    )
    def test_any_float(self, values: list[float], fmt: tuple[int, bool], data, ste: str, rounding: bool) -> None:
        fraclen = data.draw(st.integers(0, largest_fraclen(*fmt)))
        check(torch.tensor(values), fraclen, *fmt, ste, rounding)

    @given(st.integers(0, 2**32), formats, st.data(), st.sampled_from(["strict", "clip"]))
    def test_ties(self, seed: int, fmt: tuple[int, bool], data, ste: str) -> None:
        fraclen = data.draw(st.integers(0, largest_fraclen(*fmt)))
        most = largest_code(*fmt)
        generator = torch.Generator().manual_seed(seed)
        halves = torch.randint(-2 * most - 4, 2 * most + 4, (64,), generator=generator) * 0.5
        check(halves * 2.0**-fraclen, fraclen, *fmt, ste)

    @pytest.mark.parametrize("rounding", [True, False])
    @pytest.mark.parametrize("axis", [0, 1, -1])
    @pytest.mark.parametrize("signed", [True, False])
    def test_a_fraclen_per_channel(self, signed: bool, axis: int, rounding: bool) -> None:
        x = 3 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
        fraclen = torch.arange(x.shape[axis]) + 3
        for ste in ("strict", "clip"):
            check(x, fraclen, 8, signed, ste, rounding, axis)

    def test_one_fraclen_in_any_form(self) -> None:
        x = torch.randn(50, 1, generator=torch.Generator().manual_seed(2))
        forms = [5, torch.tensor(5), torch.tensor([5]), torch.tensor(5.0), torch.tensor([5], dtype=torch.int32)]
        results = [run(x, fraclen) for fraclen in forms]
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))

    def test_two_bits_learn_by_the_clip_mask_only(self) -> None:
        x = torch.tensor([-1.0, -0.75, -0.25, 0.25, 0.75, 1.0])
        assert (run(x, 0, bits=2, ste="strict")[1] != 0).tolist() == [False, False, True, True, False, False]
        assert (run(x, 0, bits=2, ste="clip")[1] != 0).all()

    def test_negation_is_exact(self) -> None:
        x = torch.randn(500, generator=torch.Generator().manual_seed(3))
        assert torch.equal(fix_quant(-x, 6), -fix_quant(x, 6))

    def test_half_precision_is_computed_in_float32(self) -> None:
        x = torch.randn(200, generator=torch.Generator().manual_seed(4)).bfloat16().requires_grad_()
        for rounding in (True, False):
            y = fix_quant(x, 5, rounding=rounding)
            assert y.dtype == torch.float32
            assert torch.equal(y, fix_quant(x.float(), 5, rounding=rounding))
            (dx,) = torch.autograd.grad(y.sum(), x)
            assert dx.dtype == torch.bfloat16

    def test_unknown_mask(self) -> None:
        with pytest.raises(ConfigError, match=r"ste='soft', expected one of \['strict', 'clip'\]"):
            fix_quant(torch.ones(1), 0, ste="soft")


def draw(kind: str, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=generator)
    uniform = torch.rand(count, generator=generator)
    return {
        "gauss": normal,
        "relu": normal.relu(),
        "bias": normal + 0.7,
        "laplace": -torch.log1p(-uniform) * normal.sign(),
        "uniform": 2 * uniform - 1,
    }[kind]


KINDS = ("gauss", "relu", "bias", "laplace", "uniform")


class TestMeasure:
    @pytest.mark.parametrize("signed", [True, False])
    @pytest.mark.parametrize("select", SELECTORS)
    def test_parts_add_up(self, select: str, signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_DOUBLE_SLICE", 7000)
        monkeypatch.setattr(module, "_GRID_SLICE", 7000)
        x = 3 * draw("bias", 60000, 5).reshape(3, 20000)
        whole, parts = measure(x, select, 8, signed), sum(measure(part, select, 8, signed) for part in x)
        assert whole.dtype == torch.float64
        rtol = 1e-12 if select in METRICS else 1e-5
        torch.testing.assert_close(whole, parts, rtol=rtol, atol=0.0)
        assert torch.equal(choose(whole, select, 8, signed), choose(parts, select, 8, signed))

    @given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=60), st.data(), st.booleans())
    def test_closed_forms_are_sums(self, values: list[float], data, signed: bool) -> None:
        x = torch.tensor(values)
        cut = data.draw(st.integers(1, len(values) - 1))
        m = x.double().abs() if signed else x.double().relu()
        learned = bool(x.abs().max() > 0) if signed else bool(x.max() > 0)
        expected = {"std": (x.double().sum(), x.double().square().sum()), "mae": (0.0, m.sum())}
        expected["rms"] = 0.0, m.square().sum()
        for select in METRICS:
            sums = measure(x, select, 8, signed)
            first, second = expected[select]
            want = torch.tensor([len(values), first, second], dtype=torch.float64) * learned
            torch.testing.assert_close(sums, want, rtol=1e-12, atol=1e-12 * float(x.abs().sum()))
            halves = measure(x[:cut], select, 8, signed) + measure(x[cut:], select, 8, signed)
            # A half with nothing to learn does not count, but there is nothing in it to add either.
            if halves[0] == sums[0]:
                torch.testing.assert_close(sums, halves, rtol=1e-12, atol=1e-12 * float(x.abs().sum()))

    @pytest.mark.parametrize("signed", [True, False])
    @pytest.mark.parametrize("select", METRICS)
    def test_closed_forms_per_channel(self, select: str, signed: bool) -> None:
        x = (
            torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(6))
            * torch.tensor([0.01, 1, 0, 9, 2, -1.0])[:, None]
        )
        x[:, 5] = -x[:, 5].abs()
        x[1, 4, 2] = math.inf
        sums = measure(x, select, 8, signed, axis=1)
        each = torch.stack([measure(x[:, c], select, 8, signed) for c in range(6)])
        torch.testing.assert_close(sums, each, rtol=1e-12, atol=1e-12)
        assert sums[2].tolist() == sums[4].tolist() == [0.0, 0.0, 0.0]
        assert bool(sums[5].any()) == signed
        assert fraclen_of(x, select, 8, signed, axis=1).tolist() == choose(each, select, 8, signed).tolist()

    @pytest.mark.parametrize("count", [100, 40000])  # every value, and binned
    @pytest.mark.parametrize("signed", [True, False])
    @pytest.mark.parametrize("select", SELECTORS)
    def test_nothing_to_learn(self, select: str, signed: bool, count: int) -> None:
        x = torch.randn(count, generator=torch.Generator().manual_seed(7))
        nan, inf = x.clone(), x.clone()
        nan[-1], inf[0] = math.nan, math.inf
        silent = [torch.zeros(0), torch.zeros(0, 3), torch.zeros(count), -torch.zeros(count), nan, -nan, inf]
        silent += [] if signed else [-x.abs(), torch.full((count,), -1e-30)]
        width = 3 if select in METRICS else 2 + largest_fraclen(8, signed)
        for data in silent:
            sums = measure(data, select, 8, signed)
            assert sums.tolist() == [0.0] * width
        assert measure(x, select, 8, signed)[0] == count
        tiny = measure(torch.full((count,), 1e-6), select, 8, signed)
        assert tiny[0] == count
        assert choose(tiny, select, 8, signed) == (0 if select in BY_ERROR else largest_fraclen(8, signed))

    def test_nothing_positive_behind_the_first_part(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_DOUBLE_SLICE", 10)
        x = -torch.ones(35)
        for place in (0, 17, 34):
            assert measure(x, "std", 8, False).tolist() == [0.0, 0.0, 0.0]
            assert measure(x.index_fill(0, torch.tensor(place), 2.0), "std", 8, False).tolist() == [35.0, -32.0, 38.0]

    @pytest.mark.parametrize("select", SELECTORS)
    def test_data_stays_as_it_is_and_no_graph_is_kept(self, select: str) -> None:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = torch.randn(20000, generator=torch.Generator().manual_seed(8)).to(dtype).requires_grad_()
            before = x.detach().clone()
            sums = measure(x, select)
            assert not sums.requires_grad
            assert torch.equal(x.detach(), before)
            wide = measure(before.double() if dtype == torch.float64 else before.float(), select)
            assert torch.equal(sums, wide)

    @pytest.mark.parametrize("select", SELECTORS)
    def test_layouts(self, select: str) -> None:
        x = torch.randn(8, 6, 20, 30, generator=torch.Generator().manual_seed(9))
        for form in (x.to(memory_format=torch.channels_last), x.transpose(1, 3), x.expand(1, *x.shape)):
            torch.testing.assert_close(measure(form, select), measure(x, select), rtol=1e-5, atol=1e-6)

    def test_settings(self) -> None:
        x = torch.ones(3)
        with pytest.raises(
            ConfigError, match=r"select='max', expected one of \['std', 'mae', 'rms', 'grid', 'histogram'\]"
        ):
            measure(x, "max")
        with pytest.raises(ConfigError, match=r"axis=0 with select='grid'"):
            measure(x, "grid", axis=0)
        with pytest.raises(ConfigError, match=r"bits=4 with select='rms', expected 8: .*select='grid'"):
            fraclen_of(x, "rms", 4)


class TestChoose:
    @pytest.mark.parametrize("signed", [True, False])
    @pytest.mark.parametrize("metric", METRICS)
    def test_a_closed_form_changes_exactly_at_its_limits(self, metric: str, signed: bool) -> None:
        c = {"std": 40.0 if signed else 70.0, "mae": 30.0, "rms": 40.0 if signed else 50.0}[metric]
        for dtype in (torch.float32, torch.float64):
            k = torch.arange(1, 9 - signed)
            limit = (c * 2.0**-k).to(dtype)
            assert torch.equal(fraclen_by_metric(limit, metric, signed), k)
            assert torch.equal(fraclen_by_metric(limit.nextafter(limit + 1), metric, signed), k - 1)
        assert fraclen_by_metric(torch.tensor([0.0, 1e30, math.inf]), metric, signed).tolist() == [8 - signed, 0, 0]

    @pytest.mark.parametrize("select", SELECTORS)
    def test_stacked_rows(self, select: str) -> None:
        rows = torch.stack([measure(torch.randn(500) * 2.0**k, select) for k in range(-9, 6)])
        each = [int(choose(row, select)) for row in rows]
        assert choose(rows, select).tolist() == each
        assert choose(rows.reshape(3, 5, -1), select).shape == (3, 5)
        assert choose(rows, select).dtype == torch.int64
        assert sorted(each, reverse=True) == each

    def test_metrics(self) -> None:
        x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(10)) + 3
        assert float(metric_of(measure(x, "std"), "std")) == pytest.approx(float(x.std()), rel=1e-12)
        assert float(metric_of(measure(x, "mae"), "mae")) == pytest.approx(float(x.abs().mean()), rel=1e-12)
        assert float(metric_of(measure(x, "rms"), "rms")) == pytest.approx(float(x.square().mean().sqrt()), rel=1e-12)

    @pytest.mark.parametrize("value", [0.01, 0.3, 1.0, 5.0, 1000.0])
    @pytest.mark.parametrize("signed", [True, False])
    @pytest.mark.parametrize("count", [1, 50])
    def test_a_constant_is_not_clipped_to_less_than_half(self, value: float, signed: bool, count: int) -> None:
        x = torch.full((count,), value)
        fraclen = int(fraclen_of(x, "std", 8, signed))
        assert fraclen == 0 or value * 2**fraclen <= 2 * largest_code(8, signed)
        assert fraclen == 8 - signed or value * 2 ** (fraclen + 1) > 2 * largest_code(8, signed)

    @given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=50), formats)
    @settings(deadline=None)
    def test_the_grid_s_errors_are_those_of_fix_quant(self, values: list[float], fmt: tuple[int, bool]) -> None:
        x = torch.tensor(values)
        m = x if fmt[1] else x.relu()
        want = [
            (m - fix_quant(m, f, bits=fmt[0], signed=fmt[1])).double().square().mean().sqrt()
            for f in range(largest_fraclen(*fmt) + 1)
        ]
        errors = quantization_errors(x, *fmt)
        torch.testing.assert_close(errors, torch.stack(want), rtol=1e-5, atol=1e-20)
        sums = measure(x, "grid", *fmt)
        if sums[0] > 0:
            torch.testing.assert_close((sums[1:] / sums[0]).sqrt(), errors, rtol=1e-5, atol=1e-20)
            best = errors[choose(sums, "grid", *fmt)]
            assert best <= errors.min() * (1 + 1e-5)

    @pytest.mark.parametrize(
        ("value", "expected"), [(1.0, 0), (0.5, 1), (0.375, 3), (127 / 128, 7), (1e-6, 0), (1e6, 0), (-2.0, 0)]
    )
    @pytest.mark.parametrize("select", BY_ERROR)
    def test_of_equal_errors_the_smallest_fraclen(self, value: float, expected: int, select: str) -> None:
        assert int(fraclen_of(torch.full((300,), value), select)) == expected

    @pytest.mark.parametrize("signed", [True, False])
    @pytest.mark.parametrize("count", [300, 5000, 70000])
    def test_the_histogram_agrees_with_the_grid(self, count: int, signed: bool) -> None:
        agree, worst, trials = 0, 0.0, 0
        for seed in range(20):
            scale = 2.0 ** (14 * seed / 19 - 8.3)
            for kind in KINDS:
                x = scale * draw(kind, count, seed)
                errors = quantization_errors(x, 8, signed)
                found, best = int(fraclen_of(x, "histogram", 8, signed)), int(fraclen_of(x, "grid", 8, signed))
                agree, trials = agree + (found == best), trials + 1
                worst = max(worst, float(errors[found] / errors[best]))
        assert agree >= 0.99 * trials
        assert worst <= 1.02

    @pytest.mark.parametrize(("bits", "signed"), FORMATS)
    def test_binned_errors_are_near_the_exact_ones(self, bits: int, signed: bool) -> None:
        x = 2 * draw("gauss", 200000, 11)
        exact, binned = (measure(x, select, bits, signed) for select in ("grid", "histogram"))
        torch.testing.assert_close(binned, exact, rtol=0.01, atol=0.0)

    def test_pixels(self) -> None:
        pixels = torch.randint(0, 256, (50000,), generator=torch.Generator().manual_seed(12))
        for select in BY_ERROR:
            assert int(fraclen_of(pixels / 256, select, 8, False)) == 8
            assert int(fraclen_of(pixels.float(), select, 8, False)) == 0


def layer(x: Tensor, select: str, ste: str, signed: bool) -> tuple[Tensor, Tensor]:
    fraclen = fraclen_of(x, select, 8, signed)
    return fix_quant(x, fraclen, signed=signed, ste=ste), fraclen


# torch 2.13's compiler itself uses what torch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("select", "ste", "signed", "backend"),
    [(select, "clip", True, "eager") for select in SELECTORS]  # traced whole: no value is read on the host
    + [("std", "strict", False, "eager"), ("std", "strict", False, "inductor")],
)
def test_compiled_equals_eager(select: str, ste: str, signed: bool, backend: str) -> None:
    pytest.importorskip("torch._inductor")
    torch._dynamo.reset()
    x = torch.randn(4, 9, 25, 25, generator=torch.Generator().manual_seed(13), requires_grad=True)
    try:
        y, fraclen = torch.compile(layer, fullgraph=True, backend=backend)(x, select, ste, signed)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no working C++ compiler: {error}")
    want, expected = layer(x, select, ste, signed)
    assert int(fraclen) == int(expected)
    assert torch.equal(y, want)
    assert torch.equal(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, want)))
