"""The fast forms against `numerics.block`, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lowbit.errors import ConfigError, InvariantError
from lightning_lowbit.kernels import fusion, ledger
from lightning_lowbit.kernels.requantize import bit_width, compile_policy, requantize, update_weights
from lightning_lowbit.numerics import block
from lightning_lowbit.numerics.block import ShiftRounding, shift_round

ROUNDINGS = list(ShiftRounding)
PSEUDO = ShiftRounding.PSEUDO_STOCHASTIC
SHIFTS = [-2, *range(34), 40, 61, 62, 63, 64, 200]
ENDS = {torch.int32: 2**31 - 1, torch.int64: 2**63 - 1, torch.float32: 2**24 - 1}


@pytest.fixture(autouse=True)
def lean() -> Iterator[None]:
    with compile_policy("never"):
        yield


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sums(dtype: torch.dtype, count: int = 3000, seed: int = 0) -> Tensor:
    """Integers of all magnitudes, small ones densely, and both ends."""
    end = ENDS[dtype]
    wide = torch.randint(-(2**62), 2**62, (count,), generator=random(seed)) >> torch.randint(
        0, 62, (count,), generator=random(seed + 1)
    )
    parts = [wide.clamp(-end, end), torch.arange(-600, 600), torch.tensor([end, -end, end - 1, 1 - end])]
    return torch.cat(parts).to(dtype)


def bits(x: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    end = 2**31 if dtype == torch.int32 else 2**62
    return torch.randint(-end, end, x.shape, generator=random(9)).to(dtype)


def slow(
    acc: Tensor, shift: Any, rounding: ShiftRounding, noise: Tensor | None = None, limit: int = 127,
    rectify: bool = False, keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    codes = shift_round(acc.to(torch.int64), shift, rounding, noise).clamp(-limit, limit)
    codes = codes.clamp(min=0) if rectify else codes
    return torch.where(keep > 0, codes, 0).to(torch.int8) if keep is not None else codes.to(torch.int8)


@pytest.mark.parametrize("dtype", list(ENDS))
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("noise_dtype", [torch.int32, torch.int64])
def test_sliced_equals_slow(
    dtype: torch.dtype, rounding: ShiftRounding, noise_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "_SLICE", 1000)
    acc = sums(dtype)
    noise = bits(acc, noise_dtype)
    keep = torch.randint(-1, 2, acc.shape, generator=random(3))
    for s in SHIFTS:
        shift = torch.tensor(s, dtype=torch.int32)
        assert torch.equal(requantize(acc, s, rounding=rounding, noise=noise), slow(acc, s, rounding, noise))
        got = requantize(acc, shift, rounding=rounding, noise=noise, limit=100, rectify=True)
        assert torch.equal(got, slow(acc, s, rounding, noise, 100, True))
        got = requantize(acc, shift, rounding=rounding, noise=noise, keep=keep.to(torch.int8))
        assert torch.equal(got, slow(acc, s, rounding, noise, keep=keep))


@pytest.mark.parametrize("rounding", [ShiftRounding.HALF_AWAY, PSEUDO])
@given(values=st.lists(st.integers(-(2**31) + 1, 2**31 - 1), max_size=6), s=st.integers(0, 40))
def test_sliced_equals_slow_on_any_int32(rounding: ShiftRounding, values: list[int], s: int) -> None:
    acc = torch.tensor(values, dtype=torch.int32)
    assert torch.equal(requantize(acc, s, rounding=rounding), slow(acc, s, rounding))


@pytest.mark.parametrize("s", range(1, 11))
def test_every_small_integer(s: int) -> None:
    acc = torch.arange(-(128 << s) - 5, (128 << s) + 6, dtype=torch.int32)
    for rounding in ROUNDINGS:
        noise = bits(acc)
        assert torch.equal(requantize(acc, s, rounding=rounding, noise=noise), slow(acc, s, rounding, noise))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2),
    "with gaps": lambda x: x[:, ::2, 1:],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "offset": lambda x: x[1:],
    "empty": lambda x: x[:0],
    "scalar": lambda x: x[0, 0, 0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    acc = LAYOUTS[layout](torch.randint(-5000, 5000, (4, 6, 5, 3), generator=random(0), dtype=torch.int32))
    keep, noise = bits(acc) % 3, bits(acc)  # contiguous: in another order than most
    got = requantize(acc, 5, rounding="stochastic", keep=keep, noise=noise)
    assert torch.equal(got, slow(acc, 5, ShiftRounding.STOCHASTIC, noise, keep=keep))
    if layout not in ("with gaps", "expanded"):
        assert got.stride() == acc.stride()
    assert bit_width(acc).item() == block.bit_width(acc).item()


@pytest.mark.parametrize("keep", [torch.tensor([0.3, -0.3, 0.0, 2.0]), torch.tensor([2**40, -(2**40), 0, 1 << 32])])
def test_keep_of_any_dtype(keep: Tensor) -> None:
    acc = torch.tensor([9, 9, 9, 9], dtype=torch.int32)
    assert requantize(acc, 0, keep=keep).tolist() == [9, 0, 0, 9]


@pytest.mark.parametrize("dtype", [*ENDS, torch.int8, torch.int16, torch.uint8, torch.float64])
def test_bit_width_equals_slow(dtype: torch.dtype) -> None:
    end = ENDS.get(dtype, 2**24 if dtype.is_floating_point else torch.iinfo(dtype).max if dtype != torch.float64 else 0)
    for k in range(64):
        for peak in (2**k - 1, 2**k, 2**k + 1):
            for value in (peak, -peak) if dtype != torch.uint8 else (peak,):
                if abs(value) <= end:
                    x = torch.tensor([0, value, 0], dtype=dtype)
                    fast = bit_width(x)
                    assert fast.dtype == torch.int32
                    assert torch.equal(fast, block.bit_width(x))
    if dtype in (torch.int32, torch.int64, torch.int8):
        least = torch.tensor([torch.iinfo(dtype).min], dtype=dtype)
        assert torch.equal(bit_width(least), block.bit_width(least))


def slow_update(
    codes: Tensor, acc: Tensor, s: int, rounding: ShiftRounding, fraction_bits: int, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    limit = 127 << fraction_bits
    step = shift_round(acc.to(torch.int64), s, rounding, noise).clamp(-(2**40), 2**40)
    moved = (codes.to(torch.int64) - step).clamp(-limit, limit)
    return moved.to(codes.dtype), shift_round(moved, fraction_bits, PSEUDO).clamp(-127, 127).to(torch.int8)


def master(shape: tuple[int, ...], fraction_bits: int) -> Tensor:
    limit = 127 << fraction_bits
    return torch.randint(-limit, limit + 1, shape, generator=random(4)).to(torch.int16 if fraction_bits else torch.int8)


def check_update(codes: Tensor, acc: Tensor, s: int, rounding: ShiftRounding, fraction_bits: int, e: int) -> None:
    noise = bits(acc)
    weight = torch.empty(codes.shape)
    expected, shown = slow_update(codes, acc, s, rounding, fraction_bits, noise)
    shift, exponent = torch.tensor(s, dtype=torch.int32), torch.tensor(e, dtype=torch.int32)
    got = update_weights(
        codes, acc, shift, rounding=rounding, weight=weight, exponent=exponent, fraction_bits=fraction_bits,
        noise=noise,
    )  # fmt: skip
    assert torch.equal(codes, expected)
    assert got.dtype == torch.int8
    assert torch.equal(got, shown)
    assert torch.equal(weight.double(), shown.double() * 2.0**e)
    assert (got is codes) == (not fraction_bits)


@pytest.mark.parametrize("fraction_bits", [0, 4, 8])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_update_equals_slow(rounding: ShiftRounding, fraction_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "_SLICE", 1000)
    for dtype in ENDS:
        acc = sums(dtype)
        codes = master(tuple(acc.shape), fraction_bits)
        for s, e in ((0, -149), (1, -9), (7, 0), (20, 120), (31, -127), (63, 3)):
            check_update(codes, acc, s, rounding, fraction_bits, e)


@pytest.mark.parametrize("fraction_bits", [0, 8])
@pytest.mark.parametrize("codes_layout", ["contiguous", "channels_last", "with gaps"])
@pytest.mark.parametrize("acc_layout", ["contiguous", "channels_last", "permuted"])
def test_update_goes_by_index_not_by_memory(fraction_bits: int, codes_layout: str, acc_layout: str) -> None:
    shape = (4, 6, 5, 3) if codes_layout != "with gaps" else (4, 12, 6, 3)
    codes = LAYOUTS[codes_layout](master(shape, fraction_bits))
    base = torch.randint(-5000, 5000, tuple(codes.shape), generator=random(0), dtype=torch.int32)
    acc = base.permute(2, 1, 3, 0).contiguous().permute(3, 1, 0, 2) if acc_layout == "permuted" else base
    acc = acc.contiguous(memory_format=torch.channels_last) if acc_layout == "channels_last" else acc
    check_update(codes, acc, 5, PSEUDO, fraction_bits, -7)


def test_update_without_weight_and_of_nothing() -> None:
    codes = torch.tensor([100, -100, 3], dtype=torch.int8)
    same = update_weights(codes, torch.tensor([-2000, 2000, 5]), 4, rounding="half_away")
    assert same is codes
    assert codes.tolist() == [127, -127, 3]
    none = torch.zeros((0, 3), dtype=torch.int16)
    assert update_weights(none, torch.zeros((0, 3)), 1, rounding=PSEUDO, fraction_bits=8).shape == (0, 3)


def test_wrong_calls_are_refused() -> None:
    acc = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(InvariantError, match="noise none"):
        requantize(acc, 1, rounding="stochastic")
    with pytest.raises(InvariantError, match="keep"):
        requantize(acc, 1, keep=torch.zeros(4))
    for codes, keywords in (
        (torch.zeros(3, dtype=torch.int16), {}),
        (torch.zeros(3, dtype=torch.int8), {"fraction_bits": 8}),
        (torch.zeros(3, dtype=torch.int8), {"weight": torch.zeros(3)}),
        (torch.zeros(3, dtype=torch.int8), {"weight": torch.zeros(4), "exponent": 0}),
        (torch.zeros(4, dtype=torch.int8), {}),
    ):
        with pytest.raises(InvariantError, match="update_weights"):
            update_weights(codes, acc, 1, rounding="half_away", **keywords)  # type: ignore[arg-type]


def test_the_policy_is_checked_and_nested(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(100, dtype=torch.int32)
    monkeypatch.setattr(fusion, "_compiler_found", lambda device: True)
    with compile_policy("always"):
        assert fusion.route(x) == "compiled"
        with compile_policy("auto"):
            assert fusion.route(x) == "sliced"
            assert fusion.route(torch.zeros(1 << 16)) == "compiled"
        assert fusion.route(x) == "compiled"
    with pytest.raises(ConfigError, match="always"), compile_policy("allways"):
        pass


def test_the_environment_decides_where_no_policy_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "_compiler_found", lambda device: True)
    monkeypatch.setattr(fusion, "chosen_policies", [])
    x = torch.zeros(100)
    assert fusion.route(x) == "sliced"
    monkeypatch.setenv(fusion.ENVIRONMENT, "always")
    assert fusion.route(x) == "compiled"
    monkeypatch.setenv(fusion.ENVIRONMENT, "yes")
    with pytest.raises(ConfigError, match=fusion.ENVIRONMENT):
        fusion.route(x)


def test_a_mode_that_watches_operations_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "_compiler_found", lambda device: True)
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with compile_policy("always"), Watch():
        requantize(torch.arange(100, dtype=torch.int32), 1)
    assert "aten.bitwise_and_.Scalar" in seen


def test_a_compiler_that_fails_is_reported_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **keywords: Any) -> Callable[..., None]:
        def loop(*tensors: Any) -> None:
            raise RuntimeError("no\nheaders")

        return loop

    monkeypatch.setattr(fusion, "_compiler_found", lambda device: True)
    monkeypatch.setattr(fusion, "_loop", broken)
    monkeypatch.setattr(ledger, "refusals", {})
    acc = torch.arange(100, dtype=torch.int32)
    with compile_policy("always"):
        for _ in range(2):
            assert torch.equal(requantize(acc, 3), slow(acc, 3, ShiftRounding.HALF_AWAY))
    assert list(ledger.refusals.values()) == ["RuntimeError: no headers"]


def test_inside_somebodys_tracing_it_is_traced() -> None:
    def step(acc: Tensor, shift: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        moved = update_weights(codes, acc, shift, rounding=PSEUDO)
        return requantize(acc, shift, rectify=True), bit_width(acc), moved

    acc, shift = sums(torch.int32), torch.tensor(9, dtype=torch.int32)
    codes = master(tuple(acc.shape), 0)
    expected = step(acc, shift, codes.clone())
    got = torch.compile(step, backend="eager", fullgraph=True)(acc, shift, codes)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        codes = requantize((x.detach() * 100).round(), 2)
        ctx.save_for_backward(codes)
        return codes.float()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return requantize((g * 8).round(), 1, keep=ctx.saved_tensors[0]).float()


def in_autograd(count: int) -> None:
    x = torch.linspace(-3, 3, count, requires_grad=True)
    y = Through.apply(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (y.detach() > 0) * 4.0)


def test_in_autograd() -> None:
    in_autograd(50)


@pytest.mark.skipif(not fusion._compiler_found("cpu"), reason="no C++ compiler")
def test_compiled_equals_slow_with_one_compilation_for_all_sizes_shifts_and_modes() -> None:
    refused = dict(ledger.refusals)
    loops = fusion._loop.cache_info().currsize
    torch._dynamo.utils.counters.clear()
    with compile_policy("always"):
        for dtype, rounding in ((torch.int32, ROUNDINGS[0]), (torch.float32, PSEUDO), (torch.int64, ROUNDINGS[2])):
            for s in SHIFTS:
                acc = sums(dtype, 100 + s)
                noise = bits(acc) if rounding is ShiftRounding.STOCHASTIC else None
                with torch.inference_mode(s % 3 == 0), torch.set_grad_enabled(s % 2 == 0):
                    got = requantize(acc, s, rounding=rounding, noise=noise, rectify=s % 5 == 0, limit=127 - s % 7)
                assert torch.equal(got, slow(acc, s, rounding, noise, 127 - s % 7, s % 5 == 0))
        in_autograd(100)
        for fraction_bits in (0, 8):
            for s, count in ((0, 100), (9, 2000), (31, 500)):
                acc = sums(torch.int32, count)
                check_update(master(tuple(acc.shape), fraction_bits), acc, s, PSEUDO, fraction_bits, s - 20)
        with torch.inference_mode():
            acc = sums(torch.int32)
            assert torch.equal(requantize(acc, 4), slow(acc, 4, ROUNDINGS[0]))
    assert ledger.refusals == refused
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 2 * (fusion._loop.cache_info().currsize - loops)
