"""F8Net with widths of their own for single layers: who has which, units that cancel all the same, and integers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from export.c99_harness import COMPILER, OPTIMIZED, Ends, compiled, differences, executed
from export.fixed_point_hops import Hops
from schemes.conformance import Case, images, loader, trainer
from schemes.conformance import Net as Conformant
from schemes.f8net_nets import distance, inputs, unit_of
from torch import Tensor, nn

from lightning_lowbit import F8Net, convert, lowbit_step, lower, summarize, verify
from lightning_lowbit.demos import DigitsCnn
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.export.c99 import export_c
from lightning_lowbit.modules.fixed_point import proved
from lightning_lowbit.modules.fixed_point_operands import FraclenWeight
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.plugins.checkpoint import save_compact
from lightning_lowbit.plugins.loading import load_from_checkpoint


class Joined(nn.Module):
    """b, c, d and, behind a mean, head read one edge class: a sum and a concat."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 4, 3, padding=1, bias=False) for i in (3, 4, 4))
        self.n, self.d, self.act = nn.BatchNorm2d(4), nn.Conv2d(8, 4, 3), act()
        self.fc, self.head = nn.Linear(4, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.n(self.a(x)))
        z = torch.cat([F.relu(y + self.b(y)), F.relu(self.c(y))], 1)
        return self.fc(F.relu(self.d(z)).mean((2, 3))) + self.head(z.mean((2, 3)))  # type: ignore[no-any-return]  # as modules are


class Pooled(nn.Module):
    """c, behind a mean, runs before b, which reads what that is the mean of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.c(y.mean((2, 3))) + self.b(y).mean((2, 3))  # type: ignore[no-any-return]  # as modules are


WIDTHS = {"a": (7, 8), "b": (8, 4), "c": (5, 6), "d": (6, 5), "fc": (8, 3), "head": (4, 8)}
"""Bits of what a layer reads, and of its weights."""


def overrides(more: int = 0, **widths: tuple[int, int]) -> dict[str, dict[str, int]]:
    chosen = {**WIDTHS, **widths}
    return {path: {"act_bits": act + more, "weight_bits": w + more} for path, (act, w) in chosen.items()}


def batch(seed: int = 0) -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def low(scheme: F8Net, steps: int = 2, net: nn.Module | None = None) -> nn.Module:
    """Calibrated, trained for a few steps, in evaluation."""
    torch.manual_seed(0)
    net = net or Joined()
    convert(net, scheme, batch())
    optimizer = torch.optim.SGD(net.train().parameters(), 0.05)
    for step in range(steps):
        optimizer.zero_grad()
        net(batch(1 + step)).square().mean().backward()
        lowbit_step(net, optimizer)
    return net.eval()


# -- who has which -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ties", ["shared", "realign"])
def test_every_layer_has_its_own_widths(ties: Any) -> None:
    net: Any = low(F8Net(ties=ties, overrides=overrides()))
    readers = inputs(net)
    found = {
        path: (readers[path].grid().bits, net.get_submodule(path).lowbit_weight.grid().bits) for path in WIDTHS
    }  # fmt: skip
    assert found == WIDTHS
    assert {path for path, reader in readers.items() if reader.leader is readers["c"]} == {"b", "c", "d", "head"}
    assert {path for path, reader in readers.items() if reader.private} == {"b", "d", "fc", "head"}
    assert len({unit_of(readers[path]) for path in ("b", "c", "d", "head")}) == 1
    assert "uint5·2^" in str(summarize(net))


def test_one_width_is_as_without_overrides() -> None:
    plain, named = low(F8Net(act_bits=6)), low(F8Net(overrides={"*": {"act_bits": 6}}))
    assert torch.equal(plain(batch(9)), named(batch(9)))
    first = inputs(low(F8Net(overrides={"*": {"act_bits": 6}}), 0, Pooled()))
    assert first["b"].leader is first["c"]  # the first one, whatever it reads


def test_the_first_pattern_that_says_it_counts() -> None:
    net: Any = low(F8Net(act_bits=7, overrides={"b": {"act_bits": 4}, "[bc]": {"act_bits": 5, "weight_bits": 3}}), 0)
    assert [inputs(net)[path].grid().bits for path in "bcd"] == [4, 5, 7]
    assert net.b.lowbit_weight.grid().bits == 3


def test_eight_bits_have_the_closed_form_and_others_search() -> None:
    net = low(F8Net(select="rms", overrides=overrides()), 0)
    assert {path: reader.form.select for path, reader in inputs(net).items() if path in WIDTHS} == {
        "a": "grid", "b": "rms", "c": "grid", "d": "grid", "fc": "rms", "head": "grid",
    }  # fmt: skip


# -- units ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ties", ["shared", "realign"])
def test_mixed_widths_keep_the_float_function_and_no_fraclen_moves_it(ties: Any) -> None:
    torch.manual_seed(0)
    float_net = Joined().eval()
    want = float_net(batch()).detach()
    net = low(F8Net(ties=ties, select="grid", overrides=overrides(more=8)), 0, float_net)
    assert distance(net(batch()), want) < 2e-3
    readers = inputs(net)
    for source in readers.values():
        if source.alpha is not None and source.leader is source:
            with torch.no_grad():
                source.alpha.mul_(1.37)  # no power of two any more
    want = net(batch()).detach()
    readers["c"].fraclen.sub_(2)
    assert distance(net(batch()), want) < 2e-3


def test_calibration_finds_each_width_its_own_end() -> None:
    """In true units the same as without a clip, where every reader is alone (fc's would be beyond its point there)."""
    ends = []
    for clip in (True, False):
        torch.manual_seed(0)
        net = Joined().eval()
        convert(net, F8Net(clip=clip, overrides=overrides(c=(2, 6))), batch() ** 3 / 6)  # a heavy tail
        readers = {path: reader for path, reader in inputs(net).items() if path != "fc"}
        ends.append({path: q.qmax * unit_of(q) * 2.0 ** -int(q.rounded()) for path, q in readers.items()})
    assert ends[0] == ends[1]
    assert ends[0]["b"] > 1.5 * ends[0]["c"]  # of the same tensor, by 8 and by 2 bits


def test_a_bound_of_six_is_kept_where_clips_end_elsewhere() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 3), "c": nn.Linear(6, 3)})

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m, self.six = net, nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            y = self.six(self.m["a"](x))
            return self.m["b"](y) + self.m["c"](y)  # type: ignore[no-any-return]  # as modules are

    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)) * 12
    module: Any = Two().eval()
    want = module(x).detach()
    report = convert(module, F8Net(overrides={"m.b": {"act_bits": 12}, "m.c": {"act_bits": 14}}), x)
    assert ["readers of several widths" in note for note in report.notes] == [True]
    assert distance(module(x), want) < 0.02
    assert torch.equal(torch.from_numpy(lower(module, x).run(x)), module(x))


@pytest.mark.filterwarnings("ignore:.*calibration saw values up to:UserWarning")
def test_codes_that_end_too_early_are_told() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"c.lowbit_input: 2-bit codes would need -\d+ bits .* that b sets with 12"):
        convert(Pooled(), F8Net(overrides={"b": {"act_bits": 12}, "c": {"act_bits": 2}}), 3000 * batch())


# -- integers ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"ties": "realign"}, {"avgpool": "shift"}, {"clip": False}], ids=str)
def test_evaluation_is_integer_execution(options: dict[str, Any]) -> None:
    net = low(F8Net(**options, rescale="none", overrides=overrides()))
    x = 2 * batch(5)
    assert torch.equal(Hops(net).run(x), net(x))
    program = lower(net, x)
    assert torch.equal(torch.from_numpy(program.run(x)), net(x))
    assert verify(net, program, [x]).ok


@pytest.mark.parametrize("act", [4, 8], ids=["narrow", "wide"])
def test_digits(act: int) -> None:
    torch.manual_seed(0)
    net, x = DigitsCnn(channels=4).eval(), torch.rand(4, 1, 8, 8)
    scheme = F8Net(
        bits=6, overrides={"conv[24]": {"weight_bits": 3}, "conv4": {"act_bits": act}, "fc": {"act_bits": 5}}
    )
    convert(net, scheme, x)
    assert verify(net, lower(net, x), [x, 3 * x]).ok


@pytest.mark.skipif(COMPILER is None, reason="no C compiler on the PATH")
def test_the_network_in_c(tmp_path: Path) -> None:
    program = lower(low(F8Net(rescale="none", overrides=overrides())), batch()[:1])
    export_c(program, tmp_path / "network.c")
    (tmp_path / "driver.c").write_text(Ends(program).driver(tmp_path / "network.c"))
    binary = compiled([tmp_path / "driver.c"], [*OPTIMIZED, "-DLOWBIT_NO_MAIN"], tmp_path / "driver")
    samples = [batch(7).numpy()]
    code, written = executed(binary, Ends(program).stream(samples))
    assert code == 0
    assert not differences(program, samples, written)


@pytest.mark.parametrize(("weight_bits", "single"), [(8, True), (12, False)])
def test_a_compiled_layer_assumes_the_largest_weight_of_its_own_width(
    weight_bits: int, single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net: Any = nn.Sequential(nn.Linear(100, 2, bias=False))
    convert(net, F8Net(rescale="none", overrides={"0": {"weight_bits": weight_bits}}), torch.randn(4, 100))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert proved(net[0], net[0].weight, None) == single


def test_a_bias_is_as_wide_as_its_own_layer_s_products_ask() -> None:
    net: Any = low(F8Net(overrides={"d": {"act_bits": 12}}), 0)
    assert (net.d.lowbit_bias.bits, net.fc.lowbit_bias.bits) == (48, 32)


# -- files ---------------------------------------------------------------------------------------------------
def test_checkpoints_keep_the_widths(tmp_path: Path) -> None:
    named = {"conv2": {"weight_bits": 4, "act_bits": 5}, "conv3": {"act_bits": 4}, "fc": {"weight_bits": 6}}
    case = Case("f8net", {"rescale": "none", "overrides": named})
    torch.manual_seed(0)
    module = Conformant()
    run = trainer(case.callback(), max_steps=2)
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "full.ckpt")
    save_compact(module.eval(), tmp_path / "compact.ckpt")
    for file in ("full.ckpt", "compact.ckpt"):
        loaded: Any = load_from_checkpoint(Conformant, tmp_path / file).eval()
        assert loaded.conv2.scheme.overrides == named
        assert inputs(loaded)["conv3"].leader is inputs(loaded)["conv3"]
        assert torch.equal(loaded(images(1)), module(images(1)))


# -- what is refused -----------------------------------------------------------------------------------------
def test_overrides_are_an_option_like_others() -> None:
    scheme = F8Net(overrides={"b": {"act_bits": 4}})
    assert pickle.loads(pickle.dumps(scheme)) == scheme == F8Net().replace(overrides={"b": {"act_bits": 4}})
    assert scheme != F8Net()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": {"b": {"act_bit": 4}}}, r"no option 'act_bit'.*'act_bits'"),
        ({"overrides": {"b": {"act_bits": 1}}}, r"overrides\['b'\].act_bits=1\): expected an integer from 2 to 16"),
        ({"overrides": {"b": 4}}, "expected options by module-path pattern"),
        ({"overrides": {"bb": {"act_bits": 4}}}, "nothing that is converted has such a path"),
        ({"overrides": {"act": {"act_bits": 4}}}, "'act': .*the path of what has act_bits. Did you mean 'b'"),
        (
            {"overrides": {"c": {"act_bits": 4}}, "ties": "reference"},
            "got 8 act_bits for b and 4 for c, expected one width",
        ),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(Joined(), F8Net(**options))


def test_channels_of_their_own_have_eight_bits() -> None:
    with pytest.raises(ConfigError, match="got widths of 4, 8 bits, expected 8"):
        F8Net.reference(per_channel=True, overrides={"b": {"weight_bits": 4}})


# -- saturation of channels ----------------------------------------------------------------------------------
def test_saturation_is_counted_by_each_channel_s_own_fraclen() -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    x = torch.rand(2, 2, 4, 4)
    convert(net, F8Net.reference(per_channel=True), x)
    reader, weight = net[3].lowbit_input, net[3].lowbit_weight
    assert isinstance(reader, FraclenInput)
    assert isinstance(weight, FraclenWeight)
    reader.fraclen.copy_(torch.tensor([8.0, 4.0, 0.0]))  # ends at about 1, 16 and 255
    assert int(reader.saturated(torch.full((1, 3, 1, 1), 10.0))) == 1
    assert int(reader.saturated(torch.full((1, 3, 1, 1), 300.0))) == 3
    weight.fraclen = torch.tensor([7, 0])  # ends at about 1 and 127
    assert int(weight.saturated(torch.full((2, 3, 1, 1), -10.0))) == 3
