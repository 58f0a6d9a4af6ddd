"""The integer form: ONNX Runtime gives the bits of the program, and its graph holds no float between the codes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

from export.onnx_agreement import agree  # noqa: E402  # after the packages that it needs
from export.onnx_programs import Writer, branches, tangle  # noqa: E402

from lightning_lowbit.errors import UnsupportedModelError  # noqa: E402
from lightning_lowbit.export.onnx import export_onnx  # noqa: E402
from lightning_lowbit.export.onnx_checks import float_tensors_between, session  # noqa: E402
from lightning_lowbit.export.runtime import ROUNDINGS, run  # noqa: E402


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("high", [127, 2**31 - 1], ids=["bytes", "words"])
def test_quantize(tmp_path, rounding, high):
    w = Writer()
    x = w.quantize(w.input(40), -high - 1, high, exponent=-5 if high == 127 else -30, rounding=rounding)
    agree(tmp_path, w, w.dequantize(x))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    "shift", [0, 1, 5, 40, -3, [4, 0, 9, -2, 1, 3], [2, 3, 4, 5, 6, 7], [-1, -3, -2, 0, -4, -1]], ids=str
)
@pytest.mark.parametrize("ends", [(-100, 127), (0, None), (None, None)], ids=str)
def test_requantize(tmp_path, rounding, shift, ends):
    w = Writer(1)
    x = w.linear(w.codes(6, low=-3, high=4, exponent=-1), 6, bits=4)
    axis = None if isinstance(shift, int) else 1
    spread = w.requantize(x, -6, None, None)  # so that a shift of 1 or more leaves every kind of remainder
    fine = w.add(spread, other=w.random.integers(-40, 41, (1, 6)), left=[0, 0])
    y = w.requantize(fine, shift, *ends, rounding=rounding, axis=axis)
    agree(tmp_path, w, w.dequantize(y), w.dequantize(fine))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_residue_and_sign(tmp_path, rounding):
    """All codes from -128 to 127 divided by 3, 4, 6 and 8."""
    w = Writer()
    x = w.codes(256, exponent=0)
    ends = [
        w.dequantize(w.divide(x, count, shift, rounding)) for count, shift in ((3, 0), (1, 2), (3, 1), (1, 3), (3, -1))
    ]
    program, path = w.program(*ends), tmp_path / "net.onnx"
    export_onnx(program, path, "integer")
    samples = np.arange(-128, 128, dtype=np.float32)[None]
    for got, want in zip(session(path.read_bytes()).run(None, {"input": samples}), run(program, samples), strict=True):
        np.testing.assert_array_equal(got, want)


CONVS = {
    "plain": ({}, (4, 7, 6), 6, [3, 3]),
    "strided": ({"stride": 2, "padding": [[1, 0], [0, 2]], "dilation": 2}, (4, 9, 8), 6, [2, 3]),
    "grouped": ({"groups": 2, "bias": False}, (4, 5, 5), 6, [3, 3]),
    "depthwise": ({"groups": 4}, (4, 5, 5), 8, [3, 3]),
    "1d": ({"padding": [[2, 1]]}, (4, 9), 6, [4]),
    "3d": ({}, (2, 4, 5, 4), 3, [3, 1, 3]),
    "wide weights": ({"bits": 16}, (4, 5, 5), 6, [3, 3]),
    "signs": ({"bits": 1}, (4, 5, 5), 6, [3, 3]),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("ends", [(0, 255), (-128, 127), (0, 15), (-100, 155), (-40000, 30000), (0, 2**20)], ids=str)
def test_conv(tmp_path, name, ends):
    options, shape, out, kernel = CONVS[name]
    w = Writer(3)
    x = w.codes(*shape, low=ends[0], high=ends[1], exponent=-5 if ends[1] < 256 else -13)
    agree(tmp_path, w, w.dequantize(w.conv(x, out, kernel, **options), precision="float64", factor=0.3))


@pytest.mark.parametrize("ends", [(0, 255), (-128, 127), (-3000, 3000)], ids=str)
@pytest.mark.parametrize("geometry", [(1, 0, 0, 1), (2, 1, 1, 1), (3, 2, 2, 1), (2, 0, 0, 2), (1, 2, 0, 1)], ids=str)
@pytest.mark.parametrize("kernel", [[3, 2], [3], [2, 1, 2]], ids=str)
def test_conv_transpose(tmp_path, ends, geometry, kernel):
    stride, padding, more, dilation = geometry
    if padding >= min(kernel) * dilation + 1:
        padding = 0
    w = Writer(4)
    x = w.codes(4, *[4, 5, 3][: len(kernel)], low=ends[0], high=ends[1], exponent=-8)
    agree(tmp_path, w, w.dequantize(w.conv_transpose(x, 6, kernel, stride, padding, more, dilation, groups=2)))


def test_linear_on_the_last_axis(tmp_path):
    w = Writer(5)
    agree(tmp_path, w, w.dequantize(w.linear(w.codes(3, 5, 7), 4)))


@pytest.mark.parametrize("size", [70000, 300000], ids=["8 bits", "6 bits"])
def test_sums_beyond_int32(tmp_path, size):
    """Of products of 8 bits, at their ends: the weights go in digits whose sums int32 holds."""
    w = Writer(6)
    x = w.codes(size, low=0, high=255, exponent=0)
    weight = w.random.integers(-128, -120, (2, size)).astype(np.int8)
    y = w.op("linear", [x], w.value((-1, 2), -size * 128 * 255, size * 128 * 255, 0), {"weight": weight})
    assert y.bits > 32
    w.samples = lambda: [np.full((1, size), 255, np.float32)]
    agree(tmp_path, w, w.dequantize(y, precision="float64"), w.dequantize(w.requantize(y, 20, None, None)))


def test_sums_of_wide_operands(tmp_path):
    w = Writer(6)
    z = w.linear(w.codes(40, low=-(2**20), high=2**20, exponent=-18), 3, bits=24)
    assert z.bits > 32
    agree(tmp_path, w, w.dequantize(z, precision="float64"), w.dequantize(w.requantize(z, 37)))


def test_add_concat(tmp_path):
    w = Writer(7)
    a, b = w.codes(4, 3, low=0, high=255), w.codes(4, 3)
    total = w.add(a, b, left=[3, 0])
    other = w.add(a, b, a, left=[0, 1, 2, 4], other=w.random.integers(-9, 10, (4, 1)))
    signs = w.threshold(b, np.int16([3, -9, 300, -300]), np.uint8([0, 1, 0, 1]))
    agree(
        tmp_path, w, *map(w.dequantize, (total, other, w.concat(a, b), w.concat(b, signs, axis=2), w.add(signs, signs)))
    )


@pytest.mark.parametrize("ends", [(0, 255), (-128, 127), (-3000, 3000), (-(2**33), 2**33)], ids=str)
@pytest.mark.parametrize(
    "geometry",
    [
        ([2], [2], [[0, 0]]),
        ([3, 2], [2, 1], [[1, 0], [0, 1]]),
        ([5, 6], [5, 6], [[0, 0], [0, 0]]),
        ([2, 1, 3], [1, 2, 2], [[1, 1], [0, 0], [1, 1]]),
    ],
    ids=["1d", "2d", "whole", "3d"],
)
def test_pools(tmp_path, ends, geometry):
    kernel, stride, padding = geometry
    w = Writer(8)
    x = w.codes(3, *[5, 6, 4][: len(kernel)], low=ends[0], high=ends[1], exponent=-30 if ends[1] > 2**20 else -9)
    most, total = w.pool("max_pool", x, *geometry), w.pool("sum_pool", x, *geometry)
    wide = w.pool("max_pool", x, kernel, stride, padding, 2) if len(kernel) == 1 else most
    sizes = total.shape[2:]
    counts = w.random.integers(1, 7, sizes).astype(np.int32)
    mean, ragged = w.divide(total, 6, 1, "half_up"), w.divide(total, counts, -2, low=-500, high=500)
    agree(tmp_path, w, *map(w.dequantize, (most, wide, total, mean, ragged)))


def test_moves(tmp_path):
    w = Writer(9)
    x = w.codes(2, 3, 4)
    index = w.random.integers(-1, 24, (5, 2)).astype(np.int32)
    ends = [
        w.sum(x, [1, 3], False),
        w.sum(x, [2], True),
        w.move("reshape", x, (-2, 12), shape=[-2, 12]),
        w.move("reshape", x, (-1, 24), shape=[-1, 24]),
        w.move("transpose", x, (4, -1, 2, 3), permutation=[3, 0, 1, 2]),
        w.move("slice", x, (-1, 1, 2, 4), starts=[0, 1, 0, 0], stops=[None, 2, None, None], steps=[1, 1, 2, 1]),
        w.move("pad", x, (-1, 3, 3, 6), padding=[[0, 0], [1, 0], [0, 0], [0, 2]], value=-7),
        w.move("gather", x, (-1, 5, 2), {"index": index}),
    ]
    agree(tmp_path, w, *map(w.dequantize, ends))


def test_floats_are_moved_before_the_first_code_and_after_the_last(tmp_path):
    w = Writer(10)
    x = w.op("reshape", [w.input(4, 6)], w.value((-1, 24), dtype="float32"), shape=[-1, 24])
    y = w.dequantize(w.linear(w.quantize(x), 6))
    agree(tmp_path, w, w.op("reshape", [y], w.value((-1, 2, 3), dtype="float32"), shape=[-1, 2, 3]))


@pytest.mark.parametrize("high", [127, 2**33], ids=["bytes", "words"])
@pytest.mark.parametrize("keep", [False, True], ids=["drop", "keep"])
def test_argmax_takes_the_first_of_equals(tmp_path, high, keep):
    w = Writer(11)
    x = w.codes(5, 40, low=-high, high=high, exponent=1)
    report = agree(tmp_path, w, w.argmax(x, 2, keep), w.argmax(x, 1, keep))
    assert "no float tensor between" in str(report)


@pytest.mark.parametrize("fractions", [(5, 15, 15, 15, 22, 22), (15, 5, 15, 15, 24, 22), (9, 3, 1, 2, 17, 17)], ids=str)
@pytest.mark.parametrize("limit", [None, 90], ids=str)
def test_normalize(tmp_path, fractions, limit):
    w = Writer(12)
    x = w.codes(3, 4, low=-(2**15), high=2**15 - 1, exponent=-12)
    names = ("fraction_in", "mean_fraction", "s_fraction", "xhat_fraction", "out_fraction", "product_fraction")
    constants = {name: w.random.integers(low, high, 3) for name, low, high in
                 (("mean", -900, 900), ("s", 1, 4000), ("gamma", -128, 128), ("beta", -(2**14), 2**14))}  # fmt: skip
    y = w.op(
        "normalize", [x], w.value(x.shape, -(2**60), 2**60, -22), constants,
        **dict(zip(names, fractions, strict=True)), limit=limit,
    )  # fmt: skip
    agree(tmp_path, w, w.dequantize(y, precision="float64"))


def test_dequantize_per_channel_with_count_and_factor(tmp_path):
    w = Writer(13)
    x = w.requantize(w.conv(w.codes(3, 4, 4), 3, [3, 3]), [5, 7, 6], axis=1)
    ends = [
        w.dequantize(x),
        w.dequantize(x, 1 / 3),
        w.dequantize(x, 1 / 3, "float64"),
        w.dequantize(x, 0.7, "float32", 9),
    ]
    agree(tmp_path, w, *ends)


def test_structured_outputs_and_two_inputs(tmp_path):
    w = Writer(14)
    a, b = w.codes(4), w.codes(4)
    y, z = w.dequantize(w.linear(a, 3)), w.dequantize(w.add(a, b))
    program = w.program(y, z)
    program = type(program)(program.ops, program.values, program.inputs, program.outputs,
                            {"dict": {"z": {"leaf": 1}, "y": {"list": [{"leaf": 0}]}}})  # fmt: skip
    report = export_onnx(program, tmp_path / "net.onnx", "integer", samples=w.samples())
    assert "equal to the program in all 2 tensors" in str(report)
    model = onnx.load(tmp_path / "net.onnx")
    assert [info.name for info in (*model.graph.input, *model.graph.output)] == [
        "input0",
        "input1",
        "output0",
        "output1",
    ]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_network_in_integers(tmp_path, rounding):
    w = Writer(15)
    agree(tmp_path, w, branches(w, rounding))
    model = onnx.load(tmp_path / "net.onnx")
    assert not float_tensors_between(model)
    weights = {node.input[1] for node in model.graph.node if node.op_type in ("ConvInteger", "MatMulInteger")}
    kinds = {tensor.data_type for tensor in model.graph.initializer if tensor.name in weights}
    assert kinds == {onnx.TensorProto.UINT8}, "a signed weight saturates on CPUs without VNNI"


def test_floats_between_integers_are_found(tmp_path):
    w = Writer(16)
    export_onnx(w.program(branches(w)), tmp_path / "net.onnx", "integer")
    model = onnx.load(tmp_path / "net.onnx")
    index, node = next((i, n) for i, n in enumerate(model.graph.node) if n.op_type == "Div")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    model.graph.node.insert(index, helper.make_node("Cast", ["there"], [node.input[0]], to=onnx.TensorProto.INT32))
    model.graph.node.insert(index, helper.make_node("Cast", ["whole"], ["there"], to=float32))
    for earlier in model.graph.node[:index]:
        earlier.output[:] = ["whole" if name == node.input[0] else name for name in earlier.output]
    assert float_tensors_between(model) == ["there"]


def test_no_float_product_hides_behind_the_last_code(tmp_path):
    w = Writer(17)
    export_onnx(w.program(w.dequantize(w.codes(4, 4))), tmp_path / "net.onnx", "integer")
    model = onnx.load(tmp_path / "net.onnx")
    last = model.graph.node[-1]
    model.graph.node.insert(
        len(model.graph.node) - 1, onnx.helper.make_node("MatMul", [last.input[0]] * 2, ["product"])
    )
    last.input[0] = "product"
    assert float_tensors_between(model) == ["product"]


def test_the_integer_form_refuses_islands_by_path(tmp_path):
    w = Writer(34)
    x = w.dequantize(w.codes(4))
    y = w.op("island", [x], w.value(x.shape, dtype="float32"), path="net.act", function="tanh")
    with pytest.raises(UnsupportedModelError, match=r"^net.act: the float function 'tanh'"):
        export_onnx(w.program(y), tmp_path / "net.onnx", "integer")


def test_codes_after_floats_are_refused_by_path(tmp_path):
    w = Writer(35)
    x = w.dequantize(w.codes(4))
    with pytest.raises(UnsupportedModelError, match=r"^quantize2: it quantizes floats"):
        export_onnx(w.program(w.dequantize(w.quantize(x))), tmp_path / "net.onnx", "integer")


@given(st.integers(0, 10**6), st.sampled_from(ROUNDINGS))
@settings(max_examples=40)
def test_random_graphs(tmp_path_factory, seed, rounding):
    """In integers always; as QDQ where it has no objection."""
    w = Writer(seed)
    outputs = tangle(w, rounding)
    folder = tmp_path_factory.mktemp("graph")
    agree(folder, w, *outputs)
    if rounding == "half_even":
        agree(folder, w, *outputs, form="qdq", allow_inexact=False)


def test_argmax_of_the_floats_behind_the_integers(tmp_path):
    """Where float32 makes equals of large sums, a class is chosen among floats, as the network does."""
    w = Writer(50)
    sums = w.linear(w.codes(64, low=-(2**15), high=2**15 - 1, exponent=-8), 9, bits=16)
    agree(tmp_path, w, w.argmax(w.dequantize(sums), 1, True))
