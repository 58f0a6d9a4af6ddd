"""Forward products of uint8 activations: every backend returns the integers of `reference`, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.layers import Layer, codes, layer, layers
from launch import held_to, run_code
from torch import Tensor

from lightning_lowbit import kernels
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.kernels import backends, cpu, cuda, ledger, reference, simulate
from lightning_lowbit.kernels.geometry import Geometry, geometry
from lightning_lowbit.numerics.guards import float_sums_exact

FAST = ("simulate", "int8", "auto")
# Where routes of the CPU's backend begin and end.
ROUTES = {
    "wide": layer((3, 136, 7, 7), (40, 136, 3, 3), padding=1),
    "narrow": layer((3, 16, 9, 9), (24, 16, 3, 3), padding=1),
    "odd channels, stride 2": layer((3, 9, 9, 8), (7, 9, 3, 2), (2, 2), 1),
    "uneven": layer((2, 24, 8, 8), (16, 24, 3, 3), (2, 2), ((0, 1), (1, 0))),
    "wide and uneven": layer((2, 136, 8, 8), (16, 136, 3, 3), (2, 1), ((0, 1), (2, 0))),
    "first": layer((3, 3, 11, 11), (16, 3, 3, 3), padding=1),
    "depthwise": layer((2, 80, 6, 6), (80, 1, 3, 3), padding=1, groups=80),
    "in groups": layer((2, 48, 6, 6), (32, 12, 3, 3), padding=1, groups=4),
    "1x1": layer((2, 24, 5, 5), (17, 24, 1, 1)),
    "1x1, stride 2": layer((2, 24, 5, 5), (17, 24, 1, 1), (2, 2)),
    "1x1, 577 channels": layer((2, 577, 3, 3), (5, 577, 1, 1)),
    "1x1 with padding": layer((2, 136, 5, 5), (17, 136, 1, 1), padding=1),
    "holes": layer((2, 16, 12, 12), (16, 16, 3, 3), padding=2, dilation=(2, 2)),
    "wide holes": layer((2, 136, 9, 9), (16, 136, 3, 3), padding=2, dilation=(2, 2)),
    "more padding than kernel": layer((2, 16, 5, 5), (16, 16, 2, 2), padding=3),
    "many wide images": layer((70, 136, 6, 6), (8, 136, 3, 3), padding=1),
    "planes, not channels_last": layer((2, 136, 6, 6), (8, 136, 3, 3), padding=1, channels_last=False),
}  # fmt: skip
SATURATING = ((255, 127), (255, -128), (0, -128))


@pytest.fixture
def nothing_probed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setattr(ledger, "counts", ledger.counts.copy())
    refusals = ledger.refusals.copy()
    ledger.refusals.clear()
    cpu._unsigned_exact.cache_clear()
    yield
    cpu._unsigned_exact.cache_clear()
    ledger.refusals.clear()
    ledger.refusals.update(refusals)


def unsigned(*size: int, seed: int = 0) -> Tensor:
    """uint8 numbers of the whole range."""
    return codes(*size, seed=seed).view(torch.uint8)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def convolved(drawn: Layer, x: Tensor, w: Tensor, backend: str, exact_float: bool = False) -> Tensor:
    return kernels.int8_conv2d(
        x, w, stride=drawn.stride, padding=drawn.padding, dilation=drawn.dilation, groups=drawn.groups,
        backend=backend, exact_float=exact_float,
    )  # fmt: skip


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=150)
@given(drawn=layers())
def test_convolutions_equal_the_reference(backend: str, drawn: Layer) -> None:
    x = drawn.x.view(torch.uint8)
    assert_same(convolved(drawn, x, drawn.w, backend), convolved(drawn, x, drawn.w, "reference"))


@settings(max_examples=150)
@given(drawn=layers())
def test_the_reference_is_the_convolution(drawn: Layer) -> None:
    x = drawn.x.view(torch.uint8)
    padded = F.pad(x.double(), (*drawn.geo.left_right, *drawn.geo.top_bottom))
    acc = F.conv2d(padded, drawn.w.double(), None, drawn.stride, 0, drawn.dilation, drawn.groups)
    assert_same(convolved(drawn, x, drawn.w, "reference"), acc.to(torch.int32))
    assert torch.equal(cuda.conv2d(x, drawn.w, drawn.geo).to(torch.int32), acc.to(torch.int32))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ROUTES)
def test_every_route_equals_the_reference(backend: str, name: str) -> None:
    drawn = ROUTES[name]
    filled = [(torch.full_like(drawn.x, x), torch.full_like(drawn.w, w)) for x, w in ((-1, 127), (-1, -128), (0, -128))]
    for x, w in [(drawn.x, drawn.w), *filled]:
        activations = x.view(torch.uint8)
        expected = convolved(drawn, activations, w, "reference")
        assert_same(convolved(drawn, activations, w, backend), expected)
        floats = convolved(drawn, activations, w, backend, exact_float=True)
        assert_same(floats.to(torch.int32), expected)
        assert floats.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("channels", [24, 136])
def test_images_with_any_strides(backend: str, channels: int) -> None:
    w = codes(8, channels, 3, 3, seed=1)
    every_second, cut = unsigned(2, 2 * channels, 7, 7)[:, ::2], unsigned(2, 9, 8, channels + 3)[:, 1:8, :7, 2:-1]
    for x in (every_second, cut.permute(0, 3, 1, 2), unsigned(1, channels, 1, 1).expand(2, channels, 7, 7)):
        expected = kernels.int8_conv2d(x.contiguous(), w, padding=1, backend="reference")
        assert_same(kernels.int8_conv2d(x, w, padding=1, backend=backend), expected)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("channels", [3, 17, 140])
def test_signals_equal_the_reference(backend: str, channels: int) -> None:
    x, w = unsigned(3, channels, 19), codes(8, channels, 5, seed=1)
    found, expected = (
        kernels.int8_conv1d(x, w, stride=2, padding=(1, 3), dilation=2, backend=name) for name in (backend, "reference")
    )
    assert_same(found, expected)
    acc = F.conv1d(F.pad(x.double(), (1, 3)), w.double(), stride=2, dilation=2)
    assert torch.equal(found.double(), acc)


@given(
    k=st.integers(0, 70) | st.sampled_from([515, 519, 577, 1023, 1025]), m=st.integers(0, 40), n=st.integers(0, 40),
    how=st.sampled_from(["row", "column", "cut", "one row"]),
)  # fmt: skip
def test_matrices_equal_the_reference(k: int, m: int, n: int, how: str) -> None:
    a, b = unsigned(m, k), codes(k, n, seed=1)
    if how == "column":
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    elif how == "cut":
        a, b = unsigned(m + 3, k + 5)[1 : m + 1, 2 : k + 2], codes(n + 5, k + 3)[1 : n + 1, 2 : k + 2].t()
    elif how == "one row":
        a, b = unsigned(1, k).expand(m, k), codes(1, n).expand(k, n)
    expected = kernels.int8_matmul(a, b, backend="reference")
    assert_same(expected, (a.long() @ b.long()).to(torch.int32))
    for backend in FAST:
        assert_same(kernels.int8_matmul(a, b, backend=backend), expected)
        assert_same(kernels.int8_matmul(a, b, backend=backend, exact_float=True).to(torch.int32), expected)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(("x", "w"), SATURATING)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 33, 3), (17, 577, 9), (64, 519, 40), (3, 2049, 16)])
def test_sums_of_the_largest_products(backend: str, x: int, w: int, m: int, k: int, n: int) -> None:
    a, b = torch.full((m, k), x, dtype=torch.uint8), torch.full((n, k), w, dtype=torch.int8).t()
    assert kernels.int8_matmul(a, b, backend=backend).eq(k * x * w).all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("channels", "kernel"), [(59, 3), (113, 3), (519, 1), (1023, 1)])
def test_fewer_products_fit_float32_than_of_int8(backend: str, channels: int, kernel: int) -> None:
    """1,023 products of int8 are exact in float32 whatever they are; of 255 * 127 only 518, and odd sums show it."""
    exact = channels * kernel**2 * 255 * 127
    assert int(torch.tensor(exact, dtype=torch.float32)) != exact
    x = torch.full((2, channels, kernel, kernel), 255, dtype=torch.uint8)
    w = torch.full((9, channels, kernel, kernel), 127, dtype=torch.int8)
    for exact_float in (False, True):
        acc = kernels.int8_matmul(x.flatten(1), w.flatten(1).t(), backend=backend, exact_float=exact_float)
        assert acc.to(torch.int64).eq(exact).all()
        for groups in (1, 2):
            images, weight = torch.cat([x] * groups, 1), torch.cat([w] * groups)
            for padding in (0, 1):
                acc = kernels.int8_conv2d(
                    images, weight, padding=padding, groups=groups, backend=backend, exact_float=exact_float
                )
                assert acc[:, :, padding, padding].to(torch.int64).eq(exact).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(("terms", "dtype"), [(65_793, torch.int32), (65_794, torch.int64), (140_000, torch.int64)])
def test_long_sums_are_int64(backend: str, terms: int, dtype: torch.dtype) -> None:
    """65,794 products of 255 * 128 do not fit int32; of 128 * 128 twice as many do."""
    x, w = torch.full((2, terms, 1, 1), 255, dtype=torch.uint8), torch.full((3, terms, 1, 1), -128, dtype=torch.int8)
    for acc in (
        kernels.int8_matmul(x.flatten(1), w.flatten(1).t(), backend=backend),
        kernels.int8_conv2d(x, w, backend=backend),
        kernels.int8_conv2d(x, w, padding=1, backend=backend)[:, :, 1, 1],
    ):
        assert acc.dtype == dtype
        assert acc.to(torch.int64).eq(terms * 255 * -128).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("size", [(0, 8, 5, 5), (2, 0, 5, 5)])
def test_nothing_to_sum(backend: str, size: tuple[int, ...]) -> None:
    acc = kernels.int8_conv2d(unsigned(*size), codes(4, size[1], 3, 3), padding=1, backend=backend)
    assert_same(acc, torch.zeros(size[0], 4, 5, 5, dtype=torch.int32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kernels.int8_matmul(codes(2, 3), unsigned(3, 2)),
            r"got int8 \(2, 3\) and uint8 \(3, 2\), expected int8 \(M, K\) and int8 \(K, N\); the first may be uint8",
        ),
        (
            lambda: kernels.int8_conv2d(unsigned(1, 2, 4, 4), unsigned(2, 2, 3, 3)),
            "expected int8 tensors of 4 axes; the first may be uint8",
        ),
        (lambda: kernels.int8_conv1d(unsigned(1, 2, 4).int(), codes(2, 2, 3)), "3 axes; the first may be uint8"),
        (
            lambda: kernels.int8_conv2d_input(unsigned(1, 2, 2, 2), codes(2, 3, 3, 3), (1, 3, 4, 4)),
            r"got uint8 \(1, 2, 2, 2\) and .*, expected int8 tensors of 4 axes$",
        ),
        (
            lambda: kernels.int8_conv1d_weight(unsigned(1, 3, 4), unsigned(1, 2, 2), (2, 3, 3)),
            "expected int8 tensors of 3 axes; the first may be uint8",
        ),
    ],
    ids=["matmul", "conv2d", "conv1d", "conv2d_input", "conv1d_weight"],
)
def test_other_dtypes_are_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.usefixtures("nothing_probed")
@pytest.mark.parametrize("product", ["matmul", "conv2d", "conv2d_weight"])
@pytest.mark.parametrize("operands", SATURATING)
def test_a_backend_that_is_wrong_on_uint8_is_passed_over_there(
    monkeypatch: pytest.MonkeyPatch, product: str, operands: tuple[int, int]
) -> None:
    right = getattr(cpu, product)

    def wrong(x: Tensor, w: Tensor, *others: object) -> Tensor:
        acc: Tensor = right(x, w, *others)
        return acc + (x.dtype is torch.uint8 and bool(x.eq(operands[0]).all() and w.eq(operands[1]).all()))

    monkeypatch.setattr(cpu, product, wrong)
    before = backends.choose("cpu")
    refusals = dict(ledger.refusals)
    x, w = (
        torch.full((2, 8, 3, 3), operands[0], dtype=torch.uint8),
        torch.full((4, 8, 3, 3), operands[1]).to(torch.int8),
    )
    assert kernels.int8_matmul(x.flatten(1), w.flatten(1).t()).eq(72 * operands[0] * operands[1]).all()
    assert kernels.int8_conv2d(x, w).eq(72 * operands[0] * operands[1]).all()
    assert kernels.int8_conv2d_weight(x, w.view(2, 16, 3, 3), (16, 8, 1, 1)).eq(18 * operands[0] * operands[1]).all()
    assert backends.choose("cpu", dtype=torch.uint8) is simulate
    assert "int8 on uint8 refused: wrong" in kernels.backend_report()
    with pytest.warns(UserWarning, match="'int8' is not exact on this machine.*'simulate' is used instead"):
        assert backends.choose("cpu", "int8", torch.uint8) is simulate
    assert backends.choose("cpu") is before
    assert refusals.items() <= ledger.refusals.items()


def in_16_bits(x: Tensor, w: Tensor, geo: Geometry, nonnegative: bool = False) -> Tensor:
    """The convolution as it comes out where pairs of products are added in 16 bits."""
    padded = F.pad(x.int(), (*geo.left_right, *geo.top_bottom))
    acc = torch.zeros(geo.output_size)
    for i in range(geo.kernel[0]):
        for j in range(geo.kernel[1]):
            products = geo.tap(padded, i, j)[:, None] * w[None, :, :, i, j, None, None]
            acc += products.unflatten(2, (-1, 2)).sum(3).clamp(-(2**15), 2**15 - 1).sum(2)
    return acc


@pytest.mark.usefixtures("nothing_probed")
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_a_convolution_that_saturates_is_refused_for_its_geometry(monkeypatch: pytest.MonkeyPatch, kernel: int) -> None:
    """Codes of int8 that are not negative do not saturate: 2 * 127 * 127 < 2^15; those of uint8 do."""
    geo = geometry((2, 32, 9, 9), (8, 32, kernel, kernel), 1, kernel // 2)
    backends.choose("cpu", dtype=torch.uint8)  # its own probe would find the fault below
    monkeypatch.setattr(cpu, "convolve_unsigned", in_16_bits)
    assert cpu._unsigned_exact(geo, True)
    assert not cpu._unsigned_exact(geo, True, torch.uint8)
    assert ledger.refusals["onednn convolution"].startswith("wrong")
    x, w = torch.full(geo.input_size, 255, dtype=torch.uint8), torch.full(geo.weight_size, 10, dtype=torch.int8)
    w[:, :16] = 127
    found, expected = (kernels.int8_conv2d(x, w, padding=kernel // 2, backend=name) for name in ("auto", "reference"))
    assert torch.equal(found, expected)


@given(low=st.integers(-128, 0), outputs=st.integers(1, 4), terms=st.integers(500, 1100), x=st.sampled_from([0, 1]))
def test_the_proof_is_that_of_the_guards(low: int, outputs: int, terms: int, x: int) -> None:
    dtype, largest = ((torch.int8, 128), (torch.uint8, 255))[x]
    rows = codes(outputs, terms, low=low).clamp(max=low if terms % 2 else 127)
    assert simulate.rows_exact(rows, dtype) == float_sums_exact(rows, largest)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=["int8", "uint8"])
def test_the_proof_of_sums_that_round(dtype: torch.dtype) -> None:
    assert not simulate.rows_exact(torch.full((1, 150_001), 127, dtype=torch.int8), dtype)
    one_of_many = torch.zeros(8, 1100, dtype=torch.int8)
    one_of_many[5] = -128
    assert not simulate.rows_exact(one_of_many, dtype)


@pytest.mark.usefixtures("nothing_probed")
def test_routes_of_the_cpu_backend() -> None:
    if backends.choose("cpu", dtype=torch.uint8) is not cpu:
        pytest.skip("this CPU has no exact int8 products")
    ledger.counts.clear()
    for name in ("narrow", "wide", "1x1", "first"):
        convolved(ROUTES[name], ROUTES[name].x.view(torch.uint8), ROUTES[name].w, "int8")
    assert ledger.counts == {
        ("int8", "onednn convolution"): 1,
        ("int8", "_int_mm"): 2,
        ("simulate", "float32"): 1,
    }


PROGRAM = """
import torch
from lightning_lowbit import kernels
from lightning_lowbit.kernels import cpu
from lightning_lowbit.kernels.geometry import geometry

torch.set_num_threads(1)
torch.manual_seed(0)
exact = True

def filled(x, size_x, w, size_w):
    if x is None:
        return torch.randint(0, 256, size_x, dtype=torch.uint8), torch.randint(-128, 128, size_w, dtype=torch.int8)
    return torch.full(size_x, x, dtype=torch.uint8), torch.full(size_w, w, dtype=torch.int8)

for x, w in ((255, 127), (255, -128), (0, -128), (None, None)):
    for m, k, n in ((3, 577, 5), (40, 576, 24), (1, 33, 2), (20, 1153, 8)):
        a, b = filled(x, (m, k), w, (k, n))
        expected = a.long() @ b.long()
        assert torch.equal(kernels.int8_matmul(a, b).long(), expected), (x, w, m, k, n)
        exact &= torch.equal(cpu.matmul(a, b).long(), expected)
    for channels, stride, groups in ((16, 1, 1), (57, 1, 1), (136, 1, 1), (16, 2, 1), (16, 1, 2), (16, 1, 16)):
        images, weight = filled(x, (2, channels, 7, 7), w, (16, channels // groups, 3, 3))
        how = dict(stride=stride, padding=1, groups=groups)
        expected = kernels.int8_conv2d(images, weight, **how, backend="reference")
        assert torch.equal(kernels.int8_conv2d(images, weight, **how), expected), (x, w, channels)
        err = filled(x, (1,), w, expected.shape)[1]
        found, slow = (
            kernels.int8_conv2d_weight(images, err, weight.shape, **how, backend=name) for name in (None, "reference")
        )
        assert torch.equal(found, slow), (x, w, channels)
        geo = geometry(images.shape, weight.shape, stride, 1, 1, groups)
        if channels == 57:
            wrong = not torch.equal(cpu.convolve_unsigned(images, weight, geo, True).long(), expected.long())
            assert not (wrong and cpu._unsigned_exact(geo, True, torch.uint8)), "saturates"
print("library exact:", exact)
print(kernels.backend_report())
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_products_are_exact_whatever_the_instructions(isa: str) -> None:
    """With fewer instructions the library's products saturate; then the probe must have refused them."""
    said = run_code(PROGRAM, ONEDNN_MAX_CPU_ISA=isa, ONEDNN_VERBOSE="1")
    assert held_to(isa, said) or not torch.backends.mkldnn.is_available()
    exact, report = said.splitlines()[-2:]
    assert ("int8 on uint8 refused" in report) == (exact == "library exact: False"), report


def test_the_device_backend_takes_uint8_by_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_int_mm")
    monkeypatch.delattr(cuda, "patches")
    a, b = unsigned(17, 600), codes(600, 8, seed=1)
    assert torch.equal(cuda.matmul(a, b).long(), reference.matmul(a, b))
    drawn = ROUTES["wide"]
    x = drawn.x.view(torch.uint8)
    assert torch.equal(cuda.conv2d(x, drawn.w, drawn.geo).long(), reference.conv2d(x, drawn.w, drawn.geo))
