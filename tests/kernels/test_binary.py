"""Packed signs: bits equal an obvious twin, in every path that may compute them."""

from __future__ import annotations

import hashlib
import platform
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from launch import run_code
from torch import Tensor

from lightning_lowbit import kernels
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.kernels import backends, ledger, popcount
from lightning_lowbit.kernels.binary import (
    BinaryWeight,
    pack_images,
    pack_signs,
    pool_signs,
    regroup_images,
    unpack_images,
    unpack_signs,
    weight_words,
    xnor_conv2d,
    xnor_linear,
    xnor_matmul,
)

PATHS = ("auto", "int8", "simulate", "reference")
SPECIAL = (0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 1.0, -1.0)


@pytest.fixture(autouse=True)
def no_backend_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=random(seed))


def signs(x: Tensor) -> Tensor:
    """float64, so that no sum of the twins is rounded."""
    return torch.where(x < 0, -1.0, 1.0).to(torch.float64)


def words_of_rows(x: Tensor) -> list[int]:
    """The words of a matrix, bit by bit."""
    words = []
    for row in x.tolist():
        for start in range(0, len(row), 64):
            word = sum(1 << bit for bit, value in enumerate(row[start : start + 64]) if value < 0)
            words.append(word - (1 << 64) if word >> 63 else word)
    return words


def threshold(outputs: int, end: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Thresholds from one that every dot reaches, -end - 1, to one that none does, end + 1, both among them."""
    low = torch.randint(-end - 1, end + 2, (outputs,), dtype=torch.int32, generator=random(seed))
    low[::5], low[1::5] = -end - 1, end + 1
    return low, torch.randint(0, 2, (outputs,), generator=random(seed + 1)) == 1


def decided(dot: Tensor, low: Tensor, flip: Tensor) -> Tensor:
    """(N, O, ...) dots to +-1 by the definition."""
    shape = (-1, *[1] * (dot.dim() - 2))
    return torch.where((dot >= low.view(shape)) != flip.view(shape), 1.0, -1.0)


@dataclass(frozen=True)
class Layer:
    x: Tensor
    weight: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    pad_value: int = 0

    def dots(self) -> Tensor:
        """The twin: a float64 convolution of values padded beforehand."""
        (top, bottom), (left, right) = self.padding
        padded = F.pad(signs(self.x), (left, right, top, bottom), value=float(self.pad_value))
        return F.conv2d(padded, signs(self.weight), None, self.stride, 0, self.dilation, self.groups)

    def run(self, limits: tuple[Tensor, Tensor] | None = None) -> Tensor:
        weight = BinaryWeight(weight_words(self.weight), self.weight.shape[1])
        return xnor_conv2d(
            pack_images(self.x, self.groups), weight, stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.groups, pad_value=self.pad_value, threshold=limits,
        )  # fmt: skip

    def check(self) -> None:
        dots, outputs = self.dots(), self.weight.shape[0]
        limits = threshold(outputs, self.weight[0].numel(), seed=5)
        found = self.run()
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        assert torch.equal(found.to(torch.float64), dots)
        assert torch.equal(self.run(limits), pack_images(decided(dots, *limits)))


def memory(x: Tensor, kind: str) -> Tensor:
    """The same images in another order of memory."""
    if kind == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "sliced":
        grown = x.new_full((x.shape[0], 2 * x.shape[1], x.shape[2], 3 * x.shape[3]), -1.0)
        grown[:, ::2, :, 1::3] = x
        return grown[:, ::2, :, 1::3]
    return x


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    sides = st.tuples(st.integers(0, 3), st.integers(0, 3))
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    channels = draw(st.sampled_from((1, 2, 7, 63, 64, 65, 130)))
    outputs = groups * draw(st.sampled_from((1, 3, 8, 20, 33, 70)))
    kernel, stride, dilation = draw(pair), draw(pair), draw(pair)
    padding = draw(sides), draw(sides)
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 20)))
    batch = draw(st.integers(1, 3))
    assume(
        all(
            length + sum(pad) > hole * (taps - 1)
            for length, pad, hole, taps in zip(size, padding, dilation, kernel, strict=True)
        )
    )
    seed = draw(st.integers(0, 999))
    x = memory(
        values(batch, groups * channels, *size, seed=seed), draw(st.sampled_from(("", "channels_last", "sliced")))
    )
    weight = values(outputs, channels, *kernel, seed=seed + 1)
    return Layer(x, weight, stride, padding, dilation, groups, draw(st.sampled_from((0, 1))))


AT_EDGES = {
    "depthwise": Layer(values(2, 40, 7, 9), values(40, 1, 3, 3), padding=((1, 1), (1, 1)), groups=40),
    "1x1 map": Layer(values(35, 70, 1, 1), values(9, 70, 3, 3), padding=((1, 1), (1, 1))),
    "kernel larger than the image": Layer(values(3, 5, 2, 2), values(4, 5, 5, 5), padding=((2, 2), (2, 2))),
    "pointwise, stride 2": Layer(values(2, 65, 8, 8), values(70, 65, 1, 1), (2, 2)),
    "a signal": Layer(values(3, 24, 1, 50), values(17, 24, 1, 5), (1, 2), ((0, 0), (4, 2)), (1, 2)),
    "one image of one channel": Layer(values(1, 1, 28, 28), values(1, 1, 3, 3)),
    "more padding than image": Layer(values(2, 3, 2, 3), values(8, 3, 2, 2), padding=((3, 3), (3, 3))),
    "wide": Layer(values(2, 256, 7, 7), values(136, 256, 3, 3), padding=((1, 1), (1, 1))),
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_packing_is_the_definition(path: str, dtype: torch.dtype) -> None:
    for length in (1, 7, 8, 63, 64, 65, 130):
        x = torch.cat([values(5, length, seed=length), torch.tensor(SPECIAL).repeat(5, 14)[:, :length]]).to(dtype)
        with kernels.use(path):
            words = pack_signs(x)
            assert words.flatten().tolist() == words_of_rows(x)
            assert torch.equal(unpack_signs(words, length).to(torch.float64), signs(x))
            assert torch.equal(pack_signs(x.t().contiguous().t()), words)
            assert torch.equal(pack_signs(x.reshape(2, 5, length)), words.reshape(2, 5, -1))


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["", "channels_last", "sliced"])
def test_images_are_packed_group_by_group(path: str, kind: str) -> None:
    for groups, channels, pixels in ((1, 1, 1), (1, 70, 5), (2, 65, 17), (3, 8, 40), (40, 1, 3)):
        x = memory(values(2, groups * channels, 3, pixels), kind)
        x[0, 0, 0, 0] = float("nan")
        with kernels.use(path):
            planes = pack_images(x, groups)
        expected = pack_signs(signs(x).reshape(2, groups, channels, 3, pixels).permute(0, 3, 4, 1, 2))
        assert planes.is_contiguous()
        assert torch.equal(planes, expected.flatten(3).permute(0, 3, 1, 2))
        assert torch.equal(unpack_images(planes, groups * channels, groups).to(torch.float64), signs(x))
        assert torch.equal(regroup_images(pack_images(x), groups * channels, groups), planes)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 140), st.integers(0, 999))
def test_matrix_products_are_exact(path: str, m: int, n: int, k: int, seed: int) -> None:
    x, w = values(m, k, seed=seed), values(n, k, seed=seed + 1)
    dots, limits, weight = signs(x) @ signs(w).t(), threshold(n, k, seed), BinaryWeight(weight_words(w), k)
    with kernels.use(path):
        a = pack_signs(x)
        ints, floats = xnor_matmul(a, weight.words, k), xnor_linear(a, weight)
        assert (ints.dtype, floats.dtype) == (torch.int32, torch.float32)
        assert torch.equal(ints.to(torch.float64), dots)
        assert torch.equal(floats.to(torch.float64), dots)
        assert torch.equal(xnor_linear(a, weight, limits), pack_signs(decided(dots, *limits)))


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=80, deadline=None)
@given(drawn=layers())
def test_convolutions_are_exact(path: str, drawn: Layer) -> None:
    with kernels.use(path):
        drawn.check()


@pytest.mark.parametrize("path", ["auto", "int8"])
@pytest.mark.parametrize("pad_value", [0, 1])
@pytest.mark.parametrize("name", AT_EDGES)
def test_convolutions_at_the_edges(path: str, pad_value: int, name: str) -> None:
    with kernels.use(path):
        replace(AT_EDGES[name], pad_value=pad_value).check()


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 1), st.integers(1, 2), st.booleans(), st.integers(3, 9),
    st.sampled_from((1, 64, 70)),
)  # fmt: skip
def test_pooled_signs_are_the_signs_of_pooled_sums(
    kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool, size: int, channels: int
) -> None:
    assume(padding <= kernel // 2 and size + 2 * padding > dilation * (kernel - 1))
    how = {"stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
    sums, limits = (
        torch.randint(-9, 10, (2, channels, size, size + 1), generator=random(size)).float(),
        threshold(channels, 4),
    )
    pooled = F.max_pool2d(sums, kernel, **how)
    found = pool_signs(pack_images(decided(sums, *limits)), limits[1], kernel, **how)
    assert torch.equal(found, pack_images(decided(pooled, *limits)))


def results() -> dict[str, Tensor]:
    """One of every kind of product, with odd sizes."""
    x, w, images = values(37, 130), values(53, 130, seed=1), values(3, 70, 9, 11, seed=2)
    layer = Layer(images, values(72, 70, 3, 3, seed=3), (1, 1), ((1, 1), (1, 1)))
    linear, a = BinaryWeight(weight_words(w), 130), pack_signs(x)
    return {
        "ints": xnor_matmul(a, linear.words, 130),
        "floats": xnor_linear(a, linear),
        "bits": xnor_linear(a, linear, threshold(53, 20)),
        "few rows": xnor_linear(a[:2], linear),
        "few rows, bits": xnor_linear(a[:2], linear, threshold(53, 20)),
        "sums": layer.run(),
        "planes": layer.run(threshold(72, 40)),
        "pads of +1": replace(layer, pad_value=1).run(),
        "channels_last": pack_images(memory(images, "channels_last")),
    }


def digest() -> str:
    found = hashlib.sha256()
    for name, tensor in results().items():
        found.update(name.encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def unpacked_digest() -> str:
    with kernels.use("reference"):
        return digest()


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(popcount, "_SPLIT", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_threads_share_the_work_and_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    ranges: list[tuple[int, int]] = []
    split = popcount._split

    def watched(part: Callable[[int, int], None], length: int, products: int) -> None:
        def noted(first: int, last: int) -> None:
            ranges.append((first, last))
            part(first, last)

        ranges.clear()
        split(noted, length, products)
        assert len(ranges) == min(3, length)
        assert sorted(place for pair in ranges for place in range(*pair)) == list(range(length))

    monkeypatch.setattr(popcount, "_split", watched)
    assert digest() == unpacked_digest()


def test_two_callers_at_once() -> None:
    expected, found = unpacked_digest(), []
    callers = [threading.Thread(target=lambda: found.append(digest())) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [expected] * 2


def in_a_process(code: str, **environment: str) -> list[str]:
    """Lines that a process without numba prints; what else it has imported, launch.py says."""
    return run_code(f"import warnings; warnings.simplefilter('error'); import sys\n{code}", **environment).split("\n")


DIGEST = """
from kernels.test_binary import digest
from lightning_lowbit.kernels import backend_report
print(digest())
print(backend_report())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names a processor of another kind")
def test_narrower_vectors_write_the_same_bits() -> None:
    pytest.importorskip("numba")
    features = "+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+bmi,+bmi2,+fma"
    lines = in_a_process(DIGEST, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES=features)
    assert lines[0] == unpacked_digest()
    assert "popcount (" in lines[1]
    assert "refused" not in lines[1]


def test_without_numba_the_same_bits_and_a_line_in_the_report() -> None:
    lines = in_a_process(f"sys.modules['numba'] = None\n{DIGEST}")
    assert lines[0] == unpacked_digest()
    assert "int8 (" in lines[1]
    assert "popcount refused" in lines[1]
    assert "lightning-lowbit[kernels]" in lines[1]


def test_importing_the_kernels_imports_no_numba() -> None:
    assert in_a_process("import lightning_lowbit.kernels\nprint('numba' in sys.modules)")[0] == "False"


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    refusals = ledger.refusals.copy()
    popcount._passed.cache_clear()
    yield
    popcount._passed.cache_clear()
    ledger.refusals.clear()
    ledger.refusals.update(refusals)


@pytest.mark.usefixtures("unprobed")
def test_loops_that_write_other_bits_are_refused_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    expected, right = unpacked_digest(), popcount.matmul
    monkeypatch.setattr(popcount, "matmul", lambda *args: right(*args) + 1)
    with pytest.warns(UserWarning, match="unpacked first, with the same results"):
        assert digest() == expected
    assert digest() == expected
    assert "wrong matrix product" in ledger.refusals["popcount"]


def test_products_go_through_the_backend_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    counts = ledger.counts.copy()
    ledger.counts.clear()
    try:
        results()
        assert {backend for backend, _ in ledger.counts} == {"popcount"}
        for name in ("simulate", "reference"):
            ledger.counts.clear()
            monkeypatch.setenv(backends.ENVIRONMENT, name)
            results()
            assert {backend for backend, _ in ledger.counts} == {name}
    finally:
        ledger.counts.clear()
        ledger.counts.update(counts)


def test_a_compiled_caller_gets_the_same_bits() -> None:
    weight = BinaryWeight(weight_words(values(20, 70)), 70)
    image_weight = BinaryWeight(weight_words(values(20, 7, 3, 3)), 7)

    def caller(x: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        packed = pack_signs(x * 2)
        sums = xnor_conv2d(pack_images(images), image_weight, padding=1) + 1
        pooled = pool_signs(pack_images(sums), torch.arange(20) % 2 == 0, 2)
        return packed, xnor_matmul(packed, packed, 70) + 1, xnor_linear(packed, weight) * 3, sums, pooled

    x, images = values(5, 70), values(2, 7, 6, 6)
    compiled = torch.compile(caller, backend="eager")
    for found, expected in zip(compiled(x, images), caller(x, images), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_same_integers() -> None:
    x, w, limits = values(37, 130), values(53, 130, seed=1), threshold(53, 20)
    weight = BinaryWeight(weight_words(w.cuda()), 130)
    a = pack_signs(x.cuda())
    assert torch.equal(a.cpu(), pack_signs(x))
    expected = BinaryWeight(weight_words(w), 130)
    assert torch.equal(xnor_linear(a, weight).cpu(), xnor_linear(a.cpu(), expected))
    found = xnor_linear(a, weight, (limits[0].cuda(), limits[1].cuda()))
    assert torch.equal(found.cpu(), xnor_linear(a.cpu(), expected, limits))
    images, kernel = values(3, 70, 9, 11, seed=2), values(72, 70, 3, 3, seed=3)
    sides = ((1, 1), (1, 1))
    for pad_value in (0, 1):
        near = Layer(images, kernel, (1, 1), sides, pad_value=pad_value)
        far = Layer(images.cuda(), kernel.cuda(), (1, 1), sides, pad_value=pad_value)
        assert torch.equal(far.run().cpu(), near.run())


def test_nothing_in_nothing_out() -> None:
    weight = BinaryWeight(weight_words(values(3, 5)), 5)
    assert xnor_linear(pack_signs(values(0, 5)), weight).shape == (0, 3)
    assert xnor_linear(pack_signs(values(0, 5)), weight, threshold(3, 5)).shape == (0, 1)
    assert xnor_matmul(pack_signs(values(2, 5)), pack_signs(values(0, 5)), 5).shape == (2, 0)
    assert Layer(values(0, 5, 3, 3), values(4, 5, 3, 3)).run().shape == (0, 4, 1, 1)
    assert Layer(values(0, 5, 3, 3), values(4, 5, 3, 3)).run(threshold(4, 5)).shape == (0, 1, 1, 1)


WORDS = pack_signs(values(3, 70))
NO_FLIP = torch.zeros(4, dtype=torch.bool)
LINEAR = BinaryWeight(WORDS, 70)
IMAGES = BinaryWeight(weight_words(values(4, 70, 3, 3)), 70)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "ints are no words": (lambda: xnor_matmul(WORDS.int(), WORDS, 70), r"int32 \(3, 2\)"),
    "k of other words": (lambda: xnor_matmul(WORDS, WORDS, 64), r"k = 64, expected int64 \(M, 1\)"),
    "other widths": (lambda: xnor_matmul(WORDS, WORDS[:, :1], 70), r"int64 \(3, 1\) for k = 70"),
    "no terms": (lambda: xnor_matmul(WORDS[:, :0], WORDS[:, :0], 0), "k = 0"),
    "weight of other words": (lambda: BinaryWeight(WORDS, 64), "for 64 terms"),
    "weight of three axes": (lambda: weight_words(values(2, 3, 4)), r"shape \(2, 3, 4\)"),
    "linear of images": (lambda: xnor_linear(WORDS, IMAGES), r"\(4, 70, 3, 3\)"),
    "convolution of rows": (lambda: xnor_conv2d(WORDS, IMAGES), r"int64 \(3, 2\)"),
    "planes of one group for two": (lambda: xnor_conv2d(pack_images(values(1, 70, 4, 4)), IMAGES, groups=2), "4, H, W"),
    "pads of 2": (lambda: xnor_conv2d(pack_images(values(1, 70, 4, 4)), IMAGES, pad_value=2), "pad_value 2"),
    "float thresholds": (lambda: xnor_linear(WORDS, LINEAR, (torch.zeros(3), torch.zeros(3) > 0)), r"float32 \(3,\)"),
    "too few thresholds": (lambda: xnor_linear(WORDS, LINEAR, threshold(2, 5)), r"int32 \(2,\)"),
    "channels in groups": (lambda: pack_images(values(1, 5, 2, 2), 2), "in 2 groups"),
    "a number": (lambda: pack_signs(torch.tensor(1.0)), "pack_signs"),
    "unpack too many": (lambda: unpack_signs(WORDS, 129), "3 words for 129"),
    "pool of other channels": (lambda: pool_signs(pack_images(values(1, 70, 4, 4)), NO_FLIP, 2), "4 channels"),
    "pool larger than the image": (lambda: pool_signs(pack_images(values(1, 4, 2, 2)), NO_FLIP, 3), "window of 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        call()
