"""Bi-Real and ReActNet pieces: their formulas, and all that a network of them goes through."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.fx
from torch import Tensor, nn

from lightning_lowbit import convert
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.graph.network import follow
from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.graph.trace import Untraceable, trace_container
from lightning_lowbit.modules.react import BiRealBlock, RPReLU, RSign
from lightning_lowbit.modules.revert import revert

SHAPES = [(5, 3), (5, 3, 7), (5, 3, 6, 7), (2, 3, 4, 5, 6)]


def scrambled(module: nn.Module, seed: int = 0) -> nn.Module:
    """With parameters that make a formula with one of them left out another one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module


def per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.detach().view(1, -1, *[1] * (x.dim() - 2))


class Net(nn.Module):
    def __init__(self, react: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.same = BiRealBlock(4, 4, react=react)
        self.down = BiRealBlock(4, 8, stride=2, react=react)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.down(self.same(self.stem(x))))
        return y


def seeded(react: bool = True) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    net = Net(react)
    for module in net.modules():
        if isinstance(module, (RSign, RPReLU)):
            scrambled(module)
    return net, torch.randn(4, 1, 9, 9)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"rank {len(shape)}")
def test_rsign_is_a_shift_whose_sign_is_the_papers(shape: tuple[int, ...]) -> None:
    sign, x = scrambled(RSign(3)), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    y = sign(x)
    assert torch.equal(y, x + per_channel(sign.shift, x))
    alpha = -per_channel(sign.shift, x)
    assert torch.equal(y > 0, x > alpha)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"rank {len(shape)}")
def test_rprelu_is_equation_4(shape: tuple[int, ...]) -> None:
    act, x = scrambled(RPReLU(3)), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x.view(len(x), 3, -1)[0, :, 0] = act.shift.detach()  # the corner
    gamma, beta, zeta = (per_channel(p, x) for p in (act.shift, act.slope, act.offset))
    expected = torch.where(x > gamma, x - gamma + zeta, beta * (x - gamma) + zeta)
    assert torch.equal(act(x), expected)


def test_gradients_of_rprelu() -> None:
    act = scrambled(RPReLU(2)).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    torch.autograd.gradcheck(lambda x, *_: act(x), (x, *act.parameters()))
    act.zero_grad()
    act(x).sum().backward()
    below = x.detach() <= per_channel(act.shift, x)
    assert torch.equal(act.offset.grad, torch.full((2,), 6.0, dtype=torch.float64))
    torch.testing.assert_close(act.slope.grad, ((x.detach() - per_channel(act.shift, x)) * below).sum((0, 2)))


def test_they_begin_as_identity_and_prelu() -> None:
    x = torch.randn(4, 3, 5)
    assert torch.equal(RSign(3)(x), x)
    assert torch.equal(RPReLU(3)(x), torch.nn.functional.prelu(x, torch.tensor(0.25)))
    assert [name for name, _ in RPReLU(3).named_parameters()] == ["shift", "slope", "offset"]
    assert [name for name, _ in RSign(3).named_parameters()] == ["shift"]
    assert repr(RPReLU(3)) == "RPReLU(3)"


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_memory_formats_stay(channels_last: bool) -> None:
    kind = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=kind)
    assert all(module(x).is_contiguous(memory_format=kind) for module in (RSign(3), RPReLU(3)))


@pytest.mark.parametrize("size", [8, 9], ids=["even", "odd"])
@pytest.mark.parametrize("stride", [1, 2], ids=["same size", "half size"])
@pytest.mark.parametrize("out", [4, 8], ids=["same channels", "doubled"])
@pytest.mark.parametrize("react", [True, False], ids=["react", "bi-real"])
def test_a_block_is_its_equation(react: bool, out: int, stride: int, size: int) -> None:
    block, x = scrambled(BiRealBlock(4, out, stride, react)), torch.randn(3, 4, size, size)
    result = block(x)
    assert result.shape == (3, out, -(-size // stride), -(-size // stride))
    block.zero_grad()
    kinds = [type(m) for m in block.shortcut]
    changes = stride == 2 or out != 4
    assert kinds == [nn.AvgPool2d] * (stride == 2) + [nn.Conv2d, nn.BatchNorm2d] * changes
    assert block.conv.bias is None
    trunk = x
    for module in block.shortcut:
        trunk = module(trunk)
    y = block.norm(block.conv(block.sign(x))) + trunk
    assert torch.equal(result, block.activation(y))
    assert isinstance(block.activation, RPReLU if react else nn.Hardtanh)
    assert isinstance(block.sign, RSign if react else nn.Identity)


def test_other_strides_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"BiRealBlock\(stride=3\): expected 1, or 2"):
        BiRealBlock(4, 8, stride=3)


@pytest.mark.parametrize("react", [True, False], ids=["react", "bi-real"])
def test_torch_fx_follows_a_network_into_its_pieces(react: bool) -> None:
    net, x = seeded(react)
    traced = torch.fx.symbolic_trace(net.eval())
    assert torch.equal(traced(x), net(x))
    for path, module in net.named_modules():
        if isinstance(module, (BiRealBlock, RSign, RPReLU)):
            assert not isinstance(trace_container(module, path), Untraceable)


def test_the_planner_sees_a_shift_and_an_activation_as_one_operation() -> None:
    net, _ = seeded()
    flow = follow(net)
    assert flow.untraced == []
    found = {call.path: call.kind for call in flow.calls if call.path is not None}
    pieces = [path for path, module in net.named_modules() if isinstance(module, (RSign, RPReLU))]
    assert {path: found[path] for path in pieces} == dict.fromkeys(pieces, Kind.ACTIVATION)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("scheme", [None, "tqt"], ids=["float", "converted"])
def test_copies(way: str, scheme: str | None) -> None:
    net, x = seeded()
    if scheme is not None:
        convert(net, scheme, x)
    twin = copy.deepcopy(net) if way == "deepcopy" else pickle.loads(pickle.dumps(net))
    assert torch.equal(twin.eval()(x), net.eval()(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("react", [True, False], ids=["react", "bi-real"])
def test_torch_compile(react: bool) -> None:
    net, x = seeded(react)
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for module in (net, compiled):
        module(x).square().sum().backward()
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-5), name


@pytest.mark.parametrize("react", [True, False], ids=["react", "bi-real"])
@pytest.mark.parametrize("scheme", ["niti", "tqt"])
def test_a_converted_network_trains_the_shifts_and_comes_back(scheme: str, react: bool) -> None:
    net, x = seeded(react)
    names = [name for name, _ in net.named_parameters()]
    plain = copy.deepcopy(net)
    report = convert(net, scheme, x)
    assert len(report.layers) == 5
    assert report.uncovered == []
    own = [n for n in names if any(isinstance(net.get_submodule(n.rpartition(".")[0]), c) for c in (RSign, RPReLU))]
    assert len(own) == (8 if react else 0)
    loss = nn.functional.cross_entropy(net.train()(x), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    parameters = dict(net.named_parameters())
    assert all(parameters[name].grad is not None and parameters[name].grad.any() for name in own)
    revert(net)
    assert [name for name, _ in net.named_parameters()] == names
    assert [type(m) for m in net.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("react", [True, False], ids=["react", "bi-real"])
def test_a_binary_network_keeps_its_trunk_float_and_takes_the_sign_of_what_is_shifted(react: bool) -> None:
    net, x = seeded(react)
    report = convert(net, "bnn", x, skip=["*shortcut"])
    assert [layer.path for layer in report.layers] == ["same.conv", "down.conv"]
    assert report.findings == []
    block, trunk = net.same.eval(), torch.randn(2, 4, 6, 6)
    signs = (torch.where(t < 0, -1.0, 1.0) for t in (block.sign(trunk), block.conv.weight))
    sums = nn.functional.conv2d(*signs, padding=1)
    expected = block.activation(block.norm(sums) + trunk)
    torch.testing.assert_close(block(trunk), expected)
    net.train()(x).square().sum().backward()
    shifts = [m.shift for m in net.modules() if isinstance(m, (RSign, RPReLU))]
    assert len(shifts) == (4 if react else 0)
    assert all(shift.grad is not None and shift.grad.any() for shift in shifts)
