"""``make demo``'s run: its committed file reaches what it promises, on its fixed seed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_lowbit.cli import main

CONFIG = Path(__file__).parents[1] / "examples" / "configs" / "digits_tqt.yaml"


def test_the_demo_keeps_its_accuracy_at_four_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(CONFIG)])
    printed = capsys.readouterr().out
    lines = {
        name: line
        for line in printed.splitlines()
        for name in ("float", "calibrated", "trained")
        if line.startswith(name)
    }
    accuracy = {name: float(re.search(r"val_acc\s+([\d.]+)\s*%", line)[1]) for name, line in lines.items()}  # type: ignore[index]
    assert set(accuracy) == {"float", "calibrated", "trained"}
    assert accuracy["float"] >= 98.5
    assert accuracy["trained"] >= 98.0
    assert accuracy["trained"] >= accuracy["float"] - 1.0
    for word in ("site", "pattern", "grid", "satur", "exact", "conv2d+bn+relu", "int4·2^"):
        assert word in printed
