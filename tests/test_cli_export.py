"""The commands without a Trainer: `export`, `verify` of programs, `schemes`."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

import lightning_lowbit.schemes
from lightning_lowbit import cli
from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.cli.measured import measured
from lightning_lowbit.cli.programs import _lowered
from lightning_lowbit.cli.schemes import _meanings
from lightning_lowbit.demos import DigitsCnn, DigitsData
from lightning_lowbit.export.program import IntegerProgram
from lightning_lowbit.export.verify_report import Certificate
from lightning_lowbit.modules.base import Scheme
from lightning_lowbit.plugins.loading import load_from_checkpoint
from lightning_lowbit.schemes import convert, registry

GUIDE = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
NET = ["--ckpt", "last.ckpt", "--model", "DigitsCnn"]
DATA = ["--data", "DigitsData", "--data.batch_size", "16"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of tqt on the demo network with other channels than its default; and a float checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    quant = QuantCallback("tqt", start=0, evaluate=False, calibrate_batches=1)
    for name, callbacks in (("last", [quant]), ("float", [])):
        run = Trainer(callbacks=callbacks, max_steps=2, limit_val_batches=0, accelerator="cpu", **quiet)
        run.fit(DigitsCnn(channels=4), DigitsData(batch_size=360))
        run.save_checkpoint(folder / f"{name}.ckpt")
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in trained.iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def status_of(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(words))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def written(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix != ".ckpt")


def test_all_forms_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    forms = ["program", "onnx", "qdq", "clip", "c"]
    assert status_of("export", *NET, *DATA, "--to", *forms, "--output", "sub.v2/net", "--name", "digits") == 1
    assert "in a folder that exists" in capsys.readouterr().err
    assert status_of("export", *NET, *DATA, "--to", *forms, "--output", "net", "--name", "digits") == 0
    files = ["net.c", "net.h", "net.lowbit", "net.onnx", "net_clip.onnx", "net_clip.prototxt", "net_qdq.onnx"]
    assert written(folder) == files
    module, x = load_from_checkpoint(DigitsCnn, "last.ckpt").eval(), torch.rand(3, 1, 8, 8)
    assert np.array_equal(IntegerProgram.load("net.lowbit").run(x), module(x).detach())
    assert "digits_run_codes" in Path("net.c").read_text()
    printed = capsys.readouterr().out
    assert re.findall(r"^net[\w.]*", printed, re.MULTILINE) == [
        "net.lowbit", "net.onnx", "net_qdq.onnx", "net_clip.onnx", "net.c",
    ]  # fmt: skip
    assert "equal to the program in all" in printed  # --data is what qdq was compared on


def test_a_whole_file_name_is_kept(folder: Path) -> None:
    assert status_of("export", *NET, "--to", "c", "--output", "firmware.c99") == 0
    assert written(folder) == ["firmware.c99", "firmware.h"]


def test_a_program_comes_with_what_runs_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", *NET, "--to", "program", "c", "--output", "out/net"]
    Path("out").mkdir()
    assert status_of(*words) == 0
    assert "--with_runtime writes what runs it without torch" in capsys.readouterr().out
    assert status_of(*words, "--with_runtime") == 0
    assert "run it: python out/runtime.py out/net.lowbit input.npy output.npy" in capsys.readouterr().out
    assert written(folder / "out") == ["net.c", "net.h", "net.lowbit", "runtime.py"]
    for name in ("runtime.py", "net.h"):
        ours = Path("out", name).read_bytes()
        Path("out", name).write_text("mine")
        assert status_of(*words, "--with_runtime") == 1
        assert f"out/{name}: there is another file of that name" in capsys.readouterr().err
        assert Path("out", name).read_text() == "mine"
        Path("out", name).write_bytes(ours)
    assert status_of("export", *NET, "--to", "c", "--output", "a", "--with_runtime") == 1


def test_a_file_of_another_class_and_no_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = torch.load("last.ckpt", weights_only=True)
    path = {"_class_path": "mynet.ResCnn", "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    checkpoint["hyper_parameters"] |= path  # as the command line has them written
    torch.save(checkpoint, "other.ckpt")
    Path("text.ckpt").write_text("epoch 1\n")
    said = {
        "other": "it is of mynet.ResCnn, got --model lightning_lowbit.demos.",
        "text": "it is no checkpoint that torch.load",
    }
    for name, words in said.items():
        assert status_of("export", "--ckpt", f"{name}.ckpt", *NET[2:], "--to", "c", "--output", "a") == 1
        assert f"--ckpt {name}.ckpt: {words}" in capsys.readouterr().err


def test_what_was_not_followed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(DigitsCnn):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if x.mean() < 9 else x / 2)

    module = Odd(channels=4).eval()
    convert(module, "tqt", torch.rand(4, 1, 8, 8))
    _lowered(module, [1, 1, 8, 8], None)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: not followed: Odd (test_cli_export.py:")
    assert second.startswith("warning: the forward takes numbers out of tensors (test_cli_export.py:")


REFUSED = {
    "second form": ([*NET, "--to", "program", "c", "--output", "a", "--name", "9"], "cannot begin the name"),
    "float network": (["--ckpt", "float.ckpt", *NET[2:], "--to", "c", "--output", "a"], "no low-bit layer found"),
    "other class": ([*NET, "--model.channels", "8", "--to", "c", "--output", "a"], "hyperparameters of the training"),
    "input shape": ([*NET, "--input_shape", "1", "3", "8", "8", "--to", "c", "--output", "a"], "1 3 8 8: the forward"),
    "order": ([*NET, "--input_shape", "1", "1", "8", "--to", "c", "--output", "a"], "(N C H W), and is made 2 to see"),
    "no checkpoint": (["--ckpt", "none.ckpt", *NET[2:], "--to", "c", "--output", "a"], "none.ckpt: no such file"),
    "no tensors": (["--ckpt", __file__, *NET[2:], "--to", "c", "--output", "a"], "it is no checkpoint of tensors"),
    "one file for two": ([*NET, "--to", "program", "c", "--output", "a.c"], "one file for 2 forms (program, c)"),
    "over the checkpoint": ([*NET, "--to", "program", "--output", "last.ckpt"], "that is the checkpoint"),
}


@pytest.mark.parametrize(("words", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_one_message_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    before = Path("last.ckpt").read_bytes()
    assert status_of("export", *words) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("error: ")
    assert reason in said.err
    assert written(folder) == []
    assert Path("last.ckpt").read_bytes() == before


def test_the_example_is_taken_from_the_data(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = property(lambda self: None, lambda self, value: None)
    monkeypatch.setattr(DigitsCnn, "example_input_array", nothing, raising=False)
    words = ["export", *NET, "--to", "program", "--output", "a"]
    assert status_of(*words) == 1
    assert "--input_shape: got none, and DigitsCnn has no example_input_array" in capsys.readouterr().err
    assert status_of(*words, *DATA) == 0  # the labels of a batch are no argument of its forward
    first = Path("a.lowbit").read_bytes()
    assert status_of(*words, "--input_shape", "1", "1", "8", "8") == 0
    assert Path("a.lowbit").read_bytes() == first


def test_model_and_data_of_a_config_of_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("fit.yaml").write_text(
        "model: DigitsCnn\nmodel.lr: 0.5\ndata: {class_path: DigitsData, init_args: {batch_size: 7}}\n"
        "quant: {scheme: tqt}\ntrainer: {max_epochs: 3}\n"
    )
    common = ["--config", "fit.yaml", "--ckpt_path", "last.ckpt"]
    assert status_of("export", *common, "--to", "program", "--output", "a") == 0
    assert status_of("verify", *common, "--program", "a.lowbit", "--batches", "2") == 0
    assert "14 samples in 2 batches" in capsys.readouterr().out
    assert status_of("verify", "--config=none.yaml", "--program", "a.lowbit") == 2
    assert "--config none.yaml: no such file" in capsys.readouterr().err


def test_what_a_checkpoint_is_not_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = ["--model", "DigitsCnn", "--data", "DigitsData", "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    net += ["--trainer.max_epochs", "1"]
    assert status_of("validate", *net, "--quant.scheme", "float", "--ckpt_path", "last.ckpt") == 2
    assert "got 'float', and last.ckpt was trained with 'tqt'. Leave quant.scheme out" in capsys.readouterr().err
    assert status_of("fit", *net, "--ckpt_path", "float.ckpt") == 2
    assert "float checkpoint" in capsys.readouterr().err
    assert status_of("predict", *net, "--ckpt_path", "last.ckpt", "--output", "no/such.npy") == 2
    assert "--output no/such.npy: expected the path of a file, in a folder that exists." in capsys.readouterr().err


def test_a_scheme_of_ones_own_is_imported_where_it_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own_scheme.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\n\nfrom lightning_lowbit import Tqt\n\n\n"
        "@dataclass(frozen=True)\nclass Own(Tqt):\n    name: ClassVar[str] = 'own'\n"
    )
    checkpoint = torch.load("last.ckpt", weights_only=True)
    checkpoint["lightning_lowbit"]["scheme"] = "own"
    torch.save(checkpoint, "own.ckpt")
    words = ["export", "--ckpt", "own.ckpt", "--model", "DigitsCnn", "--to", "program", "--output", "a"]
    path = list(sys.path)
    try:
        assert status_of(*words) == 1
        assert "no scheme is called 'own'" in capsys.readouterr().err
        assert status_of(*words, "--quant.scheme", "own_scheme.Own") == 0
        del sys.modules["own_scheme"]
        Path("fit.yaml").write_text("quant: {scheme: own_scheme.Own}\n")
        assert status_of(*words, "--config", "fit.yaml") == 0
        assert "own_scheme" in sys.modules
        assert status_of("schemes", "own_scheme.Own") == 0
    finally:
        sys.path[:] = path
        sys.modules.pop("own_scheme", None)


def test_verify_proves_a_program_and_finds_a_changed_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("export", *NET, "--to", "program", "--output", "a.lowbit") == 0
    words = ["verify", *NET, *DATA, "--batches", "1", "--program"]
    assert status_of(*words, "a.lowbit", "--certificate", "proof.json") == 0
    assert "EQUAL" in capsys.readouterr().out
    certificate = Certificate.load("proof.json")
    assert certificate.ok
    assert certificate.samples == 16
    program = IntegerProgram.load("a.lowbit")
    index, op = next((i, op) for i, op in enumerate(program.ops) if "weight" in op.constants)
    changed = op.constants["weight"].copy()
    changed.flat[0] += 1 if changed.flat[0] < 0 else -1
    program.replace_op(index, dataclasses.replace(op, constants={**op.constants, "weight": changed})).save("b.lowbit")
    assert status_of(*words, "b.lowbit") == 1
    assert "DIFFERENT: conv1" in capsys.readouterr().out
    assert status_of(*words, "last.ckpt") == 2
    assert status_of(*words, "none.lowbit") == 2
    assert "--program none.lowbit: no such file" in capsys.readouterr().err


WRONG = {
    "option": (["export", "--outptu", "a"], "Did you mean 'output'?"),
    "form": (["export", "--to", "onxx"], "Did you mean 'onnx'?"),
    "model": (["export", "--model", "DigitCnn"], "Did you mean 'DigitsCnn'?"),
    "option of verify": (["verify", "--progam", "a"], "Did you mean 'program'?"),
    "half of verify": (["verify", "--program", "a"], "--program needs --ckpt FILE and --model CLASS"),
    "scheme": (["schemes", "tqtt"], "Did you mean 'tqt'?"),
    "subcommand": (["exprot"], "Did you mean 'export'?"),
    "optimizer": (["fit", "--model", "DigitsCnn", "--optimizer", "Adamm"], "Did you mean 'Adam'?"),
    "value": (["fit", "--model", "DigitsCnn", "--quant.scheme.act_round", "half_evn"], "Did you mean 'half_even'?"),
}


@pytest.mark.parametrize(("words", "hint"), WRONG.values(), ids=WRONG)
def test_a_wrong_word_is_answered(capsys: pytest.CaptureFixture[str], words: list[str], hint: str) -> None:
    assert status_of(*words) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("rich", [True, False])
def test_schemes_prints_what_it_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rich: bool
) -> None:
    pytest.importorskip("onnx")

    @dataclasses.dataclass(frozen=True)
    class Unread(Scheme):
        """A scheme of another package."""

        def quantizer(self, site: Any) -> None:
            raise RuntimeError("no such device")

    entry, known = SimpleNamespace(name="unread", load=lambda: Unread), {"tqt": registry()["tqt"]}
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setattr(lightning_lowbit.schemes, "entry_points", lambda group: [entry])
    monkeypatch.setattr(lightning_lowbit.schemes, "_built_in", lambda: dict(known))
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    state = torch.get_rng_state()
    assert status_of("schemes") == 0
    assert torch.equal(torch.get_rng_state(), state)
    lines = capsys.readouterr().out.splitlines()
    assert ("─" in lines[1]) == rich
    assert max(map(len, lines)) <= 90
    rows = [line.split() for line in lines]
    assert ["tqt", "8", "8", "32", "float", "folded", "program", "onnx", "qdq", "clip", "c"] in rows
    assert ["unread", "?", "?", "?", "?", "?", "-"] in rows
    assert "not exported: no such device" in [line.strip() for line in lines]


def test_the_table_is_measured() -> None:
    assert measured(registry()["niti"]).errors == "8"
    assert measured(registry()["wageubn"]).note.startswith("lowbit_add: it reads sums")


@pytest.mark.parametrize("name", sorted(registry()))
def test_options_of_a_scheme_are_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cls: Any = registry()[name]
    options = [field.name for field in dataclasses.fields(cls)]
    assert set(options) == set(_meanings(cls))
    assert status_of("schemes", cls.__name__) == 0
    printed = capsys.readouterr().out
    for option in options:
        assert re.search(rf"^{option} +\S+", printed, re.MULTILINE), option


def test_the_commands_of_the_guide_run(folder: Path) -> None:
    section = GUIDE.partition("\n## From the command line\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\$ lightning-lowbit (.*)", section, re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["export", "verify", "export"]
    for line in lines:
        assert status_of(*line.split()) == 0
    assert written(folder) == ["digits.c", "digits.h", "digits.lowbit", "digits_int8.onnx", "runtime.py"]
