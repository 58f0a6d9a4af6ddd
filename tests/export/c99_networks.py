"""Programs that hold every kind of op, with what each must not get wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from export.c99_programs import Net

from lightning_lowbit.export.runtime import ROUNDINGS, Program

NETWORKS: dict[str, Callable[[], Program]] = {}


def network(build: Callable[[Net], None]) -> Callable[[Net], None]:
    def made() -> Program:
        net = Net(len(build.__name__))
        build(net)
        return net.program()

    NETWORKS[build.__name__] = made
    return build


@network
def quantize(net: Net) -> None:
    x = net.input(40)
    for rounding in ROUNDINGS:
        net.out(net.quantize(x, exponent=-3, rounding=rounding))
    for low, high, exponent in [
        (0, 255, -7),
        (-1, 1, 2),
        (-32768, 32767, -20),
        (-(2**31), 2**31 - 1, -30),
        (0, 7, 100),
    ]:
        net.out(net.quantize(net.input(16), low, high, exponent))


@network
def requantize(net: Net) -> None:
    narrow, wide = net.codes(6, 5, low=-30000, high=30000), net.codes(64, low=-(2**31), high=2**31 - 1)
    for rounding in ROUNDINGS:
        for x in (narrow, wide):
            for shift in (1, 4, 31, 70):
                net.out(net.requantize(x, shift, None, None, rounding))
        net.out(net.requantize(narrow, [0, 1, 2, 3, 9, -3], -100, 1000, rounding, axis=1))
        net.out(net.requantize(narrow, [5, 5, 5, 5, 5], 0, None, rounding, axis=-1))
    net.out(net.requantize(narrow, -5, None, 3000))
    net.out(net.requantize(wide, -20, None, None))
    net.out(net.requantize(narrow, 0, 0, None))
    net.out(net.requantize(net.requantize(net.requantize(narrow, 0, 0, None), 3, 0, 255), [1, 2, 3, 1, 0, 2], axis=1))


@network
def divide(net: Net) -> None:
    x, wide = net.codes(3, 4, 5, low=-3000, high=3000), net.codes(30, low=-(2**31), high=2**31 - 1)
    for rounding in ROUNDINGS:
        for count, shift in [(6, 0), (49, 2), (6, -4), (1, 3), (2**20, 15)]:
            net.out(net.divide(x, count, shift, rounding, low=-50, high=2000))
        net.out(net.divide(wide, 7, -10, rounding))
        net.out(net.divide(x, net.ints(1, 9, 4, 5), 1, rounding))
        net.out(net.divide(x, net.ints(1, 9, 3, 1, 5), -2, rounding, low=-128, high=127))


@network
def conv(net: Net) -> None:
    for groups, shape, kernel, geometry in [
        (1, (3, 7, 6), (4, 3, 3, 3), {"padding": [[1, 1], [1, 1]]}),
        (2, (4, 8, 9), (6, 2, 3, 2), {"stride": [2, 3], "padding": [[2, 0], [1, 3]], "dilation": [2, 1]}),
        (4, (4, 5, 5), (8, 1, 3, 3), {"padding": [[1, 1], [1, 1]], "stride": [2, 2]}),
        (1, (5, 4, 4), (3, 5, 1, 1), {}),
        (1, (3, 11), (4, 3, 4), {"padding": [[3, 2]], "dilation": [3], "stride": [2]}),
        (1, (2, 4, 5, 3), (3, 2, 2, 3, 2), {"padding": [[1, 0], [1, 1], [0, 1]], "stride": [1, 2, 1]}),
        (1, (1, 2, 2), (2, 1, 3, 3), {"padding": [[5, 4], [4, 5]]}),
    ]:
        for biased, low, high in [(True, -128, 127), (False, 0, 255)]:
            x = net.codes(*shape, low=low, high=high)
            bias = net.ints(-5000, 5000, kernel[0]) if biased else None
            y = net.conv(x, net.ints(-128, 127, *kernel), bias, groups=groups, **geometry)
            net.out(net.requantize(y, net.ints(0, 9, kernel[0]).tolist(), axis=1) if biased else y)


@network
def conv_transpose(net: Net) -> None:
    for groups, shape, kernel, geometry in [
        (1, (3, 4, 5), (3, 4, 3, 3), {"stride": [2, 2], "padding": [1, 1], "output_padding": [1, 1]}),
        (2, (4, 3, 3), (4, 3, 2, 3), {"stride": [1, 3], "dilation": [2, 1]}),
        (1, (2, 7), (2, 3, 4), {"stride": [2], "padding": [2]}),
        (1, (2, 3, 2, 3), (2, 2, 2, 2, 3), {"stride": [2, 1, 2]}),
    ]:
        y = net.conv_transpose(
            net.codes(*shape),
            net.ints(-128, 127, *kernel),
            net.ints(-99, 99, groups * kernel[1]),
            groups=groups,
            **geometry,
        )
        net.out(y)
        net.out(net.requantize(y, 5, 0, 255, "half_up"))


@network
def linear(net: Net) -> None:
    x = net.codes(3, 20)
    y = net.linear(x, net.ints(-128, 127, 6, 20), net.ints(-(2**20), 2**20, 6))
    net.out(y)
    net.out(net.linear(net.requantize(y, [8, 9, 10, 9, 8, 7], axis=2, rounding="half_away"), net.ints(-8, 7, 2, 6)))
    net.out(net.requantize(y, [3, 8, 12], axis=1))
    net.out(net.requantize(net.linear(x, net.ints(-9, 9, 3, 20)), [2, 4, 6], axis=1))
    net.out(net.linear(net.codes(9, low=0, high=65535), net.ints(-32768, 32767, 4, 9), net.ints(-5, 5, 4)))


@network
def wide(net: Net) -> None:
    """Sums past 32 bits."""
    x = net.codes(16, 3, 3, low=-32768, high=32767)
    y = net.conv(x, net.ints(-32768, 32767, 4, 16, 3, 3), net.ints(-(2**40), 2**40, 4), padding=[[1, 1], [1, 1]])
    net.out(y)
    z = net.requantize(y, 20, -(2**31), 2**31 - 1)
    net.out(net.requantize(net.linear(z, net.ints(-128, 127, 5, 3)), 17, -128, 127, "truncate"))
    net.out(net.add([y, z], [3, 20]))
    net.out(net.summed("sum", y, 9, axes=[2, 3], keepdims=False))


@network
def pools(net: Net) -> None:
    x, line, cube = net.codes(3, 7, 8), net.codes(2, 9, low=0, high=255), net.codes(2, 4, 5, 4)
    for source, geometry in [
        (x, {"kernel": [2, 2], "stride": [2, 2], "padding": [[0, 0], [0, 0]], "dilation": [1, 1]}),
        (x, {"kernel": [3, 3], "stride": [2, 1], "padding": [[1, 1], [1, 0]], "dilation": [2, 2]}),
        (line, {"kernel": [3], "stride": [2], "padding": [[1, 1]], "dilation": [1]}),
        (cube, {"kernel": [2, 3, 2], "stride": [2, 2, 1], "padding": [[1, 0], [1, 1], [0, 1]], "dilation": [1, 1, 1]}),
    ]:
        value = net.values[source]
        net.out(net.op("max_pool", source, (value.low, value.high), **geometry))
        del geometry["dilation"]
        y = net.summed("sum_pool", source, int(np.prod(geometry["kernel"])), **geometry)
        net.out(y)
        net.out(net.divide(y, 9, -1, "half_up", low=-128, high=127))
        net.out(net.requantize(y, [1 + c for c in range(value.shape[1])], axis=1))


@network
def moves(net: Net) -> None:
    x, y = net.codes(3, 4, 6), net.codes(5, 4, 6, low=-7, high=200)
    net.out(net.same("reshape", x, shape=[-1, 12, 6]))
    net.out(net.same("transpose", net.same("reshape", x, shape=[-1, 12, 6]), permutation=[0, 2, 1]))
    net.out(net.same("transpose", x, permutation=[0, 3, 1, 2]))
    net.out(net.same("slice", x, starts=[0, 1, 0, 1], stops=[None, 3, None, -1], steps=[1, 1, 2, 3]))
    net.out(net.op("pad", x, (-128, 127), padding=[[0, 0], [1, 0], [0, 2], [3, 1]], value=-5))
    net.out(net.op("pad", x, (-128, 127), padding=[[0, 0], [0, 0], [-1, 2], [1, -3]], value=0))
    net.out(net.op("concat", [x, y, x], (-128, 200), axis=1))
    net.out(net.op("concat", [x, x], (-128, 127), axis=-1))
    net.out(net.same("gather", x, index=net.ints(-1, 71, 5, 4).astype(np.int32)))
    many = net.same("reshape", x, shape=[-3, 4, 6])
    net.out(net.same("gather", many, index=net.ints(-1, 23, 7).astype(np.int32)))
    net.out(net.same("reshape", net.requantize(many, 1), shape=[-1, 72]))


@network
def sums(net: Net) -> None:
    x, y, z = net.codes(3, 4, 5), net.codes(3, 4, 5, low=0, high=255), net.codes(3, 1, 1, low=-2000, high=2000)
    total = net.add([x, y], [2, 0])
    net.out(total)
    net.out(net.requantize(total, 2, rounding="half_up"))
    net.out(net.add([x, y, z], [0, 5, 3]))
    net.out(net.requantize(net.add([net.requantize(z, 4), net.requantize(x, 1)], [0, 0]), 1))
    net.out(net.add([x, x], [0, 1]))
    net.out(net.add([x], [4, 0], net.ints(-1000, 1000, 3, 1, 5)))
    net.out(net.add([net.same("reshape", x, shape=[-1, 1, 60]), net.same("reshape", y, shape=[-1, 60, 1])], [0, 0]))
    for axes, keep in [([2, 3], False), ([1], True), ([1, 3], False), ([-1], True), ([1, 2, 3], False)]:
        terms = int(np.prod([net.values[x].shape[axis] for axis in axes]))
        y = net.summed("sum", x, terms, axes=axes, keepdims=keep)
        net.out(y)
        net.out(net.divide(y, terms, -3, "half_away"))


@network
def unsigned(net: Net) -> None:
    """Every op on codes that uint16 and uint32 hold."""
    for high in (50_000, 2**31 - 1, 2**32 - 1):
        x = net.codes(3, 4, 4, low=0, high=high)
        few = {"kernel": [2, 2], "stride": [2, 2], "padding": [[0, 0], [0, 0]]}
        net.out(net.requantize(x, 9))
        net.out(net.divide(x, 3))
        net.out(net.divide(x, net.ints(1, 9, 4, 4)))
        net.out(net.conv(x, net.ints(-2, 2, 2, 3, 3, 3), net.ints(-9, 9, 2)))
        net.out(net.conv_transpose(x, net.ints(-2, 2, 3, 2, 2, 2)))
        net.out(net.linear(x, net.ints(-2, 2, 2, 4)))
        net.out(net.summed("sum_pool", x, 4, **few))
        net.out(net.op("max_pool", x, (0, high), dilation=[1, 1], **few))
        net.out(net.summed("sum", x, 16, axes=[2, 3], keepdims=False))
        net.out(net.add([x, x], [0, 1]))
        net.out(net.op("concat", [x, net.requantize(x, 20, 0, 255)], (0, high), axis=1))
        net.out(net.same("transpose", x, permutation=[0, 2, 3, 1]))
        net.out(net.op("pad", x, (0, high), padding=[[0, 0], [0, 0], [1, 0], [0, 1]], value=high))
        net.out(net.same("gather", x, index=net.ints(-1, 47, 9).astype(np.int32)))
        constants = {"low": net.rng.integers(0, high, 3), "flip": net.ints(0, 1, 3)}
        net.out(net.op("threshold", x, (-1, 1), constants=constants, axis=1))
        net.out(net.op("argmax", x, dtype="int64", axis=1, keepdims=False))
    net.out(net.normalize(net.codes(3, 4, 4, low=0, high=50_000), 3))


@network
def threshold(net: Net) -> None:
    x = net.codes(6, 5, low=-300, high=300)
    borders = np.array([-(2**40), -300, 0, 17, 300, 2**40])
    constants = {"low": borders, "flip": np.array([0, 1, 0, 1, 0, 1], np.int8)}
    signs = net.op("threshold", x, (-1, 1), constants=constants, axis=1)
    net.out(signs)
    image = net.op("reshape", signs, (-1, 1), shape=[-1, 6, 5, 1])
    y = net.conv(
        image, np.sign(net.ints(0, 1, 6, 6, 3, 1).astype(np.int8) - 0.5).astype(np.int8), padding=[[1, 1], [0, 0]]
    )
    few = {"low": net.ints(-5, 5, 6), "flip": net.ints(0, 1, 6)}
    net.out(net.op("threshold", y, (-1, 1), constants=few, axis=1))
    net.out(net.op("argmax", x, dtype="int64", axis=1, keepdims=False))
    net.out(net.op("argmax", signs, dtype="int64", axis=-1, keepdims=True))


@network
def normalize_behind_conv_transpose(net: Net) -> None:
    """Stages of a sum have names of their own beside the loops of the sum."""
    x = net.codes(3, 4, 4)
    net.out(net.requantize(net.normalize(net.conv_transpose(x, net.ints(-2, 2, 3, 4, 2, 2)), 4), 14))


@network
def normalize(net: Net) -> None:
    x = net.codes(8, 3, 4)
    net.out(net.normalize(x, 8))
    net.out(net.normalize(x, 8, limit=1000))
    net.out(net.normalize(x, 8, fraction_in=9, xhat_fraction=2, s_fraction=3, limit=90))
    y = net.conv(x, net.ints(-128, 127, 5, 8, 1, 1))
    net.out(net.requantize(net.normalize(y, 5), 14, rounding="half_up"))


@network
def ends(net: Net) -> None:
    """Moves of floats before quantize and behind dequantize; factors, counts, units by channel."""
    x, y = net.input(3, 4, 4), net.input(2, 4, 4)
    joined = net.op("concat", [x, y], dtype="float32", axis=1)
    padded = net.op("pad", joined, dtype="float32", padding=[[0, 0], [0, 0], [1, 0], [0, 1]], value=0.5)
    codes = net.quantize(net.op("transpose", padded, dtype="float32", permutation=[0, 2, 3, 1]))
    net.out(codes, factor=0.1)
    net.out(codes, count=3, factor=0.3, precision="float64")
    net.out(codes, count=7)
    net.out(codes, counts=net.ints(1, 9, 5, 1, 5))
    floats = net.op("dequantize", codes, dtype="float32", factor=None, precision="float32", count=None)
    net.out(net.op("reshape", floats, dtype="float32", shape=[-1, 125]))
    moved = net.op(
        "transpose",
        net.op("reshape", floats, dtype="float32", shape=[-1, 25, 5]),
        dtype="float32",
        permutation=[0, 2, 1],
    )
    net.out(net.op("pad", moved, dtype="float32", padding=[[0, 0], [0, 0], [2, 0]], value=0.0))
    net.out(moved)
    by_channel = net.op("reshape", codes, (-128, 127), (-3, 0, 5, 2, -140), along=2, shape=[-1, 25, 5])
    net.out(by_channel, factor=1.7)
    net.out(by_channel)


@network
def classes(net: Net) -> None:
    """argmax of floats that round to one another, of floats that are an output as well, and of moved ones."""
    few = net.codes(12, low=-2, high=2)
    near = np.sort(net.rng.integers(2**27, 2**27 + 20, 12))
    close = net.op("add", [few], (0, 2**28), left=[0, 0], constants={"other": near.astype(np.int32)})
    for codes in (close, few):
        for is_output in (False, True):
            floats = net.op("dequantize", codes, dtype="float32", factor=None, precision="float32", count=None)
            net.out(net.op("argmax", floats, dtype="int64", axis=1, keepdims=False))
            if is_output:
                net.out(floats)
    rows = net.op("reshape", floats, dtype="float32", shape=[-1, 3, 4])
    net.out(net.op("argmax", rows, dtype="int64", axis=1, keepdims=True))
    net.out(net.op("argmax", close, dtype="int64", axis=1, keepdims=False))


@network
def residual(net: Net) -> None:
    """A small residual network, all of whose rescaling happens inside its sums."""

    def conv(x: str, ins: int, size: int = 3, stride: int = 1) -> str:
        weight, bias = net.ints(-127, 127, 8, ins, size, size), net.ints(-999, 999, 8)
        return net.conv(x, weight, bias, stride=[stride] * 2, padding=[[size // 2] * 2] * 2)

    x = net.requantize(net.requantize(conv(net.codes(3, 12, 12), 3), 0, 0, None), 6, 0, 255)
    for stride in (1, 2):
        y = net.requantize(conv(x, 8, stride=stride), 8, 0, 255)
        y = net.requantize(conv(y, 8), 9)
        skip = x if stride == 1 else net.requantize(conv(x, 8, 1, 2), 8)
        x = net.requantize(net.add([y, skip], [1, 0]), 1, 0, 255)
    x = net.divide(net.summed("sum", x, 36, axes=[2, 3], keepdims=False), 36, -2, "half_up", low=0, high=1023)
    logits = net.linear(net.same("reshape", x, shape=[-1, 8]), net.ints(-127, 127, 10, 8), net.ints(-9999, 9999, 10))
    net.out(logits)
    net.out(net.op("argmax", logits, dtype="int64", axis=1, keepdims=False))


@network
def windows(net: Net) -> None:
    """Drawn geometries of everything that slides over an image."""

    def draw(low: int, high: int, many: int) -> list[int]:
        return [int(n) for n in net.rng.integers(low, high, many, endpoint=True)]

    for _ in range(16):
        d, groups = draw(1, 3, 1)[0], draw(1, 2, 1)[0]
        kernel, stride, dilation = draw(1, 3, d), draw(1, 3, d), draw(1, 2, d)
        sizes = [k * n + more for k, n, more in zip(kernel, dilation, draw(0, 4, d), strict=True)]
        padding = [draw(0, k - 1, 2) for k in kernel]
        ins, outs = (groups * n for n in draw(1, 3, 2))
        x = net.codes(ins, *sizes, low=draw(-128, 0, 1)[0], high=draw(1, 255, 1)[0])
        bias, value = net.ints(-300, 300, outs), net.values[x]
        geometry = {"stride": stride, "dilation": dilation}
        weight = net.ints(-9, 9, outs, ins // groups, *kernel)
        net.out(net.conv(x, weight, bias, padding=padding, groups=groups, **geometry))
        weight = net.ints(-9, 9, ins, outs // groups, *kernel)
        before = [min(pair) for pair in padding]
        more = [int(net.rng.integers(0, max(s, n))) for s, n in zip(stride, dilation, strict=True)]
        net.out(net.conv_transpose(x, weight, bias, padding=before, output_padding=more, groups=groups, **geometry))
        half = [[min(p, k // 2) for p in pair] for pair, k in zip(padding, kernel, strict=True)]
        net.out(net.op("max_pool", x, (value.low, value.high), kernel=kernel, padding=half, **geometry))
        terms = int(np.prod(kernel))
        net.out(net.summed("sum_pool", x, terms, kernel=kernel, padding=padding, stride=stride))
