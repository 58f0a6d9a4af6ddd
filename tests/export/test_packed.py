"""A packed network gives the bits of the network that it was packed from, and holds nothing but bits where it may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from export.packed_nets import BINARY, Functional, Residual, agree, converted, mlp, values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.export.bits import Bits
from lightning_lowbit.export.packed import pack, packing_of
from lightning_lowbit.export.packed_layers import PackedEnd, PackedNorm, Passed

# Batches of a few values, which may all be positive.
pytestmark = pytest.mark.filterwarnings("ignore:.*has no negative value in calibration")
OPTIONS = st.fixed_dictionaries({
    "scale": st.sampled_from(["none", "max", "channel_mean"]),
    "shift": st.booleans(),
    "relu": st.sampled_from(["keep", "hardtanh", "prelu", "rprelu"]),
    "pad_value": st.sampled_from([0, 1]),
})  # fmt: skip
SEEDS = st.integers(0, 10_000)
ACTS = {
    "hardtanh": lambda c: nn.Hardtanh(),
    "narrow": lambda c: nn.Hardtanh(-0.5, 0.25),
    "relu": lambda c: nn.ReLU(),
    "prelu": lambda c: nn.PReLU(),
    "prelus": lambda c: nn.PReLU(c),
    "leaky": lambda c: nn.LeakyReLU(0.1),
    "turned": lambda c: nn.LeakyReLU(-0.1),
    "tanh": lambda c: nn.Tanh(),
    "dropout": lambda c: nn.Dropout(0.5),
    "none": lambda c: nn.Identity(),
}  # fmt: skip
FOLDING = {"hardtanh", "narrow", "relu", "prelu", "prelus", "leaky", "dropout", "none"}


# -- equality --------------------------------------------------------------------------------------------------------
@settings(max_examples=50, deadline=None)
@given(
    widths=st.lists(st.integers(1, 130), min_size=2, max_size=4), batch=st.integers(1, 3), norm=st.booleans(),
    act=st.sampled_from(sorted(ACTS)), bias=st.booleans(), options=OPTIONS, seed=SEEDS,
)  # fmt: skip
def test_linear_networks(
    widths: list[int], batch: int, norm: bool, act: str, bias: bool, options: dict[str, Any], seed: int
) -> None:
    x = values((batch, widths[0]), seed)
    torch.manual_seed(seed)
    net = converted(
        mlp(*widths, 3, norm=norm, act=ACTS[act], bias=bias), torch.randn(4, widths[0]), seed, **BINARY, **options
    )
    packed = pack(net)
    assert agree(net, packed, x)
    assert len(packing_of(packed).signs) == (len(widths) - 1 if act in FOLDING else 0)


def convolutional(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    """A random stack of convolutions, flattened into a linear layer; and the shape of an image."""
    axes = draw(st.sampled_from([1, 2]))
    conv, norm, pool = ((nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d), (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d))[axes - 1]
    channels, size = draw(st.integers(1, 4)), draw(st.lists(st.integers(1, 7), min_size=axes, max_size=axes))
    image = (channels, *size)
    x, layers = torch.zeros(1, *image), []
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([1, 1, 2]))
        groups = groups if channels % groups == 0 else 1
        kernel, dilation, stride = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
        padding: Any = draw(st.sampled_from([0, 1, 2, "same", "valid"]))
        if padding == "same":
            stride = 1
        elif padding == "valid" or min(x.shape[2:]) + 2 * padding < dilation * (kernel - 1) + 1:
            padding = (
                0 if min(x.shape[2:]) >= dilation * (kernel - 1) + 1 else dilation * kernel
            )  # larger than the image
        outputs = groups * draw(st.sampled_from([1, 2, 5, 32, 40, 64]))
        part: list[nn.Module] = [
            conv(channels, outputs, kernel, stride, padding, dilation, groups, draw(st.booleans()))
        ]
        where = draw(st.sampled_from(["none", "before", "behind"]))
        side = draw(st.integers(0, 1))
        window = pool(draw(st.integers(2, 3)), draw(st.integers(1, 2)), side, ceil_mode=draw(st.booleans()))
        y = part[0](x)
        fits = min(y.shape[2:]) + 2 * side >= 3
        part += [window] if where == "before" and fits else []
        part += [norm(outputs)] if draw(st.booleans()) else []
        part += [window] if where == "behind" and fits else []
        part += [ACTS[draw(st.sampled_from(sorted(ACTS)))](outputs)]
        for layer in part:
            x = layer.eval()(x)
        layers += part
        channels = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(x[0].numel(), 3)), image


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@settings(max_examples=50, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), last=st.booleans(), options=OPTIONS, seed=SEEDS)
def test_convolutional_networks(data: Any, batch: int, last: bool, options: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    net, image = convolutional(data.draw)
    x = values((batch, *image), seed)
    x = x.contiguous(memory_format=torch.channels_last) if last and x.dim() == 4 else x
    net[-2] = Rows() if last and x.dim() == 4 else net[-2]
    net = converted(net, torch.randn(2, *image), seed, **BINARY, depthwise="binary", **options)
    assert agree(net, pack(net), x)


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("options", "signs"),
    [({}, 1), ({"shift": True, "scale": "channel_mean"}, 1), ({"pad_value": 1}, 1)],
    ids=["plain", "shift", "pad1"],
)
def test_residual_networks(options: dict[str, Any], signs: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 6, 6)
    net = converted(Residual(), x, seed, **options)
    packed = pack(net)
    assert agree(net, packed, x)
    assert agree(net, packed, x.contiguous(memory_format=torch.channels_last))
    assert agree(net, packed, x[:1])
    assert packing_of(packed).signs == ["conv1"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scale", ["none", "max", "channel_mean"])
def test_functional_networks(scale: str, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(3, 3, 10, 10)
    net = converted(Functional(), x, seed, scale=scale, **BINARY)
    packed = pack(net)
    assert agree(net, packed, x)
    assert packing_of(packed).signs == ["conv1", "conv2", "fc1"]


@pytest.mark.parametrize("end", ["float", "float_input", "binary", "int8"])
@pytest.mark.parametrize("shape", [(3, 9), (3, 2, 7), (3, 2, 5, 5)], ids=["linear", "conv1d", "conv2d"])
def test_ends(end: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    if len(shape) == 2:
        net = mlp(9, 70, 70, 4)
    else:
        conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[len(shape) - 3]
        net = nn.Sequential(
            conv(2, 6, 3, padding=1, bias=False), norm(6), nn.Hardtanh(), conv(6, 6, 3, padding="same"), norm(6),
            nn.Hardtanh(), conv(6, 5, 3, stride=2, padding=1),
        )  # fmt: skip
    x = torch.randn(shape)
    net = converted(net, x, 3, first=end, last=end)
    packed = pack(net)
    assert agree(net, packed, x)
    assert sum(isinstance(module, PackedEnd) for module in packed.modules()) == (2 if end == "int8" else 0)
    left = packing_of(packed).left
    assert len(left) == (2 if end in ("float", "float_input") else 0)
    assert all("float" in reason for reason in left.values())


def test_features_on_the_last_of_three_axes() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 9)
    net = converted(mlp(9, 70, 65, 4, norm=False), x, **BINARY, shift=True)
    packed = pack(net)
    assert agree(net, packed, x)
    assert agree(net, packed, x[0])
    assert len(packing_of(packed).signs) == 2


def test_three_axes_where_thresholds_count_channels_along_axis_1() -> None:
    net = converted(mlp(9, 5, 5, 4), torch.randn(4, 9), **BINARY)
    x = torch.randn(2, 5, 9)
    with torch.no_grad():
        net(x)  # five rows of five features: torch's norm takes the rows for channels
        with pytest.raises(UnsupportedModelError, match=r"0: its input has 3 axes"):
            pack(net)(x)


def test_ties_do_occur() -> None:
    """The networks above would prove little if no sum met its norm's mean."""
    torch.manual_seed(0)
    net = converted(mlp(8, 64, 3), torch.randn(4, 8), 0, **BINARY)
    seen = []
    net[1].register_forward_hook(lambda module, args, output: seen.append(int((output == 0).sum())))
    with torch.no_grad():
        net(torch.randn(50, 8))
    assert seen[0] > 100


@pytest.mark.parametrize("name", ["functional", "residual", "linear"])
def test_compiled(name: str) -> None:
    torch.manual_seed(1)
    net, x = {
        "functional": lambda: (Functional(), torch.randn(2, 3, 10, 10)),
        "residual": lambda: (Residual(), torch.randn(2, 3, 6, 6)),
        "linear": lambda: (mlp(9, 70, 65, 4), torch.randn(2, 9)),
    }[name]()
    net = converted(net, x, 1, **(BINARY if name != "residual" else {}))
    packed = pack(net)
    torch.compiler.reset()
    assert agree(net, torch.compile(packed, backend="aot_eager"), x)


def test_an_empty_batch() -> None:
    net = converted(mlp(9, 70, 65, 4), torch.randn(4, 9), **BINARY)
    assert agree(net, pack(net), torch.empty(0, 9))


# -- what is folded ---------------------------------------------------------------------------------------------------
def test_nothing_but_signs_between_binary_layers() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, 10)
    net = converted(Functional(), x, **BINARY)
    packed = pack(net)
    seen: dict[str, tuple[type, type]] = {}
    for path, module in packed.named_children():
        module.register_forward_hook(lambda m, args, y, path=path: seen.update({path: (type(args[0]), type(y))}))
    with torch.no_grad():
        packed(x)
    inner = {path: kinds for path, kinds in seen.items() if not path.startswith("lowbit_")}
    assert inner.pop("conv1") == (Tensor, Bits)
    assert inner.pop("fc2") == (Bits, Tensor)
    assert set(inner) == {"bn1", "conv2", "bn2", "fc1", "bn3"}
    assert set(inner.values()) == {(Bits, Bits)}
    assert not any(isinstance(module, PackedNorm) for module in packed.modules())
    assert all(isinstance(packed.get_submodule(path), Passed) for path in ("bn1", "bn2", "bn3"))


def folded(net: nn.Module, x: Tensor, **options: Any) -> tuple[list[str], dict[str, str]]:
    net = converted(net, x, **{**BINARY, **options})
    packed = pack(net)
    assert agree(net, packed, x)
    packing = packing_of(packed)
    return packing.signs, packing.numbers


class Forked(nn.Module):
    """One sign read by two layers."""

    def __init__(self, shift_one: bool = False) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(8, 70), nn.BatchNorm1d(70)
        self.left, self.right = nn.Linear(70, 5), nn.Linear(70, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.left(x) - self.right(x)


def test_two_layers_share_signs() -> None:
    assert folded(Forked(), torch.randn(4, 8))[0] == ["stem"]
    assert folded(Forked(), torch.randn(4, 8), shift=True)[0] == []  # each has a shift of its own


def test_groups_of_whole_words_share_signs() -> None:
    def net(channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(4, channels, 3), nn.BatchNorm2d(channels), nn.Conv2d(channels, 4, 3, groups=2), nn.Flatten(),
            nn.Linear(4 * 9, 2),
        )  # fmt: skip

    x = torch.randn(2, 4, 7, 7)
    assert folded(net(128), x)[0] == ["0", "2"]
    signs, numbers = folded(net(20), x)
    assert signs == ["2"]
    assert numbers["0"] == "2 reads groups of 10 channels, no whole words"


def test_a_module_that_runs_twice_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b, self.c = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.norm(self.b(self.norm(self.a(x)))))

    signs, numbers = folded(Twice(), torch.randn(4, 8))
    assert signs == []
    assert "norm runs more than once" in numbers["a"]


def test_a_hook_sees_numbers() -> None:
    net = converted(mlp(8, 70, 70, 3), torch.randn(4, 8), **BINARY)
    seen: list[Tensor] = []
    net[2].register_forward_hook(lambda module, args, output: seen.append(output))
    packed = pack(net)
    assert packing_of(packed).numbers["0"] == "2 has forward hooks"
    assert agree(net, packed, torch.randn(3, 8))
    assert torch.equal(seen[-2], seen[-1])


def test_a_negative_slope_or_an_infinite_norm_stays() -> None:
    x = torch.randn(4, 8)
    for break_it, why in (
        (lambda net: net[2].weight.data.fill_(-0.5), "a slope behind it is negative"),
        (lambda net: net[1].running_mean.fill_(torch.inf), "1 has parameters that are not finite"),
    ):
        net = converted(mlp(8, 70, 3, act=lambda c: nn.PReLU()), x, **BINARY)
        with torch.no_grad():
            break_it(net)
        packed = pack(net)
        assert packing_of(packed).numbers["0"] == why
        assert agree(net, packed, x)


def test_layers_without_a_packed_form_are_listed() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 3),
    )  # fmt: skip
    x = torch.randn(2, 2, 6, 6)
    net = converted(net, x, first="float_input", last="binary")
    packed = pack(net)
    assert agree(net, packed, x)
    assert packing_of(packed).left == {"0": "its input is float", "2": "padding_mode='reflect' has no packed form"}
    assert "not packed: 0 (its input is float)" in str(packing_of(packed))
    cube = converted(
        nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(32, 3)),
        torch.randn(2, 2, 3, 3, 3), **BINARY,
    )  # fmt: skip
    assert packing_of(pack(cube)).left == {"0": "Conv3d has no packed form"}


# -- that the comparison can fail -------------------------------------------------------------------------------------
@pytest.mark.parametrize("what", ["low", "flip", "words"])
@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc1"])
def test_a_changed_bit_shows(layer: str, what: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 10, 10)
    net = converted(Functional(), x, 5, **BINARY)
    for module in net.modules():  # norms without constant channels, so that each threshold matters
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            (
                module.running_mean.zero_(),
                module.running_var.fill_(1),
                module.weight.data.fill_(1),
                module.bias.data.zero_(),
            )
    packed = pack(net)
    assert agree(net, packed, x)
    tensor = getattr(packed.get_submodule(layer), what)
    if what == "low":
        tensor += 4
    elif what == "flip":
        tensor[1] = ~tensor[1]
    else:
        tensor.view(-1)[-1] ^= 1
        tensor.view(-1)[0] ^= 7
    assert not agree(net, packed, x)
