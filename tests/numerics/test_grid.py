"""A grid says which values it holds, and refuses to be built wrong."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.grid import Grid


@st.composite
def exponent_grids(draw: st.DrawFn) -> Grid:
    signed = draw(st.booleans())
    bits = draw(st.integers(2 if signed else 1, 16))
    free = Grid(bits, signed=signed)
    zero_point = draw(st.integers(free.qmin, free.qmax))
    return Grid(bits, draw(st.integers(-40, 40)), zero_point=zero_point, signed=signed)


@given(grid=exponent_grids(), data=st.data())
def test_every_code_is_inside_and_every_neighbor_outside(grid: Grid, data: st.DataObject) -> None:
    code = data.draw(st.integers(grid.qmin, grid.qmax))
    value = torch.tensor((code - grid.zero_point) * grid.step)
    assert grid.contains(value)
    assert not grid.contains(torch.tensor(value.item() + grid.step / 2))
    assert not grid.contains(torch.nextafter(value, torch.tensor(float("inf"))))
    assert grid.contains(torch.tensor([grid.low, grid.high]))
    assert not grid.contains(torch.tensor(grid.low - grid.step))
    assert not grid.contains(torch.tensor(grid.high + grid.step))
    assert grid.contains(torch.tensor(0.0))


@given(bits=st.integers(2, 32), narrow=st.booleans())
def test_signed_range(bits: int, narrow: bool) -> None:
    grid = Grid(bits, 0, narrow=narrow)
    assert grid.qmin == -(2 ** (bits - 1)) + int(narrow)
    assert grid.qmax == 2 ** (bits - 1) - 1


def test_a_value_lost_in_float32_is_found_in_float64() -> None:
    # 2^24 + 1 has no float32: a test in float32 would round the code and call the value good.
    grid = Grid(32, 0)
    assert grid.contains(torch.tensor(2**24 + 1, dtype=torch.int64))
    assert not grid.contains(torch.tensor(2**24 + 0.5, dtype=torch.float64))


@given(scale=st.floats(1e-6, 1e3), code=st.integers(-128, 127))
def test_a_scaled_grid_holds_what_float32_makes_of_a_code(scale: float, code: int) -> None:
    grid = Grid(8, scale=scale)
    carrier = torch.tensor(float(code)) * scale
    assert grid.contains(carrier)
    assert not grid.contains(carrier + 0.3 * scale)


def test_per_channel_steps_follow_their_axis() -> None:
    grid = Grid(4, (-1, 2), axis=1)
    assert grid.steps == (0.5, 4.0)
    assert (grid.low, grid.high) == (-32.0, 28.0)
    assert grid.contains(torch.tensor([[0.5, 4.0], [-4.0, 28.0]]))
    assert not grid.contains(torch.tensor([[0.5, 0.5]]))
    assert not grid.contains(torch.tensor([[8.0, 4.0]]))
    with pytest.raises(ConfigError, match=r"2 channels along axis 1, got a tensor of shape \(2, 3\)"):
        grid.contains(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match=r"use Grid\.steps"):
        grid.step  # noqa: B018


def test_a_grid_is_a_value() -> None:
    grid = Grid(8, -5)
    assert grid == Grid(bits=8, exponent=-5)
    assert hash(grid) == hash(pickle.loads(pickle.dumps(grid)))
    assert (grid.fraclen, grid.step) == (5, 2.0**-5)
    with pytest.raises(AttributeError):
        grid.bits = 4  # type: ignore[misc]


def test_a_grid_without_a_place_has_a_range_and_no_step() -> None:
    grid = Grid(8, signed=False)
    assert (grid.qmin, grid.qmax) == (0, 255)
    for ask in ("step", "low", "high", "fraclen"):
        with pytest.raises(ConfigError, match="Grid uint8"):
            getattr(grid, ask)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, r"bits=1, expected an integer in 2\.\.53 for signed"),
        ({"bits": 0, "signed": False}, r"bits=0, expected an integer in 1\.\.53 for unsigned"),
        ({"bits": 54}, "bits=54"),
        ({"bits": 8.0}, r"bits=8\.0"),
        ({"bits": 8, "exponent": -150}, r"exponent=-150, expected an integer in -149\.\.120"),
        ({"bits": 8, "exponent": 0, "scale": 1.0}, "both exponent and scale"),
        ({"bits": 8, "exponent": (0, 1)}, "axis=None with per-channel"),
        ({"bits": 8, "exponent": 0, "axis": 0}, "axis=0 with per-tensor"),
        ({"bits": 8, "scale": 0.0}, r"scale=0\.0, expected a positive"),
        ({"bits": 8, "scale": (0.5, float("nan")), "axis": 0}, "scale=nan"),
        ({"bits": 8, "exponent": 0, "zero_point": 128}, r"zero_point=128, expected a code in -128\.\.127"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Grid(**fields)  # type: ignore[arg-type]
