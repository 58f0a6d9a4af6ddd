"""`lightning-lowbit verify`: what it prints and the status it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lowbit import cli
from lightning_lowbit.reports.certificate import record


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Certificates: of a run, of one that parts from it at step 16, of other steps, and a checkpoint of the first."""

    def write(name: str, steps: tuple[int, ...], **changes: Any) -> str:
        entries = [
            record(step // 8, step, "step", {"conv1": "a", "fc": "x" if step >= changes.get("parts", 99) else "b"})
            for step in steps
        ]
        content = {"format": 1, "scheme": "toy", "seed": changes.get("seed", 0), "limits": [], "records": entries}
        path = tmp_path / name
        if name.endswith("ckpt"):
            torch.save({"callbacks": {"TrainingCertificate": content}}, path)
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
        return str(path)

    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    return {
        "a": write("a.json", (8, 16, 24)),
        "checkpoint": write("a.ckpt", (8, 16)),
        "parts": write("b.json", (8, 16, 24), parts=16, seed=1),
        "other steps": write("c.json", (5, 10)),
        "notes": str(tmp_path / "notes.txt"),
        "missing": str(tmp_path / "missing.json"),
    }


def verify(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verify", *words])
    printed = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, printed.out, printed.err


def test_runs_that_agree_leave_status_0(capsys: pytest.CaptureFixture[str], files: dict[str, str]) -> None:
    status, out, _ = verify(capsys, "--certificate", files["a"], files["checkpoint"])
    assert status == 0
    assert out == "agree: 2 records compared, up to step 16 (epoch 2)\n1 record only in A\n"


def test_runs_that_part_leave_status_1_and_say_where(capsys: pytest.CaptureFixture[str], files: dict[str, str]) -> None:
    status, out, _ = verify(capsys, "--certificate", files["a"], files["parts"])
    assert status == 1
    assert out == "part at step 16 (epoch 2): fc; equal up to step 8 (epoch 1)\nseed: 0 in A, 1 in B\n"


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ("other steps", "no record of both is of the same moment"),
        ("notes", "notes.txt' (5 bytes): neither JSON nor a checkpoint"),
        ("missing", "missing.json': no such file"),
    ],
)
def test_what_cannot_be_compared_leaves_status_2(
    capsys: pytest.CaptureFixture[str], files: dict[str, str], second: str, words: str
) -> None:
    status, out, err = verify(capsys, "--certificate", files["a"], files[second])
    assert (status, out) == (2, "")
    assert err.startswith("error: certificate")
    assert words in err


@pytest.mark.parametrize("words", [[], ["--certificate", "a.json"]], ids=["nothing", "one file"])
def test_a_wrong_command_line_leaves_status_2(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    status, _, err = verify(capsys, *words)
    assert status == 2
    assert "usage: lightning-lowbit verify" in err


def test_a_misspelt_subcommand_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["verfy"])
    assert "Did you mean 'verify'?" in capsys.readouterr().err
