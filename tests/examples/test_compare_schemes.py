"""The example of a comparison, cut down to an epoch of one scheme."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import compare_schemes


def test_it_prints_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare_schemes.main(["--schemes", "tqt", "--float_epochs", "1", "--epochs", "1"])
    printed = capsys.readouterr().out
    assert [(trial.name, trial.exact) for trial in found.trials] == [("float", None), ("tqt", True)]
    assert found["tqt"].value("float") == found["float"].value("trained")
    assert found["tqt"].trials[0].size < found["float"].trials[0].size / 3
    assert printed.count("repeats") == 2  # in the head of the table and in the words below
    assert "int8" not in printed  # the report of a fit
