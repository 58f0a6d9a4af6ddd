"""What a packed network refuses, what it holds, and its file."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from export.packed_nets import BINARY, Functional, agree, converted, mlp, randomize
from torch import nn

from lightning_lowbit.errors import ConfigError, InvariantError
from lightning_lowbit.export.packed import pack, packing_of
from lightning_lowbit.export.packed_file import load_packed, save_packed
from lightning_lowbit.export.packed_layers import PackedConv, PackedLinear
from lightning_lowbit.export.packed_sizes import packed_sizes
from lightning_lowbit.schemes import convert


# -- refusals ---------------------------------------------------------------------------------------------------------
def test_what_cannot_be_packed_says_why() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(ConfigError, match=r"Sequential: no binary layer to pack: it is not converted\. Convert"):
        pack(mlp(8, 16, 16, 3))
    other = mlp(8, 16, 16, 3)
    convert(other, "tqt", x)
    with pytest.raises(ConfigError, match="it was converted with another scheme"):
        pack(other)
    early = mlp(8, 16, 16, 3)
    convert(early, "bnn")
    with pytest.raises(ConfigError, match=r"3: neither trained nor calibrated\. Train"):
        pack(early)
    staged = mlp(8, 16, 16, 3)
    convert(staged, "bnn", x, weights_at=100)
    with pytest.raises(ConfigError, match=r"3: its weights are float, in the first of two stages.*weights_at=100"):
        pack(staged)
    packed = pack(converted(mlp(8, 16, 16, 3), x))
    with pytest.raises(ConfigError, match="is packed already"):
        pack(packed)
    with pytest.raises(ConfigError, match="signs and thresholds, which do not learn"):
        packed.train()
    with pytest.raises(ConfigError, match="is not a packed network"):
        packing_of(mlp(8, 3))


def test_signs_are_never_taken_for_numbers() -> None:
    net = converted(Functional(), torch.randn(2, 3, 10, 10), **BINARY)
    packed = pack(net)
    with torch.no_grad():
        bits = packed.conv1(torch.randn(2, 3, 10, 10))
    assert bits.shape == (2, 70, 10, 10)
    assert bits.dtype == torch.float32
    assert "conv1" in repr(bits)
    for read in (
        torch.tanh, torch.relu, lambda b: b + 1, lambda b: 1 - b, lambda b: b.sum(), lambda b: torch.cat([b, b]),
        lambda b: b.numpy(), lambda b: b[0], lambda b: b.tolist(), lambda b: torch.equal(b, b), lambda b: b.add_(1),
        lambda b: nn.functional.hardtanh(b), lambda b: packed.fc1(b), lambda b: packed.bn2(b), lambda b: b.flatten(1),
        lambda b: nn.functional.max_pool2d(b, 3), lambda b: torch.ops.aten.neg(b), lambda b: b.sum().item(),
    ):  # fmt: skip
        with pytest.raises(InvariantError, match=r"conv1: \w+.* got its result, of which only signs were kept"):
            read(bits)
    with pytest.raises(InvariantError, match="part of the thresholds of conv1"):
        packed.bn1(torch.randn(2, 70, 5, 5))


def test_a_layer_alone_takes_numbers_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, 10)
    net = converted(Functional(), x, shift=False, **BINARY)
    packed, rows = pack(net), torch.randn(3, 11)
    with torch.no_grad():
        assert torch.equal(packed.fc2(rows), net.fc2(rows))
        flat = torch.randn(2, 54)
        assert torch.equal(packed.fc2(packed.bn3(packed.fc1(flat)).clamp(-1, 1)), net.fc2(net.bn3(net.fc1(flat))))


# -- what it holds ----------------------------------------------------------------------------------------------------
def test_no_float_weight_is_kept() -> None:
    net = converted(mlp(64, 640, 640, 640, 10), torch.randn(4, 64), first="int8", last="int8")
    packed = pack(net)
    held = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.state_dict().items()}
    assert held["3.words"] == (torch.int64, (640, 10))
    assert held["3.low"] == (torch.int32, (640,))
    assert held["3.flip"] == (torch.bool, (640,))
    assert held["0.weight"] == (torch.int8, (640, 64))
    assert held["9.bias"] == (torch.int32, (10,))
    assert not [name for name, (dtype, shape) in held.items() if dtype.is_floating_point and len(shape) > 1]
    with torch.no_grad():
        packed(torch.randn(2, 64))
    assert len(pickle.dumps(packed)) < 300_000  # two binary layers alone are 3.3 MB in float32


def test_sizes_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = converted(mlp(64, 640, 640, 640, 10), torch.randn(4, 64), first="int8", last="int8")
    packed = pack(net)
    capsys.readouterr()
    sizes = save_packed(packed, tmp_path / "net.pt")
    printed = capsys.readouterr().out
    assert printed.strip() == str(sizes).strip()
    rows = {row.path: row for row in sizes.rows}
    assert rows["3"].words == 640 * 640 // 8
    assert rows["3"].thresholds == 5 * 640
    assert rows["3"].float32 == 4 * (640 * 640 + 640)
    assert rows["0"].words == 640 * 64
    assert rows["0"].dtype == "int8"
    assert 29 < sizes.binary.float32 / sizes.binary.stored < 32
    assert sizes.file == (tmp_path / "net.pt").stat().st_size
    assert sizes.whole.stored < sizes.file < 2 * sizes.whole.stored
    assert f"{sizes.file:,}" in printed
    assert str(packed_sizes(packed)) in printed


@pytest.mark.parametrize("relu", ["keep", "prelu", "rprelu"])
def test_a_file_restores_it(tmp_path: Path, relu: str, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(3, 3, 10, 10)
    options: dict[str, Any] = {"first": "int8", "relu": relu, "scale": "channel_mean"}

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
        )  # fmt: skip

    net = converted(network(), x, **options)
    save_packed(pack(net), tmp_path / "net.pt")
    fresh = network()
    convert(fresh, "bnn", **options)
    for target in (fresh, net):
        restored = load_packed(target, tmp_path / "net.pt")
        assert agree(net, restored, x)
        assert not restored.training
    assert torch.load(tmp_path / "net.pt", weights_only=True)["format"] == "lightning_lowbit.packed"


def test_wrong_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(2, 3, 10, 10)
    net, good = converted(Functional(), x, **BINARY), tmp_path / "good.pt"
    save_packed(pack(net), good)
    whole = good.read_bytes()

    def written(name: str, change: Any) -> Path:
        file = torch.load(good, weights_only=True)
        change(file)
        torch.save(file, tmp_path / name)
        return tmp_path / name

    def other(module: nn.Module, **options: Any) -> nn.Module:
        convert(module, "bnn", **{**BINARY, **options})
        return module

    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("words")
    torch.save(net.state_dict(), tmp_path / "foreign.pt")
    for target, path, message in (
        (net, tmp_path / "none.pt", "none.pt: no such file"),
        (net, tmp_path / "cut.pt", "cut.pt: .*damaged"),
        (net, tmp_path / "text.pt", "text.pt: .*damaged"),
        (net, tmp_path / "foreign.pt", "foreign.pt: .*lacks format"),
        (net, written("1.pt", lambda file: file.update(version=99)), "1.pt: its version is 99, expected 1"),
        (net, written("2.pt", lambda file: file.pop("state")), "2.pt: damaged, it lacks 'state'"),
        (net, written("3.pt", lambda file: file["state"].pop("conv1.words")), "3.pt: damaged, it lacks conv1.words"),
        (net, written("4.pt", lambda file: file["state"].pop("fc1.flip")), "4.pt: damaged, it lacks fc1.flip"),
        (net, written("5a.pt", lambda file: file["layers"].update(conv1=3)), "5a.pt: damaged, the entry of conv1"),
        (
            net,
            written("5b.pt", lambda file: file["layers"]["conv1"].update(tensors={"words": ("torch.int64",)})),
            "5b.pt: damaged, the entry of conv1",
        ),
        (net, written("5.pt", lambda file: file["state"].pop("fc2.bias")), "5.pt: damaged, it lacks fc2.bias"),
        (net, written("6.pt", lambda file: file["state"].update(x=torch.ones(1))), "6.pt: it does not fit .*x"),
        (
            net,
            written("7.pt", lambda file: cut(file, "conv1.words")),
            "7.pt: damaged, conv1.words: got torch.int64 .*expected",
        ),
        (
            net,
            written("8.pt", lambda file: cut(file, "conv1.low")),
            "8.pt: damaged, conv1.low: got torch.int32 .*expected",
        ),
        (Functional(), good, "expected a converted network to load .*good.pt"),
        (other(Functional(), pad_value=1), good, "good.pt: conv1: the file says .*'pad_value': 0"),
        (other(mlp(8, 16, 3)), good, "good.pt: (bn1|conv1): no such module"),
    ):
        with pytest.raises(ConfigError, match=f"(?s){message}"):
            load_packed(target, path)


def cut(file: dict[str, Any], key: str) -> None:
    file["state"][key] = file["state"][key][:5]


def test_copies(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 10, 10)
    net = converted(Functional(), x, **BINARY)
    packed = pack(net)
    assert agree(net, packed, x)  # the kernels' own forms of the words exist now
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to("cpu")):
        assert agree(net, again, x)
        assert str(packing_of(again)) == str(packing_of(packed))
    randomize(net, 9)
    other = pack(net)
    packed.load_state_dict(other.state_dict())
    assert agree(net, packed, x)


def test_the_network_is_left_alone() -> None:
    x = torch.randn(3, 3, 10, 10)
    net = converted(Functional(), x, **BINARY).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pack(net)
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_results_lie_in_memory_like_the_networks() -> None:
    """Float code behind a convolution adds up in the order of memory."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    net = converted(nn.Sequential(nn.Conv2d(8, 70, 3), nn.BatchNorm2d(70), nn.Conv2d(70, 6, 3)), x, **BINARY)
    packed = pack(net)
    with torch.no_grad():
        for given in (x, x.contiguous()):
            assert packed(given).stride() == net(given).stride()


def test_kinds() -> None:
    packed = pack(converted(Functional(), torch.randn(2, 3, 10, 10), **BINARY))
    assert isinstance(packed.conv1, PackedConv)
    assert isinstance(packed.fc1, PackedLinear)
    assert packed.fc1.pixels == 9
    assert packed.fc1.words.shape == (11, 9)  # six channels of nine pixels: a word each
