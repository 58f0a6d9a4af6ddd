"""Tables at any width: figures are whole, names stay apart, what has no room is said below."""

from __future__ import annotations

import re
import sys

import pytest

from lightning_lowbit.reports import table
from lightning_lowbit.reports.comparison import Comparison, Trial

DEEP = [
    table.Line(
        f"encoder.layer{stage}.{block}.conv{number}",
        "conv2d+bn+relu",
        f"uint8·2^-11 × int8·2^-1{number}",
        "8×8→24",
        2_361_340 + 10 * stage + number,
        0.0404 * stage,
        exact=stage < 4,
    )
    for stage in (1, 4)
    for block in (0, 1)
    for number in (1, 2)
]
NAMES = (
    "float",
    "tqt:bits=8",
    "tqt:bits=8:freeze_batch_norm=0.9",
    "f8net:bits=8",
    "f8net:bits=8:freeze_batch_norm=0.9",
)


def words(printed: str) -> list[str]:
    return printed.translate(str.maketrans("", "", "─-,;:")).split()


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("rich", [True, False])
def test_no_figure_is_ever_cut(
    width: int, rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    table.show(DEEP, ["a note"], {})
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    assert printed.strip().translate(str.maketrans("", "", "─-")).split() == (
        table.text(DEEP, ["a note"]).translate(str.maketrans("", "", "─-")).split()
    )
    for line in DEEP:
        for figure in line.cells()[2:6]:
            assert {*words(figure)} <= {*words(printed)}
    assert "not exact" in printed


def test_a_column_without_room_is_said_below_by_its_entries() -> None:
    head, *rows = table.cells(DEEP, 80)
    assert head == ("site", "grid", "mac", "bytes", "saturated")
    assert [row[1:] for row in rows] == [(c[2], *c[3:6]) for c in (line.cells() for line in DEEP)]
    notes = " ".join(table.text(DEEP, [], 80).partition("\n\n")[2].split())
    assert "pattern conv2d+bn+relu: encoder.layer1.0.conv1, " in notes
    assert re.search(r"not exact: encoder\.layer4\.0\.conv1, .*encoder\.layer4\.1\.conv2$", notes)


def test_a_table_that_cannot_fit_is_wider_than_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    table.show(DEEP, [], {})
    assert DEEP[-1].grid in capsys.readouterr().out


@pytest.mark.parametrize("width", [20, 60, 80, 90])
def test_rows_of_a_comparison_never_get_one_name(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    trials = [
        Trial(name, seed, metrics={"float": {"acc": 0.9}, "calibrated": {"acc": 0.9}, "trained": {"acc": 0.9}},
              size=2048, float_size=4096, step=2.0, exact=True)
        for name in NAMES for seed in (0, 1)
    ]  # fmt: skip
    printed = str(Comparison(tuple(trials)))
    _, _, *rows = printed.partition("\n\n")[0].splitlines()
    names = [row.split()[0] for row in rows]
    assert len({*names}) == len(NAMES)
    assert [name.partition(":")[0].rstrip("…") for name in names] == [name.partition(":")[0] for name in NAMES]
    if width == 80:
        assert "ratio 0.50: float, tqt:bits=8, tqt:bits=8:freeze_batch_norm=0.9" in " ".join(printed.split())


def test_names_are_cut_where_they_differ_least() -> None:
    def names(*given: str, width: int = 24) -> list[str]:
        lines = [table.Line(name, "fc", "int8", "8×8") for name in given]
        return [row[0] for row in table.cells(lines, width)[1:]]

    assert names("backbone.stage.conv1", "backbone.stage.conv2", width=34) == ["…e.stage.conv1", "…e.stage.conv2"]
    assert names("a.backbone.stage.conv", "b.backbone.stage.conv") == [
        "a.backbon…age.conv",
        "b.backbon…age.conv",
    ]


def test_nothing_prints_two_empty_lines(capsys: pytest.CaptureFixture[str]) -> None:
    table.show(DEEP, ["a note"], {})
    table.show(DEEP, [], {})
    table.show(DEEP, [], {"trained": {"acc": 1.0}})
    assert "\n\n\n" not in capsys.readouterr().out
    assert table.text(DEEP, []).splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "calibrated", "trained", "points"),
    [
        ("val/acc", 0.9597, 0.1612, "79.85"), ("val_acc", 0.96, 0.945, None), ("val_acc", 0.9, 0.95, None),
        ("val_loss", 0.9, 0.1, None), ("accuracy", 95.0, 90.0, "5.00"), ("accuracy", 95.0, 94.0, None),
    ],
)  # fmt: skip
def test_accuracy_that_training_lost_is_said(name: str, calibrated: float, trained: float, points: str | None) -> None:
    found = table.setbacks({"calibrated": {name: calibrated}, "trained": {name: trained}})
    assert len(found) == (points is not None)
    if points is not None:
        assert found[0].startswith(f"{name}: trained is {points} points below calibrated. Lower the learning rate")
    assert table.setbacks({"trained": {name: trained}}) == []
