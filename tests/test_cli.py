"""The command line: short names, the key `quant`, and what it says when a name is wrong."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

import lightning_lowbit
from lightning_lowbit import cli
from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.cli.settings import scheme_class
from lightning_lowbit.schemes import registry
from lightning_lowbit.schemes.tqt import Tqt

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
NET = ["--model", "DigitsCnn", "--data", "DigitsData"]
QUIET = [
    "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "false",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
]  # fmt: skip

Fit = Callable[..., Trainer]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Fit:
    """A function from the words behind `fit` to the Trainer that they build, which does not run."""

    class BuiltError(Exception):
        pass

    def stop(self: cli.LowBitCLI) -> None:
        raise BuiltError(self.trainer)

    monkeypatch.setattr(cli.LowBitCLI, "before_fit", stop, raising=False)  # Lightning's own hook

    def run(*words: str) -> Trainer:
        with pytest.raises(BuiltError) as caught:
            cli.main(["fit", *QUIET, *words])
        trainer: Trainer = caught.value.args[0]
        return trainer

    return run


def quant_callbacks(trainer: Trainer) -> list[QuantCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, QuantCallback)]  # type: ignore[attr-defined]


def test_the_console_script_knows_our_callbacks_and_the_folder_that_it_is_called_in(tmp_path: Path) -> None:
    names = ["BinaryMonitor", "Calibrate", "FraclenSchedule"]
    source = "from lightning_lowbit.demos import DigitsCnn\n\n\nclass Own(DigitsCnn):\n    pass\n"
    (tmp_path / "own_net.py").write_text(source, encoding="utf-8")
    words = ["fit", "--model", "own_net.Own", *(f"--trainer.callbacks+={name}" for name in names), "--print_config"]
    last = "import atexit, sys; atexit.register(lambda: print(sys.path[-1]))"
    code = f"{last}; from lightning_lowbit import cli; cli.main({words})"
    path = {"PYTHONPATH": str(CONFIGS.parents[1]), "PYTHONSAFEPATH": "1"}  # as of a script in a folder of its own
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert "class_path: own_net.Own" in done.stdout, done.stderr[-2000:]
    assert all(f".{name}\n" in done.stdout for name in names)
    assert Path(done.stdout.splitlines()[-1]).samefile(tmp_path)  # last: it shadows nothing


def print_config(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", *words, "--print_config"])
    assert not stopped.value.code
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(words))
    assert stopped.value.code == 2
    return capsys.readouterr().err.rpartition("error: ")[2]


TQT4 = {
    "name, then option": ["--quant.scheme", "tqt", "--quant.scheme.bits", "4"],
    "with equals signs": ["--quant.scheme=tqt", "--quant.scheme.bits=4"],
    "class name": ["--quant.scheme", "Tqt", "--quant.scheme.bits", "4"],
    "class path": ["--quant.scheme", "lightning_lowbit.schemes.tqt.Tqt", "--quant.scheme.bits", "4"],
    "option of the default scheme": ["--quant.scheme.bits", "4"],
    "inline mapping": ["--quant.scheme", "{class_path: tqt, init_args: {bits: 4}}"],
    "inline section": ["--quant", "{scheme: tqt, scheme.bits: 4}"],
}


@pytest.mark.parametrize("words", TQT4.values(), ids=TQT4)
def test_scheme_and_options_combine_on_the_command_line(build: Fit, words: list[str]) -> None:
    (callback,) = quant_callbacks(build(*NET, *words))
    assert callback.scheme == Tqt(bits=4)


YAML4 = {
    "beside each other": "quant: {scheme: tqt, scheme.bits: 4}",
    "dotted": "quant.scheme: tqt\nquant.scheme.bits: 4",
    "class path and init_args": "quant: {scheme: {class_path: tqt, init_args: {bits: 4}}}",
    "option of the default scheme": "quant: {scheme.bits: 4}",
}


@pytest.mark.parametrize("text", YAML4.values(), ids=YAML4)
def test_scheme_and_options_combine_in_yaml(build: Fit, tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: DigitsCnn\ndata: DigitsData\n{text}\n", encoding="utf-8")
    (callback,) = quant_callbacks(build("--config", str(file)))
    assert callback.scheme == Tqt(bits=4)


def test_a_section_can_have_a_file_of_its_own(build: Fit, tmp_path: Path) -> None:
    file = tmp_path / "quant.yaml"
    file.write_text("scheme: tqt\nscheme.bits: 4\n", encoding="utf-8")
    (callback,) = quant_callbacks(build(*NET, "--quant", str(file)))
    assert callback.scheme == Tqt(bits=4)


def test_the_command_line_adds_to_yaml(build: Fit) -> None:
    config = str(CONFIGS / "digits_tqt.yaml")
    (callback,) = quant_callbacks(build("--config", config, "--quant.scheme.act_bits", "6"))
    assert callback.scheme == Tqt(bits=4, act_bits=6)


def test_quant_stands_first(build: Fit) -> None:
    trainer = build(*NET, "--trainer.callbacks+=LearningRateMonitor")
    names = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert names[0] == "QuantCallback"
    assert "LearningRateMonitor" in names


def test_float_adds_no_callback(build: Fit) -> None:
    assert quant_callbacks(build("--config", str(CONFIGS / "digits_float.yaml"))) == []
    # Also over a file that names a scheme.
    assert quant_callbacks(build("--config", str(CONFIGS / "digits_tqt.yaml"), "--quant.scheme", "float")) == []


def test_a_second_callback_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    path = "lightning_lowbit.callbacks.quant.QuantCallback"
    message = complaint(capsys, "fit", *NET, *QUIET, f"--trainer.callbacks+={path}")
    assert message.startswith("trainer.callbacks: a QuantCallback stands there")


@pytest.mark.parametrize(("word", "kind"), [("3", int), ("0", int), ("0.5", float), ("500 steps", str)])
def test_a_moment_keeps_its_kind(capsys: pytest.CaptureFixture[str], word: str, kind: type) -> None:
    """An epoch that arrived as 3.0 would be read as a fraction."""
    start = print_config(capsys, *NET, "--quant.start", word)["quant"]["start"]
    assert type(start) is kind
    assert start == kind(word)


ROUND = {
    "skip": [*NET, "--quant.scheme.bits", "4", "--quant.skip", "[fc]", "--quant.start", "500 steps"],
    "float": [*NET, "--quant.scheme=float"],
    "niti": [*NET, "--quant.scheme", "niti", "--quant.scheme.mu", "[5, 4]", "--quant.scheme.mu_at", "[0, 0.5]"],
    "wageubn": [*NET, "--quant.scheme", "wageubn", "--quant.scheme.preset", "paper", "--quant.scheme.dr", "[128]"],
    "overrides": [*NET, "--quant.scheme.overrides", "{conv2: {weight_bits: 6}}"],
    "jacinto": ["--config", str(CONFIGS / "digits_jacinto.yaml"), "--quant.scheme.preset", "reference"],
    "callback": ["--config", str(CONFIGS / "digits_tqt.yaml"), "--trainer.callbacks+=LearningRateMonitor"],
}


@pytest.mark.parametrize("words", ROUND.values(), ids=ROUND)
def test_printed_config_reads_back_as_itself_and_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, build: Fit, words: list[str]
) -> None:
    first = print_config(capsys, *words)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(first), encoding="utf-8")
    assert print_config(capsys, "--config", str(file)) == first
    if "callback" in str(words):  # which needs the logger that a built Trainer here has not
        return
    schemes = [
        [callback.scheme for callback in quant_callbacks(build(*given))]
        for given in (words, ["--config", str(file), *QUIET])
    ]
    assert schemes[0] == schemes[1]


@pytest.mark.parametrize("name", [*sorted(registry()), "Tqt", "lightning_lowbit.Jacinto"])
def test_every_option_of_a_scheme_has_a_help_text(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", "--quant.scheme.help", name])
    assert not stopped.value.code
    cls: Any = scheme_class(name)
    assert explained(capsys.readouterr().out) == {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize("name", ["BinaryMonitor", "Calibrate", "Distill", "FraclenSchedule", "QuantMonitor"])
def test_every_option_of_a_callback_has_a_help_text(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", "--trainer.callbacks.help", name])
    parameters = inspect.signature(getattr(lightning_lowbit, name)).parameters
    assert explained(capsys.readouterr().out) - {"help"} == set(parameters)


def explained(text: str) -> set[str]:
    """Options under which a help has words, and not their type alone."""
    found = re.findall(r"^  --[\w.]+?\.(\w+)\+? [^\n]*\n +(?=[^\s(])", text.partition("Help for")[2], re.MULTILINE)
    return set(found)


def test_the_first_screen_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert not stopped.value.code
    screen = capsys.readouterr().out
    assert "First try: lightning-lowbit fit --model DigitsCnn" in screen
    assert screen.index("\n    fit ") < screen.index("\n    export ")
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("lightning-lowbit ")


WRONG = {
    "scheme": (["fit", *NET, "--quant.scheme", "tqtt"], "Did you mean 'tqt'?"),
    "field of a scheme": (["fit", *NET, "--quant.scheme.weight_bit", "4"], "Did you mean 'weight_bits'?"),
    "argument of quant": (["fit", *NET, "--quant.calibrate_batch_count", "4"], "'quant.calibrate_batches'?"),
    "trainer option": (["fit", *NET, "--trainer.max_epoch_count", "4"], "Did you mean 'trainer.max_epochs'?"),
    "model": (["fit", "--model", "DigitCnn", "--data", "DigitsData"], "Did you mean 'DigitsCnn'?"),
    "field of a model": (["fit", "--model", "DigitsCnn", "--model.chanels", "4"], "Did you mean 'channels'?"),
    "subcommand": (["fti"], "Did you mean 'fit'?"),
    "option first": ([*NET, "fit"], "The command comes first: lightning-lowbit fit"),
    "value": (["fit", *NET, "--quant.scheme.bits", "four"], "quant.scheme.bits: got 'four', expected int or null.\n"),
    "range": (["fit", *NET, "--quant.scheme.bits", "40"], "Tqt(weight_bits=40): expected an integer from 2 to 16"),
    "of a table": (["fit", *NET, "--quant.scheme.overrides", "{fc: {weight_bit: 4}}"], "Did you mean 'weight_bits'?"),
    "choice": (["fit", *NET, "--quant.scheme.mode", "static_"], "mode: got 'static_', expected 'static', 'retrain_wt'"),
    "trainer value": (["fit", *NET, "--trainer.max_epochs", "x"], "trainer.max_epochs: got 'x', expected int or null."),
    "strategy": (["fit", *NET, "--trainer.strategy", "dpp"], "trainer: You selected an invalid strategy name"),
    "kind of class": (["fit", "--model", "DigitsData"], "model: DigitsData is no LightningModule."),
    "callback": (["fit", *NET, "--trainer.callbacks+=Calibrat"], "full path. Did you mean 'Calibrate'?"),
    "of a callback": (["fit", *NET, "--trainer.callbacks+=Freeze"], "trainer.callbacks: Freeze needs 'at'."),
    "module of a scheme": (["fit", *NET, "--quant.scheme", "no_module.Own"], "No module named 'no_module'. Expected"),
    "class of a scheme": (["fit", *NET, "--quant.scheme", "lightning_lowbit.Tqtt"], "Did you mean 'Tqt'?"),
    "no scheme": (["fit", *NET, "--quant.scheme", "lightning_lowbit.QuantCallback"], "is no subclass of"),
    "no option": (["fit", *NET, "--quant", "tqt"], "expected a file or options, as in --quant.scheme tqt."),
    "no model": (["fit", "--data", "DigitsData"], "--model: expected, and not given."),
    "no data": (["fit", "--model", "DigitsCnn", *QUIET], "--data: expected, and DigitsCnn has no train_dataloader."),
    "no file": (["fit", "--config", "none.yaml"], "--config none.yaml: no such file."),
    "no checkpoint": (["validate", *NET, "--ckpt_path", "none.ckpt"], "--ckpt_path none.ckpt: no such file."),
    "other file": (["validate", *NET, "--ckpt_path", __file__], "it is no checkpoint of tensors and plain types."),
}


@pytest.mark.parametrize(("words", "hint"), WRONG.values(), ids=WRONG)
def test_a_wrong_name_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str], words: list[str], hint: str
) -> None:
    message = complaint(capsys, *words)
    assert hint in message
    assert message.count("\n") <= 2  # one sentence, and where the options are listed


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("quant: {scheme: nitti}", "no scheme is called 'nitti'"),
        ("quant: {skipp: [fc]}", "Did you mean 'quant.skip'?"),
        ("quant: {scheme: tqt, scheme.bit: 4}", "Did you mean 'bits'?"),
        ("quant: {scheme: float, scheme.bits: 4}", "'float' has no options, got bits"),
        ("quant: tqt", "quant: got 'tqt', expected its options, as in quant: {scheme: tqt}."),
        ("quant: {scheme: [tqt]}", "quant.scheme: ['tqt'] is no Scheme."),
        ("quant: {scheme: {class_pth: tqt}}", "Did you mean 'class_path'?"),
        ("quant:\n\tscheme: tqt", "line 4, column 1: a tab. YAML is indented with spaces."),
        ("quant: {scheme: tqt, skip: [fc],\n  skip: [conv1]}", "line 4: the key 'skip' stands there a second time."),
        ("data: DigitsData", "line 3: the key 'data' stands there a second time."),
    ],
)
def test_a_wrong_name_in_yaml_is_answered_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, hint: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: DigitsCnn\ndata: DigitsData\n{text}\n", encoding="utf-8")
    assert hint in complaint(capsys, "fit", "--config", str(file))


@pytest.mark.parametrize(("text", "kind"), [("- model: DigitsCnn\n", "a list"), ("", "nothing"), ("tqt\n", "a str")])
def test_a_file_without_keys_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, kind: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    message = complaint(capsys, "fit", "--config", str(file))
    assert message == f"--config {file}: expected keys such as model, data, quant, trainer; got {kind}.\n"


def test_schemes_lists_every_registered_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["schemes"])
    table = capsys.readouterr().out
    for name, scheme in registry().items():
        assert f"{scheme.__module__}.{scheme.__qualname__}" in table
        assert name in table
    assert "weight_bits=8" in table


def test_subcommands_are_those_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "{fit,validate,test,predict,export,verify," in capsys.readouterr().out


def last_accuracy(folder: Path) -> str:
    """The last ``val_acc`` that Lightning's CSVLogger wrote below ``folder``."""
    (file,) = folder.rglob("metrics.csv")
    with file.open(encoding="utf-8") as lines:
        return [row["val_acc"] for row in csv.DictReader(lines) if row["val_acc"]][-1]


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning:lightning.pytorch.callbacks")
def test_a_bare_name_takes_the_options_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--config", str(CONFIGS / "digits_tqt.yaml"), "--trainer.enable_progress_bar", "false"]
    cli.main(["fit", *common, "--quant.scheme.bits", "4", "--trainer.max_epochs", "3"])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    cli.main(["validate", *common, "--ckpt_path", str(checkpoint)])
    runs = tmp_path / "runs" / "digits_tqt"
    assert last_accuracy(runs / "version_1") == last_accuracy(runs / "version_0")
    # Options of one's own are held against the checkpoint's.
    message = complaint(capsys, "validate", *common, "--quant.scheme.act_bits", "6", "--ckpt_path", str(checkpoint))
    assert "ckpt_path: trained with" in message


# Each run has a version folder of its own, so the checkpoint lies in another than the one in use.
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning:lightning.pytorch.callbacks")
@pytest.mark.parametrize("name", ["digits_tqt", "digits_float"])
def test_an_example_config_trains_and_its_checkpoint_validates(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--config", str(CONFIGS / f"{name}.yaml"), "--trainer.enable_progress_bar", "false"]
    cli.main(["fit", *common, "--trainer.max_epochs", "3"])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    cli.main(["validate", *common, "--ckpt_path", str(checkpoint)])
    trained = last_accuracy(tmp_path / "runs" / name / "version_0")
    assert float(trained) > 0.8
    assert last_accuracy(tmp_path / "runs" / name / "version_1") == trained


@pytest.mark.parametrize("name", sorted(registry()))
def test_a_named_scheme_comes_with_its_own_defaults(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", "--model", "lightning_lowbit.demos.DigitsCnn", "--quant.scheme", name, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["quant"]["scheme"]["init_args"]
    fields = dataclasses.fields(registry()[name])
    own = {
        f.name: f.default for f in fields if f.default is not dataclasses.MISSING and not isinstance(f.default, tuple)
    }
    assert {option: printed[option] for option in own} == own
