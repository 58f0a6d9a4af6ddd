"""The README's code runs as it stands, on a generated checkpoint and with the epochs cut down; so do schemes' pages."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import yaml

from lightning_lowbit import F8Net, Jacinto, Wageubn, convert, summarize
from lightning_lowbit.cli import main
from lightning_lowbit.demos import DigitsCnn
from lightning_lowbit.reports.certificate import read_certificate
from lightning_lowbit.schemes.jacinto_presets import PRESETS, settings_of
from lightning_lowbit.schemes.wageubn_options import PRESETS as FULL_PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FIXED_POINT = (ROOT / "docs" / "f8net.md").read_text()
RANGES = (ROOT / "docs" / "jacinto.md").read_text()
FULL = (ROOT / "docs" / "wageubn.md").read_text()
WATCHING = (ROOT / "docs" / "monitor.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


SHELL = "".join(blocks("bash")).splitlines()


@pytest.fixture
def in_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    original = L.Trainer.__init__

    def quiet(self: Any, *args: Any, **kwargs: Any) -> None:
        settings = {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        original(self, *args, **{**kwargs, **settings, "max_epochs": 2, "limit_train_batches": 4})

    monkeypatch.setattr(L.Trainer, "__init__", quiet)
    return tmp_path


def test_python_blocks_run_in_order(in_scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third, full, fourth, fifth, sixth, seventh = blocks("python")
    namespace: dict[str, Any] = {}
    exec(first, namespace)
    assert namespace["quant"].metrics["trained"]
    exec(second, namespace)
    assert set(namespace["quant"].metrics) == {"float", "calibrated", "trained"}
    x = torch.rand(4, 1, 8, 8)
    model, again = namespace["model"].eval(), namespace["again"].eval()
    assert torch.equal(model(x), again(x))
    assert capsys.readouterr().out.count("scheme tqt") == 3  # of both fits and of summarize
    exec(third, namespace)
    assert "training bit-identical on any machine: yes" in capsys.readouterr().out
    assert read_certificate(Path("certificate.json"))["records"]
    exec(full, namespace)
    assert "conv2.weight" in capsys.readouterr().out
    exec(fourth, namespace)
    assert "conv2" in capsys.readouterr().out
    assert torch.equal(namespace["packed"](x), namespace["model"].eval()(x))
    exec(fifth, namespace)
    assert "torch.int8 torch.int32" in capsys.readouterr().out
    exec(sixth, namespace)
    assert namespace["calibrated"].scheme.bias_calibration > 0
    assert summarize(namespace["model"])["conv2"].grid is not None
    capsys.readouterr()
    exec(seventh, namespace)
    printed = capsys.readouterr().out
    assert "EQUAL" in printed
    assert "int32 suffices" in printed
    for line in SHELL:
        if line.startswith("python "):
            subprocess.run([sys.executable, "-I", *line.split("#")[0].split()[1:]], check=True, capture_output=True)
        elif line.startswith("cc ") and shutil.which("cc"):
            assert subprocess.run(line, shell=True, check=True, capture_output=True).stdout == b"ok\n"
    images = torch.from_numpy(np.load("images.npy"))
    assert np.array_equal(np.load("logits.npy"), namespace["model"](images).detach())


def test_the_blocks_of_the_fixed_point_page_run_in_order(in_scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes, loop, twice, integers = blocks("python", FIXED_POINT)
    namespace: dict[str, Any] = {}
    exec(recipes, namespace)
    assert set(namespace["quant"].metrics) == {"float", "calibrated", "trained"}
    untouched = torch.load("float.pt")["conv2.weight"]
    assert torch.equal(namespace["model"].conv2.weight, untouched)  # of tiny
    capsys.readouterr()
    exec(loop, namespace)
    assert "2 of 2 layers low-bit" in capsys.readouterr().out
    exec(twice, namespace)
    assert namespace["second"].conv2.lowbit_input.alpha is not None
    exec(integers, namespace)  # compares the integers with the network's evaluation
    assert namespace["codes"].dtype == torch.uint8


def test_the_blocks_of_the_page_of_ranges_run_in_order(in_scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes, scratch, freezing, loop = blocks("python", RANGES)
    namespace: dict[str, Any] = {}
    exec(recipes, namespace)
    assert "scheme jacinto" in capsys.readouterr().out
    trained, x = namespace["again"].eval(), torch.rand(4, 1, 8, 8)
    assert not torch.equal(trained.conv2.weight, torch.load("float.pt")["conv2.weight"])
    calibrated = namespace["model"].eval()  # biases moved, weights did not
    assert torch.equal(calibrated.conv2.weight, torch.load("float.pt")["conv2.weight"])
    assert not torch.equal(calibrated.bn2.bias, torch.load("float.pt")["bn2.bias"])
    assert not torch.equal(calibrated(x), trained(x))
    exec(scratch, namespace)
    exec(freezing, namespace)
    assert namespace["quant"].schedule.steps == {"freeze_batch_norm": 2, "freeze_ranges": 4}
    capsys.readouterr()
    exec(loop, namespace)
    assert "2 of 2 layers low-bit" in capsys.readouterr().out


def test_the_blocks_of_the_page_of_full_8_bits_run_in_order(
    in_scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes, groups, stages, loop = blocks("python", FULL)
    namespace: dict[str, Any] = {}
    exec(recipes, namespace)
    printed = capsys.readouterr().out
    assert "bn2.xhat" in printed
    assert "scheme wageubn" in printed
    x = torch.rand(4, 1, 8, 8)
    model, again = namespace["model"].eval(), namespace["again"].eval()
    assert torch.equal(model(x), again(x))
    assert not torch.equal(model.conv2.weight, torch.load("float.pt")["conv2.weight"])
    exec(groups, namespace)
    exec(stages, namespace)
    steps = namespace["trainer"].callbacks[0].schedule.steps
    assert [steps[f"quantize_{what}"] for what in ("norms", "errors", "gradients")] == [0, 1, 2]
    capsys.readouterr()
    exec(loop, namespace)
    assert "2 of 2 layers low-bit" in capsys.readouterr().out


def test_the_blocks_of_the_page_of_watching_run(in_scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *_ = blocks("python", WATCHING)
    exec(first.replace("QuantMonitor(", "QuantMonitor(every_n_steps=2, "), namespace := dict[str, Any]())
    assert namespace["watch"].summary.keys() >= {"sqnr_min", "saturation_max", "flips_mean"}
    assert "'sqnr_min': " in capsys.readouterr().out


def test_the_fixed_point_page_quotes_the_report() -> None:
    (note, *_) = blocks("text", FIXED_POINT)
    model = DigitsCnn()
    convert(model, "f8net", torch.rand(8, 1, 8, 8), skip=["conv3"])
    line = re.compile(re.sub(r"py:\d+", r"py:\\d+", re.escape(note.strip()).replace("\\:", ":")))
    assert line.search(str(summarize(model)).replace("\n  ", " "))


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its head."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in section.splitlines() if line.startswith("| ")]
    return cells[1:]


@pytest.mark.parametrize(
    ("scheme", "text", "heading"),
    [(F8Net, FIXED_POINT, "3. Options"), (Jacinto, RANGES, "4. Options"), (Wageubn, FULL, "8. Options")],
    ids=["f8net", "jacinto", "wageubn"],
)
def test_options_of_a_scheme_stand_on_its_page(scheme: type[Any], text: str, heading: str) -> None:
    listed = [name for first, *_ in rows(text, heading) for name in re.findall(r"`(\w+)`", first)]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(scheme))


@pytest.mark.parametrize(
    ("scheme", "text", "heading"),
    [(Jacinto, RANGES, "4. Options"), (Wageubn, FULL, "8. Options")],
    ids=["jacinto", "wageubn"],
)
def test_defaults_of_a_scheme_stand_on_its_page(scheme: type[Any], text: str, heading: str) -> None:
    stated = {
        name: ast.literal_eval(default.strip("`"))
        for first, default, _ in rows(text, heading)
        for name in re.findall(r"`(\w+)`", first)
    }
    assert stated == {field.name: getattr(scheme(), field.name) for field in dataclasses.fields(scheme)}


def test_presets_of_full_8_bits_stand_on_their_page() -> None:
    table = rows(FULL, "6. Presets")
    assert {name for settings in FULL_PRESETS.values() for name in settings} <= {row[0].strip("`") for row in table}
    for place, preset in enumerate(FULL_PRESETS, 1):  # columns in their order
        stated = {row[0].strip("`"): ast.literal_eval(row[place].strip("`")) for row in table}
        scheme = Wageubn(preset=preset)
        assert stated == {name: getattr(scheme, name) for name in stated}, preset


def test_presets_of_jacinto_stand_on_its_page() -> None:
    table = {preset.strip("`"): dict(re.findall(r"`(\w+)=(.*?)`", sets)) for preset, sets in rows(RANGES, "5. Presets")}
    assert set(table) >= set(PRESETS)
    for preset, stated in table.items():
        assert {name: ast.literal_eval(value) for name, value in stated.items()} == settings_of(preset), preset


def test_the_yaml_block_is_a_config_that_parses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, scheme, words in (
        (README, "tqt", "bits: 4"),
        (FIXED_POINT, "f8net", "select: histogram"),
        (RANGES, "jacinto", "preset: WC4_AT8"),
        (FULL, "wageubn", "e2: flag16"),
    ):
        (block,) = blocks("yaml", text)
        assert yaml.safe_load(block)["quant"]["scheme"] == scheme
        (tmp_path / "some.yaml").write_text(block)
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", str(tmp_path / "some.yaml"), "--print_config"])
        assert stop.value.code == 0
        assert words in capsys.readouterr().out


def test_shell_lines_name_commands_that_exist(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    makefile = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    monkeypatch.chdir(ROOT)
    for line in SHELL:
        words = line.split("#")[0].split()
        if not words or words[0] in ("python", "cc"):  # run with the blocks that write their files
            continue
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile
        elif words[0] == "pip":
            assert set(",".join(re.findall(r"\[([\w,]+)]", line)).split(",")) <= set(extras), line
        else:
            assert words[0] == "lightning-lowbit"
            extra = [] if words[1] == "schemes" else ["--print_config"]
            with contextlib.suppress(SystemExit):
                main([*words[1:], *extra])
            assert "error:" not in capsys.readouterr().err, line


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()
