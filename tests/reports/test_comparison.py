"""The table of a comparison: what is in it, in each of its forms, and how rows come by yes and no."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.reports.comparison import SUFFIXES, Comparison, Trial, checked_output, outcome
from lightning_lowbit.reports.exactness import exactness
from lightning_lowbit.reports.repeats import differs
from lightning_lowbit.schemes import convert

FLOAT = Trial("float", 0, metrics={"trained": {"val_acc": 0.98, "val_loss": 0.1}}, size=4096, float_size=4096, step=1.0)
TQT = Trial(
    "tqt", 0, "bits=4",
    {"float": {"val_acc": 0.98}, "calibrated": {"val_acc": 0.5}, "trained": {"val_acc": 0.97, "val_loss": 0.2}},
    size=1024, float_size=4096, step=2.0, exact=True, why={"does not repeat": "gradients are float"},
)  # fmt: skip
AGAIN = dataclasses.replace(TQT, seed=1, metrics={"trained": {"val_acc": 0.95}}, step=None)
NO = Trial("bnn", 0, refused="conv1: no such kernel")


def lines(found: Comparison) -> dict[str, list[str]]:
    """Cells of the printed table by their first."""
    table = str(found).partition("\n\n")[0].replace(" %", "%").splitlines()
    return {cells[0]: cells for cells in map(str.split, table)}


def test_a_line_a_row_in_the_order_of_the_runs() -> None:
    found = Comparison((FLOAT, TQT))
    table = lines(found)
    assert [name for name in table if "-" not in name] == ["row", "float", "tqt"]
    assert table["row"] == ["row", "float", "calibrated", "trained", "KiB", "ratio", "step", "exact", "repeats"]
    assert table["tqt"] == ["tqt", "98.00%", "50.00%", "97.00%", "1.0", "0.25", "2.00×", "yes", "no"]
    assert table["float"][1:] == ["98.00%", "4.0", "1.00", "1.00×", "-", "no"]
    assert "tqt: bits=4" in str(found)
    assert "tqt, does not repeat: gradients are float" in str(found)
    assert found.ok


def test_seeds_are_one_row() -> None:
    found = Comparison((TQT, AGAIN))
    assert found["tqt"].value("trained") == pytest.approx(0.96)
    assert lines(found)["tqt"][3:5] == ["96.00%", "1.00"]
    assert "seeds 0, 1; ± of trained, half the distance" in " ".join(str(found).split())
    one_no = Comparison((TQT, dataclasses.replace(AGAIN, exact=False)))
    assert lines(one_no)["tqt"][-2:] == ["no", "no"]


def test_a_refused_row_says_why() -> None:
    found = Comparison((FLOAT, NO))
    assert lines(found)["bnn"] == ["bnn", "refused"]
    assert "bnn, refused: conv1: no such kernel" in str(found)
    assert not found.ok
    assert outcome(NO) == "refused: conv1: no such kernel"
    partly = Comparison((TQT, dataclasses.replace(NO, name="tqt", seed=1)))
    assert str(partly).partition("\n\n")[0].endswith("1 of 2 seeds refused")
    assert partly["tqt"].value("trained") == 0.97


def test_the_metric_is_an_accuracy_unless_another_is_asked_for() -> None:
    assert Comparison((FLOAT,)).metric == "val_acc"
    assert Comparison((FLOAT,), asked="val_loss")["float"].value("trained") == 0.1
    assert lines(Comparison((FLOAT,), asked="val_loss"))["float"][1] == "0.1"
    wrong = Comparison((FLOAT,), asked="val_ac")
    assert wrong.metric == "val_acc"
    assert "val_ac: validation does not log it. Did you mean 'val_acc'?" in str(wrong)
    assert not wrong.ok
    assert outcome(FLOAT, "val_ac").endswith("98.00 % (val_ac: validation does not log it. Did you mean 'val_acc'?)")


def test_a_network_without_validation_says_so() -> None:
    silent = Trial("float", size=4096, float_size=4096)
    found = Comparison((silent,))
    assert str(found).startswith("row")
    assert "validation logs nothing" in str(found)
    assert outcome(silent) == "validation logs nothing"
    assert not Comparison((silent,), asked="val_acc").ok


def test_a_row_that_training_ruined_says_so_below() -> None:
    ruined = dataclasses.replace(TQT, metrics={"calibrated": {"val_acc": 0.98}, "trained": {"val_acc": 0.07}})
    assert "tqt: val_acc: trained is 91.00 points below calibrated." in " ".join(str(Comparison((ruined,))).split())
    assert "below calibrated" not in str(Comparison((FLOAT, TQT)))


def test_json_reads_back_as_itself(tmp_path: Path) -> None:
    found = Comparison((FLOAT, TQT, NO), "digits")
    read = json.loads(found.save(tmp_path / "a.json").read_text(encoding="utf-8"))
    assert Comparison.from_json(read).to_json() == found.to_json() == read
    assert str(Comparison.from_json(read)) == str(found)


def test_markdown_has_the_table_and_its_words() -> None:
    table, _, words = Comparison((FLOAT, dataclasses.replace(TQT, name="a|b"))).to_markdown().partition("\n\n")
    head, rule, _, row = table.splitlines()
    assert head.startswith("| row | float | calibrated | trained | KiB |")
    assert rule.count("|") == head.count("|")
    assert row == r"| a\|b | 98.00 % | 50.00 % | 97.00 % | 1.0 | 0.25 | 2.00× | yes | no |"
    assert "- a|b: bits=4" in words


def test_the_page_and_the_plot_show_rows_with_an_accuracy(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = Comparison((FLOAT, TQT, NO))
    assert [(point.scheme, point.size, point.exact) for point in found.points] == [
        ("float", 4096, None), ("tqt", 1024, True),
    ]  # fmt: skip
    content = found.save(tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<svg" in content
    assert '<tr class="warn"><td>bnn</td>' in content
    assert found.save(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    losses = Comparison((FLOAT,), asked="val_loss")
    assert losses.points == []
    assert "<svg" not in losses.save(tmp_path / "b.html").read_text(encoding="utf-8")


def test_an_output_that_cannot_be_written_is_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="ends in one of " + ", ".join(SUFFIXES)):
        checked_output(tmp_path / "table.csv")
    with pytest.raises(ConfigError, match="in a folder that exists"):
        checked_output(tmp_path / "none" / "table.md")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"lightning-lowbit\[report\]"):
        checked_output(tmp_path / "a.png")
    assert checked_output(tmp_path / "a.md") == tmp_path / "a.md"


def test_steps_go_to_the_first_trial_that_ran() -> None:
    found = Comparison((dataclasses.replace(TQT, refused="no", step=None), AGAIN, FLOAT))
    timed = found.with_steps({"tqt": 3.0}, {"float": "not measured: two optimizers"})
    assert [trial.step for trial in timed.trials] == [None, 3.0, None]
    assert "float, step: not measured: two optimizers" in str(timed)


def network(*more: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4), *more).eval()
    return net, torch.randn(8, 1, 6, 6)


def test_exact_means_that_the_program_ran_and_agreed() -> None:
    net, x = network()
    convert(net, "tqt", x)
    found = exactness(net, (x, torch.zeros(8, dtype=torch.int64)))
    assert (found.exact, found.why_not) == (True, "")
    assert (found.repeats, found.differs) == (False, "gradients are float")


def test_quantized_gradients_are_not_called_float() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))).eval(), torch.randn(8, 1, 6, 6)
    convert(net, "wageubn", x)
    assert differs(net).startswith("gradients are quantized, between float sums")
    niti, x = network()
    convert(niti, "niti", x)
    assert differs(niti) == ""


def test_a_program_with_islands_or_none_is_not_exact() -> None:
    net, x = network(nn.GELU(), nn.Linear(4, 2))
    convert(net, "tqt", x)
    assert "float islands: 4" in exactness(net, x).why_not
    open_net, x = network()
    convert(open_net, "tqt")
    found = exactness(open_net, x)
    assert not found.exact
    assert "not calibrated" in found.why_not


def test_numbers_that_are_none_are_null() -> None:
    content = Comparison((Trial("tqt", metrics={"trained": {"val_loss": float("nan")}}),), "T").to_json()
    assert content["trials"][0]["metrics"]["trained"]["val_loss"] is None
    json.dumps(content, allow_nan=False)
