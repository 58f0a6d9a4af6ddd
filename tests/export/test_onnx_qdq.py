"""The QDQ form: fused into int8 kernels it gives the bits of the program; what it would not give it refuses."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

from export.onnx_agreement import agree  # noqa: E402  # after the packages that it needs
from export.onnx_programs import Writer, branches  # noqa: E402

from lightning_lowbit.errors import ConfigError, UnsupportedModelError  # noqa: E402
from lightning_lowbit.export.onnx import export_onnx  # noqa: E402
from lightning_lowbit.export.onnx_checks import session  # noqa: E402
from lightning_lowbit.export.runtime import run  # noqa: E402


def test_qdq_network(tmp_path):
    w = Writer(20)
    report = agree(tmp_path, w, branches(w), form="qdq", samples=w.samples())
    assert not report.inexact
    assert "equal to the program" in str(report)
    assert len(report.differences) == 7


def fused(path):
    """What ONNX Runtime runs after its own rewriting."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    runtime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def test_qdq_runs_in_int8_kernels(tmp_path):
    w = Writer(20)
    export_onnx(w.program(branches(w)), tmp_path / "net.onnx")
    kinds = fused(tmp_path / "net.onnx")
    assert kinds.count("QLinearConv") == 3
    assert {"QLinearAdd", "QLinearGlobalAveragePool", "QGemm"} <= set(kinds)
    assert not {"Conv", "Gemm", "Add"} & set(kinds)


@pytest.mark.parametrize("ends", [(0, 255), (-128, 127), (-127, 127), (0, 15), (-8, 7), (-100, 155), (3, 200)], ids=str)
def test_qdq_ranges(tmp_path, ends):
    w = Writer(21)
    x = w.codes(4, 6, 6, low=ends[0], high=ends[1])
    y = w.requantize(w.conv(x, 6, [3, 3], stride=2), [6, 5, 7, 6, 8, 6][0], *ends)
    z = w.requantize(w.conv_transpose(y, 4, [3, 3], 2, 1, 1, bits=4), 5, *ends)
    again = w.requantize(w.add(z, x), 1, *ends)
    agree(tmp_path, w, w.dequantize(again), w.dequantize(w.linear(again, 3)), w.argmax(y, 1, True), form="qdq")


def test_qdq_weights_with_a_scale_per_channel(tmp_path):
    w = Writer(22)
    x = w.codes(4, 6, 6)
    acc = w.conv(x, 3, [3, 3])
    w.values[acc.name] = acc = type(acc)(acc.name, acc.shape, "int", acc.low, acc.high, (-9, -11, -8), 1)
    y = w.value(acc.shape, -128, 127, -3)
    w.op("requantize", [acc], y, shift=[6, 8, 5], axis=1, rounding="half_even", low=-128, high=127)
    agree(tmp_path, w, w.dequantize(y), form="qdq")


@pytest.mark.parametrize(
    "stages",
    [
        [(2, -128, 127)],
        [(1, 0, 255)],
        [(-1, 0, 63)],
        [(0, 0, None)],
        [(0, -20, 90), (1, -5, 30)],
        [(1, -128, 127), (1, 0, 255), (0, 3, 9)],
    ],
    ids=str,
)
def test_qdq_bytes_to_other_bytes(tmp_path, stages):
    """ONNX Runtime merges Q -> DQ -> Q -> DQ into a pair with a scale of its own, which moves codes."""
    w = Writer(23)
    x = w.codes(500)
    for stage in stages:
        x = w.requantize(x, *stage)
    agree(tmp_path, w, w.dequantize(x), form="qdq")


@pytest.mark.parametrize("ends", [(0, 255), (-128, 127)], ids=str)
@pytest.mark.parametrize("window", [(2, 2), (3, 2), (5, 6), (7, 2), (3, 3)], ids=str)
def test_qdq_averages_with_ties(tmp_path, ends, window):
    """Over 30 elements the fused global pool of ONNX Runtime is wrong in 3 ties of 10."""
    w = Writer(24)
    h, v = window
    x = w.codes(300, h, v, low=ends[0], high=ends[1], exponent=-4)
    grid = w.codes(3, 3 * h, 3 * v, low=ends[0], high=ends[1], exponent=-4)
    n = h * v
    sides, d = [[h // 2, 0], [0, v // 2]], 2
    pooled, padded = (
        w.pool("sum_pool", grid, [h, v], [h, v], [[0, 0]] * d),
        w.pool("sum_pool", grid, [h, v], [h, v], sides),
    )
    ones = np.pad(np.ones((3 * h, 3 * v), np.int32), sides)
    rows, columns = (np.arange(0, ones.shape[i] - k + 1, k) for i, k in enumerate(window))
    counts = np.array([[ones[i : i + h, j : j + v].sum() for j in columns] for i in rows])
    means = [
        w.divide(w.sum(x, [2, 3], False), n, 0, "half_even", *ends),
        w.divide(w.sum(x, [2, 3], True), n, 1, "half_even", *ends),
        w.divide(w.sum(x, [3], True), v, 0, "half_even", *ends),
        w.divide(pooled, n, 0, "half_even", *ends),
        w.divide(padded, n, -1, "half_even", *ends),
        w.divide(padded, counts, 0, "half_even", *ends),
        w.divide(padded, counts + 1, 0, "half_even", *ends),
    ]
    agree(tmp_path, w, *map(w.dequantize, means), form="qdq")


def test_qdq_floats_between_two_stretches(tmp_path):
    w = Writer(25)
    x = w.dequantize(w.codes(500))
    agree(tmp_path, w, w.dequantize(w.quantize(x, -40, 50, exponent=-3)), form="qdq")


def test_qdq_narrow_sums_are_bytes(tmp_path):
    w = Writer(26)
    x, y = w.codes(4, 6, 6, low=-8, high=7), w.codes(4, 6, 6, low=-8, high=7)
    total = w.move("pad", w.add(x, y), (-1, 4, 6, 8), padding=[[0, 0], [0, 0], [0, 0], [1, 1]], value=-100)
    agree(tmp_path, w, w.dequantize(w.requantize(w.conv(total, 4, [3, 3]), 6)), form="qdq")
    assert {"QLinearAdd", "QLinearConv"} <= set(fused(tmp_path / "net.onnx"))


def test_qdq_moves_beyond_the_bytes(tmp_path):
    w = Writer(27)
    x = w.codes(4, low=0, high=255)
    padded = w.move("pad", x, (-1, 6), padding=[[0, 0], [1, 1]], value=-7)
    mixed = w.concat(x, w.requantize(x, 0, 0, 100), w.codes(4))
    agree(tmp_path, w, w.dequantize(padded), w.dequantize(mixed), w.argmax(mixed, 1, False), form="qdq")


def sixteen_bits(w):
    x = w.codes(4)
    y = w.requantize(w.linear(x, 4), 2, -(2**15), 2**15 - 1)
    return w.dequantize(w.requantize(y, 6))


def wide_input(w):
    return w.dequantize(w.requantize(w.linear(w.codes(4, low=-(2**11), high=2**11), 4), 9))


def long_sums(w):
    return w.dequantize(w.linear(w.codes(4000), 2))


def coarse_sums(w):
    return w.dequantize(w.requantize(w.linear(w.codes(4000), 2), 17))


def long_average(w):
    x = w.codes(6, 200, 200, low=0, high=255)
    return w.dequantize(w.divide(w.sum(x, [2, 3], False), 40000, 0, "half_even", 0, 255))


def odd_zero_point(w):
    return w.dequantize(w.requantize(w.linear(w.codes(8, low=-101, high=154), 4), 6))


def wide_weights(w):
    return w.dequantize(w.requantize(w.linear(w.codes(4), 4, bits=12), 9))


def per_channel(w):
    return w.dequantize(w.requantize(w.linear(w.codes(4), 2), [5, 6], axis=1))


def ties_up(w):
    return w.dequantize(w.requantize(w.linear(w.codes(4, rounding="half_up"), 4), 6, rounding="half_up"))


OBJECTIONS = {
    sixteen_bits: r"requantize2 \(requantize, bits\): a stage of 15 bits",
    wide_input: r"linear1 \(linear, input bits\): 13",
    long_sums: r"linear1 \(linear, sum bits\): 2\d",
    coarse_sums: r"linear1 \(linear, sum bits\): 2\d",
    long_average: r"divide2 \(divide, sum bits\)",
    odd_zero_point: r"an even zero point",
    wide_weights: r"linear1 \(linear, weight bits\)",
    per_channel: r"requantize2 \(requantize, exponent\)",
    ties_up: r"quantize0 \(quantize, rounding\): half_up.*requantize2 \(requantize, rounding\): half_up",
}


@pytest.mark.parametrize("case", OBJECTIONS, ids=lambda case: case.__name__)
def test_qdq_refuses_by_path_and_field(tmp_path, case):
    w = Writer(30)
    with pytest.raises(UnsupportedModelError, match=OBJECTIONS[case]):
        export_onnx(w.program(case(w)), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", [sixteen_bits, wide_input, wide_weights, ties_up], ids=lambda case: case.__name__)
def test_allow_inexact_measures_the_difference(tmp_path, case):
    w = Writer(31)
    program = w.program(case(w))
    with pytest.raises(ConfigError, match="got no samples"):
        export_onnx(program, tmp_path / "net.onnx", allow_inexact=True)
    samples = w.samples(200)
    report = export_onnx(program, tmp_path / "net.onnx", allow_inexact=True, samples=samples)
    assert report.inexact
    got = session((tmp_path / "net.onnx").read_bytes()).run(None, {"input": samples[0]})[0]
    last = report.differences[-1]
    assert last.count == (got != run(program, *samples)).sum()
    if case is ties_up:
        codes = {row.path: row.largest for row in report.differences}
        assert codes["quantize0 (quantize)"] == 1
        assert f"differ ({100 * last.count / last.total:.2g} %)" in str(report)


def test_a_tie_rule_is_the_only_thing_that_differs(tmp_path):
    """half_up against QuantizeLinear: by one unit, in ties."""
    w = Writer(32)
    x = w.codes(500, exponent=-3, rounding="half_up")
    report = export_onnx(w.program(w.dequantize(x)), tmp_path / "net.onnx", allow_inexact=True, samples=w.samples(20))
    codes = report.differences[0]
    assert codes.largest == 1
    assert 0 < codes.count < codes.total / 4


@pytest.mark.parametrize("bits", [8, 12])
def test_the_same_codes_on_another_step(tmp_path, bits):
    """A mean over a power of two is the sum, counted in other units: nothing is computed, and the worth changes."""
    w = Writer(30)
    x = w.codes(4, 6, 6, low=0, high=255)
    sums = x if bits == 8 else w.add(x, x)
    other = w.value(sums.shape, sums.low, sums.high, sums.exponent - 4)
    w.op("reshape", [sums], other, shape=list(sums.shape))
    y = w.requantize(w.conv(w.requantize(other, 1, 0, 255), 5, [3, 3]), 6)
    agree(tmp_path, w, w.dequantize(other), w.dequantize(y), form="qdq")
