"""Backends are chosen by argument, block and environment, used after a probe, and passed over when it fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernels.layers import codes, layer
from launch import held_to, run_code
from torch import Tensor

from lightning_lowbit import kernels
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.kernels import backends, cpu, ledger, reference, simulate
from lightning_lowbit.kernels.geometry import Geometry, geometry


@pytest.fixture(autouse=True)
def a_process_in_which_nothing_ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    monkeypatch.setattr(backends, "_choices", {})
    counts, refusals = ledger.counts.copy(), ledger.refusals.copy()
    ledger.counts.clear()
    ledger.refusals.clear()
    cpu._unsigned_exact.cache_clear()
    yield
    cpu._unsigned_exact.cache_clear()
    ledger.counts.clear()
    ledger.refusals.clear()
    ledger.counts.update(counts)
    ledger.refusals.update(refusals)


class Wrong:
    """A backend of which one product is off by one."""

    def __init__(self, product: str) -> None:
        self.product = product

    def _spoilt(self, product: str, acc: Tensor) -> Tensor:
        return acc + 1 if product == self.product else acc

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return self._spoilt("matmul", reference.matmul(a, b))

    def conv2d(self, x: Tensor, w: Tensor, geo: Geometry, nonnegative: bool = False) -> Tensor:
        return self._spoilt("conv2d", reference.conv2d(x, w, geo))

    def conv2d_input(self, err: Tensor, w: Tensor, geo: Geometry) -> Tensor:
        return self._spoilt("conv2d_input", reference.conv2d_input(err, w, geo))

    def conv2d_weight(self, x: Tensor, err: Tensor, geo: Geometry) -> Tensor:
        return self._spoilt("conv2d_weight", reference.conv2d_weight(x, err, geo))


def test_argument_before_block_before_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.choose("cpu") in (cpu, simulate)
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    assert backends.choose("cpu") is reference
    with kernels.use("simulate"):
        assert backends.choose("cpu") is simulate
        assert backends.choose("cpu", "reference") is reference
        with kernels.use("reference"):
            assert backends.choose("cpu") is reference
        assert backends.choose("cpu") is simulate
    assert backends.choose("cpu") is reference


def test_a_block_ends_with_its_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), kernels.use("reference"):
        raise RuntimeError("inside")
    assert backends.choose("cpu") is not reference


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a = codes(2, 2)
    with pytest.raises(ConfigError, match=r"backend=: 'int9' is not a backend. Did you mean 'int8'\?"):
        kernels.int8_matmul(a, a, backend="int9")
    with (
        pytest.raises(ConfigError, match="Known: 'auto', 'cuda', 'int8', 'reference', 'simulate'"),
        kernels.use("zzz"),
    ):
        pass
    monkeypatch.setenv(backends.ENVIRONMENT, "gpu")
    with pytest.raises(ConfigError, match="LIGHTNING_LOWBIT_BACKEND: 'gpu' is not a backend"):
        kernels.int8_matmul(a, a)


def test_a_backend_of_another_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="'cuda' works on cuda tensors, got cpu; ask for 'auto'"):
        kernels.int8_matmul(codes(2, 2), codes(2, 2), backend="cuda")


@pytest.mark.parametrize("product", ["matmul", "conv2d", "conv2d_input", "conv2d_weight"])
def test_a_backend_that_fails_its_probe_is_passed_over(monkeypatch: pytest.MonkeyPatch, product: str) -> None:
    monkeypatch.setitem(backends.BACKENDS, "int8", Wrong(product))
    assert backends.choose("cpu") is simulate  # no warning: nobody asked for it
    assert "int8 refused: wrong" in kernels.backend_report()
    with pytest.warns(UserWarning, match="'int8' is not exact on this machine.*'simulate' is used instead"):
        assert backends.choose("cpu", "int8") is simulate
    assert backends.choose("cpu", "int8") is simulate  # said once


def test_when_floats_are_wrong_too_the_reference_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("int8", "simulate"):
        monkeypatch.setitem(backends.BACKENDS, name, Wrong("conv2d"))
    assert backends.choose("cpu") is reference
    report = kernels.backend_report()
    assert "int8 refused" in report
    assert "simulate refused" in report


def test_an_operator_that_is_missing_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_int_mm")
    assert backends.choose("cpu") is simulate
    assert "int8 refused: AttributeError" in kernels.backend_report()


def test_a_wrong_convolution_is_refused_for_its_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = layer((2, 16, 7, 7), (8, 16, 3, 3), padding=1)
    right = cpu.convolve_unsigned

    def wrong(x: Tensor, w: Tensor, geo: Geometry, nonnegative: bool = False) -> Tensor:
        return right(x, w, geo, nonnegative) + (geo.size == (7, 7))

    monkeypatch.setattr(cpu, "convolve_unsigned", wrong)
    if backends.choose("cpu") is not cpu:
        pytest.skip("this CPU has no exact int8 products")
    ledger.refusals.clear()
    for found, expected in zip(drawn.products("int8"), drawn.products("reference"), strict=True):
        assert torch.equal(found, expected)
    assert "onednn convolution refused: wrong" in kernels.backend_report()


OUTSIDE = {
    "holes beyond the image": geometry((4, 24, 3, 1), (6, 8, 2, 2), (1, 2), 3, 2, 3),
    "a kernel that needs the padding": geometry((2, 16, 6, 2), (9, 16, 5, 2), (3, 1), ((3, 3), (1, 1)), (2, 3)),
    "padding beyond the kernel": geometry((1, 16, 4, 4), (8, 16, 3, 3), 1, 3),
    "one channel": geometry((1, 1, 11, 2), (16, 1, 3, 2), (1, 2), ((2, 2), (0, 0))),
    "one channel in each group": geometry((2, 3, 10, 7), (99, 1, 5, 5), 3, ((2, 2), (4, 4)), 1, 3),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_geometries_that_crash_the_operator_never_reach_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def crash(*_: object) -> Tensor:
        raise AssertionError("reached")

    monkeypatch.setattr(cpu, "convolve_unsigned", crash)
    assert not cpu._unsigned_exact(OUTSIDE[name], False)
    assert not ledger.refusals


def test_the_report_names_backends_and_routes() -> None:
    assert kernels.backend_report() == "no product yet"
    a = codes(3, 5)
    kernels.int8_matmul(a, a.t(), backend="reference")
    kernels.int8_matmul(a, a.t(), backend="simulate")
    kernels.int8_matmul(a, a.t(), backend="simulate")
    assert kernels.backend_report() == "reference (int64 1); simulate (float32 2)"
    if backends.choose("cpu") is cpu:
        long = torch.ones(1, 140_000, dtype=torch.int8)
        kernels.int8_matmul(long, long.t())
        assert kernels.backend_report().startswith("int8 (_int_mm in int64 chunks 1); reference")


PROGRAM = """
import torch
from lightning_lowbit import kernels

torch.set_num_threads(1)
exact = True
for x, y in ((127, 127), (-128, -128), (127, -128)):
    for m, k, n in ((3, 577, 5), (40, 576, 24), (1, 33, 2)):
        a, b = torch.full((m, k), x, dtype=torch.int8), torch.full((k, n), y, dtype=torch.int8)
        expected = a.long() @ b.long()
        assert torch.equal(kernels.int8_matmul(a, b).long(), expected), (x, y, m, k, n)
        exact &= torch.equal(torch._int_mm(a, b).long(), expected)
    for channels, stride in ((16, 1), (136, 1), (16, 2)):
        x4 = torch.full((2, channels, 7, 7), x, dtype=torch.int8)
        w = torch.full((8, channels, 3, 3), y, dtype=torch.int8)
        how = dict(stride=stride, padding=1)
        err = torch.full(kernels.int8_conv2d(x4, w, **how).shape, x, dtype=torch.int8)
        for product, operands in (
            (kernels.int8_conv2d, (x4, w)),
            (kernels.int8_conv2d_input, (err, w, x4.shape)),
            (kernels.int8_conv2d_weight, (x4, err, w.shape)),
        ):
            assert torch.equal(product(*operands, **how), product(*operands, **how, backend="reference")), channels
print("library exact:", exact)
print(kernels.backend_report())
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_products_are_exact_whatever_the_instructions(isa: str) -> None:
    """With fewer instructions the library's products saturate; then the probe must have refused them."""
    said = run_code(PROGRAM, ONEDNN_MAX_CPU_ISA=isa, ONEDNN_VERBOSE="1")
    assert held_to(isa, said) or not torch.backends.mkldnn.is_available()
    exact, report = said.splitlines()[-2:]
    assert ("int8 refused" in report) == (exact == "library exact: False"), report
