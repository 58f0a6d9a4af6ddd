"""The export example, cut down to an epoch: who computes the network's integers, and who says why not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import export_and_run

ALL = "360 of 360 images with the same integers"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_everybody_computes_the_same_integers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = export_and_run.main(["--epochs", "1", "--folder", str(tmp_path)])
    printed = capfd.readouterr().out
    assert len(rows) == 5
    assert [who for who, row in rows.items() if ALL not in row] == []
    assert len({row.partition(" %")[0] for row in rows.values()}) == 1  # one accuracy
    assert all(f"{who:<26}{row}" in printed for who, row in rows.items())
    assert "int32 suffices" in printed
    assert "EQUAL" in printed
    assert {"runtime.py", "digits.lowbit", "digits.c", "integer.onnx", "qdq.onnx"} <= {
        p.name for p in tmp_path.iterdir()
    }


def test_float_islands_are_refused_where_integers_are_needed(tmp_path: Path) -> None:
    rows = export_and_run.main(["--scheme", "bnn", "--epochs", "1", "--folder", str(tmp_path)])
    assert ALL in rows["the network, PyTorch"]
    assert "% correct" in rows["the program, numpy alone"]
    for who in ("C99", "ONNX Runtime, integer", "ONNX Runtime, qdq"):
        assert rows[who].startswith("- bn1"), who
    assert not list(tmp_path.glob("*.c"))
    assert not list(tmp_path.glob("*.onnx"))
