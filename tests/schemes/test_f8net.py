"""F8Net through its seam: units that cancel, conversion that keeps a float function, options and what is reported."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph import unit_nets
from schemes.f8net_nets import (
    NETWORKS,
    alphas,
    converted,
    distance,
    fraclens,
    images,
    inputs,
    labels,
    outputs,
    reach,
    rule,
    seen,
    train,
    unit_of,
    widen,
)
from torch import nn

from lightning_lowbit import F8Net, convert, lowbit_step, summarize
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import float_mode
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.fixed_point_operands import ResultUnit
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.modules.layers import LowBitLayer

BLOCK = {"resnet": "layer1.1.conv1", "mobilenet_v2": "blocks.2.expand"}  # the first layer of a block with an identity


def wide(network: str, **options: Any) -> nn.Module:
    """16 bits, trained, with clips that no value meets: what moves is a matter of units alone."""
    net = widen(train(converted(network, bits=16, select="grid", alpha_lr=0.01, **options).train()).eval())
    assert all(math.frexp(alpha.item())[0] != 0.5 for alpha in alphas(net).values())
    return net


def moved(net: nn.Module, quantizer: FraclenInput, by: int) -> float | None:
    """How far the output goes with a fraclen; None where the format does not reach."""
    before, rounded, want = quantizer.fraclen.clone(), quantizer.rounded().clone(), outputs(net)
    quantizer.fraclen.add_(by)
    reached = not torch.equal(quantizer.rounded(), rounded)
    result = distance(outputs(net), want)
    quantizer.fraclen.copy_(before)
    return result if reached else None


# -- units ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ties", ["shared", "realign"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_fraclen_moves_no_function(network: str, ties: str) -> None:
    net = wide(network, ties=ties)
    found = {
        (path, by): moved(net, quantizer, by)
        for path, quantizer in inputs(net).items() if quantizer.alpha is not None and quantizer.average is quantizer
        for by in ((-1,) if quantizer.private else (1, -1, -4))
    }  # fmt: skip
    assert len({path for path, _ in found}) >= 6
    assert sum(value is not None for value in found.values()) >= 10
    assert {key: value for key, value in found.items() if value is not None and value >= 1e-3} == {}


@pytest.mark.parametrize(("network", "path"), BLOCK.items(), ids=list(BLOCK))
def test_the_published_units_do_not_cancel_in_an_identity_block(network: str, path: str) -> None:
    net = wide(network, ties="reference")
    quantizer = inputs(net)[path]
    assert min(moved(net, quantizer, 1) or 1.0, moved(net, quantizer, -1) or 1.0) > 0.05


@pytest.mark.parametrize("ties", ["shared", "realign"])
def test_a_flip_in_training_moves_nothing_in_evaluation(ties: str) -> None:
    """Also not for a mean, whose own average is in the unit of its class."""
    net = wide("resnet", ties=ties, train="statistics", freeze_batch_norm=None)
    reach(net, "freeze_batch_norm")
    leaders = {path: q for path, q in inputs(net).items() if q.alpha is not None and q.leader is q}
    want = outputs(net)
    before = {path: q.rounded().clone() for path, q in leaders.items()}
    for quantizer in leaders.values():
        quantizer.fraclen.copy_(quantizer.rounded() - 0.5 + 1e-3)  # the next batch decides
    for step in range(8):
        train(net.train(), 1, gain=4.0 if step < 4 else 1.0)
        assert distance(outputs(net), want) < 2e-3, step
    assert any(not torch.equal(q.rounded(), before[path]) for path, q in leaders.items())


def test_producers_divide_by_the_unit_that_readers_multiply_by() -> None:
    net = wide("resnet")
    layers: dict[str, Any] = {m.path: m for m in net.modules() if isinstance(m, LowBitLayer)}
    stem, block, shortcut = layers["conv1"], layers["layer2.0.conv1"], layers["layer2.0.downsample.0"]
    unit = block.lowbit_input.unit()
    assert unit is not None
    assert unit != 1
    one = torch.ones(())
    assert torch.equal(stem.lowbit_unit(one), one / unit)
    for reader in (block, shortcut):
        assert torch.equal(reader.lowbit_input.absorb(torch.ones(2, 3)), torch.ones(2, 3) * unit)


def test_one_alpha_stands_under_every_reader_s_path() -> None:
    net = converted("resnet")
    state, parameters = net.state_dict(), dict(net.named_parameters(remove_duplicate=False))
    tie = ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"]
    assert {f"{path}.lowbit_input.alpha" for path in tie} <= state.keys()
    assert len({id(parameters[f"{path}.lowbit_input.alpha"]) for path in tie}) == 1
    assert "conv1.lowbit_input.alpha" not in state  # it comes from outside


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_a_copy_keeps_its_ties_and_nothing_of_the_original(make: Any) -> None:
    net = widen(converted("resnet"))
    want, other = outputs(net), make(net)
    assert torch.equal(outputs(other), want)
    readers = inputs(other)
    tie = ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"]
    assert len({id(readers[path].alpha) for path in tie}) == 1
    units = [m for _, m in quantizers(other) if isinstance(m, ResultUnit) and m.reader in [readers[p] for p in tie]]
    assert len(units) == 3  # the stem and both blocks write into it
    with torch.no_grad():
        readers[tie[-1]].alpha.mul_(0.5)  # type: ignore[union-attr]  # it has one
        readers[tie[0]].fraclen.sub_(1)
    (unit,) = {unit_of(readers[path]) for path in tie}
    assert unit == unit_of(inputs(net)[tie[0]]) / 4
    assert all(float(result(torch.ones(())).detach()) == pytest.approx(1 / unit, rel=1e-6) for result in units)
    assert torch.equal(outputs(net), want)
    assert not torch.equal(outputs(other), want)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: unit_nets.Auxiliary(), "c reads: .* is a result of the network"),
        (lambda: unit_nets.Chain(between=unit_nets.Branching()), "a, b, c read: .*cannot be followed"),
        (lambda: unit_nets.Positioned(), "c reads: .*computes with true values"),
    ],
    ids=["auxiliary", "untraceable", "position"],
)
def test_what_others_read_has_no_clip_and_the_report_says_why(make: Any, words: str) -> None:
    torch.manual_seed(0)
    net = make()
    with torch.no_grad():
        want = net(images())
    report = convert(net, "f8net", images())
    assert inputs(net)["c"].alpha is None
    assert any(re.search(words, note) for note in report.notes), report.notes
    assert [note for note in summarize(net).notes if note in report.notes] == report.notes
    got = net(images())
    for key in want if isinstance(want, dict) else (None,):
        assert distance(*((got, want) if key is None else (got[key], want[key]))) < 0.03


def test_what_a_hook_looks_at_is_in_true_values() -> None:
    torch.manual_seed(0)
    net, looked = unit_nets.Chain(), []
    net.b.register_forward_hook(lambda module, args, result: looked.append(result.detach()))
    net(images())
    report = convert(net, "f8net", images())
    widen(net)
    looked.clear()
    net.eval()(images())
    low = looked.pop()
    with float_mode(net):
        net(images())
    assert distance(low, looked.pop()) < 0.03
    assert any("b, c read: a hook on b looks at it" in note for note in report.notes)
    assert inputs(net)["b"].alpha is None  # what it reads is in the hook's sight too
    assert all(quantizer.alpha is None for path, quantizer in inputs(net).items() if path != "b")


def test_a_skipped_layer_opens_its_class_and_the_report_says_so() -> None:
    net = seen("resnet")
    want = outputs(net)
    report = convert(net, "f8net", images(), skip=["layer1.1.conv2"])
    note = "no trained clip on what layer1.0.conv1, layer1.1.conv1, layer2.0.conv1, layer2.0.downsample.0 read: "
    reasons = [text for text in report.notes if text.startswith(note)]
    assert len(reasons) == 1
    assert "layer1.1.bn2" in reasons[0]
    assert reasons[0] in summarize(net).notes
    assert inputs(net)["layer1.0.conv1"].alpha is None
    assert inputs(net)["layer2.0.conv2"].alpha is not None
    assert distance(outputs(net), want) < 0.05


# -- what conversion keeps -----------------------------------------------------------------------------------
@pytest.mark.parametrize("rescale", ["stddev", "none"])
@pytest.mark.parametrize("avgpool", ["exact", "shift"])
@pytest.mark.parametrize("ties", ["shared", "realign", "reference"])
@pytest.mark.parametrize("network", NETWORKS)
def test_conversion_keeps_a_float_network(network: str, ties: str, avgpool: str, rescale: str) -> None:
    for seed in (2, 3):
        net = seen(network, seed)
        want = outputs(net)
        convert(net, "f8net", images(), ties=ties, avgpool=avgpool, rescale=rescale)
        assert distance(outputs(net), want) < 0.05
        with float_mode(net):
            assert distance(net.eval()(images()), want) < 1e-6


@pytest.mark.parametrize("rescale", ["stddev", "constant", "none"])
def test_a_mean_by_a_shift_is_made_up_for_and_the_reference_s_is_not(rescale: str) -> None:
    nets = {
        avgpool: converted("resnet", bits=16, avgpool=avgpool, rescale=rescale)
        for avgpool in ("exact", "shift", "reference")
    }  # fmt: skip
    exact, shift, reference = (outputs(net) for net in nets.values())
    assert distance(shift, exact) < 1e-3
    assert distance(reference, exact) > 0.02  # 9 / 8 of the mean
    training = [reach(net, "freeze_fraclen", "freeze_batch_norm").train()(images()) for net in nets.values()]
    assert distance(training[1], training[0]) < 1e-3
    assert distance(training[2], training[0]) > 0.02


def test_a_clip_does_the_work_of_a_rectifier_at_six() -> None:
    net = seen("mobilenet_v2_six", gamma=3.0)
    want = outputs(net)
    plain = copy.deepcopy(net)
    for module in plain.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
    assert distance(outputs(plain), want) > 0.1  # six is met
    convert(net, "f8net", images(), bits=16)
    readers = inputs(net)
    assert readers["blocks.0.depthwise"].limit == 6.0
    assert readers["blocks.0.depthwise"].clip().item() == 6.0
    assert readers["blocks.1.expand"].limit is None
    assert distance(outputs(net), want) < 2e-3
    with torch.no_grad():
        for alpha in alphas(net).values():
            alpha.mul_(4)
    train(net.train(), 1)
    assert {q.limit: q.clip().item() for q in readers.values() if q.limit is not None} == {6.0: 6.0}


@pytest.mark.parametrize("bias", ["float", "int32"])
@pytest.mark.parametrize("rescale", ["stddev", "constant", "none"])
@pytest.mark.parametrize("avgpool", ["exact", "shift"])
@pytest.mark.parametrize("network", NETWORKS)
def test_evaluation_computes_what_training_computes_on_frozen_statistics(
    network: str, avgpool: str, rescale: str, bias: str
) -> None:
    """Up to roundings: of the bias to the products' grid, and where float32 comes upon a tie that float64 does not."""
    bits = 8 if bias == "float" else 12
    net = converted(network, avgpool=avgpool, rescale=rescale, bias=bias, bits=bits, alpha_lr=0.05)
    reach(train(net.train(), lr=0.1), "freeze_fraclen", "freeze_batch_norm")
    training, evaluation = net.train()(images(5)).detach(), net.eval()(images(5)).detach()
    apart = (training - evaluation).norm(dim=1) / evaluation.norm(dim=1)
    assert float(apart.quantile(0.75)) < (1e-5 if bias == "float" else 2e-3)
    losses = [F.cross_entropy(y.double(), labels(5)).item() for y in (training, evaluation)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_wide_bias_is_not_cut() -> None:
    """16-bit operands leave no bit of an int32 before the point."""
    net = converted("mobilenet_v2", bits=16)
    with torch.no_grad():
        net.fc.bias.add_(3.0)  # type: ignore[union-attr, operator]  # it has one
    reach(net, "freeze_fraclen", "freeze_batch_norm")
    assert distance(net.train()(images(5)), net.eval()(images(5))) < 1e-3


# -- options -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 1}, r"weight_bits=1.*from 2 to 16"),
        ({"act_bits": 17}, r"act_bits=17.*from 2 to 16"),
        ({"weight_bits": True}, r"weight_bits=True"),
        ({"select": "mse"}, r"select='mse'.*grid"),
        ({"weight_select": None}, r"weight_select=None"),
        ({"ties": "share"}, r"ties='share'.*'shared'"),
        ({"ste": "hard"}, r"ste='hard'"),
        ({"rescale": True}, r"rescale=True"),
        ({"bias": "int16"}, r"bias='int16'.*'int32'"),
        ({"avgpool": "floor"}, r"avgpool='floor'"),
        ({"train": "none"}, r"train='none'"),
        ({"preset": "published"}, r"preset='published'"),
        ({"momentum": 0.0}, r"momentum=0\.0.*\(0, 1\]"),
        ({"momentum": math.nan}, r"momentum=nan"),
        ({"alpha_lr": -0.1}, r"alpha_lr=-0\.1"),
        ({"alpha_lr": math.nan}, r"alpha_lr=nan"),
        ({"freeze_fraclen": 1.5}, r"freeze_fraclen=1\.5"),
        ({"freeze_batch_norm": "soon"}, r"freeze_batch_norm='soon'"),
        ({"warmup": -1}, r"warmup=-1"),
        ({"per_channel": True}, r"per_channel.*preset='reference'"),
        ({"own_average": False}, r"own_average=False.*preset='reference'"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_wrong_option_says_what_is_allowed(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        F8Net(**options)
    with pytest.raises(ConfigError, match=words):
        F8Net.tiny(**options) if "train" not in options else F8Net(**options)


def test_bits_are_said_in_one_way_or_the_other() -> None:
    assert F8Net(bits=4) == F8Net(weight_bits=4, act_bits=4)
    assert F8Net(bits=4, act_bits=8) == F8Net(weight_bits=4, act_bits=8)
    assert F8Net(bits=4).replace(bits=6) == F8Net(bits=6)
    assert F8Net(bits=4).replace(momentum=0.5) == F8Net(bits=4, momentum=0.5)
    assert F8Net.conventional() == F8Net()


@pytest.mark.parametrize("bits", [2, 4, 5, 16])
def test_other_widths_search_and_few_bits_pass_gradients_up_to_the_clip(bits: int) -> None:
    net = converted("resnet", bits=bits, select="std", weight_select="mae")
    reader, layer = inputs(net)["layer1.0.conv2"], net.get_submodule("layer1.0.conv2")
    weight: Any = layer.lowbit_weight
    assert (reader.form.bits, reader.form.select, weight.select) == (bits, "grid", "grid")
    assert (reader.form.ste, weight.ste) == (("clip", "clip") if bits < 4 else ("strict", "strict"))
    assert (reader.grid().bits, weight.grid().bits) == (bits, bits)
    optimizer_free = [q.fraclen.clone() for q in inputs(net).values()]
    train(net.train())
    assert not all(torch.equal(a, q.fraclen) for a, q in zip(optimizer_free, inputs(net).values(), strict=True))
    assert bool(torch.isfinite(outputs(net)).all())


def test_pixels_keep_eight_fraction_bits_in_the_first_layer_alone() -> None:
    torch.manual_seed(0)
    net, other = unit_nets.Chain(), unit_nets.Chain()
    pixels = torch.randint(0, 256, (8, 3, 10, 10)) / 256
    convert(net, "f8net", pixels, pixels=True)
    convert(other, "f8net", pixels)
    first = inputs(net)["a"]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(3):
        net.train()(pixels / 4).square().mean().backward()
        lowbit_step(net, optimizer)
        assert float(first.fraclen) == 8.0
    assert str(first.grid()).startswith("uint8·2^-8")
    assert torch.equal(first.eval()(pixels), pixels)
    assert inputs(other)["a"].fixed is None
    assert "a.lowbit_input" not in rule(net).fraclens()


def test_a_network_s_input_is_signed_and_rectified_tensors_are_not() -> None:
    net = converted("resnet")
    assert inputs(net)["conv1"].signed
    assert not any(inputs(net)[path].signed for path in ("layer1.0.conv1", "layer1.0.conv2", "fc"))
    linear = converted("mobilenet_v2")
    assert inputs(linear)["blocks.1.expand"].signed  # behind a linear bottleneck
    assert not inputs(linear)["blocks.1.depthwise"].signed


def test_without_a_clip_nothing_is_counted_in_other_units() -> None:
    net = converted("resnet", clip=False)
    assert alphas(net) == {}
    assert all(quantizer.unit() is None for quantizer in inputs(net).values())
    before = fraclens(net)
    train(net.train())
    assert any(not torch.equal(before[path], value) for path, value in fraclens(net).items())
