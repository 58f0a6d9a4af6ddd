"""WAGEUBN's options, presets and backends; what it converts and leaves; evaluation; two processes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launch import run_script
from schemes.conformance import Net, copy_of, differing, loader, net, trainer
from schemes.wageubn_nets import (
    Twin,
    chain,
    converted,
    direct,
    errors,
    images,
    norms,
    on_grid,
    residual,
    rule,
    scale,
    sgd,
    state,
    step,
    weights,
    widths,
)
from torch import Tensor, nn

from lightning_lowbit import QuantCallback, Wageubn, convert, load_from_checkpoint
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import Site, switch_of
from lightning_lowbit.modules.error_gate import ErrorForm, ErrorGate
from lightning_lowbit.modules.plane_layers import multiplies_integers
from lightning_lowbit.schemes import resolve

# -- options -------------------------------------------------------------------------------------------------
NUMBER = (None, "x", True, float("nan"))
WRONG: dict[str, tuple[Any, ...]] = {
    "preset": ("papers", 3),
    "bits": (1, 17, 8.0, "8", True),
    "weight_bits": (1, 17, 8.0, "8", True),
    "act_bits": (1, 17, 8.5),
    "act_format": ("fixed", (8, 1)),
    "act_init": ("maxx", None),
    "percentile": (0, 101, -1, *NUMBER),
    "width_share": (-0.1, 1.0, *NUMBER),
    "width_patience": (0, -1, 1.5, *NUMBER),
    "io": ("all", True),
    "weight_range": ("two",),
    "e1": ("shift", "shift1", "shift17", "float8", 8),
    "e2": ("flag", "flag1", "flag17", True),
    "clip_to_one": ("yes", 1),
    "sync_range": (1, None),
    "norms": ("no", None),
    "mean_bits": (0, 1, "16", 16.0, None),
    "deviation_bits": (0, 1, None),
    "xhat_bits": (0, 1, "8"),
    "gamma_bits": (0, 1.5),
    "beta_bits": (0, True),
    "running_bits": (0, 1, "16", True),
    "norm_momentum": (-0.1, 1.0, "x", True, float("nan")),
    "bias_bits": (1, 17),
    "gradient_bits": (1, 17, "15"),
    "momentum_bits": (1, 9),
    "accumulator_bits": (1, 17),
    "lr_bits": (1, 17),
    "stored_bits": (15, 32),
    "exact": ("no", None),
    "gradients": ("no", 1),
    "update": ("sgd",),
    "lr_scale": (0, -1.0, "2", None, True),
    "momentum": (-0.25, 1.0, "0.9", True, float("nan")),
    "clip_stored": (1,),
    "dr": (0, 1, 3, 100, "128", (128, 5), 2**16, (), True),
    "dr_at": ("soon", -1, (0, 2.5), ()),
    "rounding": ("up", None),
    "seed": ("0", 1.5, None, -1, True),
    "first_last": ("int4",),
    "quantize_norms": (1.5, -1, "10", None),
    "quantize_errors": ("x",),
    "quantize_gradients": (-0.5,),
    "freeze_widths": ("x", 2.0),
    "backend": ("tpu", None),
    "check": (1, None),
    "overrides": (
        3, {"a": 3}, {"a": {"bits": 8}}, {"a": {"weight_bits": 1}}, {"a": {"act_format": "fixed"}},
        {"a": {"act_format": (8,)}}, {"a": {"act_format": (1, 0)}}, {"a": {"act_format": (60, 0)}},
    ),
}  # fmt: skip
EXPECTED = ("expected", "not one of", "no such", "no option", "Give ")


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option, values in WRONG.items() for value in values], ids=str
)
def test_wrong_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Wageubn(**{option: value})
    words = str(caught.value)
    assert option.removeprefix("weight_") in words or (option == "bits" and "_bits" in words)
    shown = str(value[-1]) if isinstance(value, tuple) and value else str(value)
    assert isinstance(value, dict) or shown in words
    assert any(part in words for part in EXPECTED)


def test_every_option_has_a_wrong_value_here() -> None:
    assert WRONG.keys() == {field.name for field in dataclasses.fields(Wageubn)}


def test_gradients_that_are_not_quantized_have_no_integer_update() -> None:
    with pytest.raises(ConfigError, match=r"update='fake' or 'float', or gradients=True"):
        Wageubn(gradients=False)
    Wageubn(gradients=False, update="fake")
    with pytest.raises(ConfigError, match="2 values and 1 moments"):
        Wageubn(dr=(128, 32))


def test_presets_set_what_their_sources_do() -> None:
    assert Wageubn() == Wageubn(preset="recommended") == resolve("wageubn")
    paper, authors, pypi = (Wageubn(preset=name) for name in ("paper", "authors", "pypi"))
    assert (paper.act_format, paper.weight_range, paper.bias_bits, paper.xhat_bits) == ("fixed_unit", "one", 8, 16)
    assert (authors.clip_to_one, authors.xhat_bits, authors.io, authors.running_bits) == (True, 8, "none", 32)
    assert (authors.norm_momentum, authors.momentum, authors.clip_stored) == (0.003, 0.25, False)
    assert authors.dr == (128, 128, 32, 8, 2)
    assert (pypi.e1, pypi.e2, pypi.update, pypi.first_last, pypi.io) == ("off", "off", "float", "int8", "strict")
    assert Wageubn(preset="authors", xhat_bits=16).xhat_bits == 16
    assert authors.replace(preset="recommended") == Wageubn()
    assert authors.replace(xhat_bits=16) == Wageubn(preset="authors", xhat_bits=16)
    assert (Wageubn(bits=6).weight_bits, Wageubn(bits=6).act_bits, Wageubn(bits=6).e1) == (6, 6, "shift6")
    assert Wageubn().replace(bits=6) == Wageubn(bits=6)
    assert Wageubn(bits=6, act_bits=8).act_bits == 8


def test_options_survive_json() -> None:
    scheme = Wageubn(preset="authors", overrides={"conv*": {"act_format": (9, 2)}}, freeze_widths=None)
    given = {name: getattr(scheme, name) for name in WRONG}
    assert Wageubn(**json.loads(json.dumps({**given, "overrides": {}}))) == scheme.replace(overrides={})


@pytest.mark.parametrize("preset", ["recommended", "paper", "authors", "pypi"])
def test_every_preset_trains(preset: str) -> None:
    net = chain()
    convert(net, "wageubn", images(), preset=preset)
    before = copy_of(net)
    losses = [float(step(net.train(), sgd(net, 0.1), images())) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
    assert not torch.equal(net[2].weight, before["2.weight"])
    assert {q.form.policy for q in widths(net).values()} == {"fixed_unit" if preset in ("paper", "authors") else "fixed_width"}  # fmt: skip  # noqa: E501
    assert bool(errors(net)) == (preset != "pypi")


# -- what is converted ---------------------------------------------------------------------------------------
def test_first_and_last_layers_stay_float_unless_asked() -> None:
    net = chain()
    report = convert(net, "wageubn", images())
    assert set(weights(net)) == {"2.lowbit_weight", "5.lowbit_weight"}
    assert "first layer, by first_last='float'" in report.skipped["0"]
    assert "last layer" in report.skipped["9"]
    assert set(rule(net).stored) == {"2.weight", "3.weight", "3.bias", "5.weight", "5.bias"}
    net = converted(chain())
    assert set(weights(net)) == {f"{n}.lowbit_weight" for n in "0259"}
    assert net[0].lowbit_input.format.total == 8
    assert all(multiplies_integers(net[n]) for n in (0, 2, 5, 9))


def test_norms_false_leaves_them_as_they_are() -> None:
    net = converted(chain(), norms=False)
    assert type(net[3]) is nn.BatchNorm2d
    assert norms(net) == {}
    assert {"3.weight", "3.bias"} & rule(net).stored.keys() == set()


@pytest.mark.parametrize(("largest", "fit", "room"), [
    (0.05, -4, -2), (0.3, -1, 0), (0.9, 0, 0), (0.998, 1, 1), (5.0, 3, 3), (0.0, 0, 0),
])  # fmt: skip
def test_ranges_of_weights_hold_them_but_for_the_published_one(largest: float, fit: int, room: int) -> None:
    for choice, power in {"one": 0, "fit": fit, "room": room}.items():
        net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        with torch.no_grad():
            net[0].weight.mul_(largest / net[0].weight.abs().max())
        quantizer = weights(converted(net, images(8, 6), weight_range=choice))["0.lowbit_weight"]
        assert quantizer.power == power, choice
        clipped = float(net[0].weight.detach().abs().max()) > 127 / 128 * 2.0**power  # type: ignore[operator, union-attr]
        assert clipped == (choice == "one" and largest > 127 / 128)


def test_ranges_follow_where_weights_come_from() -> None:
    def powers(net: Any, **options: Any) -> list[int]:
        return [q.power for q in weights(converted(net, **options)).values()]

    seen = chain()
    seen(images())  # its norm has met data: trained elsewhere
    assert powers(seen) == powers(chain(), weight_range="fit") != powers(chain())
    assert powers(chain()) == powers(chain(), weight_range="room")


# -- errors --------------------------------------------------------------------------------------------------
def test_the_published_code_s_largest_error_code_is_one_more() -> None:
    g = torch.tensor([1.4, -1.4, 0.5, 0.001])
    values = {}
    for one in (False, True):
        gate = ErrorGate(ErrorForm("shift", 8, clip_to_one=one), "")
        values[one] = gate.values(g, switch_of(converted(chain())).run)
    assert (values[False] * 128).tolist() == [127.0, -127.0, 64.0, 0.0]
    assert (values[True] * 128).tolist() == [128.0, -128.0, 64.0, 0.0]


@pytest.mark.parametrize("form", ["shift8", "shift16", "flag8", "flag16", "off"])
def test_errors_at_results_are_as_fine_as_their_form(form: str) -> None:
    """One sample whose input is one code of one feature at a time: the products are the errors."""
    net = converted(nn.Sequential(nn.Linear(4, 4, bias=False)), torch.eye(4), e2=form)
    switch_of(net).managed = True
    g = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)) * torch.logspace(0, -6, 4)
    net(torch.eye(4)).backward(g)
    got, unit = net[0].weight.grad.double().t() / float(scale(g.double())), float(scale(g.double()))
    fraction = {"shift8": 7, "shift16": 15, "flag8": 14, "flag16": 30}.get(form)
    worst = {"shift8": 2.0**-8, "shift16": 2.0**-16, "flag8": 2.0**-8, "flag16": 2.0**-16, "off": 0.0}[form]
    assert fraction is None or on_grid(got, fraction)
    assert fraction is None or not on_grid(got, fraction - 1)
    error = (got * unit - g).abs()
    inside = g.abs() < 127 / 128 * unit  # not clipped
    assert float(error[inside].max()) <= worst * unit
    small = g.abs() < unit / 256
    assert bool(small.any())
    assert form != "flag8" or float(error[small].max()) <= 2.0**-15 * unit


# -- evaluation and backends ---------------------------------------------------------------------------------
def test_evaluation_is_the_formula_with_running_statistics() -> None:
    net = residual()
    net = train_on(converted(net, weight_range="fit"), 3)
    twin = Twin(net)
    seen: dict[str, Tensor] = {}
    for name, module in net.named_children():
        module.register_forward_hook(lambda m, a, y, name=name: seen.__setitem__(name, y.detach().double()))
    x = images(seed=3)
    with torch.no_grad():
        net.eval()(x)

    def norm(name: str, layer: str, x: Tensor) -> Tensor:
        unit = 2.0 ** twin.power[layer]
        wide = lambda t: t.reshape(1, -1, 1, 1)  # noqa: E731
        mean, var = twin.running[f"{name}.running_mean"] / unit, twin.running[f"{name}.running_var"] / unit**2
        s = direct(var.sqrt(), 16) + 2.0**-15
        xhat = direct((x / unit - wide(direct(mean, 16))) / wide(s), 16)
        return wide(direct(twin.p[f"{name}.weight"], 8)) * xhat + wide(direct(twin.p[f"{name}.bias"], 8))

    a = twin.activation("conv1", x.double())
    a1 = twin.activation("relu1", norm("bn1", "conv1", twin.layer("conv1", a, 1)).clamp(min=0))
    total = norm("bn2", "conv2", twin.layer("conv2", a1, 1)).float().double() + a1
    a2 = twin.activation("relu2", total.clamp(min=0))
    y = twin.activation("pool", F.avg_pool2d(twin.layer("conv3", a2, 0), 2))
    for name, want in {"relu1": a1, "relu2": a2, "pool": y, "conv2": twin.seen["conv2"]}.items():
        assert torch.equal(seen[name], want), name


def train_on(net: Any, steps: int) -> Any:
    for number in range(steps):
        step(net, sgd(net, 0.1), images(seed=number), lambda y: y.square().mean())
    return net


@pytest.mark.parametrize("options", [{}, {"e2": "flag16", "weight_bits": 12, "io": "strict", "e1": "flag8"}], ids=str)
def test_a_fit_has_the_same_bits_on_all_backends(options: dict[str, Any]) -> None:
    found = []
    for backend in ("int8", "simulate", "reference", "auto"):
        module = net()
        callback = QuantCallback(
            Wageubn(first_last="int8", backend=backend, seed=3, **options), start=0, evaluate=False
        )
        torch.manual_seed(5)
        trainer(callback).fit(module, loader(), loader())
        found.append(state(module))
    for other in found[1:]:
        assert differing(found[0], other) == []


def test_a_checkpoint_gives_the_network_back(tmp_path: Path) -> None:
    module = net()
    scheme = Wageubn(first_last="int8", weight_range="fit", overrides={"conv2": {"weight_bits": 6}})
    run = trainer(QuantCallback(scheme, start=0))
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    again = load_from_checkpoint(Net, tmp_path / "end.ckpt").eval()
    x = images(4, 1, 8, 8)
    assert torch.equal(again(x), module.eval()(x))
    assert again.conv2.lowbit_weight.bits == 6
    assert again.conv2.lowbit_weight.power == module.conv2.lowbit_weight.power < 0
    assert not torch.equal(again(x), torch.zeros(4, 3))


def test_quantizers_stand_where_the_publication_has_them() -> None:
    scheme = Wageubn(first_last="int8")
    site = Site("a", "error", "conv2d", "", True, slot="lowbit_error")
    assert scheme.quantizer(site) is not None
    net = converted(chain())
    assert all(widths(net)[f"{n}.lowbit_output"].gate is not None for n in (1, 4, 6))
    assert widths(net)["7.lowbit_output"].gate is None  # a mean: E1 belongs to activations
    assert set(errors(net)) == {f"{n}.lowbit_error" for n in "0259"}
    assert set(norms(net)) == {"3"}
    assert len(rule(net).gates) == 7


# -- two processes -------------------------------------------------------------------------------------------
def ranks_with_different_data_hold_the_same(ranks: Any) -> None:
    for run in ("plain", "shared", "fake"):
        _same(ranks, run)


def _same(ranks: Any, run: str) -> None:
    apart = [key for key in differing(*(rank[run] for rank in ranks)) if not key.startswith("own ")]
    assert {key.split(".")[-1] for key in apart} == {"running_mean", "running_var"}
    found = ranks[0][run]
    assert any(key.endswith("width") for key in found)
    assert any(key.startswith("master") for key in found) == (run != "fake")


def a_synchronized_norm_is_one_norm_of_all_values(ranks: Any) -> None:
    whole = ranks[0]["whole"]
    for name in ("y", "x"):
        got = torch.cat([rank["sync"][name] for rank in ranks])
        torch.testing.assert_close(got, whole[name], rtol=1e-6, atol=1e-6)
    for rank in ranks:
        assert torch.equal(rank["sync"]["running_mean"], whole["running_mean"])
        assert torch.equal(rank["sync"]["running_var"], whole["running_var"])


def widths_hold_the_data_of_all_ranks(ranks: Any) -> None:
    for rank in ranks:
        integer = int(rank["plain"]["conv1.lowbit_input.width"][0])
        assert 2.0**integer >= float(ranks[1]["plain"]["own largest"]) > 2.0 ** (integer - 1)
    assert float(ranks[0]["plain"]["own largest"]) * 4 < float(ranks[1]["plain"]["own largest"])


def errors_share_a_unit_where_asked(ranks: Any) -> None:
    for run, equal in (("plain", False), ("shared", True)):
        units = [rank[run]["own unit"] for rank in ranks]
        assert torch.equal(*units) == equal
    first = [rank["plain"]["own unit"][0] for rank in ranks]  # errors of the last layer
    assert torch.equal(ranks[0]["shared"]["own unit"][0], torch.maximum(*first))


def a_step_that_one_rank_must_skip_is_skipped_by_all(ranks: Any) -> None:
    for rank in ranks:
        assert float(rank["bad"]["own skipped"]) == 1
        assert all(bool(torch.isfinite(value).all()) for key, value in rank["bad"].items() if key[:3] != "own")
    apart = differing(ranks[0]["bad"], ranks[1]["bad"])
    assert {key for key in apart if not key.endswith(("running_mean", "running_var")) and key[:4] != "own "} == set()


def test_two_ranks(tmp_path: Path) -> None:
    """One pair of processes for all that is asked of them: starting it takes most of the time."""
    run_script(Path(__file__).with_name("wageubn_ranks.py"), tmp_path, ranks=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for check in (
        ranks_with_different_data_hold_the_same,
        a_synchronized_norm_is_one_norm_of_all_values,
        widths_hold_the_data_of_all_ranks,
        errors_share_a_unit_where_asked,
        a_step_that_one_rank_must_skip_is_skipped_by_all,
    ):
        check(ranks)
