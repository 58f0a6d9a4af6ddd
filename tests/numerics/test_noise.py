"""Counter-based bits: fixed for ever, a function of the sample, and without visible structure.

Bounds on the statistics are 5.5 standard deviations of independent fair bits: good generators fail about one of
26 million such comparisons. The inputs are fixed, so that a pass stays a pass.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit.numerics import noise
from lightning_lowbit.numerics.noise import combine, counter_bits, counter_bits_reference, counter_floats

KEY = combine(2024, 3, 0x1234ABCD)
DEVIATIONS = 5.5


def planes(bits: Tensor) -> Tensor:
    """(31, n) of +-1."""
    flat = bits.reshape(-1)
    return torch.stack([1 - 2 * ((flat >> k) & 1).float() for k in range(31)])


def assert_unrelated(a: Tensor, b: Tensor) -> None:
    """No bit of a predicts any bit of b."""
    x, y = planes(a), planes(b)
    agreement = (x @ y.t()) / x.shape[1] ** 0.5
    assert float(agreement.abs().max()) < DEVIATIONS


def test_golden_values() -> None:
    """Trained networks depend on them: they never change."""
    assert combine() == 406178094332734088
    assert counter_bits(combine(0), torch.tensor([0, 1, 2**40]), 4).tolist() == [
        [824617707, 412993822, 889458308, 113838967],
        [1568339254, 317397650, 666232843, 756867143],
        [488307025, 568974555, 1233249369, 217068883],
    ]


def test_range_and_shape() -> None:
    bits = counter_bits(KEY, torch.arange(300), 1000)
    assert bits.dtype == torch.int32
    assert bits.shape == (300, 1000)
    assert int(bits.min()) >= 0
    assert int(bits.max()) > 2**31 - 2**14
    assert counter_bits(KEY, torch.arange(0), 7).shape == (0, 7)
    assert counter_bits(KEY, torch.arange(7), 0).shape == (7, 0)


def test_a_row_depends_on_its_sample_only() -> None:
    whole = counter_bits(KEY, torch.arange(1000), 777)  # several slices
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:9]
    assert torch.equal(counter_bits(KEY, order, 777), whole[order])
    assert torch.equal(counter_bits(torch.tensor(KEY), order, 500), whole[order, :500])


@pytest.mark.parametrize("size", [1, 64, 100, 1 << 16])
@pytest.mark.parametrize(("samples", "per_sample"), [(1, 1), (7, 31), (16, 64), (17, 100), (3, 333), (40, 1)])
def test_slices_equal_the_definition(monkeypatch: pytest.MonkeyPatch, size: int, samples: int, per_sample: int) -> None:
    monkeypatch.setattr(noise, "_SLICE", size)
    index = torch.arange(samples) * 3
    expected = counter_bits_reference(KEY, index, per_sample)
    assert expected.dtype == torch.int32
    for key in (KEY, torch.tensor(KEY)):
        assert torch.equal(counter_bits(key, index, per_sample), expected)
        floats = counter_floats(key, index, per_sample)
        assert floats.dtype == torch.float32
        assert torch.equal(floats.double() * 2**24, (expected >> 7).double())


@given(
    key=st.integers(0, 2**63 - 1),
    samples=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20),
    per_sample=st.sampled_from([1, 9, 33]),
)
def test_every_key_and_sample_equals_the_definition(key: int, samples: list[int], per_sample: int) -> None:
    index = torch.tensor(samples)
    expected = counter_bits_reference(key, index, per_sample)
    assert torch.equal(counter_bits(key, index, per_sample), expected)
    assert torch.equal(counter_bits(torch.tensor(key), index, per_sample), expected)
    assert torch.equal(counter_floats(key, index, per_sample).double() * 2**24, (expected >> 7).double())


def test_rows_longer_than_16_bits() -> None:
    row, index = (1 << 18) + 5, torch.tensor([3, 2**33])
    assert torch.equal(counter_bits(KEY, index, row), counter_bits_reference(KEY, index, row))
    for start in (2**16 - 3, 2**31 - 3, 2**32 - 6):
        words = torch.arange(start, start + 6)
        assert torch.equal(noise._elements(start, start + 6, words.device).long() & noise._WORD, words ^ (words >> 16))


def test_equal_with_more_threads() -> None:
    one = counter_bits(KEY, torch.arange(64), 4096)
    torch.set_num_threads(3)
    try:
        three = counter_bits(KEY, torch.arange(64), 4096)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, three)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13's compiler itself uses what torch has deprecated
def test_whole_graphs_equal_eager() -> None:
    def both(key: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        return counter_bits(key, samples, 300), counter_floats(key, samples, 300)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        both(torch.tensor(KEY), torch.arange(9)), compiled(torch.tensor(KEY), torch.arange(9)), strict=True
    ):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_every_bit_is_fair() -> None:
    x = planes(counter_bits(KEY, torch.arange(256), 4096))
    assert float((x.sum(1) / x.shape[1] ** 0.5).abs().max()) < DEVIATIONS


@pytest.mark.parametrize("distance", [1, 2, 64, 1024])
def test_neighbors_in_a_row_are_unrelated(distance: int) -> None:
    bits = counter_bits(KEY, torch.arange(64), 4096)
    assert_unrelated(bits[:, :-distance], bits[:, distance:])


@pytest.mark.parametrize("distance", [1, 2, 64, 2**32, 2**40])
def test_neighboring_samples_are_unrelated(distance: int) -> None:
    samples = torch.arange(64)
    assert_unrelated(counter_bits(KEY, samples, 4096), counter_bits(KEY, samples + distance, 4096))


@pytest.mark.parametrize(("a", "b"), [((1, 2), (1, 3)), ((1, 2), (2, 1)), ((0,), (0, 0)), ((7, 1), (8, 1))])
def test_neighboring_keys_are_unrelated(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    samples = torch.arange(64)
    assert_unrelated(counter_bits(combine(*a), samples, 4096), counter_bits(combine(*b), samples, 4096))


def test_low_bytes_of_short_rows_are_uniform() -> None:
    bits = counter_bits(KEY, torch.arange(100_000), 10) & 255  # a batch of losses: many samples, few classes
    counts = torch.bincount(bits.reshape(-1), minlength=256).double()
    chi_squared = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert abs(chi_squared - 255) < DEVIATIONS * (2 * 255) ** 0.5


def test_keys_of_a_grid_are_distinct() -> None:
    seeds, steps = torch.arange(300).unsqueeze(1), torch.arange(1000)
    keys = combine(seeds, steps, 99)
    assert isinstance(keys, Tensor)
    assert int(keys.min()) >= 0
    assert keys.unique().numel() == 300_000
    assert (keys & 0xFFFF_FFFF).unique().numel() > 299_900  # 10 repeats expected of 32 random bits
    assert keys[17, 400].item() == combine(17, 400, 99)


@given(words=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4))
def test_tensors_combine_as_ints_do(words: list[int]) -> None:
    key = combine(*words)
    assert 0 <= key < 2**63
    mixed = combine(*(torch.tensor(word) for word in words))
    assert isinstance(mixed, Tensor)
    assert mixed.item() == key
    assert combine(*words, 0) != key
