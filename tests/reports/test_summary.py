"""The report: every tensor in its rows, a line a layer in print, claims that follow from the network."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import Tally, switch_of
from lightning_lowbit.reports import table
from lightning_lowbit.reports.summary import Summary, print_report, summarize
from lightning_lowbit.schemes import convert
from lightning_lowbit.schemes.tqt import Tqt

METRICS = {
    "float": {"val_acc": 0.975, "val_loss": 0.0658},
    "calibrated": {"val_acc": 0.9556, "val_loss": 0.11716},
    "trained": {"val_acc": 1.0, "val_loss": 12.5},
}


class Net(nn.Module):
    """Registered in another order than it runs; the add is functional and registers last of all."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        x = self.bn2(self.conv2(x)) + x
        y: Tensor = self.fc(self.pool(x).flatten(1))
        return y


def converted(net: nn.Module | None = None, scheme: Tqt | None = None, batch: Tensor | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = (net or Net()).eval()
    convert(net, scheme or Tqt(bits=4), torch.rand(4, 1, 6, 6) if batch is None else batch)
    return net


def tallied(net: nn.Module, batch: Tensor) -> Summary:
    switch = switch_of(net)
    switch.tally = tally = Tally()
    net(batch)
    switch.tally = None
    return summarize(net, tally)


@pytest.fixture
def report() -> Summary:
    return tallied(converted(), torch.rand(4, 1, 6, 6))


def test_lines_stand_in_the_order_of_execution_and_name_both_factors(report: Summary) -> None:
    assert [line.site for line in report.lines] == ["conv1", "conv2", "lowbit_add", "pool", "fc"]
    grids = {line.site: line.grid for line in report.lines}
    for layer, source in (("conv1", "conv1.input"), ("conv2", "conv2.input"), ("fc", "pool.output")):
        source_grid, weight_grid = report[source].grid, report[f"{layer}.weight"].grid
        assert grids[layer] == f"{str(source_grid).split()[0]} × {str(weight_grid).split()[0]}"
    operands = {str(report[key].grid).split()[0] for key in ("relu.output", "bn2.output")}
    assert set(grids["lowbit_add"].split(" + ")) == operands
    assert grids["pool"].endswith(f"→ {str(report['pool.output'].grid).split()[0]}")
    patterns = {line.site: line.pattern for line in report.lines}
    assert (patterns["conv1"], patterns["conv2"], patterns["lowbit_add"]) == (
        "conv2d+relu",
        "conv2d+bn",
        "add",
    )


def test_every_tensor_has_a_row_and_rows_run_in_order(report: Summary) -> None:
    sites = list(dict.fromkeys(row.site for row in report.rows))
    assert sites == ["conv1", "relu", "conv2", "bn2", "lowbit_add", "pool", "fc"]
    assert {row.role for row in report.rows if row.site == "conv1"} == {"input", "weight", "bias", "sum"}
    with pytest.raises(KeyError, match=r"conv9.*conv1\.weight"):
        report["conv9"]


def test_saturation_is_the_share_of_the_worst_tensor_of_a_line() -> None:
    batch = 0.9 * torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))  # well inside [-1, 0.99]
    net = converted(batch=batch)
    far = batch.clone()
    far[:, :, :3] = 100.0  # half of the input values lie beyond its grid
    report = tallied(net, far)
    assert report["conv1.input"].saturation == 0.5
    (line,) = [line for line in report.lines if line.site == "conv1"]
    assert line.saturation == 0.5
    assert "50.00 %" in str(report)
    assert "saturation" not in str(summarize(net)).splitlines()[0]  # nothing was counted: no column


def test_exact_is_judged_by_the_actual_weights() -> None:
    batch = torch.rand(2, 1, 6, 6)
    small = converted(scheme=Tqt(act_bits=16, weight_bits=16, input_bits=16, operand_bits=16), batch=batch)
    report = summarize(small)
    assert report["conv2.sum"].exact is False
    assert "not proved exact" in str(report)
    assert "  no" in str(report)
    assert summarize(converted(batch=batch))["conv2.sum"].exact is True


def test_a_float_bias_is_on_no_grid_and_sums_with_it_are_not_exact() -> None:
    report = summarize(converted(scheme=Tqt(bias="float")))
    assert report["conv1.sum"].exact is False
    assert report["conv2.sum"].exact is False  # its norm makes a bias


def test_summarizing_changes_nothing() -> None:
    net = converted()
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    rng = torch.get_rng_state()
    summarize(net)
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_an_open_network_says_so() -> None:
    net = Net()
    convert(net, "tqt")
    report = summarize(net)
    assert report["conv1.weight"].grid is None
    assert {line.grid for line in report.lines if line.site.startswith("conv")} == {"float × float"}
    assert "evaluation integer-exact: no: not calibrated yet" in " ".join(str(report).split())


def test_what_stays_float_is_named_with_its_reason() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    convert(net, "tqt", torch.rand(2, 4), skip=["2"])
    words = " ".join(str(summarize(net)).split())
    assert "1 of 2 layers low-bit" in words
    assert "skipped: 2 (by skip=)" in words
    assert "float by nature: LayerNorm (1)" in words
    assert "evaluation integer-exact: no: float layers" in words


def test_a_float_network_is_refused_with_the_next_step() -> None:
    with pytest.raises(ConfigError, match=r"Net: no low-bit layer found\. Convert it first"):
        summarize(Net())


@pytest.mark.parametrize("rich", [True, False])
def test_the_printed_report_fits_80_columns_with_and_without_rich(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setenv("COLUMNS", "80")
    batch = torch.rand(4, 1, 6, 6)
    net = converted()
    switch_of(net).tally = tally = Tally()
    net(batch)
    print_report(net, METRICS, tally)
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 80
    report = summarize(net, tally)
    words = [line.split() for line in printed]
    for line in report.lines:
        assert " ".join(cell for cell in line.cells() if cell).split() in words
    assert printed[-3:] == table.metric_lines(METRICS)


def test_without_rich_and_with_it_the_same_words_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    net = converted()
    print_report(net, METRICS, None)
    colored = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich", None)
    print_report(net, METRICS, None)
    plain = capsys.readouterr().out
    ruled = str.maketrans("", "", "─-")
    assert colored.translate(ruled).split() == plain.translate(ruled).split()


def test_long_names_are_shortened_where_they_tell_least() -> None:
    line = table.Line(
        "backbone.features.layer1.0.conv2",
        "conv_transpose2d+bn+hardswish",
        "uint4·2^-4 × int4·2^-6",
        "4×4→15",
        1_152,
        0.5,
        exact=False,
    )
    (_, cells) = table.cells([line], 95)
    assert cells[0].startswith("…")
    assert cells[0].endswith("layer1.0.conv2")
    assert cells[1].startswith("conv_tr")
    assert cells[2:] == line.cells()[2:]
    assert table.cells([line], 200)[1] == line.cells()
    assert max(map(len, table.text([line], ["word " * 60], 95).splitlines())) <= 95


def test_metric_lines_are_aligned_and_accuracies_are_percent() -> None:
    assert table.metric_lines(METRICS) == [
        "float       val_acc  97.50 %  val_loss  0.0658",
        "calibrated  val_acc  95.56 %  val_loss  0.1172",
        "trained     val_acc 100.00 %  val_loss 12.5000",
    ]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("val/acc", 0.5, "50.00 %"), ("Accuracy", 0.25, "25.00 %"), ("MulticlassAccuracy", 0.5, "50.00 %"),
        ("valAcc", 0.5, "50.00 %"), ("acc_top5", 0.5, "50.00 %"), ("val_acc", 97.5, "97.5000"),
        ("accumulated_loss", 0.5, "0.5000"), ("vaccine", 0.5, "0.5000"), ("loss", 1e-7, "1e-07"),
        ("loss", 0.0, "0.0000"),
    ],
)  # fmt: skip
def test_a_metric_is_percent_by_name_and_range(name: str, value: float, shown: str) -> None:
    assert table.metric_lines({"trained": {name: value}}) == [f"trained     {name} {shown}"]


def test_a_metric_that_one_stage_lacks_leaves_a_gap() -> None:
    lines = table.metric_lines({"float": {"a": 1.0}, "trained": {"a": 1.0, "b": 2.0}, "calibrated": {}})
    assert lines == ["float       a 1.0000", "trained     a 1.0000  b 2.0000"]


def test_reports_need_no_lightning() -> None:
    program = "import sys, lightning_lowbit.reports.summary; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
