"""Files that cannot be used are refused by name, with the next step, and leave the module as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import Net, SaveAtTheEnd, fit_is_refused, loader, net, refusal, trainer

from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.plugins.loading import load_from_checkpoint
from lightning_lowbit.schemes.tqt import Tqt


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints: float, low-bit, one of a future format, cut ones, and float files that do not fit."""
    folder = tmp_path_factory.mktemp("files")
    names = (
        "float.ckpt", "lowbit.ckpt", "future.ckpt", "unknown.ckpt", "cut.ckpt", "begun.ckpt", "empty.ckpt",
        "keys.pt", "numbers.pt", "module.pt", "absent.pt",
    )  # fmt: skip
    path = {name: folder / name for name in names}
    trainer(SaveAtTheEnd(path["float.ckpt"])).fit(net(), loader())
    trainer(QuantCallback(Tqt(), start=0), SaveAtTheEnd(path["lowbit.ckpt"])).fit(net(), loader())
    whole = path["lowbit.ckpt"].read_bytes()
    path["cut.ckpt"].write_bytes(whole[: len(whole) // 2])
    path["begun.ckpt"].write_bytes(whole[:10])
    path["empty.ckpt"].write_bytes(b"")
    for name, changes in (
        ("future.ckpt", {"format": 99, "version": "9.0"}),
        ("unknown.ckpt", {"scheme": "tqtt"}),
    ):
        content = torch.load(path["lowbit.ckpt"])
        content["lightning_lowbit"].update(changes)
        torch.save(content, path[name])
    state = net().state_dict()
    state["stem.weight"] = state.pop("conv1.weight")
    state["fc.weight"] = torch.zeros(3, 4)
    torch.save(state, path["keys.pt"])
    torch.save({"epoch": 1}, path["numbers.pt"])
    torch.save(net(), path["module.pt"])
    return path


def test_a_float_checkpoint_does_not_resume(files: dict[str, Path]) -> None:
    path = files["float.ckpt"]
    words = [str(path), "is a float checkpoint", "init_from= (--quant.init_from"]
    fit_is_refused(net(), trainer(QuantCallback(start=0)), *words, ckpt_path=path)


@pytest.mark.parametrize("name", ["cut.ckpt", "begun.ckpt", "empty.ckpt"])
@pytest.mark.parametrize(
    "way",
    [
        "ckpt_path",
        "init_from",
        "load_from_checkpoint",
    ],
)
def test_a_file_that_is_cut_off_is_refused_with_its_size(files: dict[str, Path], way: str, name: str) -> None:
    path = files[name]
    words = [str(path), "cut off", f"{path.stat().st_size} bytes"]
    if way == "ckpt_path":
        fit_is_refused(net(), trainer(QuantCallback(start=0)), *words, ckpt_path=path)
    elif way == "init_from":
        fit_is_refused(net(), trainer(QuantCallback(init_from=str(path))), *words)
    else:
        message = refusal(lambda: load_from_checkpoint(Net, path))
        assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "keys.pt",
            ["nothing was loaded", "fc.weight (3, 4) for (2, 4)", "in the file: conv1.weight", "stem.weight"],
        ),
        ("numbers.pt", ["no tensors found", "'state_dict'"]),
        ("module.pt", ["Python objects beside tensors.", "torch.save(module.state_dict(), path)"]),
        ("absent.pt", ["no such file"]),
    ],
)  # fmt: skip
def test_init_from_a_file_that_does_not_fit_loads_nothing(files: dict[str, Path], name: str, words: list[str]) -> None:
    path = files[name]
    fit_is_refused(net(), trainer(QuantCallback(init_from=str(path))), f"init_from='{path}'", *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(
            {"width": 6},
            ["conv1.weight", "(4, 1, 3, 3)", "(6, 1, 3, 3)"],
        ),
        ({"extra": True}, ["extra.", "only here"]),
        (
            {"crossed": True},
            ["branches.0.lowbit_output: tied to branches.", "differs from the one that was trained"],
        ),
    ],
)
def test_a_low_bit_checkpoint_of_another_network_is_refused(
    files: dict[str, Path], options: dict[str, Any], words: list[str]
) -> None:
    run = trainer(QuantCallback(start=0))
    fit_is_refused(net(**options), run, *words, again=not options.get("extra"), ckpt_path=files["lowbit.ckpt"])


def test_a_low_bit_checkpoint_without_its_trainer_is_held_to_its_ties(files: dict[str, Path]) -> None:
    message = refusal(lambda: load_from_checkpoint(Net, files["lowbit.ckpt"], crossed=True))
    assert "differs from the one that was trained" in message


def test_a_checkpoint_of_other_options_names_what_differs(files: dict[str, Path]) -> None:
    run = trainer(QuantCallback(Tqt(act_bits=4), start=0))
    words = [
        "trained with Tqt(act_bits=8), this callback has act_bits=4.",
        "('tqt')",
        "options from the checkpoint",
    ]
    fit_is_refused(net(), run, *words, ckpt_path=files["lowbit.ckpt"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("future.ckpt", ["format 99", "lightning-lowbit 9.0", "reads format 1", "Install"]),
        ("unknown.ckpt", ["no scheme is called 'tqtt'", "Did you mean 'tqt'?"]),
    ],
)
def test_a_checkpoint_from_elsewhere_says_what_is_needed(files: dict[str, Path], name: str, words: list[str]) -> None:
    fit_is_refused(net(), trainer(QuantCallback(start=0)), *words, ckpt_path=files[name])
    message = refusal(lambda: load_from_checkpoint(Net, files[name]))
    assert [word for word in words if word not in message] == [], message
