"""The report as one page: valid, alone, escaped; with what was given and nothing else."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.export.lowering import lower
from lightning_lowbit.reports import widths
from lightning_lowbit.reports.histograms import rounding_activations
from lightning_lowbit.reports.html import html_report
from lightning_lowbit.reports.plots import Point, accuracy_against_size
from lightning_lowbit.reports.sensitivity import sensitivity
from lightning_lowbit.reports.summary import summarize
from lightning_lowbit.schemes import convert

_VOID = {"meta", "br", "hr", "img", "link", "input"}
_EVIL = "<script>alert('&\"')</script>"


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order, and no name is given twice."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.names: list[str] = []
        self.targets: list[str] = []
        self.words: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._saw(tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> is no HTML"
        self._saw(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def _saw(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        keys = [key for key, _ in attrs]
        assert len(keys) == len(set(keys))
        assert not [key for key in keys if key.startswith(("on", "xmlns"))]
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.names.append(value or "")
            elif key in ("href", "src"):
                self.targets.append(value or "")
            self.targets += re.findall(r"url\(([^)]*)\)", value or "")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.same = nn.Conv2d(4, 4, 3, padding=1)
        self.kept = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = torch.relu(self.same(x) + x).mean((2, 3))
        y: Tensor = self.fc(self.kept(x))
        return y


def converted() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    convert(net, "tqt", torch.randn(8, 1, 5, 5), skip=["kept"])
    return net


def test_a_page_with_everything_stands_alone(tmp_path: Path) -> None:
    net, x = converted(), torch.randn(8, 1, 5, 5)
    log = [
        {"step": float(t), "lowbit/conv.weight/saturation": 0.1 * t, "lowbit/conv.weight/exponent": -7.0,
         "lowbit/conv.weight/log2_t": 0.2 * t} for t in range(3)
    ]  # fmt: skip
    points = [Point(_EVIL, 100, 0.5), Point("tqt", 50, 0.5, True)]
    written = html_report(
        net, tmp_path / "report.html", batches=[x], sensitivity=sensitivity(net, [x]), log=log, compared=points,
        program=lower(net, x), metrics={"float": {"val_acc": 0.5}, "trained": {"val_acc": 0.25}},
        figures={_EVIL: accuracy_against_size(points)}, title=f"{_EVIL} of the net",
    )  # fmt: skip
    content = written.read_text("utf-8")
    assert content.startswith("<!DOCTYPE html>\n")
    assert not re.search(r"https?:|//[a-z]|<script|<link|<iframe|<img|@import", content)
    page = Page(content)
    assert page.tags.count("svg") == 8
    assert len(page.names) == len(set(page.names)) > 50
    assert {target.strip("'\"") for target in page.targets} <= {f"#{name}" for name in page.names}
    words = "".join(page.words)
    assert words.count(_EVIL) == 5  # title, headline, caption, and a point in two plots
    for line in str(net_lines := summarize(net)).split():
        assert line.strip("-") in words
    assert "skipped: kept (by skip=)" in words
    assert " = ".join(net_lines.ties[0]) in words
    for expected in ("evaluation integer-exact: no", "val_acc 25.00 %", "worst", "8 samples", "MACs a sample"):
        assert expected in words
    assert "#000000" not in content  # black would be black in the dark


def test_a_page_of_a_network_alone_needs_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "report.html"
    with pytest.raises(ConfigError, match="plots=False"):
        html_report(converted(), path)
    assert list(tmp_path.iterdir()) == []
    page = Page(html_report(converted(), path, plots=False).read_text("utf-8"))
    titles = ["Claims", "Layers", "Shared grids", "What stays float, and other notes"]
    assert [word for word in page.words if word in (*titles, "Plots", "Sensitivity", "Metrics")] == titles
    assert "Net, tqt" in page.words


def test_what_is_not_shown_is_named_and_a_network_may_round_weights_alone(tmp_path: Path) -> None:
    net = converted()
    for quantizer in rounding_activations(net):
        quantizer.ready = False
    path = html_report(net, tmp_path / "weights.html", batches=[torch.randn(2, 1, 5, 5)], left_out={"log": _EVIL})
    words = Page(path.read_text("utf-8")).words
    assert f"log: {_EVIL}" in words
    assert "Weights before rounding, and their grids" in words
    assert "Activations before rounding, and their grids" not in words


def test_a_network_that_is_not_calibrated_has_a_page(tmp_path: Path) -> None:
    net = Net()
    convert(net, "tqt")
    page = Page(html_report(net, tmp_path / "open.html").read_text("utf-8"))
    assert "svg" not in page.tags
    assert "not calibrated yet" in "".join(page.words)


def test_the_same_network_has_the_same_bytes_and_is_left_as_it_was(tmp_path: Path) -> None:
    net = converted()
    state, rng = {name: value.clone() for name, value in net.state_dict().items()}, torch.get_rng_state()
    first, again = (html_report(net, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == again
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_the_columns_are_those_of_the_printed_tables(tmp_path: Path) -> None:
    net = converted()
    content = html_report(net, tmp_path / "report.html", plots=False).read_text("utf-8")
    heads = re.findall(r"<thead><tr>(.*?)</tr>", content)
    names = [re.findall(r"<th[^>]*>([^<]*)</th>", head) for head in heads]
    printed = [re.split(r"\s{2,}", str(part).splitlines()[0]) for part in (summarize(net), summarize(net).widths())]
    assert names == printed
    assert set(names[1]) <= set(widths._COLUMNS.names)


def test_the_page_on_reports_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    document = (Path(__file__).parents[2] / "docs" / "reports.md").read_text("utf-8")
    for block in re.findall(r"```python\n(.*?)```", document, re.DOTALL):
        exec(block, namespace)
    written = {"weights.png", "activations.png", "bars.png", "size.png", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == written
    Page((tmp_path / "report.html").read_text("utf-8"))


def test_a_missing_folder_and_a_float_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="whose folder is not there"):
        html_report(converted(), tmp_path / "none" / "report.html", plots=False)
    with pytest.raises(ConfigError, match="no low-bit layer"):
        html_report(Net(), tmp_path / "report.html")
