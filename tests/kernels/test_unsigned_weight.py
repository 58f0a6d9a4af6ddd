"""Weight gradients of uint8 activations: every backend returns the integers of `reference`, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.layers import Layer, codes, layer, layers
from torch import Tensor

from lightning_lowbit import kernels
from lightning_lowbit.kernels import columns, cpu, cuda, reference

FAST = ("simulate", "int8", "auto")
# Where routes of the CPU's backend begin and end: patches, rows of patches, planes, groups, several chunks.
ROUTES = {
    "wide": layer((3, 136, 7, 7), (40, 136, 3, 3), padding=1),
    "wide, many images": layer((70, 40, 6, 6), (8, 40, 3, 3), padding=1),
    "wide, stride 2": layer((3, 40, 9, 8), (24, 40, 3, 2), (2, 2), 1),
    "wide, uneven": layer((2, 40, 8, 8), (16, 40, 3, 3), (2, 1), ((0, 1), (2, 0))),
    "wide holes": layer((2, 40, 12, 12), (16, 40, 3, 3), padding=2, dilation=(2, 2)),
    "narrow": layer((3, 16, 9, 9), (24, 16, 3, 3), padding=1),
    "narrow, many images": layer((5, 9, 90, 90), (3, 9, 3, 3), padding=1),
    "narrow, uneven, holes": layer((2, 24, 12, 12), (16, 24, 3, 3), (1, 2), ((0, 3), (2, 0)), (2, 3)),
    "first": layer((3, 3, 11, 11), (16, 3, 3, 3), padding=1),
    "first, many images": layer((5, 3, 90, 90), (4, 3, 3, 3), padding=1),
    "first, uneven, holes": layer((2, 8, 11, 9), (16, 8, 5, 2), padding=((3, 0), (1, 4)), dilation=(1, 2)),
    "first, patches apart": layer((2, 3, 16, 16), (24, 3, 4, 4), (4, 4)),
    "depthwise": layer((2, 80, 6, 6), (80, 1, 3, 3), padding=1, groups=80),
    "depthwise, stride 2": layer((2, 24, 7, 6), (48, 1, 3, 3), (2, 2), ((1, 0), (0, 1)), groups=24),
    "in groups": layer((2, 48, 6, 6), (32, 12, 3, 3), padding=1, groups=4),
    "wide groups": layer((2, 144, 5, 5), (6, 72, 3, 3), padding=1, groups=2),
    "1x1": layer((2, 24, 5, 5), (17, 24, 1, 1)),
    "1x1, stride 2": layer((2, 40, 5, 5), (17, 40, 1, 1), (2, 2)),
    "1x1 with padding": layer((2, 40, 5, 5), (17, 40, 1, 1), padding=1),
    "more padding than kernel": layer((2, 40, 5, 5), (16, 40, 2, 2), padding=3),
    "planes, not channels_last": layer((2, 40, 6, 6), (8, 40, 3, 3), padding=1, channels_last=False),
}  # fmt: skip
EXTREMES = ((255, 127), (255, -128), (0, -128))


def unsigned(*size: int, seed: int = 0) -> Tensor:
    """uint8 numbers of the whole range."""
    return codes(*size, seed=seed).view(torch.uint8)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def gradient(drawn: Layer, x: Tensor, err: Tensor, backend: str, exact_float: bool = False) -> Tensor:
    return kernels.int8_conv2d_weight(
        x, err, drawn.w.shape, stride=drawn.stride, padding=drawn.padding, dilation=drawn.dilation,
        groups=drawn.groups, backend=backend, exact_float=exact_float,
    )  # fmt: skip


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=150)
@given(drawn=layers())
def test_gradients_equal_the_reference(backend: str, drawn: Layer) -> None:
    x = drawn.x.view(torch.uint8)
    assert_same(gradient(drawn, x, drawn.err, backend), gradient(drawn, x, drawn.err, "reference"))


@settings(max_examples=150)
@given(drawn=layers())
def test_the_reference_is_the_gradient(drawn: Layer) -> None:
    x, w = drawn.x.view(torch.uint8), drawn.w.double().requires_grad_()
    padded = F.pad(x.double(), (*drawn.geo.left_right, *drawn.geo.top_bottom))
    acc = F.conv2d(padded, w, None, drawn.stride, 0, drawn.dilation, drawn.groups)
    (grad,) = torch.autograd.grad(acc, w, drawn.err.double())
    assert_same(gradient(drawn, x, drawn.err, "reference"), grad.to(torch.int32))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ROUTES)
def test_every_route_equals_the_reference(backend: str, name: str) -> None:
    drawn = ROUTES[name]
    filled = [(torch.full_like(drawn.x.view(torch.uint8), x), torch.full_like(drawn.err, e)) for x, e in EXTREMES]
    for x, err in [(drawn.x.view(torch.uint8), drawn.err), *filled]:
        expected = gradient(drawn, x, err, "reference")
        assert_same(gradient(drawn, x, err, backend), expected)
        floats = gradient(drawn, x, err, backend, exact_float=True)
        assert_same(floats.to(torch.int32), expected)
        assert floats.is_contiguous(memory_format=torch.channels_last)


def test_the_device_backend_takes_uint8_by_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_int_mm")
    monkeypatch.delattr(cuda, "patches")
    for name in ("wide", "wide, uneven", "in groups"):
        drawn = ROUTES[name]
        x = drawn.x.view(torch.uint8)
        expected = reference.conv2d_weight(x, drawn.err, drawn.geo)
        assert torch.equal(cuda.conv2d_weight(x, drawn.err, drawn.geo).long(), expected)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("channels", [3, 24, 40])
def test_images_with_any_strides(backend: str, channels: int) -> None:
    every_second, cut = unsigned(2, 2 * channels, 7, 7)[:, ::2], unsigned(2, 9, 8, channels + 3)[:, 1:8, :7, 2:-1]
    err = codes(2, 16, 7, 7, seed=1)[:, 1::2]
    for x in (every_second, cut.permute(0, 3, 1, 2), unsigned(1, channels, 1, 1).expand(2, channels, 7, 7)):
        size = (8, channels, 3, 3)
        expected = kernels.int8_conv2d_weight(x.contiguous(), err.contiguous(), size, padding=1, backend="reference")
        assert_same(kernels.int8_conv2d_weight(x, err, size, padding=1, backend=backend), expected)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (16, 16), (40, 1), (12, 2)])
@pytest.mark.parametrize("values", [None, *EXTREMES], ids=str)
def test_signals(backend: str, channels: int, groups: int, values: tuple[int, int] | None) -> None:
    x, err = unsigned(3, channels, 19), codes(3, 16, 8, seed=1)
    if values is not None:
        x, err = x.fill_(values[0]), err.fill_(values[1])
    w = torch.zeros(16, channels // groups, 5, dtype=torch.double, requires_grad=True)
    acc = F.conv1d(F.pad(x.double(), (1, 3)), w, stride=2, dilation=2, groups=groups)
    (expected,) = torch.autograd.grad(acc, w, err.double())
    found = kernels.int8_conv1d_weight(
        x, err, w.shape, stride=2, padding=(1, 3), dilation=2, groups=groups, backend=backend
    )
    assert_same(found, expected.to(torch.int32))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pixels", [519, 699, 1383])
def test_fewer_products_fit_float32_than_of_int8(backend: str, images: int, groups: int, pixels: int) -> None:
    """519 products of 255 * 127 have an odd sum beyond 2^24; of 128 * 127 twice as many stay below it."""
    exact = pixels * 255 * 127
    assert int(torch.tensor(exact, dtype=torch.float32)) != exact
    shape = (images, 2, 1, pixels // images)
    x, err = torch.full(shape, 255, dtype=torch.uint8), torch.full(shape, 127, dtype=torch.int8)
    for exact_float in (False, True):
        acc = kernels.int8_conv2d_weight(
            x, err, (2, 2 // groups, 1, 1), groups=groups, backend=backend, exact_float=exact_float
        )
        assert acc.to(torch.int64).eq(exact).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(
    ("images", "width", "dtype"), [(3, 21_931, torch.int32), (2, 32_897, torch.int64), (2, 70_000, torch.int64)]
)
@pytest.mark.parametrize(("value", "error"), EXTREMES)
def test_long_sums_are_int64(backend: str, images: int, width: int, dtype: torch.dtype, value: int, error: int) -> None:
    """65,793 products of 255 * 128 fit int32 and not one more; of 128 * 128 twice as many do."""
    for channels, groups, kernel in ((2, 1, 1), (2, 1, 3), (12, 1, 1), (40, 1, 1), (4, 2, 3)):
        x = torch.full((images, channels, 1, width), value, dtype=torch.uint8)
        err = torch.full((images, 2, 1, width), error, dtype=torch.int8)
        size = (2, channels // groups, 1, kernel)
        acc = kernels.int8_conv2d_weight(x, err, size, padding=(0, kernel // 2), groups=groups, backend=backend)
        assert acc.dtype == dtype
        assert acc[..., kernel // 2].to(torch.int64).eq(images * width * value * error).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("size", [(0, 8, 5, 5), (2, 0, 5, 5)], ids=str)
def test_nothing_to_sum(backend: str, size: tuple[int, ...]) -> None:
    acc = kernels.int8_conv2d_weight(
        unsigned(*size), codes(size[0], 4, 5, 5), (4, size[1], 3, 3), padding=1, backend=backend
    )
    assert_same(acc, torch.zeros(4, size[1], 3, 3, dtype=torch.int32))


@given(batch=st.integers(1, 70), inputs=st.integers(1, 40), outputs=st.integers(1, 40), cut=st.booleans())
def test_the_gradient_of_a_linear_layer(batch: int, inputs: int, outputs: int, cut: bool) -> None:
    """The activations turned around are the first operand, (in, batch), and what comes out is the gradient's."""
    x, err = unsigned(batch + cut, inputs + cut)[cut:, cut:], codes(batch + cut, outputs + cut, seed=1)[cut:, cut:]
    for backend in ("reference", *FAST):
        found = kernels.int8_matmul(x.t(), err, backend=backend)
        assert_same(found, (x.t().long() @ err.long()).to(torch.int32))


@pytest.mark.parametrize(("value", "error"), EXTREMES)
def test_the_largest_gradient_of_a_linear_layer(value: int, error: int) -> None:
    x, err = torch.full((577, 33), value, dtype=torch.uint8), torch.full((577, 17), error, dtype=torch.int8)
    for backend in ("reference", *FAST):
        assert kernels.int8_matmul(x.t(), err, backend=backend).eq(577 * value * error).all()


def test_activations_turned_around_need_no_copy() -> None:
    turned = cpu._less_128(unsigned(64, 48).t())
    assert columns.matrix(turned) is turned
