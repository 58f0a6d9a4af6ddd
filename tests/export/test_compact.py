"""Compact checkpoints: codes in place of floats, and the very same evaluation."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from schemes.conformance import Case, Net, copy_of, differing, images, loader, net, trainer
from torch import Tensor, nn

from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.export.checkpoint import compact, expand
from lightning_lowbit.modules.base import float_mode
from lightning_lowbit.plugins.checkpoint import KEY, float_state_dict, initialize_from, save_compact
from lightning_lowbit.plugins.loading import load_from_checkpoint
from lightning_lowbit.schemes import convert, registry

ALL = ("conv1", "conv2", "conv3", "fc")
# Scheme, options, layers whose weights are codes, the bits of a code.
ROWS: tuple[tuple[str, dict[str, Any], tuple[str, ...], int], ...] = (
    ("bnn", {}, ALL[1:3], 1),
    ("bnn", {"scale": "channel_mean", "first": "binary", "last": "float_input"}, ALL, 1),
    ("bnn", {"scale": "max", "latent_std": 0.5}, ALL[1:3], 1),
    ("f8net", {}, ALL[:3], 8),  # the classifier's factor follows from float weights
    ("f8net", {"clip": False, "rescale": "none"}, ALL, 8),
    ("jacinto", {}, ALL, 8),
    ("jacinto", {"preset": "WC8_AT8"}, ALL, 8),
    ("jacinto", {"bias": "tidl_scale"}, ALL, 8),
    ("niti", {}, ALL, 8),
    ("niti", {"norms": "fold"}, ALL, 8),
    ("tqt", {}, ALL, 8),
    ("tqt", {"weight_bits": 12, "bias": "own", "acc_bits": 16}, ALL, 16),
    ("wageubn", {"first_last": "int8"}, ALL, 8),
)


@dataclass
class Saved:
    module: Net
    path: Path
    coded: tuple[str, ...]
    bits: int


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: str(Case(*row[:2])))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Two steps of training, and the compact file."""
    scheme, options, coded, bits = request.param
    module, path = net(), tmp_path_factory.mktemp("compact") / "compact.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a scheme thinks of this network and these ranges
        trainer(Case(scheme, options).callback(), max_steps=2).fit(module, loader(), loader())
    save_compact(module.eval(), path)
    return Saved(module, path, coded, bits)


def test_every_scheme_has_a_row() -> None:
    assert {row[0] for row in ROWS} == set(registry())


def test_evaluation_is_the_same_and_the_module_left_alone(saved: Saved) -> None:
    before = copy_of(saved.module)
    found = compact(saved.module)
    assert differing(copy_of(saved.module), before) == []
    assert found.coded == saved.coded
    assert set(found.kept) == {path for path in ALL if path not in saved.coded and f"{path}.weight" in converted(saved)}
    assert {entry["bits"] for entry in found.table["codes"].values()} == {saved.bits}
    loaded = load_from_checkpoint(Net, saved.path).eval()
    for gain in (0.3, 1.0, 8.0):
        assert torch.equal(loaded(images(1) * gain), saved.module(images(1) * gain))
    through = net(seed=7)
    run = trainer(QuantCallback(saved.module.conv2.scheme))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in the fixture
        run.validate(through, loader(), ckpt_path=saved.path, verbose=False)
    assert torch.equal(through.eval()(images(1)), saved.module(images(1)))


def converted(saved: Saved) -> set[str]:
    """Keys of converted layers' weights."""
    skipped = saved.module.conv2.switch.conversion.skipped
    return {f"{path}.weight" for path in ALL if path not in skipped}


def test_a_second_compact_file_is_the_same_weights(saved: Saved, tmp_path: Path) -> None:
    loaded = load_from_checkpoint(Net, saved.path).eval()
    found = save_compact(loaded, tmp_path / "again.ckpt")
    assert set(found.coded) == set(saved.coded)
    again = load_from_checkpoint(Net, tmp_path / "again.ckpt").eval()
    assert torch.equal(again(images(1)), saved.module(images(1)))


def test_the_float_network_inside_is_whole(saved: Saved) -> None:
    loaded, plain = load_from_checkpoint(Net, saved.path).eval(), net(seed=3).eval()
    plain.load_state_dict(float_state_dict(loaded), strict=True)
    with float_mode(loaded):
        assert torch.equal(loaded(images(1)), plain(images(1)))
    fresh = net(seed=6)
    initialize_from(saved.path, fresh)
    assert differing(copy_of(fresh), copy_of(plain)) == []


def test_training_from_it_is_refused(saved: Saved, tmp_path: Path) -> None:
    said = r"Net: it was loaded from a compact checkpoint.*Resume from the full checkpoint.*init_from="
    scheme = saved.module.conv2.scheme
    with pytest.raises(ConfigError, match=said):
        trainer(QuantCallback(scheme)).fit(net(), loader(), loader(), ckpt_path=saved.path)
    loaded = load_from_checkpoint(Net, saved.path)
    trainer(QuantCallback(scheme)).validate(loaded, loader(), verbose=False)
    torch.save({"state_dict": loaded.state_dict(), "pytorch-lightning_version": "2.6.0"}, tmp_path / "whole.ckpt")
    for module in (loaded, load_from_checkpoint(Net, tmp_path / "whole.ckpt")):  # nor does a full file change that
        with pytest.raises(ConfigError, match=said):
            trainer(QuantCallback(scheme)).fit(module.train(), loader(), loader())


def test_the_file_holds_plain_types_and_few_tensors(saved: Saved) -> None:
    content = torch.load(saved.path, weights_only=True)
    assert set(content) == {"state_dict", "pytorch-lightning_version", KEY}
    assert all(key.startswith("lowbit.") for key in content["state_dict"])
    dtype = {1: torch.int64, 8: torch.int8, 16: torch.int16}[saved.bits]
    weights = sum(saved.module.state_dict()[f"{path}.weight"].numel() for path in saved.coded)
    stored = next(value for value in content["state_dict"].values() if value.dtype == dtype)
    assert stored.numel() * (64 if saved.bits == 1 else 1) >= weights
    assert list(saved.path.parent.iterdir()) == [saved.path]


# -- layers that are not as simple -------------------------------------------------------------------------------
class Stack(nn.Module):
    """Layers one behind the other; what comes out of any network."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def calibrated(module: nn.Module, x: Tensor, scheme: str, **options: Any) -> nn.Module:
    convert(module.eval(), scheme, example_input=x, **options)
    return module


def restored(module: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """A copy that was made compact and filled again, and the layers whose floats were kept."""
    found, twin = compact(module), copy.deepcopy(module)
    state: dict[str, Any] = dict(found.state)
    expand(state, found.table)
    twin.load_state_dict(state, strict=True)
    return twin, found.kept


@pytest.mark.parametrize("per_channel", ["none", "all"])
@pytest.mark.parametrize("power2", [True, False], ids=["power of two", "any"])
def test_a_range_is_that_of_the_floats(per_channel: str, power2: bool) -> None:
    """The largest weight rounds to 64 of 128 codes, half the range; where any range goes, to 127 and not to its end."""
    torch.manual_seed(0)
    module = Stack(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))
    for layer in (module.layers[0], module.layers[2]):
        assert isinstance(layer, nn.Conv2d)
        layer.weight.data.clamp_(-0.4, 0.4)
        layer.weight.data[:, 0, 0, 0] = 0.5001 + 0.001 * torch.rand(len(layer.weight))
    largest = module.layers[0].state_dict()["weight"].max()
    x = torch.randn(4, 2, 8, 8)
    calibrated(module, x, "jacinto", per_channel=per_channel, power2=power2)
    twin, kept = restored(module)
    assert kept == {}
    assert torch.equal(twin(x), module(x))
    assert float(twin.state_dict()["layers.0.weight"].max()) == float(largest)


class Shared(nn.Module):
    """One weight in two layers with batch norms of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight
        self.norm_a, self.norm_b = nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm_a(self.a(x)))
        y: Tensor = self.fc(torch.relu(self.norm_b(self.b(x))))
        return y


def test_what_cannot_be_codes_keeps_its_floats_by_name() -> None:
    torch.manual_seed(1)
    x = torch.randn(16, 4)
    module = calibrated(Shared(), x, "tqt")
    twin, kept = restored(module)
    assert kept == dict.fromkeys(("a", "b"), "it shares parameters with another module")
    assert torch.equal(twin(x), module(x))
    pruned = Stack(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.utils.prune.random_unstructured(pruned.layers[0], "weight", 0.5)
    calibrated(pruned, x, "tqt")
    twin, kept = restored(pruned)
    assert kept == {"layers.0": "its weights are computed from other parameters"}
    assert torch.equal(twin(x), pruned(x))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("scheme", ["tqt", "jacinto", "f8net"])
@pytest.mark.parametrize("kind", ["transposed", "depthwise", "linear"])
def test_norms_are_merged_behind_any_layer(kind: str, scheme: str, affine: bool) -> None:
    torch.manual_seed(2)
    layers: dict[str, tuple[nn.Module, nn.Module, Tensor]] = {
        "transposed": (
            nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, 1e-3, affine=affine), torch.randn(4, 4, 5, 5)
        ),
        "depthwise": (
            nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8, 1e-7, affine=affine), torch.randn(4, 4, 5, 5)
        ),
        "linear": (nn.Linear(4, 8), nn.BatchNorm1d(8, affine=affine), torch.randn(8, 4)),
    }  # fmt: skip
    layer, norm, x = layers[kind]
    module = Stack(layer, norm, nn.ReLU(), nn.Flatten(), nn.Linear(layer(x).flatten(1).shape[1], 3))
    assert isinstance(norm.running_mean, Tensor)
    assert isinstance(norm.running_var, Tensor)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    options = {"per_channel": "all"} if scheme == "jacinto" else {}
    calibrated(module, x, scheme, **options)
    twin, kept = restored(module)
    assert "layers.0" not in kept
    assert torch.equal(twin(x), module(x))


# -- files -------------------------------------------------------------------------------------------------------
def test_a_module_without_codes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "compact.ckpt"
    with pytest.raises(ConfigError, match="no low-bit layer found"):
        save_compact(net(), path)
    module = net()
    convert(module, "tqt")
    with pytest.raises(ConfigError, match="Net: converted and neither trained nor calibrated"):
        save_compact(module, path)
    with pytest.raises(ConfigError, match="no folder"):
        save_compact(module, tmp_path / "absent" / "compact.ckpt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["absent", "short", "other type", "no scale"])
def test_a_damaged_file_is_refused(damage: str) -> None:
    torch.manual_seed(3)
    found = compact(calibrated(Stack(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 4), "tqt"))
    state: dict[str, Any] = dict(found.state)
    table = copy.deepcopy(found.table)
    if damage == "absent":
        del state["lowbit.int8"]
    elif damage == "short":
        state["lowbit.int8"] = state["lowbit.int8"][1:]
    elif damage == "other type":
        table["codes"]["layers.0.weight"]["bits"] = 16
    else:
        del table["tensors"]["float32"]["layers"]["0"]["weight:scale"]
    with pytest.raises(ConfigError, match=r"compact checkpoint: damaged, .*Save it again"):
        expand(state, table)


@pytest.mark.parametrize(("scheme", "most"), [("tqt", 0.3), ("niti", 0.3), ("bnn", 1 / 18)])
def test_a_file_has_a_quarter_of_the_bytes_or_a_bit_a_weight(tmp_path: Path, scheme: str, most: float) -> None:
    """A stack with the sizes of a ResNet-20's last stage."""
    torch.manual_seed(4)
    blocks = [part for _ in range(6) for part in (nn.Conv2d(64, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())]
    module = Stack(nn.Conv2d(3, 64, 3, bias=False), nn.ReLU(), *blocks, nn.Flatten(), nn.Linear(64, 10))
    x = torch.randn(2, 3, 15, 15)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a rectifier feeds signs
        calibrated(module, x, scheme)
    save_compact(module, tmp_path / "compact.ckpt")
    torch.save(float_state_dict(module), tmp_path / "float.pt")
    ratio = (tmp_path / "compact.ckpt").stat().st_size / (tmp_path / "float.pt").stat().st_size
    assert ratio < most
