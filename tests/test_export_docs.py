"""The pages on export: their code runs in order, and their tables say what the code does."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from test_readme import blocks, in_scratch, rows  # noqa: F401  # a fixture
from torch import Tensor, nn

import lightning_lowbit
from lightning_lowbit import convert, export_c, export_onnx, lower, verify
from lightning_lowbit.cli import main
from lightning_lowbit.demos import DigitsCnn
from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.export import runtime
from lightning_lowbit.export.program_check import _NEEDED
from lightning_lowbit.export.runtime_float import FUNCTIONS

DOCS = Path(__file__).parents[1] / "docs"
GUIDE = (DOCS / "export.md").read_text()
FORMAT = (DOCS / "program_format.md").read_text()
UNPATCHED = Trainer.__init__
NAMES = ("Bnn", "F8Net", "Jacinto", "Niti", "Tqt", "Wageubn")


def shell(line: str) -> None:
    """A line of a page, with this Python, in the current folder."""
    subprocess.run(re.sub(r"^python ", f"{sys.executable} -I ", line), shell=True, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_blocks_of_the_guide_run_in_order(in_scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    pytest.importorskip("onnxruntime")
    namespace: dict[str, Any] = {}
    for block in blocks("python", GUIDE):
        exec(block, namespace)
    printed = capsys.readouterr().out
    for words in ("no float islands", "EQUAL", "half_away [-128, -3, -2, -1, 0, 1, 2, 3, 127]", "form qdq", "as codes"):
        assert words in printed
    lone, c, predict = "".join(blocks("bash", GUIDE)).splitlines()
    shell(lone)
    assert np.array_equal(np.load("logits.npy"), namespace["program"].run(namespace["images"]))
    shell(c)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", UNPATCHED)  # whose arguments the command line reads
        main([*predict.split()[1:], "--trainer.logger", "false", "--trainer.accelerator", "cpu"])
    assert np.load("digits.npy").shape == (360,)
    exec(blocks("python", FORMAT)[0], namespace)
    assert "requantize relu1 ['v2'] -> v3" in capsys.readouterr().out


class Stack(nn.Module):
    """Convolutions, norms, rectifiers, a max pool, a linear layer: no sum of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        logits: Tensor = self.fc(self.pool(torch.relu(self.bn2(self.conv2(x)))).flatten(1))
        return logits


def exported() -> list[tuple[str, str, list[str]]]:
    """Scheme, network and what the table says of them."""
    found = []
    for schemes, network, *said in rows(GUIDE, "What each scheme exports"):
        found += [(scheme, network, said) for scheme in re.findall(r"`(.*?)`", schemes)]
    return found


@pytest.mark.parametrize(("scheme", "network", "said"), exported(), ids=[f"{s}-{n}" for s, n, _ in exported()])
def test_what_a_scheme_exports_is_what_the_table_says(
    scheme: str, network: str, said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = pytest.importorskip("onnxruntime").InferenceSession
    torch.manual_seed(0)
    net = (DigitsCnn(channels=8) if network == "residual" else Stack()).eval()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]  # it tracks statistics
            norm.bias.normal_(0, 0.2)
    x = torch.randint(0, 17, (8, 1, 8, 8)) / 16
    convert(net, eval(scheme, {name: getattr(lightning_lowbit, name) for name in NAMES}), x)
    program, wanted = lower(net, x), net(x).detach().numpy()
    assert verify(net, program, [x]).ok
    found = []
    for form in ("integer", "qdq", "clip"):
        try:
            export_onnx(program, tmp_path / "net.onnx", form=form, weight_type="uint8")
        except UnsupportedModelError:
            found.append("no")
            continue
        (got,) = session(tmp_path / "net.onnx", providers=["CPUExecutionProvider"]).run(None, {"input": x.numpy()})
        assert np.abs(got - wanted).max() <= (0.1 * np.abs(wanted).max() if form == "clip" else 0), form
        found.append("yes")
    assert found == said
    assert bool(program.summary().islands) == (said[0] == "no")
    if said[0] == "no":
        with pytest.raises(UnsupportedModelError, match="float island"):
            export_c(program, tmp_path / "net.c")
    else:
        assert np.array_equal(program.run(x), wanted)
        export_c(program, tmp_path / "net.c", test_input=x)
        if shutil.which("cc"):
            subprocess.run(["cc", "-std=c99", "net.c", "-o", "net"], cwd=tmp_path, check=True)
            subprocess.run([tmp_path / "net"], check=True, capture_output=True)


def test_quoted_refusals_are_messages_of_the_package() -> None:
    folder = Path(lightning_lowbit.__file__).parent
    source = re.sub(r'"\s+f?"', "", "".join(path.read_text() for path in folder.rglob("*.py")))
    quoted = re.findall(r'^\| "(.*?)" \|', GUIDE, re.MULTILINE)
    assert len(quoted) > 10
    assert [words for words in quoted if words not in source] == []


def test_links_lead_somewhere() -> None:
    for text in (GUIDE, FORMAT):
        for path, _, place in re.findall(r"\]\(((?!http)[^)#]*)(#)?([^)]*)\)", text):
            target = (DOCS / path).read_text() if path else text
            heads = [
                re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall("^#+ (.*)", target, re.M)
            ]
            assert not place or place in heads, (path, place)


def test_kinds_and_their_attributes_stand_on_the_page() -> None:
    section = FORMAT.partition("\n## Operations\n")[2]
    table = {kind: (a, c) for kind, a, c in re.findall(r"^\| `(\w+)` \| (.*?) ?\| (.*?) ?\|", section, re.MULTILINE)}
    assert list(table) == list(runtime.KINDS)
    for kind, (attributes, constants) in table.items():
        needed = [*_NEEDED[kind][0].split(), *_NEEDED[kind][1].split()]
        assert set(needed) <= set(re.findall(r"`(\w+)`", attributes + constants)), kind
    listed = re.findall(r"`(\w+)`", section.partition("`runtime_float.py`:")[2].partition(" A reader")[0])
    assert listed == list(FUNCTIONS)


def test_the_table_of_ties_is_what_the_runtime_and_the_page_s_code_do() -> None:
    section = FORMAT.partition("\n## Rounding\n")[2].partition("\n## ")[0]
    head, _, *lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    quarters = [int(Fraction(number) * 4) for number in head[2:]]
    namespace: dict[str, Any] = {}
    exec(blocks("python", FORMAT)[1], namespace)
    assert [line[0].strip("`") for line in lines] == list(runtime.ROUNDINGS)
    for rule, _, *stated in lines:
        name, numbers = rule.strip("`"), [int(number) for number in stated]
        assert runtime.requantize(np.array(quarters), 2, name).tolist() == numbers
        assert [namespace["round_shift"](v, 2, name) for v in quarters] == numbers
        many = list(range(-40, 41))
        assert [namespace["round_shift"](v, 3, name) for v in many] == runtime.requantize(
            np.array(many), 3, name
        ).tolist()
