"""Every backend returns the integers of `reference`, bit for bit, and `reference` those of torch's own convolution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.layers import Layer, codes, layer, layers
from torch import Tensor

from lightning_lowbit import kernels
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.kernels import backends, columns, cpu, cuda, reference
from lightning_lowbit.kernels.geometry import INT32_TERMS, geometry

FAST = ("simulate", "int8", "auto")
# Where routes of the CPU's backend begin and end: wide and narrow, first layers, groups, strides, 1x1, one row.
ROUTES = {
    "wide": layer((3, 136, 7, 7), (40, 136, 3, 3), padding=1),
    "narrow": layer((3, 16, 9, 9), (24, 16, 3, 3), padding=1),
    "narrow, stride 2": layer((3, 16, 9, 9), (24, 16, 3, 3), (2, 2), 1),
    "uneven": layer((2, 24, 8, 8), (16, 24, 3, 3), (2, 2), ((0, 1), (1, 0))),
    "first": layer((3, 3, 11, 11), (16, 3, 3, 3), padding=1),
    "first, 8 channels": layer((3, 8, 11, 9), (16, 8, 5, 3), padding=2),
    "depthwise": layer((2, 80, 6, 6), (80, 1, 3, 3), padding=1, groups=80),
    "in groups": layer((2, 48, 6, 6), (32, 12, 3, 3), padding=1, groups=4),
    "1x1": layer((2, 24, 5, 5), (17, 24, 1, 1)),
    "1x1, stride 2": layer((2, 24, 5, 5), (17, 24, 1, 1), (2, 2)),
    "holes": layer((2, 16, 12, 12), (16, 16, 3, 3), padding=2, dilation=(2, 2)),
    "patches that do not overlap": layer((2, 3, 16, 16), (24, 3, 4, 4), (4, 4)),
    "more padding than kernel": layer((2, 16, 5, 5), (16, 16, 2, 2), padding=3),
    "many images": layer((40, 8, 8, 8), (8, 8, 3, 3), (2, 2), 1),
    "many wide images": layer((70, 40, 6, 6), (8, 40, 3, 3), padding=1),
    "rows of planes": layer((3, 12, 3, 200), (8, 12, 3, 1)),
}  # fmt: skip


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, got, want in zip(("forward", "input", "weight"), found, expected, strict=True):
        assert got.dtype == want.dtype, name
        assert torch.equal(got, want), name


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=150)
@given(drawn=layers())
def test_convolutions_equal_the_reference(backend: str, drawn: Layer) -> None:
    assert_same(drawn.products(backend), drawn.products("reference"))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ROUTES)
def test_every_route_equals_the_reference(backend: str, name: str) -> None:
    expected = ROUTES[name].products("reference")
    assert_same(ROUTES[name].products(backend), expected)
    floats = ROUTES[name].products(backend, exact_float=True)
    assert_same([acc.to(torch.int32) for acc in floats], expected)
    assert all(acc.is_contiguous(memory_format=torch.channels_last) for acc in (*expected, *floats))


@settings(max_examples=150)
@given(drawn=layers())
def test_the_reference_is_the_convolution(drawn: Layer) -> None:
    x, w = (operand.double().requires_grad_() for operand in (drawn.x, drawn.w))
    padded = F.pad(x, (*drawn.geo.left_right, *drawn.geo.top_bottom))
    acc = F.conv2d(padded, w, None, drawn.stride, 0, drawn.dilation, drawn.groups)
    grads = torch.autograd.grad(acc, (x, w), drawn.err.double())
    assert_same(drawn.products("reference"), [exact.detach().to(torch.int32) for exact in (acc, *grads)])


@settings(max_examples=150)
@given(drawn=layers())
def test_the_arithmetic_of_the_device_backend(drawn: Layer) -> None:
    """On the host: the same functions, whose operands the device's kernel would accept."""
    found = (
        cuda.conv2d(drawn.x, drawn.w, drawn.geo),
        cuda.conv2d_input(drawn.err, drawn.w, drawn.geo),
        cuda.conv2d_weight(drawn.x, drawn.err, drawn.geo),
    )
    assert_same([acc.to(torch.int32) for acc in found], drawn.products("reference"))


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 17, 10), (17, 8, 8), (40, 24, 16)])
def test_the_device_gets_the_sizes_that_it_accepts(monkeypatch: pytest.MonkeyPatch, m: int, k: int, n: int) -> None:
    def strict(a: Tensor, b: Tensor) -> Tensor:
        assert a.shape[0] > 16
        assert a.shape[1] % 8 == b.shape[1] % 8 == 0
        return (a.long() @ b.long()).int()

    a, b = codes(m, k), codes(k, n)
    monkeypatch.setattr(torch, "_int_mm", strict)
    assert torch.equal(cuda.matmul(a, b).long(), reference.matmul(a, b))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ROUTES)
def test_cuda_equals_the_reference(name: str) -> None:
    host = ROUTES[name]
    device = Layer(host.x.cuda(), host.w.cuda(), host.err.cuda(), *list(vars(host).values())[3:])
    assert_same([acc.cpu() for acc in device.products("cuda")], host.products("reference"))


@given(k=st.integers(0, 70), m=st.integers(0, 40), n=st.integers(0, 40), how=st.sampled_from(["row", "column", "cut"]))
def test_matrices_equal_the_reference(k: int, m: int, n: int, how: str) -> None:
    a, b = codes(m, k), codes(k, n, seed=1)
    if how == "column":
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    elif how == "cut":
        a, b = codes(m + 3, k + 5)[1 : m + 1, 2 : k + 2], codes(n + 5, k + 3)[1 : n + 1, 2 : k + 2].t()
    expected = kernels.int8_matmul(a, b, backend="reference")
    assert expected.dtype == torch.int32
    assert torch.equal(expected.long(), a.long() @ b.long())
    for backend in FAST:
        assert torch.equal(kernels.int8_matmul(a, b, backend=backend), expected)
        assert torch.equal(kernels.int8_matmul(a, b, backend=backend, exact_float=True).int(), expected)


@pytest.mark.parametrize("strides", [(1, 1), (0, 1), (1, 0), (8, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("size", [(1, 9), (9, 1), (5, 9), (1, 1)])
def test_strides_that_the_library_misreads(size: tuple[int, int], strides: tuple[int, int]) -> None:
    """`torch._int_mm` takes wrong numbers from repeated or overlapping rows, and from axes of length 1."""
    a = codes(100).as_strided(size, strides, 3)
    b = codes(size[1], 12, seed=1)
    assert torch.equal(cpu.matmul(a, b).long(), reference.matmul(a, b))
    assert torch.equal(cpu.matmul(b.t(), a.t()).long(), reference.matmul(b.t(), a.t()))


@pytest.mark.parametrize("kernel", [(1, 3), (3, 1), (3, 4)])
def test_patches_own_their_memory(kernel: tuple[int, int]) -> None:
    """For one image and a kernel as wide as the image, rows of patches could be one view with rows that overlap."""
    geo = geometry((1, 8, 6 if kernel[0] > 1 else 1, kernel[1] if kernel[0] > 1 else 9), (4, 8, *kernel))
    padded = columns.pixels(codes(*geo.input_size))
    found = columns.patches(padded, geo)
    assert found.is_contiguous()
    assert found.untyped_storage().data_ptr() != padded.untyped_storage().data_ptr()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("values", [(127, 127), (127, -128), (-128, -128)])
def test_long_sums_are_int64(backend: str, values: tuple[int, int]) -> None:
    """140,000 products of 127 * 127 do not fit int32; the library alone wraps."""
    terms = 140_000
    a, b = torch.full((2, terms), values[0], dtype=torch.int8), torch.full((2, terms), values[1], dtype=torch.int8)
    exact = terms * values[0] * values[1]
    acc = kernels.int8_matmul(a, b.t(), backend=backend)
    assert acc.dtype == torch.int64
    assert acc.eq(exact).all()
    if backends.choose("cpu") is cpu:
        assert torch._int_mm(a, b.t()).long().ne(exact).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_the_longest_int32_sum(backend: str) -> None:
    a = torch.full((1, INT32_TERMS), -128, dtype=torch.int8)
    acc = kernels.int8_matmul(a, a.t(), backend=backend)
    assert acc.dtype == torch.int32
    assert acc.item() == INT32_TERMS * 128 * 128


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("channels", [1, 16, 40])
def test_the_gradient_of_a_weight_over_many_pixels_is_int64(backend: str, channels: int) -> None:
    size = (3, channels, 210, 210)
    x, err = torch.full(size, -128, dtype=torch.int8), torch.full((3, 1, 210, 210), -128, dtype=torch.int8)
    acc = kernels.int8_conv2d_weight(x, err, (1, channels, 3, 3), padding=1, backend=backend)
    assert acc.dtype == torch.int64
    assert acc[..., 1, 1].eq(3 * 210 * 210 * 128 * 128).all()
    assert acc[..., 0, 2].eq(3 * 209 * 209 * 128 * 128).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("size", [(0, 8, 5, 5), (2, 0, 5, 5)])
def test_nothing_to_sum(backend: str, size: tuple[int, ...]) -> None:
    empty = layer(size, (4, size[1], 3, 3), padding=1)
    for acc, shape in zip(empty.products(backend), ((size[0], 4, 5, 5), size, (4, size[1], 3, 3)), strict=True):
        assert acc.shape == shape
        assert acc.dtype == torch.int32
        assert not acc.any()
    assert kernels.int8_matmul(codes(3, 0), codes(0, 2), backend=backend).tolist() == [[0, 0]] * 3
    assert kernels.int8_matmul(codes(0, 3), codes(3, 2), backend=backend).shape == (0, 2)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("size", [(2, 5, 5), (16, 8, 5), (8, 1, 3)], ids=str)
@pytest.mark.parametrize("padding", [2, (1, 0)])
def test_signals_are_images_of_one_row(
    backend: str, size: tuple[int, int, int], padding: int | tuple[int, int]
) -> None:
    outputs, channels, taps = size
    x, w = codes(1, channels, 21), codes(outputs, channels, taps, seed=1)
    how = {"stride": 2, "padding": padding, "dilation": 2}
    one_row = {
        "stride": (1, 2), "padding": ((0, 0), (padding, padding) if isinstance(padding, int) else padding),
        "dilation": (1, 2), "backend": "reference",
    }  # fmt: skip
    expected = kernels.int8_conv2d(x.unsqueeze(2), w.unsqueeze(2), **one_row).squeeze(2)
    assert torch.equal(kernels.int8_conv1d(x, w, **how, backend=backend), expected)
    err = codes(*expected.shape, seed=2)
    images, weight, rows = x.unsqueeze(2), w.unsqueeze(2), err.unsqueeze(2)
    expected = kernels.int8_conv2d_input(rows, weight, images.shape, **one_row).squeeze(2)
    assert torch.equal(kernels.int8_conv1d_input(err, w, x.shape, **how, backend=backend), expected)
    expected = kernels.int8_conv2d_weight(images, rows, weight.shape, **one_row).squeeze(2)
    assert torch.equal(kernels.int8_conv1d_weight(x, err, w.shape, **how, backend=backend), expected)


@pytest.mark.parametrize("name", ["narrow", "wide", "first", "uneven", "depthwise", "1x1"])
def test_the_promise_of_nonnegative_codes_changes_no_integer(name: str) -> None:
    drawn = ROUTES[name]
    how = {"stride": drawn.stride, "padding": drawn.padding, "groups": drawn.groups}
    x = drawn.x.clamp(min=0)
    expected = kernels.int8_conv2d(x, drawn.w, **how, backend="reference")
    for backend in FAST:
        assert torch.equal(kernels.int8_conv2d(x, drawn.w, **how, backend=backend, nonnegative=True), expected)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("largest", [100, 127])
def test_whether_floats_hold_a_sum_is_up_to_the_operands(backend: str, largest: int) -> None:
    """1,152 products, of which the largest sum is odd: beyond 2^24 for weights of 127, below it for 100."""
    wide, narrow = torch.full((1, 128, 5, 5), 127, dtype=torch.int8), torch.full((1, 8, 5, 5), 127, dtype=torch.int8)
    weight = torch.full((8, 128, 3, 3), largest, dtype=torch.int8)
    weight[0, 0, 0, 0] -= 1
    turned = weight.transpose(0, 1).contiguous()
    images, errors = (torch.full((1, 3, 24, 48), value, dtype=torch.int8) for value in (127, largest))
    errors[0, :, 3, 3] -= 1
    one = geometry(images.shape, (3, 3, 1, 1))
    calls: list[Callable[..., Tensor]] = [
        lambda **how: kernels.int8_matmul(wide.flatten(1)[:, :1152], weight.flatten(1).t(), **how),
        lambda **how: kernels.int8_conv2d(wide, weight, padding=1, **how),
        lambda **how: kernels.int8_conv2d_input(wide, turned, narrow.shape, padding=1, **how),
        lambda **how: kernels.int8_conv2d_weight(images, errors, one.weight_size, **how),
    ]
    for call in calls:
        expected = call(backend="reference")
        assert (int(expected.max()) > 2**24) == (largest == 127)
        for exact_float in (False, True):
            assert torch.equal(call(backend=backend, exact_float=exact_float).long(), expected.long())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.int8_matmul(codes(2, 3).float(), codes(3, 2)), r"got float32 \(2, 3\) and int8 \(3, 2\)"),
        (lambda: kernels.int8_matmul(codes(2, 3), codes(2, 3)), r"expected int8 \(M, K\) and int8 \(K, N\)"),
        (lambda: kernels.int8_conv2d(codes(1, 3, 4, 4), codes(2, 2, 3, 3)), "do not fit a weight"),
        (lambda: kernels.int8_conv2d(codes(1, 2, 2, 2), codes(2, 2, 3, 3)), "larger than the padded input"),
        (lambda: kernels.int8_conv2d(codes(1, 2, 4, 4), codes(2, 2, 3, 3), stride=0), "at least 1"),
        (lambda: kernels.int8_conv2d(codes(2, 4, 4), codes(2, 2, 3, 3)), "expected int8 tensors of 4 axes"),
        (lambda: kernels.int8_conv1d(codes(1, 2, 4, 4), codes(2, 2, 3)), "expected int8 tensors of 3 axes"),
        (
            lambda: kernels.int8_conv2d_input(codes(1, 2, 4, 4), codes(2, 3, 3, 3), (1, 3, 9, 9)),
            r"expected the output's \(1, 2, 7, 7\)",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
