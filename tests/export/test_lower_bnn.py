"""BNN as an integer program: the program's numbers are those of the network's evaluation, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from export.packed_nets import Functional, Residual, converted, mlp, randomize
from export.program_nets import NETS, Net, built, close, conv, differing, fitted, functions
from export.random_graphs import random_batch, random_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lowbit import convert
from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.export.lowering import lower
from lightning_lowbit.modules.react import BiRealBlock
from lightning_lowbit.numerics.guards import FLOAT32_EXACT
from lightning_lowbit.schemes.bnn import Bnn

# Batches of a few values, which may all be positive.
pytestmark = pytest.mark.filterwarnings("ignore:.*has no negative value in calibration")
INT8 = {"first": "int8", "last": "int8"}
OPTIONS: dict[str, dict[str, Any]] = {
    "int8": INT8,
    "binary": {"first": "binary", "last": "binary", "depthwise": "binary"},
    "scaled": {**INT8, "scale": "channel_mean", "relu": "rprelu", "shift": True, "depthwise": "binary"},
    "bordered": {**INT8, "scale": "max", "relu": "hardtanh", "pad_value": 1, "depthwise": "binary"},
}
# Functions of floats that numpy and torch compute in the same order, so with the same bits.
EXACT = {"affine", "mul", "add", "clamp", "relu", "relu6", "prelu", "leaky_relu"}


def lowered(name: str, options: str) -> tuple[nn.Module, Any, Tensor]:
    net, x = built(name)
    convert(net.train(), "bnn", x, **OPTIONS[options])
    randomize(net, 3)
    return net.eval(), lower(net, x), x


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NETS)
def test_program_is_evaluation(name: str, options: str) -> None:
    net, program, x = lowered(name, options)
    if set(functions(program)) <= EXACT:
        assert differing(net, program, 2 * x) == []
    else:  # averages of floats, and layers that stay float
        close(net, program, 2 * x)


@pytest.mark.parametrize("name", ["max pools", "signal", "volume", "words", "norm of words", "moves"])
def test_thresholds_and_lines_leave_no_floats_between_8_bit_ends(name: str) -> None:
    _, program, _ = lowered(name, "int8")
    assert functions(program) == []
    assert [op.kind for op in program.ops].count("dequantize") == 1


def test_networks_of_signs() -> None:
    x = torch.randn(7, 3, 12, 12)
    net = converted(Functional(), x, first="binary", last="int8")
    program = lower(net, x)
    assert functions(program) == []
    assert [op.kind for op in program.ops].count("threshold") == 3
    assert differing(net, program, x) == []


def test_a_border_of_ones() -> None:
    x = torch.randn(7, 3, 12, 12)
    net = converted(Functional(), x, pad_value=1, **INT8)
    program = lower(net, x)
    pads = [op.attributes for op in program.ops if op.kind == "pad"]
    assert pads == [{"padding": [[0, 0], [0, 0], [1, 1], [1, 1]], "value": 1}]
    assert differing(net, program, x) == []


def test_sums_of_numbers_stay_floats() -> None:
    x = torch.randn(7, 3, 9, 9)
    for options in (INT8, {"first": "binary", "last": "binary"}):
        net = converted(Residual(), x, **options)  # type: ignore[arg-type]
        program = lower(net, x)
        assert "add" in functions(program)
        assert "bn1" not in {op.path for op in program.ops}  # it stands in a threshold
        close(net, program, x)


@pytest.mark.parametrize("react", [False, True], ids=["hardtanh", "react"])
def test_bi_real_blocks(react: bool) -> None:
    net = nn.Sequential(
        conv(3, 4, padding=1), BiRealBlock(4, 4, react=react), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(162, 3)
    )
    x = torch.randn(7, 3, 9, 9)
    convert(net.train(), "bnn", x, **INT8)
    randomize(net, 1)
    program = lower(net.eval(), x)
    assert set(functions(program)) <= EXACT
    assert differing(net, program, x) == []


def test_equal_signs_are_taken_once() -> None:
    net = Net(lambda m, x: m.b(y := F.hardtanh(m.a(x))) + m.c(y), a=conv(), b=conv(), c=conv())
    x = torch.randn(7, 3, 9, 9)
    convert(net.train(), "bnn", x, first="binary", last="binary")
    program = lower(net.eval(), x)
    assert [op.kind for op in program.ops].count("threshold") == 2
    assert differing(net, program, x) == []


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 70), min_size=2, max_size=4), st.booleans(), st.sampled_from(range(6)), st.booleans(),
    st.sampled_from(["none", "max", "channel_mean"]), st.booleans(), st.sampled_from(["binary", "int8"]),
    st.integers(0, 10_000),
)  # fmt: skip
def test_linear_networks(
    widths: list[int], norm: bool, act: int, bias: bool, scale: str, shift: bool, end: str, seed: int
) -> None:
    """With ties, zeros, turned and constant channels."""
    torch.manual_seed(seed)
    acts = (nn.Hardtanh(-0.5, 0.25), nn.ReLU(), nn.PReLU(), nn.LeakyReLU(0.1), nn.LeakyReLU(-0.1), nn.Identity())
    x = torch.randint(-4, 5, (7, widths[0])) / 4
    net = mlp(*widths, 3, norm=norm, act=lambda c: acts[act], bias=bias)
    net = converted(net, torch.randn(4, widths[0]), seed, first=end, last=end, scale=scale, shift=shift)
    program = lower(net, x)
    assert differing(net, program, x) == []
    last = next(name for name, layer in reversed(list(net.named_modules())) if isinstance(layer, nn.Linear))
    floats = {op.path for op in program.ops if op.kind == "island"}
    floats -= {"0"} if shift else set()  # the input, a float
    assert act == 4 or end == "int8" or floats <= {last}  # a negative slope is no threshold, and two are no line


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from(sorted(OPTIONS)))
def test_random_graphs(seed: int, blocks: int, options: str) -> None:
    net, shape = random_net(random.Random(seed), "bnn", blocks=blocks)
    x = random_batch(shape, 7, seed)
    convert(net, "bnn", x, **OPTIONS[options])
    program = lower(net.eval(), x)
    assert not set(functions(program)) <= EXACT or differing(net, program, x) == []


def test_part_of_a_network() -> None:
    net, _, x = lowered("signal", "int8")
    part: Any = net[:7]  # type: ignore[index]
    assert differing(part, lower(part, x), x) == []


def test_two_steps_of_a_fit(tmp_path: Path) -> None:
    net, x = fitted("signal", Bnn(**INT8), tmp_path)
    program = lower(net, x)
    assert functions(program) == []
    assert differing(net, program, 3 * x) == []


def test_float_ends_are_islands() -> None:
    for end, words in (("float", {"conv", "linear"}), ("float_input", {"conv", "add"})):
        net, x = built("signal")
        convert(net, "bnn", x, first=end, last=end)
        program = lower(net.eval(), x)
        assert words <= set(functions(program))
        close(net, program, x)


def test_8_bit_ends_of_other_forms_are_exact() -> None:
    """Sums that float32 does not hold, of a layer without an integer product."""
    first = conv(150, 2, padding=1, padding_mode="reflect")
    nn.init.uniform_(first.weight, 0.4, 0.49)
    net, x = nn.Sequential(first, nn.Hardtanh(), conv(2, 2, 1), conv(2, 2, 1)), 0.8 + torch.rand(7, 150, 9, 9) / 6
    convert(net, "bnn", x, **INT8)
    program = lower(net.eval(), x)
    sums = next(op.output for op in program.ops if op.kind == "conv")
    assert program.values[sums].high > FLOAT32_EXACT
    assert differing(net, program, x) == []
    part = net[:1]
    assert differing(part, lower(part, x), x) == []


# -- refusals --------------------------------------------------------------------------------------------------------
def test_a_first_stage_is_refused() -> None:
    net, x = built("signal")
    convert(net, Bnn(weights_at=2, **INT8), x)
    with pytest.raises(UnsupportedModelError, match=r"4: its weights are float, in the first of two stages"):
        lower(net.eval(), x)


def test_statistics_of_the_batch_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    x = torch.randn(7, 4)
    convert(net, Bnn(**INT8), x)
    with pytest.raises(UnsupportedModelError, match=r"1: it normalizes by the batch that it is given"):
        lower(net.eval(), x)


def test_an_end_that_was_zero_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.zeros(7, 4)
    convert(net, Bnn(**INT8), x)
    with pytest.raises(UnsupportedModelError, match=r"0\.lowbit_input: it has no grid, for it saw no calibration"):
        lower(net.eval(), x)


def test_wide_sums_of_an_end_that_are_averaged_are_refused() -> None:
    first = conv(1100, 2, 1)
    nn.init.constant_(first.weight, 0.49)
    net = nn.Sequential(first, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 2), nn.Linear(2, 2))
    x = torch.rand(7, 1100, 4, 4)
    convert(net, Bnn(**INT8), x)
    with pytest.raises(UnsupportedModelError, match=r"24 bits of float32.*skip=\['0'\]"):
        lower(net.eval(), x)


def test_an_end_that_shares_its_weight_with_a_binary_layer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.d(torch.relu(self.c(self.b(self.a(x)))))

    torch.manual_seed(0)
    net, x = Tied().eval(), torch.randn(16, 8)
    convert(net, Bnn(**INT8), x)
    assert torch.equal(torch.as_tensor(lower(net, x).run(x)), net(x))
