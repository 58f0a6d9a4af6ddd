"""A fixed-point network's evaluation is its integer execution, bit for bit; integer operations by their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from export.fixed_point_hops import Hops
from export.fixed_point_nets import NETS, Overwritten, batch, wide_layer
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lowbit import F8Net, convert, lowbit_step
from lightning_lowbit.errors import ConfigError, InvariantError, UnsupportedModelError
from lightning_lowbit.export import fixed_point
from lightning_lowbit.export.fixed_point import IntegerInput, encode, integer_input, integer_unit, run_unit
from lightning_lowbit.modules.elementwise import LowBitAdd
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.numerics.fraclen import fix_quant, largest_code
from lightning_lowbit.numerics.guards import FLOAT32_EXACT

INT32_MAX = 2**31 - 1
VARIANTS = {
    "default": F8Net(),
    "realign": F8Net(ties="realign"),
    "no-clip-grid": F8Net(clip=False, select="grid"),
    "shift": F8Net(avgpool="shift"),
    "realign-shift-constant": F8Net(ties="realign", avgpool="shift", rescale="constant"),
    "no-clip-shift-narrow": F8Net(clip=False, avgpool="shift", rescale="none", act_bits=6, weight_bits=5),
    "tiny": F8Net.tiny(),
    "published": F8Net.reference(avgpool="reference"),
}
ACCUMULATORS = st.integers(-(2**31), INT32_MAX) | st.integers(-600, 600)
LABELS, FRACLENS = st.integers(0, 15), st.integers(0, 8)


def trained(net: nn.Module, scheme: F8Net, steps: int = 3) -> nn.Module:
    """Converted, calibrated and trained for a few steps, in evaluation."""
    convert(net, scheme, batch(0))
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    net.train()
    for step in range(steps):
        x = batch(step)
        loss = F.cross_entropy(net(x), torch.arange(len(x)) % 5)
        optimizer.zero_grad()
        loss.backward()
        lowbit_step(net, optimizer)
    return net.eval()


def inputs(net: nn.Module) -> list[FraclenInput]:
    return [module for module in net.modules() if isinstance(module, FraclenInput)]


def scatter(net: nn.Module, seed: int) -> None:
    """Other fractional lengths everywhere, many of them too long or too short."""
    generator = torch.Generator().manual_seed(seed)
    for source in inputs(net):
        low, high = (-2, 3) if source.relative else (2, 8)
        source.fraclen.fill_(float(torch.randint(low, high, (), generator=generator)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NETS)
def test_evaluation_is_integer_execution(name: str, variant: str) -> None:
    torch.manual_seed(0)
    net = trained(NETS[name](), VARIANTS[variant])
    x = batch(7)
    hops = Hops(net)
    assert torch.equal(hops.run(x), net(x))
    assert hops.seen["LowBitLayer"] == len(hops.units) == sum(isinstance(m, LowBitLayer) for m in net.modules())


@pytest.mark.parametrize("variant", ["default", "realign"])
@pytest.mark.parametrize("name", NETS)
def test_whatever_the_fraclens(name: str, variant: str) -> None:
    torch.manual_seed(1)
    net = trained(NETS[name](), VARIANTS[variant], steps=1)
    for seed in range(2):
        scatter(net, seed)
        Hops(net, (None,)).run(3 * batch(seed))


def test_what_the_networks_exercise() -> None:
    torch.manual_seed(0)
    net = trained(NETS["overwritten"](), F8Net(ties="realign"))
    scatter(net, 1)
    assert any(unit.input.moved for unit in Hops(net).units.values())
    units = [float(source.clip().detach()) / source.qmax for source in inputs(net) if source.alpha is not None]
    assert units
    assert all(math.frexp(unit)[0] != 0.5 for unit in units)  # training moved them


def test_pixels_are_codes() -> None:
    torch.manual_seed(0)
    net, x = NETS["basic"](), torch.randint(0, 256, (4, 3, 12, 12)) / 256
    convert(net, F8Net(pixels=True), x)
    hops = Hops(net.eval())
    hops.run(x)
    first = next(iter(hops.units.values()))
    assert (first.fraclen_in, first.signed) == (8, False)
    assert torch.equal(first.input.codes((x * 256).int(), 8), encode(x, first.input))


@pytest.mark.filterwarnings("ignore:.*which no fraclen holds")
@pytest.mark.parametrize(("channels", "least", "dtype"), [(64, -1.0, torch.float32), (128, 0.9, torch.float64)])
def test_layers_beyond_518_terms(channels: int, least: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = wide_layer(channels, least)
    convert(net, F8Net(clip=False), batch(0, 2))
    net[2].lowbit_input.fraclen.fill_(7.0)
    hops, results = Hops(net.eval(), (None,)), []
    net[2].register_forward_hook(lambda layer, args, result: results.append((layer.lowbit_input(args[0]), result)))
    hops.run(batch(1, 2))
    unit, (codes, result) = hops.units["2"], results[0]
    assert 9 * channels * 255 * 127 > FLOAT32_EXACT
    assert (unit.bound < FLOAT32_EXACT) == (dtype == torch.float32)
    assert result.dtype == dtype
    if dtype == torch.float64:  # where float32 would have been wrong
        weight = unit.weight * 2.0**-unit.fraclen_weight
        assert unit.bias is not None
        floats = F.conv2d(codes, weight, unit.bias * 2.0**-unit.label, padding=1)
        assert not torch.equal(floats.double(), result)


@pytest.mark.filterwarnings("ignore:.*which no fraclen holds")
def test_sums_beyond_24_bits() -> None:
    torch.manual_seed(0)
    net, x, sums = Overwritten(), 1000 * torch.randn(2, 4, 6, 6), []
    with torch.no_grad():
        net.a.weight.mul_(10)
    convert(net, F8Net(clip=False), x)
    net.b.lowbit_input.fraclen.fill_(8.0)
    for module in net.eval().modules():
        if isinstance(module, LowBitAdd):
            module.register_forward_hook(lambda op, args, result: sums.append(result))
    net.eval()(x)
    exact = [total.clone() for total in sums]
    assert (exact[0].dtype, exact[-1].dtype) == (torch.float64, torch.float32)  # the last one leaves the network
    assert not torch.equal(exact[0].float().double(), exact[0])
    for module in net.modules():
        module.__dict__.pop("read_by_others", None)  # keep it exact to the end, for comparison
    Hops(net).run(x)
    assert torch.equal(sums[-1].float(), exact[-1])


def test_rectifiers_that_end_at_six() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 5, 3)), 20 * batch(0)
    convert(net, F8Net(clip=False), x)
    results: list[Tensor] = []
    net.eval()[1].register_forward_hook(lambda op, args, result: results.append(result))
    Hops(net).run(x)
    assert float(results[0].max()) == 6


@pytest.mark.parametrize("bits", [10, 12])
def test_wider_codes_have_the_same_sums(bits: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.ReLU(), nn.Linear(8, 5))
    convert(net, F8Net(bits=bits, rescale="none"), batch(0))
    unit, x = integer_unit(net.eval()[1]), batch(1).flatten(1)
    codes = encode(x, unit.input)
    assert (unit.weight.dtype, codes.dtype) == (torch.int16, torch.int32)
    acc = codes.long() @ unit.weight.long().t() + unit.bias
    assert torch.equal(net[1](x).double() * 2.0**unit.label, acc.double())
    assert int(acc.abs().max()) <= unit.bound
    with pytest.raises(ConfigError, match=r"1: got torch.int32 codes and torch.int16 weights.*bits=8"):
        run_unit(unit, codes)


def test_linear_layers_of_sequences() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(3, 5, 6)
    convert(net, F8Net(), x)
    Hops(net.eval()).run(x)


def rounded(value: Fraction, bits: int, signed: bool) -> int:
    most = largest_code(bits, signed)
    return max(-most if signed else 0, min(most, round(value)))  # Python rounds halves of fractions to even


@given(acc=ACCUMULATORS, label=LABELS, fraclen=FRACLENS, bits=st.integers(2, 16), signed=st.booleans())
def test_requantize(acc: int, label: int, fraclen: int, bits: int, signed: bool) -> None:
    expected = rounded(Fraction(acc) * Fraction(2) ** (fraclen - label), bits, signed)
    codes = fixed_point.requantize(torch.tensor([acc], dtype=torch.int32), label, fraclen, bits, signed)
    assert codes.tolist() == [expected]
    assert codes.dtype == (torch.int32 if bits > 8 else torch.int8 if signed else torch.uint8)
    evaluated = fix_quant(torch.tensor([acc * 2.0**-label], dtype=torch.float64), fraclen, bits=bits, signed=signed)
    assert evaluated.item() * 2.0**fraclen == expected


@given(
    number=st.integers(-300, 300), rest=st.sampled_from([-1, 0, 1]), total=ACCUMULATORS, near=st.booleans(),
    label=LABELS, fraclen=FRACLENS, count=st.integers(1, 3000), signed=st.booleans(),
)  # fmt: skip
def test_mean_is_the_float64_quotient_rounded(
    number: int, rest: int, total: int, near: bool, label: int, fraclen: int, count: int, signed: bool
) -> None:
    if near:  # at a tie, or as near as sums come to one
        total = (2 * number + 1) * count * 2 ** max(label - fraclen, 0) // 2 + rest
    expected = rounded(Fraction(total, count) * Fraction(2) ** (fraclen - label), 8, signed)
    assert fixed_point.mean(torch.tensor([total]), label, count, fraclen, 8, signed).tolist() == [expected]
    quotient = torch.tensor([total * 2.0**-label], dtype=torch.float64) / count
    assert fix_quant(quotient, fraclen, signed=signed).item() * 2.0**fraclen == expected


def test_no_shift_wraps() -> None:
    acc = torch.tensor([-(2**31), -1, 0, 1, INT32_MAX], dtype=torch.int32)
    assert fixed_point.requantize(acc, 0, 50, 8, True).tolist() == [-127, -127, 0, 127, 127]


@given(a=ACCUMULATORS, b=ACCUMULATORS, label_a=LABELS, label_b=LABELS)
@example(a=INT32_MAX, b=1, label_a=3, label_b=3)
@example(a=-(2**30), b=-(2**31), label_a=3, label_b=4)
def test_sums_saturate_and_never_wrap(a: int, b: int, label_a: int, label_b: int) -> None:
    first, second = (torch.tensor([x], dtype=torch.int32) for x in (a, b))
    found, label = fixed_point.add(first, label_a, second, label_b)
    assert (label, found.dtype) == (max(label_a, label_b), torch.int32)
    wide_a, wide_b = a << label - label_a, b << label - label_b
    if max(abs(wide_a), abs(wide_b)) <= INT32_MAX:
        assert found.tolist() == [max(-INT32_MAX, min(INT32_MAX, wide_a + wide_b))]
    else:
        assert abs(found.item()) <= INT32_MAX
        assert found.item() * (wide_a + wide_b) >= 0 or a * b < 0
    joined, label = fixed_point.concat([first, second], [label_a, label_b], 0)
    for own, wide in zip(joined.tolist(), (wide_a, wide_b), strict=True):
        assert own == wide if abs(wide) <= INT32_MAX else abs(own) > INT32_MAX // 2 ** (15 + 1) and own * wide > 0


@given(label=LABELS, count=st.integers(1, 5000))
def test_mean_by_a_shift(label: int, count: int) -> None:
    shift = fixed_point.shift_mean(label, count) - label
    assert 2 ** (shift - 0.5) <= count <= 2 ** (shift + 0.5)


def small(layer: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(layer or nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))


REFUSALS: dict[str, tuple[Callable[[], nn.Module], Any, tuple[int, ...] | None, str]] = {
    "another scheme": (small, "tqt", (2, 3, 8, 8), r"0 was converted with Tqt.*F8Net\(\)"),
    "float bias": (small, F8Net(bias="float"), (2, 3, 8, 8), "0 has a float bias.*int32"),
    "float network": (small, F8Net(floating=True), (2, 3, 8, 8), "0 has float weights"),
    "not calibrated": (small, F8Net(), None, "0.* is not calibrated"),
    "channels": (
        small, F8Net(preset="reference", per_channel=True), (2, 3, 8, 8), "0 has fractional lengths per channel",
    ),
    "padding": (
        lambda: small(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), F8Net(), (2, 3, 8, 8),
        "0 pads with padding_mode='circular'",
    ),
    "transposed": (lambda: small(nn.ConvTranspose2d(3, 4, 3)), F8Net(), (2, 3, 8, 8), r"0 is neither.*skip=\['0'\]"),
    "three axes": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, 1)), F8Net(), (2, 3, 5, 5, 5),
        "0 is neither Linear, Conv1d nor Conv2d",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_integers_is_named(name: str) -> None:
    torch.manual_seed(0)
    make, scheme, size, message = REFUSALS[name]
    net = make()
    convert(net, scheme, None if size is None else torch.randn(size))
    with pytest.raises(UnsupportedModelError, match=message):
        integer_unit(net.eval()[0])


def test_training_has_no_integers() -> None:
    net = small()
    convert(net, F8Net(), torch.randn(2, 3, 8, 8))
    with pytest.raises(ConfigError, match=r"0: got a layer in training mode. Call eval\(\)"):
        integer_unit(net.train()[0])


def test_weights_behind_a_mean_that_has_not_run() -> None:
    torch.manual_seed(0)
    net = NETS["mobilenet-v1"]()
    convert(net, F8Net(avgpool="shift"), batch(0))
    last = [module for module in net.eval().modules() if isinstance(module, LowBitLayer)][-1]
    with pytest.raises(UnsupportedModelError, match=r"makes up for the mean of .*Run one batch"):
        integer_unit(last)
    net(batch(0))
    integer_unit(last)


@pytest.mark.filterwarnings("ignore:.*which no fraclen holds")
def test_sums_that_int32_may_not_hold() -> None:
    torch.manual_seed(0)
    net = small()
    with torch.no_grad():
        net[0].bias.fill_(1e9)
    convert(net, F8Net(clip=False), torch.randn(2, 3, 8, 8))
    with pytest.raises(InvariantError, match=r"0: its sums can reach \d{14}, expected at most 2147483647"):
        integer_unit(net.eval()[0])
    wide = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 2))
    convert(wide, F8Net(bits=16), torch.randn(8, 64))
    with pytest.raises(UnsupportedModelError, match=r"0: its sums can reach.*F8Net\(bits=8\)"):
        integer_unit(wide.eval()[0])


def test_codes_of_the_wrong_sign() -> None:
    torch.manual_seed(0)
    net, x = small(), torch.randn(2, 3, 8, 8)
    convert(net, F8Net(), x)
    unit = integer_unit(net.eval()[0])
    assert (unit.signed, unit.bits, unit.label) == (True, 8, unit.fraclen_in + unit.fraclen_weight)
    codes: Tensor = encode(x, integer_input(net[0].lowbit_input))
    with pytest.raises(ConfigError, match=r"0: got torch.uint8 codes.*expected torch.int8"):
        run_unit(unit, codes.view(torch.uint8))


def test_realigned_codes_stay() -> None:
    form = IntegerInput(fraclen=6, bits=8, signed=False, moved=2)
    acc = torch.tensor([5, 64, 700])
    assert torch.equal(form.codes(acc, 6), fixed_point.requantize(acc, 6, 4, 8, False))
    assert torch.equal(form.mean(acc, 6, 3), fixed_point.mean(acc, 6, 3, 4, 8, False))
