"""A merged network as an integer program: its evaluation, bit for bit, which adds integers however many there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from export.lowered_nets import NETS, TELLING, Net, between, conv, differing, low, ready
from export.random_graphs import random_batch, random_nets
from hypothesis import given, settings
from schemes.niti_nets import fit, images
from torch import Tensor, nn

from lightning_lowbit import Jacinto, lower
from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.modules import merging
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.numerics.guards import FLOAT32_EXACT
from lightning_lowbit.schemes import jacinto

VARIANTS = {
    "default": Jacinto(),
    "sums out": Jacinto(quantize_out=False, act_round="half_even"),
    "channels": Jacinto(per_channel="all", quantize_out=False),
    "zero points": Jacinto(symmetric=False, act_round="half_away"),
    "own bias": Jacinto(bias="own", per_channel="all"),
    "tidl": Jacinto(bias="tidl", weight_bits=4),
    "tidl scale": Jacinto(bias="tidl_scale"),
    "wide": Jacinto(bits=16, per_channel="depthwise"),
    "fixed": Jacinto(act_range=4.0, weight_cap=0.3, weight_shrink=1.0, range_sync="hist", dead_channels="merge"),
}
CASES = [(n, "default") for n in NETS] + [(n, v) for v in VARIANTS if v != "default" for n in TELLING]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_programs_are_evaluation(name: str, variant: str) -> None:
    net, x = ready(name)
    low(net, VARIANTS[variant], x)
    program = lower(net, x)
    assert differing(net, program, 2 * x) == []
    assert between(program) == []


def test_what_a_group_rounds_is_rounded_once() -> None:
    net, x = ready("residual")
    program = lower(low(net, Jacinto(), x), x)
    assert [op.kind for op in program.ops] == [
        "quantize", "conv", "requantize", "conv", "requantize", "add", "requantize", "conv", "requantize", "dequantize"
    ]  # fmt: skip


def test_zero_points_are_counted_away() -> None:
    net, x = ready("average pools")
    program = lower(low(net, Jacinto(symmetric=False), x.abs() - 0.5), x)
    first = program.ops[0].attributes
    assert first["high"] - first["low"] == 255
    assert first["low"] not in (-128, 0)


def test_a_part_of_a_network() -> None:
    net, x = ready("signal")
    low(net, Jacinto(), x)
    assert differing(net[:4], lower(net[:4], x), x) == []


def test_a_layer_that_reads_floats_is_an_island() -> None:
    net, x = ready("residual")
    program = lower(low(net, Jacinto(quantize_in=False), x), x)
    assert [op.path for op in program.ops if op.kind == "island"] == ["a"]
    off = (torch.from_numpy(program.run(x)) - net(x)).abs().max()
    assert off < 0.1 * net(x).abs().max()  # a code at a tie may fall to the other side


def test_a_float_bias_is_an_island() -> None:
    net, x = ready("words")
    program = lower(low(net, Jacinto(bias="float"), x), x)
    assert [op.path for op in program.ops if op.kind == "island"] == ["0", "3"]


def test_behind_a_fit() -> None:
    x, _ = images()
    module, _, _ = fit(Jacinto(warmup=0), max_epochs=1, limit_train_batches=2)
    assert differing(module.eval(), lower(module, x), x) == []


def wide(bits: int = 8, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 2400), nn.ReLU(), nn.Linear(2400, outputs))
    with torch.no_grad():
        net[0].weight.mul_(0.1)
        net[0].bias.uniform_(1, 2)
        net[2].weight.uniform_(0.7, 1)
    return net


def in_integers(layer: Any, codes: Tensor) -> Tensor:
    """A linear layer's sums by int64."""
    weight, bias, scale = merging.quantized(layer)
    units = float(scale) * float(layer.input_grid.limits().scale)
    sums = codes @ (weight.double() * scale).to(torch.int64).t()
    return (sums + (bias.double() * units).to(torch.int64)) / units


@pytest.mark.parametrize("quantize_out", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_evaluation_adds_more_than_float32_holds(quantize_out: bool, grad: bool, monkeypatch: Any) -> None:
    net, x = wide(), torch.randn(64, 4)
    low(net, Jacinto(quantize_out=quantize_out, ste_weights="folded"), x)
    codes, source = [], net[2].input_grid
    net[2].register_forward_pre_hook(lambda layer, args: codes.append(args[0]))
    with torch.set_grad_enabled(grad):
        y = net(x)
    assert y.dtype == torch.float32
    scale = float(source.limits().scale)
    sums = in_integers(net[2], (codes[0].double() * scale).to(torch.int64))
    assert float(sums.abs().max()) * scale * float(merging.quantized(net[2])[2]) > FLOAT32_EXACT
    if quantize_out:
        end = net[2].lowbit_output.limits().to_host()
        wanted = (torch.floor(sums * end.scale + 0.5).clamp(end.qmin, end.qmax) / end.scale).float()
    else:
        wanted = sums.float()
    assert torch.equal(y, wanted)
    assert differing(net, lower(net, x[:7]), x[:7]) == []
    monkeypatch.setattr(merging, "product", lambda layer, x, weight, bias, scale: layer.op(x, weight, bias))
    assert quantize_out or not torch.equal(net(x), wanted)  # float32 alone is another number


def test_small_sums_stay_float32() -> None:
    net, x = ready("residual")
    low(net, Jacinto(), x)
    kinds = []
    for layer in (module for module in net.modules() if isinstance(module, LowBitLayer)):
        layer.op = lambda x, w, b, op=layer.op: kinds.append(x.dtype) or op(x, w, b)  # type: ignore[method-assign]
    with torch.no_grad():
        net(x)
    assert kinds == 3 * [torch.float32]


def faint(m: Any, x: Tensor) -> Tensor:
    """A branch whose codes are a thousandth of those that it is added to."""
    return F.relu(m.a(x) + m.b(x))


def meaning(m: Any, x: Tensor) -> Tensor:
    return F.avg_pool2d(F.relu(m.a(x)), 24)


WIDE: dict[str, tuple[Any, dict[str, nn.Module]]] = {
    "sum": (faint, {"a": conv(3, 4, 1), "b": conv(3, 4, 1)}),
    "mean": (meaning, {"a": conv(3, 1024, 1)}),
}


@pytest.mark.parametrize("name", WIDE)
def test_sums_and_means_of_16_bits_are_rounded_once(name: str, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    forward, layers = WIDE[name]
    net, x = Net(forward, **layers), torch.randn(12, 3, 24, 24)
    with torch.no_grad():
        net.a.weight.mul_(0.3)
        net.a.bias.uniform_(6, 7)
        for p in layers["b"].parameters() if "b" in layers else ():
            p.mul_(2.0**-10)
    low(net, Jacinto(bits=16), x)
    program = lower(net, x)
    assert differing(net, program, x) == []
    assert net(x).dtype == torch.float32
    monkeypatch.setattr(jacinto, "operation", lambda op, *operands, **settings: op.op(*operands, **settings))
    assert differing(net, program, x) != []  # float32 rounds on its way


@pytest.mark.parametrize("per_channel", ["none", "all"])
def test_a_bias_finer_than_the_products(per_channel: str) -> None:
    net, x = wide(), torch.randn(7, 4)
    with torch.no_grad():
        net[2].bias.mul_(2.0**-10)
        net[2].weight[1].mul_(2.0**-3)
        net[2].weight.mul_(0.2)
    low(net, Jacinto(bias="own", quantize_out=False, per_channel=per_channel), x)
    program = lower(net, x)
    assert [op.kind for op in program.ops][-3 - (per_channel == "all") :][-2:] == ["add", "dequantize"]
    assert differing(net, program, x) == []


def test_sums_on_a_step_per_channel_move() -> None:
    net = Net(lambda m, x: m.a(x).flatten(1), a=conv())
    x = torch.randn(7, 3, 8, 8)
    with torch.no_grad():
        net.a.weight[0].mul_(0.1)
    low(net, Jacinto(per_channel="all", quantize_out=False), x)
    assert differing(net, lower(net, x), x) == []


def test_sums_beyond_float64() -> None:
    net, x = Net(lambda m, x: m.a(x), a=nn.Linear(4, 3)), torch.randn(7, 4)
    with torch.no_grad():
        net.a.weight.mul_(2.0**11)
        net.a.bias.mul_(2.0**-18)
    low(net, Jacinto(bits=16, bias="own", act_range=2.0**15), x)
    with pytest.raises(UnsupportedModelError, match=r"a: its sums can reach \S+, beyond float64"):
        lower(net, x)


@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_compiled_evaluation_adds_the_same_integers() -> None:
    net, x = wide(), torch.randn(16, 4)
    low(net, Jacinto(), x)
    with torch.no_grad():
        wanted = net(x)
        assert torch.equal(torch.compile(net, backend="eager")(x), wanted)


REFUSALS = {
    "float steps": (Jacinto(power2=False), "a: the scale of its weights is no power of two.*power2=True"),
    "float means": (Jacinto(avgpool="float"), r"lowbit_avg_pool: its means are float.*avgpool='exact'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_integers_is_named(name: str) -> None:
    scheme, message = REFUSALS[name]
    net, x = ready("uneven windows")
    with pytest.raises(UnsupportedModelError, match=message):
        lower(low(net, scheme, x), x)


def test_means_with_more_digits_than_float64() -> None:
    net = Net(lambda m, x: F.avg_pool2d(F.relu(m.a(x)), 3), a=conv())
    x = torch.randn(7, 3, 8, 8)
    low(net, Jacinto(), x)
    with torch.no_grad():
        net.lowbit_avg_pool.lowbit_output.clips.fill_(2.0**50)
    with pytest.raises(UnsupportedModelError, match=r"lowbit_avg_pool: its means have more digits than float64"):
        lower(net, x)


def test_float_steps_of_activations() -> None:
    net, x = ready("words")
    low(net, Jacinto(power2=False), x)
    with pytest.raises(UnsupportedModelError, match=r"0.lowbit_input: its step is no power of two.*power2=True"):
        net[0].lowbit_input.as_snap()


@settings(max_examples=25, deadline=None)
@given(drawn=random_nets("jacinto"))
def test_random_networks(drawn: Any) -> None:
    net, shape = drawn
    low(net, Jacinto(), random_batch(shape, 4))
    x = random_batch(shape, 7, 1)
    assert differing(net, lower(net, x), x) == []
