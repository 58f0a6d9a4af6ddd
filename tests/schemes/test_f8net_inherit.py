"""Clips that weights were trained with go along with them: ``init_from=`` of a network in F8Net's float mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from schemes.conformance import STEPS, SaveAt, images, loader, net, trainer

from lightning_lowbit import F8Net, QuantCallback
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.plugins.checkpoint import initialize_from
from lightning_lowbit.schemes import convert


@pytest.fixture
def clipped(tmp_path: Path) -> Path:
    """A checkpoint of a float network that was trained with clips."""
    path = tmp_path / "clipped.ckpt"
    scheme = F8Net(floating=True, alpha_lr=0.5)
    trainer(QuantCallback(scheme, start=0), SaveAt(path, STEPS)).fit(net(), loader(), loader())
    return path


def clips(module: torch.nn.Module) -> dict[str, float]:
    found = [m for m in module.modules() if isinstance(m, FraclenInput)]
    return {m.site.key: float(m.alpha.detach()) for m in found if m.alpha is not None}


def test_clips_come_with_the_weights_and_calibration_leaves_them(clipped: Path) -> None:
    saved = torch.load(clipped)["state_dict"]
    trained = {key.removesuffix(".alpha"): float(value) for key, value in saved.items() if key.endswith(".alpha")}
    module = net(1)
    trainer(QuantCallback(F8Net(alpha_lr=0.0), init_from=str(clipped))).fit(module, loader(), loader())
    assert clips(module) == pytest.approx(trained)
    fresh = net(1)
    fresh.load_state_dict({key: value for key, value in saved.items() if "lowbit" not in key})
    convert(fresh, F8Net(), images())
    assert clips(fresh) != pytest.approx(trained)  # what calibration would have made of them


def test_a_scheme_without_clips_says_what_the_weights_lose(clipped: Path) -> None:
    module = net(1)
    convert(module, F8Net(clip=False), images())
    with pytest.warns(UserWarning, match=r"lowbit_input: the weights were trained with a clip at .*clip=True"):
        initialize_from(clipped, module)


def test_other_low_bit_state_is_not_taken(clipped: Path, tmp_path: Path) -> None:
    module = net(1)
    convert(module, F8Net(bits=4), images())
    before = {key: value.clone() for key, value in module.state_dict().items() if "fraclen" in key}
    initialize_from(clipped, module)
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())
