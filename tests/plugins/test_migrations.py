"""Records of older checkpoints come up to date format by format; what nobody can read is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from schemes.conformance import Net, copy_of, differing, loader, net, trainer

from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.plugins import migrations
from lightning_lowbit.plugins.checkpoint import KEY, initialize_from
from lightning_lowbit.plugins.loading import load_from_checkpoint
from lightning_lowbit.plugins.migrations import FORMAT, MIGRATIONS, migrate


def names_of_format_0(spec: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """A format in which schemes were called methods and thresholds were saved as such, not as their logarithms."""
    for key in [key for key in state if key.endswith(".threshold")]:
        state[key.replace(".threshold", ".log2_t")] = state.pop(key).log2()
    return {**{key: value for key, value in spec.items() if key != "method"}, "scheme": spec["method"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint of a run, and the same as format 0 would have had it."""
    folder = tmp_path_factory.mktemp("formats")
    run = trainer(QuantCallback("tqt", start=0), max_steps=2)
    run.fit(net(), loader(), loader())
    run.save_checkpoint(folder / "now.ckpt")
    content = torch.load(folder / "now.ckpt")
    spec, state = content[KEY], content["state_dict"]
    content[KEY] = {**{k: v for k, v in spec.items() if k != "scheme"}, "format": 0, "method": spec["scheme"]}
    for key in [key for key in state if key.endswith(".log2_t")]:
        state[key] = state[key].round()  # so that the logarithm is exact
    torch.save({**content, KEY: spec}, folder / "now.ckpt")
    for key in [key for key in state if key.endswith(".log2_t")]:
        state[key.replace(".log2_t", ".threshold")] = state.pop(key).exp2()
    torch.save(content, folder / "old.ckpt")
    return {name: folder / f"{name}.ckpt" for name in ("now", "old")}


def test_an_old_file_is_read_everywhere(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"low-bit format 0 .*reads format 1\. Install the version that wrote it"):
        load_from_checkpoint(Net, files["old"])
    monkeypatch.setitem(MIGRATIONS, 0, names_of_format_0)
    want = copy_of(load_from_checkpoint(Net, files["now"]))
    assert differing(copy_of(load_from_checkpoint(Net, files["old"])), want) == []
    through = net(seed=4)
    trainer(QuantCallback("tqt")).validate(through, loader(), ckpt_path=files["old"], verbose=False)
    assert differing(copy_of(through), want) == []
    plain = net(seed=5)
    initialize_from(files["old"], plain)
    assert torch.equal(plain.conv2.weight, want["conv2.weight"])


def test_formats_are_applied_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "FORMAT", FORMAT + 2)
    for number in (FORMAT, FORMAT + 1):
        monkeypatch.setitem(
            MIGRATIONS, number, lambda spec, state: {**spec, "seen": [*spec.get("seen", []), spec["format"]]}
        )
    spec = {"format": FORMAT}
    assert migrate(spec, {}) == {"format": FORMAT + 2, "seen": [FORMAT, FORMAT + 1]}
    assert spec == {"format": FORMAT}


def test_every_format_up_to_this_one_is_readable() -> None:
    assert sorted(MIGRATIONS) == list(range(min(MIGRATIONS, default=FORMAT), FORMAT))
    spec = {"format": FORMAT}
    assert migrate(spec, {}) is spec


@pytest.mark.parametrize("found", [FORMAT + 1, 99, -1, None, "1", 1.5], ids=str)
def test_what_nobody_can_read_is_refused(found: Any) -> None:
    newer = isinstance(found, int) and found > FORMAT
    step = "Install that version, or a later one" if newer else "Install the version that wrote it"
    with pytest.raises(ConfigError, match=rf"low-bit format {found!r} \(written by lightning-lowbit 7\.1\).*{step}"):
        migrate({"format": found, "version": "7.1"}, {})
