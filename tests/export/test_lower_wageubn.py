"""WAGEUBN as an integer program: the program's numbers are those of the network's evaluation, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from export.program_nets import NETS, Net, built, close, conv, differing, fitted, functions
from export.random_graphs import random_batch, random_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lowbit import convert
from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.export.lowering import lower
from lightning_lowbit.modules.fixed_norm import NormGrids
from lightning_lowbit.numerics.guards import FLOAT32_EXACT
from lightning_lowbit.numerics.normalize import batch_norm, odd_float32
from lightning_lowbit.numerics.rounding import round_to
from lightning_lowbit.schemes.wageubn import Wageubn

STRICT = Wageubn(io="strict", first_last="int8")
OPTIONS: dict[str, Wageubn] = {
    "strict": STRICT,
    "outputs": Wageubn(first_last="int8"),
    "pypi": Wageubn(preset="pypi"),
    "units": STRICT.replace(act_format="fixed_unit", weight_range="one"),
    "12 bits": STRICT.replace(bits=12),
    "narrow norms": STRICT.replace(xhat_bits=8, mean_bits=8, deviation_bits=6, beta_bits=12),
}
# A product of sums that nobody rounded, and a float function of what a batch norm gives.
BEYOND = {("concat", "outputs"), ("max pools", "outputs")}


def converted(name: str, scheme: Wageubn) -> tuple[nn.Module, Tensor]:
    net, x = built(name)
    convert(net, scheme, x)
    return net.eval(), x


def largest_sum(program: Any) -> int:
    sums = [op.output for op in program.ops if op.kind in ("conv", "conv_transpose", "linear")]
    return max(max(-program.values[name].low, program.values[name].high) for name in sums)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NETS)
def test_program_is_evaluation(name: str, options: str) -> None:
    net, x = converted(name, OPTIONS[options])
    if (name, options) in BEYOND:
        with pytest.raises(UnsupportedModelError, match="Convert with io='strict'"):
            lower(net, x)
        return
    program = lower(net, x)
    assert not functions(program)
    assert differing(net, program, 3 * x) == []


WIDE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(2000, 2, bias=False), (4000, 2000)),
    "biased": (lambda: nn.Linear(2000, 2), (4000, 2000)),
    "transposed": (lambda: nn.ConvTranspose2d(600, 2, 3, 2, 1, output_padding=1), (150, 600, 4, 4)),
    "reflected": (lambda: nn.Conv2d(170, 2, 3, padding=1, padding_mode="reflect"), (150, 170, 4, 4)),
}


@torch.no_grad()
@pytest.mark.parametrize("wide", WIDE)
def test_sums_beyond_float32_are_rounded_once(wide: str) -> None:
    """In float32 some of them would fall on ties of their 16 bits."""
    torch.manual_seed(0)
    make, shape = WIDE[wide]
    net: Any = nn.Sequential(make())
    layer = net[0]
    nn.init.uniform_(layer.weight, 0.8, 0.98)
    x = 1.7 + torch.rand(shape) / 4
    convert(net.eval(), STRICT, x[:20])
    layer.lowbit_output = None  # its 8 bits would hide what the 16 before them are
    program = lower(net, x[:2])
    assert largest_sum(program) > FLOAT32_EXACT
    found = net(x)
    assert torch.equal(torch.as_tensor(program.run(x)), found)
    bias = None if layer.bias is None else layer.lowbit_bias(layer.bias).double()
    sums = layer.op(layer.lowbit_input(x).double(), layer.lowbit_weight(layer.weight).double(), bias)
    exact, narrow = (layer.lowbit_accumulator.quantize(y).float() for y in (sums, sums.float()))
    assert torch.equal(found, exact)
    assert not torch.equal(exact, narrow)


@pytest.mark.parametrize("options", ["strict", "outputs"])
def test_wide_networks(options: str) -> None:
    net, x = converted("wide", OPTIONS[options])
    assert largest_sum(lower(net, x)) > FLOAT32_EXACT


def test_a_norm_reads_wide_sums_and_gives_float32() -> None:
    net, _ = converted("wide", OPTIONS["outputs"])
    norm: Any = net[1]  # type: ignore[index]
    nn.init.constant_(norm.weight, 1 + 3 / 128)
    sums = (torch.randint(-(2**26), 2**26, (500, 4)) / 2**12).double()
    format, power = norm.lowbit_accumulator.present, norm.lowbit_accumulator.power
    exact, _, _ = batch_norm(
        sums, norm.weight, norm.bias, format, (norm.running_mean, norm.running_var), exponent=power
    )
    with torch.no_grad():
        assert torch.equal(norm(sums), odd_float32(exact))
    assert not torch.equal(odd_float32(exact), exact.float())


def test_sums_and_averages_are_rounded_once() -> None:
    """40000.5 + 2^-10 is no tie, and float32 makes it one."""
    net = Net(lambda m, x: m.c(F.avg_pool2d(F.relu(m.a(x)) + F.relu(m.b(x)), 2)), a=conv(), b=conv(), c=conv(3, 2, 1))
    convert(net.eval(), STRICT.replace(bits=16), torch.randn(7, 3, 9, 9))
    add, pool = net.get_submodule("lowbit_add"), net.get_submodule("lowbit_avg_pool")
    for op in (add, pool):
        op.lowbit_output.keep(16)  # type: ignore[operator, union-attr]  # so that codes are worth 1
    with torch.no_grad():
        assert add(torch.full((2,), 40000.0), torch.full((2,), 0.5 + 2**-10)).tolist() == [40001.0] * 2
        window = torch.tensor([[[[40000.0, 40000.0], [40001.0, 40001.0 + 2**-8]]]])
        assert pool(window, 2).tolist() == [[[[40001.0]]]]


def test_part_of_a_network() -> None:
    net, x = converted("signal", STRICT)
    part: Any = net[:6]  # type: ignore[index]
    assert differing(part, lower(part, x), x) == []


def test_part_that_begins_inside() -> None:
    """Its first layer multiplies the codes of what comes in."""
    net, _ = converted("signal", STRICT)
    part: Any = net[4:]  # type: ignore[index]
    inner = torch.rand(7, 4, 6)
    program = lower(part, inner)
    assert program.ops[0].kind == "quantize"
    assert differing(part, program, inner) == []


def test_two_steps_of_a_fit(tmp_path: Path) -> None:
    for scheme in (STRICT, Wageubn(first_last="int8")):
        net, x = fitted("signal", scheme, tmp_path)
        program = lower(net, x)
        assert all(op.attributes["limit"] for op in program.ops if op.kind == "normalize")
        assert not functions(program)
        assert differing(net, program, 3 * x) == []


def test_a_channel_that_was_constant() -> None:
    """Its deviation is 0: quotients are as large as they become, and clipped."""
    net, x = built("groups")
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_var.zero_()  # type: ignore[union-attr]
    convert(net, STRICT, x)
    assert differing(net, lower(net, x), x) == []
    for grids in (module for module in net.modules() if isinstance(module, NormGrids)):
        grids.guard.fill_(4)
    assert differing(net, lower(net, x), x) == []


def test_float_ends_are_islands() -> None:
    net, x = converted("signal", Wageubn())
    program = lower(net, x)
    assert functions(program) == ["conv", "grid_norm", "linear"]
    close(net, program, x, 2e-2)


def test_norms_off_their_grids_are_islands() -> None:
    cases = (
        STRICT.replace(norms=False), STRICT.replace(xhat_bits=32), STRICT.replace(mean_bits=32, gamma_bits=32)
    )  # fmt: skip
    for scheme, function in zip(cases, ("affine", "grid_norm", "grid_norm"), strict=True):
        net, x = converted("residual", scheme)
        program = lower(net, x)
        assert set(functions(program)) <= {function, "add"}
        close(net, program, x, 0.1)


def test_norms_that_have_not_begun_are_islands() -> None:
    net, x = converted("residual", STRICT)
    for grids in (module for module in net.modules() if isinstance(module, NormGrids)):
        grids.switch_on(False)
    assert "affine" in functions(lower(net, x))


# -- refusals --------------------------------------------------------------------------------------------------------
def refused(net: nn.Module, x: Tensor, scheme: Wageubn, words: str) -> None:
    convert(net.eval(), scheme, x)
    with pytest.raises(UnsupportedModelError, match=words):
        lower(net, x)


def test_statistics_of_the_batch_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    refused(net, torch.randn(7, 4), STRICT, r"1: it normalizes by the batch that it is given.*track_running_stats=True")


def test_a_norm_s_result_that_leaves_is_refused() -> None:
    """float32 does not hold its 22 bits behind the point, and evaluation rounds them so that a quantizer may follow."""
    net, x = nn.Sequential(conv(), nn.BatchNorm2d(3)), torch.randn(7, 3, 9, 9)
    refused(net, x, Wageubn(first_last="int8"), "output: it reads sums that need more than the 24 bits .*io='strict'")


def test_wide_sums_that_several_read_are_refused() -> None:
    first = nn.Linear(3000, 5)
    nn.init.ones_(first.weight)
    net = Net(
        lambda m, x: m.b(F.relu(y := m.a(x))) + m.c(F.relu(y[:, 1:])), a=first, b=nn.Linear(5, 2), c=nn.Linear(4, 2)
    )
    refused(net, torch.rand(7, 3000), Wageubn(first_last="int8"), "24 bits of float32.*Convert with io='strict'")


def test_values_beyond_float64_s_quotients_are_refused() -> None:
    net, x = built("signal")
    with torch.no_grad():
        net[0].weight *= 1e9  # type: ignore[index, operator]
    refused(net, x, STRICT, ": its quotients have more bits than float64 divides exactly")


# -- what evaluation does --------------------------------------------------------------------------------------------
@given(st.integers(-(2**50), 2**50), st.integers(2, 20))
def test_rounded_to_odd_first_is_rounded_once(code: int, shift: int) -> None:
    v = torch.tensor([float(code)], dtype=torch.float64)
    most = 2.0 ** (22 + shift)  # so that float32 keeps two bits below the new step
    v = v.clamp(-most, most)
    assert torch.equal(round_to(odd_float32(v) / 2.0**shift), round_to(v / 2.0**shift).float())


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from(["strict", "pypi", "units", "12 bits"]))
def test_random_graphs(seed: int, blocks: int, options: str) -> None:
    net, shape = random_net(random.Random(seed), "wageubn", blocks=blocks)
    x = random_batch(shape, 7, seed)
    convert(net, OPTIONS[options], x)
    program = lower(net.eval(), x)
    assert not functions(program)
    assert differing(net, program, 2 * x) == []
