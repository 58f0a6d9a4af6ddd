"""A fixed-point network as an integer program: the program's numbers are those of its evaluation, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from export.fixed_point_nets import wide_layer
from export.lowered_nets import NETS, TELLING, Net, between, conv, differing, low, ready
from export.random_graphs import random_batch, random_nets
from hypothesis import assume, given, settings
from schemes.niti_nets import fit, images
from torch import Tensor, nn

from lightning_lowbit import F8Net, lower, verify
from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.numerics.guards import FLOAT32_EXACT

VARIANTS = {
    "default": F8Net(),
    "realign": F8Net(ties="realign"),
    "shift": F8Net(avgpool="shift", rescale="constant"),
    "no-clip": F8Net(clip=False, select="grid", rescale="none", act_bits=6, weight_bits=5),
    "published": F8Net.reference(avgpool="reference"),
    "wide": F8Net(bits=12),
}
CASES = [(n, "default") for n in NETS] + [(n, v) for v in VARIANTS if v != "default" for n in TELLING]


def scatter(net: nn.Module) -> None:
    """Fraclens and clips as training might leave them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for source in (module for module in net.modules() if isinstance(module, FraclenInput)):
            low, high = (-2, 3) if source.relative else (2, 8)
            source.fraclen.fill_(float(torch.randint(low, high, (), generator=generator)))
            if source.alpha is not None:
                source.alpha.mul_(float(1 + torch.rand((), generator=generator)) ** 0.1)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_programs_are_evaluation(name: str, variant: str) -> None:
    net, x = ready(name)
    low(net, VARIANTS[variant], x)
    scatter(net)
    program = lower(net, x)
    assert differing(net, program, 2 * x) == []
    assert between(program) == [] or variant == "wide" or name == "mean that leaves"


def test_a_mean_by_a_shift_divides_nothing() -> None:
    divides = []
    for avgpool in ("exact", "shift"):
        net, x = ready("mean")  # of 36 values
        divides.append("divide" in [op.kind for op in lower(low(net, F8Net(avgpool=avgpool), x), x).ops])
    assert divides == [True, False]


def test_moved_codes_are_relabeled() -> None:
    net, x = ready("residual")
    low(net, F8Net(ties="realign"), x)
    scatter(net)
    assert any(source.moved() for source in net.modules() if isinstance(source, FraclenInput))
    assert differing(net, lower(net, x), x) == []


def test_a_part_of_a_network() -> None:
    net, x = ready("signal")
    low(net, F8Net(), x)
    features = net[:4]  # its sums go to readers that are not there
    wanted = features(x).float()
    assert torch.equal(torch.from_numpy(lower(features, x).run(x)), wanted)


@pytest.mark.filterwarnings("ignore:.*which no fraclen holds")
def test_sums_that_float32_does_not_hold() -> None:
    torch.manual_seed(0)
    net, x = wide_layer(128, 0.9), torch.randn(7, 3, 12, 12)
    low(net, F8Net(clip=False), x)
    net[2].lowbit_input.fraclen.fill_(7.0)
    program = lower(net, x)
    assert max(value.high for value in program.values.values()) > FLOAT32_EXACT
    assert differing(net, program, x) == []
    sums = []
    net[2].register_forward_hook(lambda layer, args, result: sums.append(result))
    net(x)
    assert not torch.equal(sums[0].float().double(), sums[0])


def leaving(m: Any, x: Tensor) -> Any:
    return m.c(F.relu(y := m.b(F.relu(m.a(x))))), y


@pytest.mark.filterwarnings("ignore:.*which no fraclen holds")
def test_what_leaves_the_network_is_rounded_for_all_its_readers() -> None:
    torch.manual_seed(0)
    wide = wide_layer(128, 0.9)
    net, x = Net(leaving, a=wide[0], b=wide[2], c=conv(4, 5, 1)), torch.randn(7, 3, 12, 12)
    low(net, F8Net(clip=False), x)
    net.b.lowbit_input.fraclen.fill_(7.0)
    net.c.lowbit_input.fraclen.fill_(8.0)
    program = lower(net, x)
    assert max(value.high for value in program.values.values()) > FLOAT32_EXACT
    assert differing(net, program, x) == []
    net.b.__dict__.pop("read_by_others")  # an exact sum, in float64
    assert torch.equal(net(x)[1].float(), torch.from_numpy(program.run(x)[1]))


def test_the_class_behind_a_rescaled_classifier_is_that_of_the_integers() -> None:
    net = Net(lambda m, x: m.fc(m.a(x).flatten(1)).argmax(-1), a=conv(), fc=nn.Linear(144, 9))
    x = torch.randn(7, 3, 8, 8)
    program = lower(low(net, F8Net(), x), x)
    assert between(program) == []
    assert differing(net, program, x) == []


def test_pixels() -> None:
    net, _ = ready("average pools")
    x = torch.randint(0, 256, (7, 3, 8, 8)) / 256
    program = lower(low(net, F8Net(pixels=True), x), x)
    assert program.ops[0].attributes["exponent"] == -8
    assert differing(net, program, x) == []


def test_behind_a_fit() -> None:
    x, _ = images()
    module, _, _ = fit(F8Net(warmup=0), max_epochs=1, limit_train_batches=2)
    assert differing(module.eval(), lower(module, x), x) == []


def test_a_network_in_training_mode_stays_in_it() -> None:
    net, x = ready("words")
    low(net, F8Net(), x).train()
    lower(net, x)
    assert all(module.training for module in net.modules())


REFUSALS = {
    "float bias": (F8Net(bias="float"), r"a: its bias is float.*F8Net\(bias='int32'\)"),
    "float network": (F8Net(floating=True), "a: its weights are float"),
    "channels": (F8Net.reference(per_channel=True), r"a: it has a fractional length per channel.*per_channel=False"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_integers_is_named(name: str) -> None:
    scheme, message = REFUSALS[name]
    net, x = ready("residual")
    with pytest.raises(UnsupportedModelError, match=message):
        lower(low(net, scheme, x), x)


def test_what_was_not_calibrated_is_named() -> None:
    net = nn.Sequential(conv(), nn.ReLU(), conv(4, 2))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(-1.0)
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(UnsupportedModelError, match=r"2.lowbit_input: it has no grid, for it saw no calibration"):
        lower(low(net, F8Net(), x), x)


def test_sums_beyond_float64() -> None:
    net, x = ready("residual")
    low(net, F8Net(bits=16), x)
    for source in (net.a.lowbit_input, net.b.lowbit_input, net.c.lowbit_input):
        source.fraclen.fill_(15.0)
    net.lowbit_add.__dict__["path"] = "the sum"
    with torch.no_grad():
        net.a.weight.mul_(2.0**-12)
        net.k.weight.mul_(2.0**12)
    with pytest.raises(UnsupportedModelError, match=r"its sums can reach .* beyond float64"):
        lower(net, x)


def test_means_with_more_digits_than_float64() -> None:
    net = Net(lambda m, x: m.fc(F.avg_pool2d(m.a(x), 3).flatten(1)), a=conv(), fc=nn.Linear(16, 3))
    x = torch.randn(7, 3, 8, 8)
    with torch.no_grad():
        net.a.weight.mul_(2.0**-12)
    low(net, F8Net(bits=16, clip=False), x)
    net.fc.lowbit_input.fraclen.fill_(0.0)
    with pytest.raises(UnsupportedModelError, match=r"fc: it reads a mean with more digits than float64 holds"):
        lower(net, x)


@settings(max_examples=25, deadline=None)
@given(drawn=random_nets("f8net"))
def test_random_networks(drawn: Any) -> None:
    net, shape = drawn
    low(net, F8Net(), random_batch(shape, 4))
    assume(all(module.ready for module in net.modules() if isinstance(module, FraclenInput)))
    x = random_batch(shape, 7, 1)
    try:
        program = lower(net, x)
    except UnsupportedModelError as error:
        refused = str(error)
    else:
        found = verify(net, program, [x])  # some nets have a norm on its own, a float island
        refused = "" if found.ok else str(found)
    assert not refused or "it reads a mean that nobody has rounded" in refused  # a max pool of means of several counts
