"""Jacinto's options and presets, its answers about sites, and what it refuses."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from schemes.jacinto_nets import Wired, chain, clips, converted, images, layers, off, seen
from torch import Tensor, nn

from lightning_lowbit import Jacinto, Scheme
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.graph.plan import Site
from lightning_lowbit.modules.clipped import ClipQuantizer
from lightning_lowbit.modules.merged import MergedBias, MergedWeight
from lightning_lowbit.schemes import convert, resolve
from lightning_lowbit.schemes.jacinto_presets import DEFAULTS, PRESETS


# -- options -------------------------------------------------------------------------------------------------
def test_defaults_are_the_published_grid() -> None:
    scheme = Jacinto()
    assert isinstance(scheme, Scheme)
    assert {name: getattr(scheme, name) for name in DEFAULTS} == DEFAULTS
    assert (scheme.ste_weights, scheme.bn_value, scheme.act_round) == ("float", "running", "half_up")
    assert (scheme.range_sync, scheme.range_floor, scheme.range_subsample) == ("mean", 0.001, 1)


def test_two_ways_to_say_the_same_are_equal() -> None:
    assert Jacinto(preset="WT8SYMP2_AT8SYMP2") == Jacinto(preset="recommended") == Jacinto() == resolve("jacinto")
    assert Jacinto(bits=4) == Jacinto(weight_bits=4, act_bits=4) == Jacinto().replace(bits=4)
    assert Jacinto(preset="reference") == Jacinto.reference() == resolve("jacinto", preset="reference")
    assert pickle.loads(pickle.dumps(Jacinto.reference(bits=5))) == Jacinto.reference(bits=5)


def test_what_is_given_beside_a_preset_or_bits_wins() -> None:
    assert Jacinto(preset="reference", bias="float").bias == "float"
    assert Jacinto.reference(avgpool="exact").avgpool == "exact"
    assert Jacinto(preset="WC4_AT8", weight_bits=6).weight_bits == 6
    assert (Jacinto(bits=4, act_bits=8).weight_bits, Jacinto(bits=4, act_bits=8).act_bits) == (4, 8)


@pytest.mark.parametrize("start", ["reference", "MSA_WC4M4_AT8R4", "simple", "advanced"])
@pytest.mark.parametrize("preset", [*PRESETS, "WT8SYMP2_AT8SYMP2"])
def test_a_preset_replaces_another_whole(start: str, preset: str) -> None:
    assert Jacinto(preset=start).replace(preset=preset) == Jacinto(preset=preset)


def test_replacing_an_option_leaves_the_others() -> None:
    scheme = Jacinto.reference(bits=5).replace(range_shrink=0.5)
    assert (scheme.bias, scheme.weight_bits, scheme.range_shrink) == ("tidl", 5, 0.5)


def test_presets_are_what_they_are_called() -> None:
    reference, simple, advanced = (Jacinto(preset=name) for name in ("reference", "simple", "advanced"))
    assert (reference.bias, reference.snap_weights_at_start, reference.avgpool) == ("tidl", True, "float")
    assert (reference.freeze_batch_norm, reference.freeze_ranges) == ("half-1", "half+1")
    assert (simple.range_shrink, simple.constrain_weights, simple.bias_calibration) == (0.0, False, 0.0)
    assert (advanced.range_shrink, advanced.constrain_weights, advanced.bias_calibration) == (0.01, True, 0.05)


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("WC8_AT8", {"per_channel": "all", "power2": False, "symmetric": False, "weight_bits": 8, "act_bits": 8}),
        ("WC8SYMP2_AT8SYMP2", {"per_channel": "all", "power2": True, "symmetric": True}),
        ("WC8P2_AT8P2", {"per_channel": "all", "power2": True, "symmetric": False}),
        ("WC4_AT8", {"weight_bits": 4, "act_bits": 8, "weight_cap": None}),
        ("WC4M4_AT8", {"weight_bits": 4, "weight_cap": 4.0}),
        ("MSA_WC8_AT8R4", {"range_shrink": 0.0, "act_range": 4.0}),
        ("WC16_AT16", {"weight_bits": 16, "act_bits": 16}),
    ],
)
def test_formats_are_spelled_out(preset: str, settings: dict[str, Any]) -> None:
    scheme = Jacinto(preset=preset)
    assert {name: getattr(scheme, name) for name in settings} == settings


@pytest.mark.parametrize(
    "wrong",
    [{"bits": 1}, {"weight_bits": 17}, {"act_bits": 8.0}, {"power2": "yes"}, {"symmetric": 1}, {"per_channel": True},
     {"range_shrink": 51}, {"range_shrink": "0.1"}, {"range_floor": -0.1}, {"range_subsample": 5},
     {"range_sync": "max"}, {"batch_ranges": None}, {"weight_shrink": -1}, {"weight_cap": 0}, {"act_range": -4},
     {"ste_weights": "wq"}, {"bn_value": "ema"}, {"bias": "int16"}, {"act_round": "up"}, {"constrain_weights": 2},
     {"snap_weights_at_start": "once"}, {"dead_channels": "skip"}, {"avgpool": "shift"}, {"quantize_in": None},
     {"bias_calibration": 2.0}, {"freeze_batch_norm": 1.5}, {"freeze_ranges": "half+x"}, {"warmup": None},
     {"warmup": -1}],
    ids=lambda wrong: "-".join(f"{k}={v}" for k, v in wrong.items()),
)  # fmt: skip
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    (option,) = wrong
    with pytest.raises(ConfigError, match=f"{option}"):
        Jacinto(**wrong)


@pytest.mark.parametrize("preset", ["best", "WC8", "WT8P2_AT8", "W8_A8", "WC33_AT8", "WT1_AT8", ""])
def test_presets_that_there_are_not_are_refused(preset: str) -> None:
    with pytest.raises(ConfigError, match=r"Jacinto\("):
        Jacinto(preset=preset)


@pytest.mark.parametrize("rule", ["tidl", "tidl_scale"])
def test_bias_rules_of_symmetric_inputs_refuse_zero_points(rule: Any) -> None:
    with pytest.raises(ConfigError, match=f"bias='{rule}', symmetric=False.*bias='int32'"):
        Jacinto(bias=rule, symmetric=False)


@pytest.mark.parametrize(
    "wrong",
    [{"conv": {"bit": 4}}, {"conv": {"act_bits": 1}}, {"conv": {"range": 0}}, {"conv": {"range": (1, 1)}},
     {"conv": {"range": float("inf")}}, {"conv": {"range": float("nan")}}, {"conv": {"signed": "yes"}}, {"conv": 8},
     [1]],
    ids=str,
)  # fmt: skip
def test_wrong_overrides_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"Jacinto"):
        Jacinto(overrides=wrong)


def test_an_override_that_meets_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"convv.*"):
        convert(chain(), Jacinto(overrides={"convv*": {"act_bits": 4}}), images())


def test_unknown_options_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"range_shrnk.*range_shrink"):
        resolve("jacinto", range_shrnk=0.1)


# -- answers about sites -------------------------------------------------------------------------------------
def site(role: str, **about: Any) -> Site:
    return Site("conv", role, "conv2d", **about)


def test_weights_and_biases() -> None:
    weight = Jacinto(weight_bits=5, per_channel="depthwise").quantizer(site("weight"))
    assert isinstance(weight, MergedWeight)
    assert (weight.form.bits, weight.form.per_channel) == (5, False)
    deep = Jacinto(per_channel="depthwise").quantizer(site("weight", depthwise=True))
    assert isinstance(deep, MergedWeight)
    assert deep.form.per_channel
    bias = Jacinto().quantizer(site("bias"))
    assert isinstance(bias, MergedBias)
    assert bias.rule == "int32"
    assert Jacinto(bias="float").quantizer(site("bias")) is None


def test_roles_that_have_no_quantizer() -> None:
    for role in ("accumulator", "error", "weight_grad", "unit", "sum"):
        assert Jacinto().quantizer(site(role)) is None
    assert Jacinto().quantizer(site("input", source="output")) is None  # it comes on a grid
    assert Jacinto(quantize_in=False).quantizer(site("input", first=True)) is None
    assert Jacinto(quantize_in=False).quantizer(site("input")) is not None  # behind float code
    assert Jacinto(quantize_out=False).quantizer(site("result", last=True, read=False)) is None
    assert Jacinto(quantize_out=False).quantizer(site("result", read=False)) is not None


@pytest.mark.parametrize(("signed", "flag"), [(False, False), (True, None), (None, None)])
def test_signs_are_the_data_s_unless_a_rectifier_says_so(signed: bool | None, flag: bool | None) -> None:
    quantizer = Jacinto().quantizer(site("output", signed=signed))
    assert isinstance(quantizer, ClipQuantizer)
    assert quantizer.flag is flag
    assert quantizer.clips.tolist() == ([0, 8] if flag is False else [-8, 8])


def test_a_range_that_clips_is_the_grid_s() -> None:
    for scheme, want in ((Jacinto(), (-2.0, 2.0)), (Jacinto(act_range=4), (-4.0, 4.0))):
        quantizer = scheme.quantizer(site("output", clips=(-2.0, 2.0)))
        assert isinstance(quantizer, ClipQuantizer)
        assert quantizer.fixed == want


def test_overrides_reach_the_sites_that_they_name() -> None:
    net = converted(chain(), overrides={
        "3": {"weight_bits": 4}, "[25]": {"act_bits": 6}, "8": {"range": (-3, 2), "signed": True},
    })  # fmt: skip
    assert {path: layer.lowbit_weight.form.bits for path, layer in layers(net).items()} == {"0": 8, "3": 4, "8": 8}
    bits = {key: quantizer.form.bits for key, quantizer in clips(net).items()}
    assert bits == {
        "0.lowbit_input": 8, "2.lowbit_output": 6, "5.lowbit_output": 6, "6.lowbit_output": 8, "8.lowbit_output": 8
    }  # fmt: skip
    last = clips(net)["8.lowbit_output"]
    assert (last.fixed, float(last.limits().low), float(last.limits().high)) == ((-3, 2), -4, 4)


def test_the_first_pattern_wins() -> None:
    net = converted(chain(), overrides={"0": {"weight_bits": 6}, "*": {"weight_bits": 4}})
    assert [layer.lowbit_weight.form.bits for layer in layers(net).values()] == [6, 4, 4]


# -- whole networks ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", [*PRESETS, "WC8_AT8", "WC8P2_AT8P2", "MSA_WC8_AT8", "WC4M4_AT8", "WC16_AT16"])
def test_every_preset_is_near_the_float_network_and_trains(preset: str) -> None:
    net = chain()
    want = seen(net, images())(images())
    convert(net, Jacinto(preset=preset), images())
    assert off(net.eval()(images()), want) < (0.25 if "4" in preset else 0.06)
    net.train()(images()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize("ste_weights", ["float", "quantized", "folded"])
@pytest.mark.parametrize("narrow", [{"weight_cap": 0.125}, {"weight_shrink": 20.0, "power2": False}], ids=str)
def test_weights_beyond_a_narrower_range_have_gradients_where_their_backward_sees_them(
    narrow: dict[str, Any], ste_weights: str
) -> None:
    """Float masters have all; what goes through the quantized weight stops where that is clipped."""
    net = converted(chain(), ste_weights=ste_weights, **narrow)
    net.train()(images()).square().sum().backward()
    last = net[8]
    magnitude = last.weight.detach().abs()
    limit = 2.0**7 / float(last.lowbit_weight.scale(last.weight.detach()))
    clipped = magnitude > limit
    assert bool(clipped.any())
    assert bool((last.weight.grad[clipped] != 0).all()) == (ste_weights == "float")
    assert bool((last.weight.grad[~clipped] != 0).any())


def test_a_zero_point_keeps_nil_at_nil() -> None:
    net = converted(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)), symmetric=False)
    grid = clips(net)["0.lowbit_input"].grid()
    assert grid.zero_point not in (0, None)
    assert torch.equal(clips(net)["0.lowbit_input"].quantize(torch.zeros(3)), torch.zeros(3))


def test_options_are_documented() -> None:
    text = Jacinto.__doc__ or ""
    missing = [f.name for f in dataclasses.fields(Jacinto) if f"{f.name}:" not in text and f"{f.name}," not in text]
    assert missing == []


def test_double_networks_stay_double() -> None:
    net, x = chain().double(), images().double()
    want = seen(net, x)(x)
    convert(net, Jacinto(), x)
    for mode in (True, False):
        y: Tensor = net.train(mode)(x)
        assert y.dtype == torch.float64
    assert off(net.eval()(x), want) < 0.06


def test_layers_left_in_float_stay_float_and_what_they_give_is_quantized_where_it_is_read() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    torch.manual_seed(0)
    net = Wired(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 2, 1))
    converted(net, skip=["b"])
    assert type(net.b) is nn.Conv2d
    assert set(layers(net)) == {"a", "c"}
    assert layers(net)["c"].input_grid is not None
