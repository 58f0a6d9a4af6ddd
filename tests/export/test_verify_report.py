"""Certificates as files and what they say of their inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export.verified_nets import Gated, images, made

from lightning_lowbit import lower
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.export.verify import Certificate, verify


def test_certificates_survive_a_file(tmp_path: Path) -> None:
    net, program = made(Gated())
    op = next(op for op in program.ops if op.kind == "linear")
    weight = op.constants["weight"].copy()
    weight[1, 2] += 1
    place = program.ops.index(op)
    faulty = program.replace_op(place, replace(op, constants={**op.constants, "weight": weight}))
    for number, some in enumerate((program, faulty)):
        certificate = verify(net, some, [images(3)])
        certificate.save(tmp_path / f"{number}.json")
        assert Certificate.load(tmp_path / f"{number}.json") == certificate
    assert json.loads((tmp_path / "1.json").read_text())["parted"]["index"] == [1, 2]
    assert "fc" in str(certificate)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json"]


def test_digests_tell_what_was_compared() -> None:
    net, program = made()
    before = verify(net, program, [images(2)]).digests
    assert verify(net, program, [images(2)]).digests == before
    assert verify(net, program, [images(2, 1)]).digests["inputs"] != before["inputs"]
    with torch.no_grad():
        net.get_parameter("conv2.weight").mul_(0.75)
    changed = verify(net, lower(net, images(1)), [images(2)]).digests
    assert changed["module"] != before["module"]
    assert changed["program"] != before["program"]
    assert changed["inputs"] == before["inputs"]


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "No such"), ("{", "was cut off"), ("{}", "no certificate"), ('{"format": 7}', "format 7"), ("3", "is no")],
    ids=["missing", "cut", "empty", "format", "number"],
)  # fmt: skip
def test_files_that_are_no_certificates(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "certificate.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        Certificate.load(path)
