"""What one layer's quantization costs: against networks computed by hand, in every scheme with float weights."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.modules.base import Tally, float_mode, switch_of
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.reports.effects import Effect, Measure
from lightning_lowbit.reports.sensitivity import Row, Sensitivity, sensitivity
from lightning_lowbit.schemes import convert

SCHEMES: list[tuple[str, dict[str, Any]]] = [
    ("tqt", {"bits": 4, "acc_bits": 16, "bias": "own"}),
    ("jacinto", {"bits": 4}),
    ("jacinto", {"avgpool": "float", "per_channel": "all"}),
    ("f8net", {"bits": 5}),
    ("f8net", {"ties": "realign", "avgpool": "shift"}),
    ("bnn", {"first": "int8", "last": "int8"}),
    ("wageubn", {"first_last": "int8", "norms": False}),
]


class Net(nn.Module):
    """A norm, rectifiers, a residual add, a pool and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.conv2(x) + x)
        y: Tensor = self.fc(self.pool(x).flatten(1))
        return y


def images(seed: int = 0) -> Tensor:
    return torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def converted(scheme: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    net(images())  # the norm sees something
    net.eval()
    convert(net, scheme, images(), **options)
    return net


def sqnr(y: Tensor, changed: Tensor) -> float:
    y, changed = y.detach().double(), changed.detach().double()
    return 10 * math.log10(float(y.square().sum() / (changed - y).square().sum()))


def simple() -> Any:
    """Two layers, whose quantized forms can be written down."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    convert(net, "tqt", torch.randn(32, 6), bits=4)
    return net


def test_rows_are_what_a_network_written_by_hand_has() -> None:
    net, x = simple(), torch.randn(8, 6)
    first, last = net[0], net[2]
    with torch.no_grad():
        w1, b1 = first.lowbit_weight.quantize(first.weight), first.lowbit_bias.quantize(first.bias)
        w2, b2 = last.lowbit_weight.quantize(last.weight), last.lowbit_bias.quantize(last.bias)
        y = last.op(torch.relu(first.op(x, first.weight, first.bias)), last.weight, last.bias)
        only_first = last.op(torch.relu(first.op(first.lowbit_input(x), w1, b1)), last.weight, last.bias)
        hidden = last.input_grid.quantize(torch.relu(first.op(x, first.weight, first.bias)))
        only_last = last.op(hidden, w2, b2)
    alone, others = sensitivity(net, x), sensitivity(net, [x], mode="all_but_one")
    assert [row.site for row in alone.rows] == ["0", "2"]
    assert alone["0"].effect.sqnr == pytest.approx(sqnr(y, only_first), abs=1e-3)
    assert alone["2"].effect.sqnr == pytest.approx(sqnr(y, only_last), abs=1e-3)
    # Of two layers, all but the first are the second alone.
    assert others["0"].effect == alone["2"].effect
    assert others["2"].effect == alone["0"].effect
    assert others.whole == alone.whole
    assert alone.whole.sqnr == pytest.approx(sqnr(y, net(x)), abs=1e-3)
    assert alone["2"].tensors == (last.input_grid.site.key, "2.lowbit_weight", "2.lowbit_bias")


def test_other_metrics_are_those_of_the_outputs() -> None:
    net, x, labels = simple(), torch.randn(8, 6), torch.arange(8) % 3
    batches = [(x[:5], labels[:5]), (x[5:], labels[5:])]
    found = sensitivity(net, iter(batches))
    with torch.no_grad(), float_mode(net):
        y = net(x).double()
    changed = net(x).detach().double()
    kl = nn.functional.kl_div(changed.log_softmax(1), y.log_softmax(1), log_target=True, reduction="batchmean")
    right, before = (changed.argmax(1) == labels).double().mean(), (y.argmax(1) == labels).double().mean()
    assert found.samples == 8
    assert found.whole.cosine == pytest.approx(float(torch.cosine_similarity(y.flatten(), changed.flatten(), 0)))
    assert found.whole.kl == pytest.approx(float(kl), rel=1e-4)
    assert found.accuracy == float(before)
    assert found.whole.accuracy_delta == pytest.approx(float(right - before))
    taken = sensitivity(net, batches, metrics=["accuracy"], target=lambda batch: (batch[1] + 1) % 3)
    assert taken.whole.sqnr is None
    assert taken.accuracy == pytest.approx(float((y.argmax(1) == (labels + 1) % 3).double().mean()))


@pytest.mark.parametrize(("scheme", "options"), SCHEMES, ids=str)
def test_every_layer_is_measured_and_the_network_is_as_before(scheme: str, options: dict[str, Any]) -> None:
    net, x = converted(scheme, options), images(1)
    net.conv1.weight.data *= 1.7  # type: ignore[operator, union-attr]  # grids that are noted when it runs are old
    for name, parameter in net.named_parameters():
        if name.endswith("alpha"):
            parameter.data *= 1.4  # tensors come in a unit of their own, as training makes them
    net.train()
    net.bn1.eval()  # type: ignore[union-attr]
    switch, tally = switch_of(net), Tally()
    switch.tally = tally
    state = {name: value.clone() for name, value in net.state_dict().items()}
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    flags = [(q.ready, getattr(q, "fused", None), len(q._forward_hooks)) for _, q in quantizers(net)]
    modes, rng = [part.training for part in net.modules()], torch.get_rng_state()
    alone = sensitivity(net, torch.utils.data.DataLoader(x, batch_size=8, shuffle=True))  # type: ignore[arg-type]
    others = sensitivity(net, [x], mode="all_but_one")
    assert torch.equal(torch.get_rng_state(), rng)
    assert modes == [part.training for part in net.modules()]
    assert flags == [(q.ready, getattr(q, "fused", None), len(q._forward_hooks)) for _, q in quantizers(net)]
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, buffers[name]) for name, value in net.named_buffers())
    assert switch.tally is tally
    assert not tally.seen
    assert {"conv1", "conv2", "fc"} <= {row.site for row in alone.rows} == {row.site for row in others.rows}
    active = {q.site.key for _, q in quantizers(net) if q.has_grid and q.site.role not in ("error", "unit")}
    assert {key for row in alone.rows for key in row.tensors} == active
    net.eval()
    with torch.no_grad():
        quantized = net(x)
        with float_mode(net):
            y = net(x)
    # Merged norms round otherwise than those of the float network.
    assert others.whole.sqnr == pytest.approx(sqnr(y, quantized), abs=0.02)
    if scheme != "bnn":  # half of a binary network is no better than all of it
        for row in (*alone.rows, *others.rows):
            assert row.effect.sqnr is not None
            assert row.effect.sqnr > others.whole.sqnr - 3  # type: ignore[operator]


def test_what_no_layer_reads_or_makes_has_a_row_of_its_own() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 2)
    )
    convert(net.eval(), "tqt", images())
    found = sensitivity(net, images(1))
    assert [row.site for row in found.rows] == ["0", "5", "3"]
    assert found["5"].tensors == ("3.lowbit_output", "5.lowbit_weight", "5.lowbit_bias")
    assert found["3"].tensors == ("2.lowbit_output",)
    with pytest.raises(KeyError, match="'4'; rows: 0, 5, 3"):
        found["4"]


def test_the_result_of_a_merged_norm_belongs_to_its_layer() -> None:
    class Residual(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.bn1(self.conv1(x))
            y: Tensor = self.fc(self.pool(self.conv2(x) + x).flatten(1))
            return y

    net = Residual().eval()
    convert(net, "tqt", images())
    assert "bn1.lowbit_output" in sensitivity(net, images(1))["conv1"].tensors


def test_after_an_error_in_the_forward_the_network_is_as_before() -> None:
    net = simple()
    with pytest.raises(RuntimeError, match="shapes"):
        sensitivity(net, [torch.randn(2, 6), torch.randn(2, 7)])
    assert all(q.ready and not q._forward_hooks for _, q in quantizers(net))


def test_rows_are_ranked_by_what_they_cost() -> None:
    def found(mode: Any) -> Sensitivity:
        effects = {"a": Effect(30.0, kl=0.1), "b": Effect(20.0, kl=0.3), "c": Effect(math.nan), "d": Effect(math.inf)}
        rows = tuple(Row(site, "", (), effect) for site, effect in effects.items())
        return Sensitivity(mode, 1, rows, Effect(10.0), None)

    assert [row.site for row in found("one").ranked()] == ["c", "b", "a", "d"]
    assert [row.site for row in found("all_but_one").ranked()] == ["d", "a", "b", "c"]
    assert [row.site for row in found("one").ranked("kl")] == ["b", "a"]
    with pytest.raises(ConfigError, match="Did you mean 'sqnr'"):
        found("one").ranked("sqrn")


def test_json_has_plain_numbers_and_null_for_what_is_equal() -> None:
    effects = Effect(math.inf, 1.0, 0.0)
    found = Sensitivity("one", 4, (Row("conv", "conv2d", ("conv.lowbit_weight",), effects),), Effect(20.5), 0.5, ("n",))
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["layers"] == [
        {"site": "conv", "pattern": "conv2d", "tensors": ["conv.lowbit_weight"], "sqnr": None, "cosine": 1.0,
         "kl": 0.0, "accuracy_delta": None}
    ]  # fmt: skip
    assert (content["mode"], content["whole"]["sqnr"], content["accuracy"]) == ("one", 20.5, 0.5)


def test_with_and_without_rich_the_same_words_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = sensitivity(simple(), [(torch.randn(8, 6), torch.arange(8) % 3)])
    found.show()
    colored = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich", None)
    found.show()
    plain = capsys.readouterr().out
    ruled = str.maketrans("", "", "─-")
    assert colored.translate(ruled).split() == plain.translate(ruled).split()
    assert plain.strip() == str(found)
    assert max(map(len, plain.splitlines())) <= 80
    worst = found.ranked()[0].site
    assert [line.split()[0] for line in str(found).splitlines() if line.endswith("worst")] == [worst]


def test_equal_outputs_and_outputs_that_are_no_numbers() -> None:
    y, measure = torch.ones(2, 3, dtype=torch.float64), Measure(("sqnr", "kl"))
    measure.add([y], [y], None)
    assert measure.effect() == Effect(math.inf, None, 0.0)
    measure.add([y], [y * math.inf], None)
    assert math.isnan(measure.effect().sqnr or 0.0)


@pytest.mark.parametrize(
    ("batches", "options", "words"),
    [
        ([], {}, "got no batch"), ([{"x": torch.zeros(2, 6)}], {}, "batch 0: got a dict"),
        ([torch.zeros(2, 6)], {"mode": "all_but_on"}, "Did you mean 'all_but_one'"),
        ([torch.zeros(2, 6)], {"metrics": ["kll"]}, "Did you mean 'kl'"),
        ([torch.zeros(2, 6)], {"metrics": []}, "got no metric"),
        ([(torch.zeros(2, 6), torch.zeros(2, 3).long())], {}, r"labels of shape \[2, 3\] for outputs \[2, 3\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_by_name(batches: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sensitivity(simple(), batches, **options)


def test_networks_that_have_no_float_layer_beside_are_refused() -> None:
    open_net = Net()
    convert(open_net, "tqt")
    with pytest.raises(ConfigError, match="Net is not calibrated"):
        sensitivity(open_net, images())
    with pytest.raises(ConfigError, match="no low-bit layer"):
        sensitivity(Net(), images())
    with pytest.raises(UnsupportedModelError, match="scheme niti, whose parameters are integers"):
        sensitivity(converted("niti", {}), images())
