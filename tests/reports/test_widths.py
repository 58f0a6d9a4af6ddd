"""How wide tensors and sums are: against codes counted one by one, in every scheme; and the table of them."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plugins.lifecycle_nets import QUIET, loader, seeded_net, trainer
from torch import Tensor, nn

from lightning_lowbit import Bnn, F8Net, Jacinto, Niti, QuantCallback, Scheme, Tqt, convert, summarize
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import Site, Tally, low_bit_modules, switch_of
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.widths import Format, accumulator_bits
from lightning_lowbit.reports.widths import Row, Widths

pytestmark = QUIET


class Net(nn.Module):
    """A grouped and a transposed convolution, a sum, and layers of more outputs than inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.relu2, self.pool, self.fc = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)) + x)
        y: Tensor = self.fc(self.pool(x).flatten(1))
        return y


def calibrated(scheme: Scheme, net: nn.Module | None = None) -> nn.Module:
    """In evaluation mode; biases are of some size, so that they count, and channels differ."""
    torch.manual_seed(0)
    net = (net or Net()).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.tensor([0.25, 1, 2, 1])
            nn.init.uniform_(module.bias, -1, 1)
    convert(net, scheme, torch.randn(8, 3, 6, 6) * torch.tensor([0.25, 1, 2]).reshape(3, 1, 1))
    return net


def layers(net: nn.Module) -> dict[str, LowBitLayer]:
    return {path: module for path, module in low_bit_modules(net) if isinstance(module, LowBitLayer)}


@torch.no_grad()
def largest_sum(layer: LowBitLayer) -> float:
    """sum |w| max|x| + |b| of the worst output, in units of one product, output by output, from what a layer holds."""
    assert layer.input_grid is not None
    assert layer.lowbit_weight is not None
    weight, bias = layer.in_evaluation()
    weight = layer.lowbit_weight.quantize(weight.detach()).double()
    x, w = layer.input_grid.grid(), layer.lowbit_weight.grid()
    bias = bias if bias is None or layer.lowbit_bias is None else layer.lowbit_bias.quantize(bias.detach()).double()
    sums = []
    for o in range(weight.shape[0]):
        step = w.steps[o] if w.axis is not None else w.step
        rows = weight[o].reshape(weight.shape[1], -1).abs().sum(1)
        group = o * layer.groups // weight.shape[0]
        units = [x.steps[group * len(rows) + i] if x.axis is not None else x.step for i in range(len(rows))]
        worst = max(x.zero_point - x.qmin, x.qmax - x.zero_point)
        total = sum(float(row) / step * unit / min(x.steps) * worst for row, unit in zip(rows, units, strict=True))
        if layer.lowbit_bias is not None and bias is not None:
            total += abs(round(float(bias[o]) / step / min(x.steps)))
        sums.append(total)
    return max(sums)


@pytest.mark.parametrize(
    "scheme",
    [
        Tqt(bits=4), Tqt(bias="float"), F8Net(), F8Net.reference(per_channel=True), Jacinto(),
        Jacinto(per_channel="all"), Jacinto(power2=False, symmetric=False, per_channel="all"),
        Bnn(first="int8", last="int8"), Niti(norms="island"), Niti(norms="fold"),
    ],
    ids=[
        "tqt", "float_bias", "f8net", "f8net_per_channel", "jacinto",
        "jacinto_per_channel", "jacinto_affine",
        "bnn", "niti", "niti_folded",
    ],
)  # fmt: skip
def test_a_sum_needs_what_its_worst_input_makes_of_its_weights(scheme: Scheme) -> None:
    net = calibrated(scheme)
    report = summarize(net)
    assert len(layers(net)) == 3
    for path, layer in layers(net).items():
        assert report[f"{path}.sum"].accumulator_bits == round(largest_sum(layer)).bit_length() + 1
    net.train()  # what is reported is evaluation's, as at the end of a run
    again = summarize(net)
    for path in layers(net):
        assert again[f"{path}.sum"] == report[f"{path}.sum"]


def test_outputs_of_a_transposed_convolution_stand_group_by_group() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    torch.manual_seed(0)
    with torch.no_grad():
        net[0].weight[:2] *= 1e-2  # of the first group
    convert(net, Tqt(bias="float"), torch.rand(4, 4, 5, 5))
    layer, codes = net[0], None
    assert layer.lowbit_weight is not None
    codes = layer.lowbit_weight.quantize(layer.weight.detach()) / layer.lowbit_weight.grid().step
    sums = [codes[2 * g : 2 * g + 2, o].abs().sum() for g in range(2) for o in range(3)]
    source = layer.input_grid.grid()
    largest = int(max(sums)) * max(source.qmax, -source.qmin)
    assert summarize(net)["0.sum"].accumulator_bits == largest.bit_length() + 1


def test_channels_on_steps_of_their_own_add_up_on_the_finest() -> None:
    net = calibrated(F8Net.reference(per_channel=True))
    layer = layers(net)["conv2"]  # of two groups
    assert layer.lowbit_input is not None
    common = summarize(net)["conv2.sum"].accumulator_bits
    layer.lowbit_input.fraclen.copy_(torch.tensor([7.0, 7.0, 1.0, 7.0]))
    row = summarize(net)["conv2.sum"]
    assert row.accumulator_bits == round(largest_sum(layer)).bit_length() + 1
    assert common is not None
    assert row.accumulator_bits > common + 4


def test_grids_that_follow_their_weight_are_those_of_the_present_one() -> None:
    net = calibrated(F8Net())
    before = summarize(net)["fc.weight"].fraction
    assert before is not None
    with torch.no_grad():
        layers(net)["fc"].weight.mul_(0.25)
    assert summarize(net)["fc.weight"].fraction == before + 2


def test_signs_need_one_bit_more_than_they_are() -> None:
    net = calibrated(Bnn(first="int8", last="int8"))
    assert summarize(net)["conv2.sum"].accumulator_bits == (2 * 9).bit_length() + 1


def test_a_sum_of_two_tensors_has_the_bits_of_its_format() -> None:
    report = summarize(calibrated(Tqt()))
    (add,) = (row for row in report.rows if row.site == "lowbit_add" and row.role == "sum")
    assert add.grid is not None
    assert add.accumulator_bits == add.total == add.grid.bits


def test_weights_that_are_no_numbers_leave_the_worst_case() -> None:
    net = calibrated(Tqt(bias="float"))
    with torch.no_grad():
        layers(net)["conv2"].weight[0, 0, 0, 0] = float("nan")
    row = summarize(net)["conv2.sum"]
    assert (row.exact, row.accumulator_bits) == (False, accumulator_bits(8, 8, 2 * 9))


def test_sums_of_products_that_are_rounded_are_not_exact_however_few_bits_they_need() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    convert(net, Jacinto(power2=False), torch.rand(8, 4))
    row = summarize(net)["0.sum"]
    assert row.exact is False
    assert row.accumulator_bits is not None
    assert row.accumulator_bits <= 18


def test_a_network_that_is_not_calibrated_says_float() -> None:
    net = Net()
    convert(net, "tqt")
    widths = summarize(net).widths()
    assert {(row.total, row.integer, row.accumulator_bits) for row in widths.rows} == {(None, None, None)}
    assert {line.split()[1] for line in table_of(widths)[2:]} == {"float"}
    assert "not known yet" in str(widths)


def table_of(widths: Widths) -> list[str]:
    return str(widths).partition("\n\n")[0].splitlines()


def cells_of(widths: Widths) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in table_of(widths)[2:]}


def test_the_table_has_a_line_for_every_tensor() -> None:
    report = summarize(calibrated(Tqt(bits=4)))
    lines = cells_of(report.widths())
    assert list(lines) == [row.name for row in report.rows]
    for row in report.rows:
        needs = [] if row.accumulator_bits is None else [str(row.accumulator_bits)]
        assert row.total is not None
        assert row.integer is not None
        assert row.total == int(bool(row.signed)) + row.integer + (row.fraction or 0)
        assert lines[row.name] == [
            str(row.total), str(row.integer), str(row.fraction), "yes" if row.signed else "no", *needs,
        ]  # fmt: skip


def test_channels_have_a_span_and_other_steps_no_point() -> None:
    net = calibrated(Jacinto(per_channel="all"))
    with torch.no_grad():
        layers(net)["fc"].weight.copy_(torch.tensor([1, 1 / 8, 1, 1, 1])[:, None] * torch.ones(4))
    report = summarize(net)
    low, high = cells_of(report.widths())["fc.weight"][2].split("..")
    assert int(high) == int(low) + 3
    assert report["fc.weight"].fraction == int(low)
    assert "of a tensor's channels" in str(report.widths())
    affine = summarize(calibrated(Jacinto(power2=False))).widths()
    assert table_of(affine)[0].split() == ["tensor", "total", "signed", "sum", "needs"]
    assert "no power of two" in str(affine)


def test_errors_have_no_line_before_there_are_any() -> None:
    report = summarize(calibrated(Niti()))
    assert report["fc.error"].total == 8
    widths = report.widths()
    assert not any("error" in name for name in cells_of(widths))
    absent = sum("error" in row.role for row in report.rows)
    assert f"not listed: {absent} that held nothing but zeros so far" in str(widths)


def test_parts_of_a_quantizer_stand_with_their_module() -> None:
    report = summarize(calibrated(Niti()))
    sites = [row.site for row in report.rows]
    assert sites == sorted(sites, key=sites.index)  # arriving errors have modules of their own, and no place of theirs


def test_more_than_31_bits_are_marked_and_noted() -> None:
    wide = Tqt(act_bits=16, weight_bits=16, input_bits=16, operand_bits=16, first_last_weight_bits=16)
    report = summarize(calibrated(wide))
    row = report["fc.sum"]
    assert row.accumulator_bits is not None
    assert row.accumulator_bits > 31
    assert row.too_wide
    lines = cells_of(report.widths())
    assert lines["fc.sum"][-3:] == [str(row.accumulator_bits), ">", "31"]
    assert "> 31: an int32 has no bit left" in str(report.widths())
    assert f"fc ({row.accumulator_bits})" in " ".join(str(report).split())
    narrow = summarize(calibrated(Tqt()))
    assert "31" not in str(narrow.widths())
    assert "31" not in str(narrow)


class NormFormats(Quantizer):
    """As a batch norm between integers has it: several tensors, none of which is its result."""

    has_grid = False

    def formats(self) -> dict[str, Format | None]:
        return {"mean": Format(16, 0), "xhat": None, "gamma": Format(9, 1)}

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        return x

    def exponent(self) -> Tensor:
        raise NotImplementedError

    def grid(self) -> Grid:
        raise NotImplementedError


def test_formats_within_a_norm_have_lines() -> None:
    net = calibrated(Tqt())
    before = str(summarize(net))
    holder = NormFormats(Site("bn2", "sum", "batch_norm", slot="lowbit_accumulator"))
    holder.switch = switch_of(net)
    net.bn2.register_module("lowbit_accumulator", holder)
    tally = Tally(seen={"bn2.gamma": 4}, saturated={"bn2.gamma": torch.tensor(1.0)})
    report = summarize(net, tally)
    lines = cells_of(report.widths())
    assert lines["bn2.mean"] == ["16", "0", "15", "yes"]
    assert lines["bn2.gamma"] == ["9", "1", "7", "yes", "25.00", "%"]
    assert lines["bn2.xhat"] == ["float"]
    sites = [row.site for row in report.rows]
    assert sites.index("conv2") < sites.index("bn2") < sites.index("lowbit_add")
    assert str(summarize(net)) == before  # no float activation, no other line


def test_the_table_fits_80_columns_and_says_the_same_without_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = "backbone.features.layer1.0.conv2"
    rows = [
        Row(path, "weight", "conv2d", Grid(8, (-9, -7), axis=0), 0.125),
        Row(path, "sum", "conv2d", Grid(32, -14), None, False, 33),
    ]
    Widths(rows).show()
    colored = capsys.readouterr().out
    assert max(map(len, colored.splitlines())) <= 80
    assert "1.0.conv2.weight" in colored
    monkeypatch.setitem(sys.modules, "rich", None)
    Widths(rows).show()
    plain = capsys.readouterr().out
    assert max(map(len, plain.splitlines())) <= 80
    ruled = str.maketrans("", "", "─-")
    assert colored.translate(ruled).split() == plain.translate(ruled).split()


def fitted(callback: QuantCallback, folder: Path) -> Any:
    net = seeded_net()
    run = trainer(folder, callback, max_epochs=1, limit_train_batches=2)
    run.fit(net, loader(), loader())
    return net


@pytest.mark.parametrize("scheme", ["tqt", "niti"])
def test_the_callback_prints_the_widths_of_its_module(
    scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = QuantCallback(scheme, start=0)
    with pytest.raises(ConfigError, match=r"no converted module yet.*trainer\.fit\(model\).*summarize\(model\)"):
        callback.width_report()
    net = fitted(callback, tmp_path)
    capsys.readouterr()
    widths = callback.width_report()
    printed = capsys.readouterr().out.split()
    assert [row.name for row in widths.rows] == [row.name for row in summarize(net).rows]
    assert {"body.conv1.sum", "saturation", "%", *map(str, cells_of(widths)["body.fc.weight"])} <= set(printed)
    if scheme == "niti":
        assert "body.conv2.error" in printed  # there are errors by now


def test_a_callback_that_ran_pickles_without_its_module(tmp_path: Path) -> None:
    callback = QuantCallback("tqt")
    trainer(tmp_path, callback, limit_val_batches=1).validate(seeded_net(), loader(), verbose=False)
    assert callback.width_report().rows
    copied = pickle.loads(pickle.dumps(callback))
    assert copied.scheme == callback.scheme
    with pytest.raises(ConfigError, match="no converted module"):
        copied.width_report()
