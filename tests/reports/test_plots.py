"""Plots: what is drawn is what was counted; nothing is kept, and no window system is asked for."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.reports import plots
from lightning_lowbit.reports.effects import Effect
from lightning_lowbit.reports.histograms import activation_histograms, weight_histograms
from lightning_lowbit.reports.plots import (
    Point,
    accuracy_against_size,
    exponent_traces,
    read_log,
    saturation_over_time,
    sensitivity_bars,
    threshold_traces,
)
from lightning_lowbit.reports.sensitivity import Row, Sensitivity
from lightning_lowbit.schemes import convert

LOG = [
    {"step": 0.0, "lowbit/a.weight/saturation": 0.0, "lowbit/a.weight/exponent": -7.0, "lowbit/a.weight/log2_t": 0.2},
    {"step": 10.0, "lowbit/a.weight/saturation": 0.25, "lowbit/a.weight/exponent": -6.0, "lowbit/a.weight/log2_t": 1.2},
    {"step": 10.0, "val_loss": 1.0, "lowbit/saturation_max": 0.25},
]


def converted(scheme: str = "tqt", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    net = nn.Sequential(*layers).eval()
    convert(net, scheme, torch.randn(8, 1, 6, 6), **options)
    return net


def lines_of(figure: Any, axes: int = 0) -> list[float]:
    """Where vertical lines stand."""
    return sorted({x for lines in figure.axes[axes].collections for (x, _), _ in lines.get_segments()})


def test_weight_histograms_show_every_layer_and_every_code() -> None:
    net = converted(bits=4)
    figure = weight_histograms(net)
    assert [axes.get_title() for axes in figure.axes] == ["0", "2", "5"]
    layer: Any = net[2]  # type: ignore[index]
    grid = layer.lowbit_weight.grid()
    assert figure.axes[1].get_xlabel() == str(grid)
    assert lines_of(figure, 1) == [code * grid.step for code in range(-8, 8)]
    counts, edges, _ = figure.axes[1].patches[0].get_data()  # type: ignore[attr-defined]
    assert round(float((counts**2).sum())) == layer.weight.numel()
    assert edges[0] <= layer.weight.min().item()
    assert [axes.get_title() for axes in weight_histograms(net, ["5"]).axes] == ["5"]
    with pytest.raises(ConfigError, match=r"no quantized weight in fc, head\*"):
        weight_histograms(net, ["fc", "head*"])


def test_a_grid_of_many_codes_is_drawn_as_its_range() -> None:
    net = converted(bits=8)
    grid = net[2].lowbit_weight.grid()  # type: ignore[index]
    assert lines_of(weight_histograms(net, ["2"])) == [grid.low, grid.high]


@pytest.mark.parametrize(
    ("scheme", "options"), [("tqt", {}), ("jacinto", {}), ("niti", {}), ("bnn", {"first": "int8"})]
)
def test_activation_histograms_hold_what_was_rounded_and_leave_the_network(scheme: str, options: Any) -> None:
    net, x = converted(scheme, **options), torch.randn(4, 1, 6, 6)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    figure = activation_histograms(net, [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(2))])
    counts = {
        axes.get_title(): round(float((axes.patches[0].get_data()[0] ** 2).sum()))  # type: ignore[attr-defined]
        for axes in figure.axes
    }
    assert counts["0.input"] == x.numel()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(q._forward_pre_hooks for _, q in quantizers(net))
    assert switch_of(net).tally is None


@pytest.mark.parametrize("scheme", ["tqt", "jacinto"])
def test_a_rectified_activation_has_no_negative_value(scheme: str) -> None:
    figure = activation_histograms(converted(scheme), torch.randn(4, 1, 6, 6), ["1"])
    (axes,) = figure.axes
    counts, edges, _ = axes.patches[0].get_data()  # type: ignore[attr-defined]
    assert edges[0] == 0.0
    assert round(float((counts**2).sum())) == 4 * 3 * 4 * 4


def test_traces_follow_the_log() -> None:
    saturation = saturation_over_time(LOG).axes[0]
    assert saturation.lines[0].get_xydata().tolist() == [[0.0, 0.0], [10.0, 25.0]]  # type: ignore[union-attr]
    exponents = exponent_traces(LOG).axes[0]
    assert exponents.lines[0].get_drawstyle() == "steps-post"
    assert exponents.lines[0].get_ydata().tolist() == [-7.0, -6.0]  # type: ignore[union-attr]
    thresholds = threshold_traces(LOG).axes[0]
    assert [line.get_ydata()[0] for line in thresholds.lines[1:]] == [0, 1, 2]  # type: ignore[index]  # powers of two
    with pytest.raises(ConfigError, match="3 moments without any 'lowbit/SITE/log2_t'"):
        threshold_traces([{"step": 0}] * 3)


def test_traces_that_lie_on_each_other_are_one_line_with_all_names() -> None:
    still = {f"lowbit/l{n}.weight/exponent": -6.0 for n in range(30)}
    figure = exponent_traces([{"step": t, **still, "lowbit/a.weight/exponent": -float(t)} for t in (0, 1)])
    labels = [line.get_label().replace("\n", " ") for line in figure.axes[0].lines]  # type: ignore[union-attr]
    assert labels == [", ".join(f"l{n}.weight" for n in range(30)), "a.weight"]
    assert figure.axes[0].get_title() == ""


def test_a_share_in_a_million_makes_no_mountain() -> None:
    axes = saturation_over_time([{"step": t, "lowbit/a.weight/saturation": 1e-6 * t} for t in (0, 1)]).axes[0]
    assert axes.get_ylim() == (0.0, 1.0)


def test_of_many_traces_those_that_move_most_are_drawn() -> None:
    log = [{"step": t, **{f"lowbit/l{n}.weight/saturation": 0.01 * n * t for n in range(40)}} for t in (0, 1)]
    axes = saturation_over_time(log).axes[0]
    assert [line.get_label() for line in axes.lines] == [f"l{n}.weight" for n in range(16, 40)]
    assert axes.get_title() == "the 24 of 40 tensors that move most"


def test_a_log_is_read_from_the_file_of_the_csv_logger(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("epoch,step,lowbit/a.weight/saturation\n0,9,\n0,9,0.5\n")
    assert read_log(file) == [{"epoch": 0, "step": 9}, {"epoch": 0, "step": 9, "lowbit/a.weight/saturation": 0.5}]
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="no column 'step'"):
        read_log(file)
    with pytest.raises(ConfigError, match="No such file"):
        read_log(tmp_path / "none.csv")


def test_bars_are_the_rows_and_equal_outputs_have_none() -> None:
    rows = tuple(Row(s, "", (), Effect(v, kl=0.1)) for s, v in (("a", 30.0), ("b", float("inf")), ("c$_1", -2.0)))
    found = Sensitivity("one", 1, rows, Effect(10.0), None)
    axes = sensitivity_bars(found).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [30.0, -2.0]  # type: ignore[attr-defined]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", r"c\$_1"]
    assert axes.lines[0].get_xdata() == [10.0, 10.0]
    assert len(sensitivity_bars(found, "kl").axes[0].patches) == 3
    with pytest.raises(ConfigError, match="'accuracy' was not measured"):
        sensitivity_bars(found, "accuracy")


def test_accuracy_stands_over_size_and_proved_networks_are_filled() -> None:
    figure = accuracy_against_size([Point("tqt", 2048, 0.975, True), Point("float", 8192, 0.98)])
    (axes,) = figure.axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[2.0, 97.5]], [[8.0, 98.0]]]  # type: ignore[union-attr]
    assert [line.get_markerfacecolor() == "none" for line in axes.lines] == [False, True]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["tqt", "float"]
    with pytest.raises(ConfigError, match="no point"):
        accuracy_against_size([])


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'lightning-lowbit\[report\]'"):
        saturation_over_time(LOG)


@pytest.mark.parametrize("module", ["plots", "histograms", "page", "html"])
def test_importing_needs_no_matplotlib_and_nothing_uses_pyplot(module: str) -> None:
    source = Path(plots.__file__).with_name(f"{module}.py").read_text("utf-8")
    assert "matplotlib.pyplot" not in source
    for statement in ast.parse(source).body:  # what stands under TYPE_CHECKING or in a function is deeper
        names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
        names += [statement.module or ""] if isinstance(statement, ast.ImportFrom) else []
        assert not [name for name in names if name.startswith("matplotlib")]
