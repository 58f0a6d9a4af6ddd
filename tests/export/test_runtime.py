"""Every kind of operation against torch and exact arithmetic, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from export.runtime_codes import codes, equal
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_lowbit.export.runtime import (
    ROUNDINGS,
    Array,
    Op,
    Program,
    ProgramError,
    Value,
    dequantize,
    divide,
    quantize,
    requantize,
    trace,
)
from lightning_lowbit.numerics.normalize import NormFormat, norm_constants, normalize
from lightning_lowbit.numerics.rounding import divide_rounded, round_to, shift_right_rounded

FLOAT32, FLOAT64, INT64 = 1 << 20, 1 << 40, 1 << 60  # bounds under which sums are computed in each arithmetic
ARITHMETICS = {"float32": FLOAT32, "float64": FLOAT64, "int64": INT64}
EXPONENTS = st.integers(-20, 20)
FEW = settings(max_examples=40, deadline=None)


def computed(
    kind: str, inputs: Array | list[Array], out: tuple[int, ...], bound: int = INT64,
    constants: Mapping[str, Array] | None = None, dtype: str = "int", **attributes: Any,
) -> Array:  # fmt: skip
    """What one operation gives for codes (or floats) that stand behind the inputs of a program."""
    arrays = inputs if isinstance(inputs, list) else [inputs]
    ops, values = [], [Value("x", (-1,), "float32")]
    for i, array in enumerate(arrays):
        float_input = array.dtype == np.float32
        batched = (-1, *array.shape[1:])
        values.append(Value(f"a{i}", batched, "float32" if float_input else "int", -bound, bound))
        ops.append(Op("reshape" if float_input else "quantize", "in", ("x",), f"a{i}"))
    values.append(Value("y", (-1, *out[1:]), dtype, -bound, bound))
    ops.append(Op(kind, "layer", tuple(f"a{i}" for i in range(len(arrays))), "y", attributes, constants or {}))
    program = Program(tuple(ops), {value.name: value for value in values}, ("x",), ("y",))
    empty = np.zeros(len(arrays[0]), np.float32)
    return trace(program, empty, given={f"a{i}": array for i, array in enumerate(arrays)})["y"]


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    axes, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    each = lambda low, high: [draw(st.integers(low, high)) for _ in range(axes)]  # noqa: E731  # three short lists
    kernel, dilation = each(1, 3), each(1, 2)
    return {
        "groups": groups, "kernel": kernel, "dilation": dilation, "stride": each(1, 3),
        "size": [d * (k - 1) + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation, strict=True)],
        "before": each(0, 2), "after": each(0, 2), "channels": groups * draw(st.integers(1, 2)),
        "out": groups * draw(st.integers(1, 2)), "bias": draw(st.booleans()), "batch": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 999)),
    }  # fmt: skip


@pytest.mark.parametrize("bound", ARITHMETICS.values(), ids=ARITHMETICS)
@FEW
@given(c=convolutions())
def test_conv(bound: int, c: dict[str, Any]) -> None:
    generator = np.random.default_rng(c["seed"])
    x = codes(generator, (c["batch"], c["channels"], *c["size"]))
    constants = {"weight": codes(generator, (c["out"], c["channels"] // c["groups"], *c["kernel"])).astype(np.int8)}
    if c["bias"]:
        constants["bias"] = codes(generator, c["out"], -9999, 9999).astype(np.int32)
    sides = [side for pair in zip(reversed(c["before"]), reversed(c["after"]), strict=True) for side in pair]
    function = (F.conv1d, F.conv2d, F.conv3d)[len(c["size"]) - 1]
    weight, bias = (torch.from_numpy(constants[k]).double() if k in constants else None for k in ("weight", "bias"))
    expected = function(
        F.pad(torch.from_numpy(x).double(), sides), weight, bias, c["stride"], 0, c["dilation"], c["groups"]
    )
    padding = [list(pair) for pair in zip(c["before"], c["after"], strict=True)]
    attributes = {"stride": c["stride"], "padding": padding, "dilation": c["dilation"], "groups": c["groups"]}
    equal(computed("conv", x, tuple(expected.shape), bound, constants, **attributes), expected.numpy())


@pytest.mark.parametrize("bound", ARITHMETICS.values(), ids=ARITHMETICS)
@FEW
@given(c=convolutions())
def test_conv_transpose(bound: int, c: dict[str, Any]) -> None:
    generator = np.random.default_rng(c["seed"])
    x = codes(generator, (c["batch"], c["channels"], *c["size"]))
    per = c["out"] // c["groups"]
    constants = {"weight": codes(generator, (c["channels"], per, *c["kernel"])).astype(np.int8)}
    if c["bias"]:
        constants["bias"] = codes(generator, c["out"], -9999, 9999).astype(np.int32)
    more = [min(more, max(s, d) - 1) for more, s, d in zip(c["after"], c["stride"], c["dilation"], strict=True)]
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(c["size"]) - 1]
    weight, bias = (torch.from_numpy(constants[k]).double() if k in constants else None for k in ("weight", "bias"))
    # The crop never takes all there is: the smallest input of an axis covers its kernel.
    expected = function(
        torch.from_numpy(x).double(), weight, bias, c["stride"], c["before"], more, c["groups"], c["dilation"]
    ) if all((n - 1) * s + d * (k - 1) + 1 + m - 2 * p > 0 for n, s, d, k, m, p in zip(
        c["size"], c["stride"], c["dilation"], c["kernel"], more, c["before"], strict=True
    )) else None  # fmt: skip
    if expected is None:
        return
    attributes = {
        "stride": c["stride"], "padding": c["before"], "output_padding": more, "dilation": c["dilation"],
        "groups": c["groups"],
    }  # fmt: skip
    equal(computed("conv_transpose", x, tuple(expected.shape), bound, constants, **attributes), expected.numpy())


@pytest.mark.parametrize("power", [24, 53, 61])
@pytest.mark.parametrize("more", [-1, 1])
def test_linear_is_exact_up_to_its_bound(power: int, more: int) -> None:
    """Odd sums as large as the bounds allow, on both sides of where a cheaper arithmetic ends."""
    most = (1 << power) + more
    x = np.array([[most // 2, most - most // 2, 0], [-(most - 2), -1, -1]])
    w = np.array([[1, 1, 1], [1, 1, 0]], np.int8)
    expected = x.astype(object) @ w.T.astype(object)
    equal(computed("linear", x, (2, 2), most, {"weight": w}), expected.astype(np.int64))
    assert expected.max() == most


@given(c=st.tuples(st.integers(0, 999), st.integers(1, 2), st.integers(1, 4), st.booleans()))
@FEW
def test_linear_along_the_last_axis(c: tuple[int, int, int, bool]) -> None:
    generator = np.random.default_rng(c[0])
    x, w = codes(generator, (c[1], 3, c[2])), codes(generator, (5, c[2]))
    constants = {"weight": w} | ({"bias": codes(generator, 5)} if c[3] else {})
    equal(computed("linear", x, (c[1], 3, 5), FLOAT32, constants), x @ w.T + constants.get("bias", 0))


def rounded(v: Fraction, rule: str) -> int:
    floor = math.floor(v)
    rest = v - floor
    up = {
        "half_even": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and floor % 2 == 1),
        "half_up": rest >= Fraction(1, 2),
        "half_away": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and v > 0),
        "floor": False,
        "truncate": v < 0 and rest > 0,
    }[rule]
    return floor + up


def clipped(v: int, low: int | None, high: int | None) -> int:
    v = v if low is None else max(v, low)
    return v if high is None else min(v, high)


LARGE = st.integers(-(1 << 61) + 1, (1 << 61) - 1) | st.integers(-40, 40)
CLIPS = st.sampled_from([(-128, 127), (0, 255), (-1, 1), (0, 0), (-(2**31), 2**31 - 1)])


@pytest.mark.parametrize("rule", ROUNDINGS)
@given(acc=st.lists(LARGE, min_size=1, max_size=8), shift=st.integers(-70, 70), clip=CLIPS)
@example(acc=[(1 << 61) - 1, 1 - (1 << 61)], shift=61, clip=(-128, 127))
@example(acc=[(1 << 61) - 1, 1 - (1 << 61)], shift=62, clip=(-128, 127))
@example(acc=[1, -1], shift=-61, clip=(-(2**61) + 1, 2**61 - 1))
def test_requantize_is_exact(rule: str, acc: list[int], shift: int, clip: tuple[int, int]) -> None:
    expected = [clipped(rounded(Fraction(v) / Fraction(2) ** shift, rule), *clip) for v in acc]
    equal(requantize(np.array(acc), shift, rule, *clip), expected)


@pytest.mark.parametrize("rule", ROUNDINGS)
@given(acc=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1), shift=st.integers(-20, 62))
def test_requantize_as_evaluation_does(rule: str, acc: list[int], shift: int) -> None:
    equal(requantize(np.array(acc), shift, rule), shift_right_rounded(torch.tensor(acc), shift, rule).numpy())


@pytest.mark.parametrize("rule", ROUNDINGS)
def test_requantize_with_a_shift_per_channel(rule: str) -> None:
    x, shifts = codes(np.random.default_rng(1), (3, 4, 5), -999, 999), [0, 3, -2, 1]
    found = computed("requantize", x, x.shape, shift=shifts, axis=1, rounding=rule, low=-100, high=None)
    expected = np.stack([requantize(x[:, c], shift, rule, low=-100) for c, shift in enumerate(shifts)], axis=1)
    equal(found, expected)
    assert found.max() > 999  # nothing is clipped on the side of None


@pytest.mark.parametrize("rule", ROUNDINGS)
@given(
    x=st.lists(st.integers(-(1 << 50), 1 << 50) | st.integers(-40, 40), min_size=1),
    count=st.integers(1, 70000), shift=st.integers(-10, 60), clip=CLIPS,
)  # fmt: skip
def test_divide_is_exact(rule: str, x: list[int], count: int, shift: int, clip: tuple[int, int]) -> None:
    expected = [clipped(rounded(Fraction(v) / (count * Fraction(2) ** shift), rule), *clip) for v in x]
    equal(divide(np.array(x), count, shift, rule, *clip), expected)


@pytest.mark.parametrize("rule", ROUNDINGS)
def test_divide_by_a_count_for_each_place(rule: str) -> None:
    x, count = codes(np.random.default_rng(2), (3, 2, 2, 2), -50, 50), np.array([[4, 2], [6, 1]], np.uint8)
    expected = divide_rounded(torch.from_numpy(x), torch.from_numpy(count.astype(np.int64)) * 2, rule)
    constants = {"count": count}
    found = computed("divide", x, x.shape, constants=constants, shift=1, rounding=rule, low=None, high=None, count=None)
    equal(found, expected.numpy())


@pytest.mark.parametrize("rule", ROUNDINGS)
@given(
    x=st.lists(st.floats(width=32, allow_nan=False) | st.integers(-300, 300).map(lambda v: v / 2), min_size=1),
    exponent=EXPONENTS,
)  # fmt: skip
def test_quantize_as_evaluation_does(rule: str, x: list[float], exponent: int) -> None:
    v = torch.tensor(x) * 2.0**-exponent
    expected = round_to(v, rule).clamp(-128, 127).to(torch.int64).numpy()
    equal(quantize(np.float32(x), exponent, rule), expected)


def test_quantize_of_numbers_that_float32_cannot_clip() -> None:
    x = np.float32([-np.inf, -3e9, 2147483520.0, 3e38, np.inf])
    equal(quantize(x, 0, low=-(2**31), high=2**31 - 1), [-(2**31), -(2**31), 2147483520, 2**31 - 1, 2**31 - 1])
    equal(quantize(x[1:3], 0, low=None, high=None), [-3000000000, 2147483520])


@pytest.mark.parametrize("exponent", [-128, 150])
def test_quantize_refuses_an_exponent_without_a_float32(exponent: int) -> None:
    with pytest.raises(ProgramError, match=f"exponent {exponent}, expected .* -127 to 149"):
        quantize(np.float32([1]), exponent)


def test_dequantize_rounds_each_step_where_it_is_asked_to() -> None:
    x = codes(np.random.default_rng(3), (4, 3), -(1 << 30), 1 << 30)
    v = torch.from_numpy(x).double() * 2.0**-7
    single = v.float() / torch.tensor(3.0) * torch.tensor(0.3)
    double = (v / 3.0 * 0.3).float()
    assert np.array_equal(dequantize(x, -7, count=3, factor=0.3), single.numpy())
    assert np.array_equal(dequantize(x, -7, count=3, factor=0.3, precision="float64"), double.numpy())
    assert not torch.equal(single, double)
    units = dequantize(x, (-3, 0, 2), 1)
    assert units.dtype == np.float32
    assert np.array_equal(units, (x * 2.0 ** np.array([-3, 0, 2])).astype(np.float32))


@FEW
@given(c=convolutions())
def test_pools(c: dict[str, Any]) -> None:
    x = codes(np.random.default_rng(c["seed"]), (c["batch"], c["channels"], *c["size"]))
    before = [min(p, k // 2) for p, k in zip(c["before"], c["kernel"], strict=True)]
    padding = [[p, p] for p in before]
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(before) - 1]
    expected = function(torch.from_numpy(x).double(), c["kernel"], c["stride"], before, c["dilation"]).numpy()
    window = {"kernel": c["kernel"], "stride": c["stride"], "padding": padding}
    equal(computed("max_pool", x, expected.shape, **window, dilation=c["dilation"]), expected)
    lowest = computed("max_pool", np.float32(x), expected.shape, dtype="float32", **window, dilation=c["dilation"])
    assert np.array_equal(lowest, expected)
    average = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(before) - 1]
    means = average(torch.from_numpy(x).double(), c["kernel"], c["stride"], before)
    equal(computed("sum_pool", x, tuple(means.shape), **window), (means * math.prod(c["kernel"])).round().numpy())


@FEW
@given(seed=st.integers(0, 999), integer_bits=st.sampled_from([None, 1]), fraction=st.integers(-3, 20))
def test_normalize_as_evaluation_does(seed: int, integer_bits: int | None, fraction: int) -> None:
    torch.manual_seed(seed)
    format = NormFormat() if integer_bits is None else NormFormat(integer_bits=integer_bits)
    given_ = norm_constants(torch.randn(3), torch.rand(3) * 2, torch.randn(3), torch.randn(3), format)
    x = torch.randint(-5000, 5000, (4, 3, 2))
    limit = None if format.integer_bits is None else (1 << (format.integer_bits + format.xhat - 1)) - 1
    attributes = {
        "fraction_in": fraction, "mean_fraction": format.mean - 1, "s_fraction": given_.s_fraction,
        "xhat_fraction": format.xhat - 1, "out_fraction": format.fraction,
        "product_fraction": format.gamma + format.xhat - 2, "limit": limit,
    }  # fmt: skip
    constants = {name: getattr(given_, name).numpy() for name in ("mean", "s", "gamma", "beta")}
    found = computed("normalize", x.numpy(), tuple(x.shape), constants=constants, **attributes)
    equal(found, normalize(x, fraction, given_, format).numpy())


def test_normalize_with_a_coarse_result() -> None:
    """More fractional bits in x than the quotient keeps: the divisor grows instead of the numerator."""
    x = np.array([[5], [6], [7], [-6]]) << 8
    attributes = {
        "fraction_in": 10, "mean_fraction": 4, "s_fraction": 1, "xhat_fraction": 2, "out_fraction": 6,
        "product_fraction": 5, "limit": None,
    }  # fmt: skip
    constants = {"mean": np.array([-16]), "s": np.array([3]), "gamma": np.array([-5]), "beta": np.array([7])}
    # (x + 1) / 1.5 with two fractional bits: 2.25, 2.5 and 2.75 times 8 / 3, and -0.5 times it
    quotients = [round(Fraction(int(v) + 1024, 1024) / Fraction(3, 2) * 4) for v in x[:, 0]]
    expected = [[-5 * q * 2 + 7] for q in quotients]
    equal(computed("normalize", x, (4, 1), constants=constants, **attributes), expected)


def test_threshold() -> None:
    x = np.array([[-1, 0, 5], [0, 1, 6], [7, -9, 7]])
    constants = {"low": np.array([0, 1, 6], np.int8), "flip": np.array([0, 1, 0], np.uint8)}
    equal(
        computed("threshold", x, x.shape, constants=constants, axis=1),
        [[-1, 1, -1], [1, -1, 1], [1, 1, 1]],
    )


def test_add_aligns_and_broadcasts() -> None:
    generator = np.random.default_rng(4)
    a, b, other = codes(generator, (2, 3, 4)), codes(generator, (2, 1, 4)), codes(generator, (3, 1)).astype(np.int8)
    expected = a * 4 + b + (other.astype(np.int64) << 9)
    equal(computed("add", [a, b], a.shape, constants={"other": other}, left=[2, 0, 9]), expected)


def test_moves() -> None:
    x = codes(np.random.default_rng(5), (2, 3, 4))
    equal(computed("concat", [x, x[:, :1]], (2, 4, 4), axis=1), np.concatenate([x, x[:, :1]], 1))
    equal(computed("sum", x, (2, 3), axes=[2], keepdims=False), x.sum(2))
    equal(computed("sum", x, (2, 1, 1), axes=[1, 2], keepdims=True), x.sum((1, 2), keepdims=True))
    padding = [[0, 0], [1, 0], [0, 2]]
    equal(computed("pad", x, (2, 4, 6), padding=padding, value=-3), np.pad(x, padding, constant_values=-3))
    attributes = {"starts": [0, 1, 0], "stops": [None, 3, None], "steps": [1, 1, 2]}
    equal(computed("slice", x, (2, 2, 2), **attributes), x[:, 1:3, ::2])
    equal(computed("reshape", x, (2, 12), shape=[-1, 12]), x.reshape(2, 12))
    equal(computed("transpose", x, (2, 4, 3), permutation=[0, 2, 1]), x.swapaxes(1, 2))
    index = np.array([[11, -1], [0, 5]], np.int32)
    expected = np.where(index < 0, 0, x.reshape(2, 12)[:, index])
    equal(computed("gather", x, (2, 2, 2), constants={"index": index}), expected)
    ties = np.array([[3, 7, 7], [1, 1, 0]])
    equal(computed("argmax", ties, (2,), dtype="int64", axis=1, keepdims=False), [1, 0])


def test_bounds_have_widths() -> None:
    widths = {(-128, 127): (8, "int8"), (0, 255): (8, "uint8"), (-1, 255): (9, "int16"), (0, 0): (1, "uint8"),
              (-129, 0): (9, "int16"), (-1, 0): (1, "int8"), (0, 65536): (17, "uint32"), (-1, 2**40): (42, "int64"),
              (0, 2**40): (41, "int64")}  # fmt: skip
    for (low, high), expected in widths.items():
        value = Value("v", (), low=low, high=high)
        assert (value.bits, value.storage) == expected
