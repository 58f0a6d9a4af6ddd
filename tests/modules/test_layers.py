"""Layers with a batch norm folded in: values, statistics and gradients against the two float layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_lowbit import Tqt, convert, summarize
from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.modules.base import Mode, low_bit_modules, mode, switch_of
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.exponent import pow2

N = 5
LAYERS: dict[str, tuple[Callable[[], nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, groups=2), nn.BatchNorm1d, (4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, 1, 1, bias=False), nn.BatchNorm2d, (4, 5, 6)),
    "depthwise": (
        lambda: nn.Conv2d(4, 4, 3, groups=4, padding_mode="reflect", padding=1),
        nn.BatchNorm2d,
        (4, 5, 5),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), nn.BatchNorm3d, (2, 3, 4, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, groups=2), nn.BatchNorm1d, (4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, bias=False), nn.BatchNorm2d, (4, 3, 4)),
    "transposed2d_groups": (lambda: nn.ConvTranspose2d(6, 3, 2, groups=3), nn.BatchNorm2d, (6, 3, 3)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 2, 2, groups=2), nn.BatchNorm3d, (4, 2, 2, 3)),
    "linear": (lambda: nn.Linear(4, 6), nn.BatchNorm1d, (4,)),
}


def pair(name: str, momentum: float | None = 0.1, affine: bool = True) -> tuple[nn.Module, nn.Module, Tensor]:
    """A float64 reference and its converted twin, whose quantizers pass everything through."""
    torch.manual_seed(1)
    make, norm, shape = LAYERS[name]
    layer = make()
    channels = getattr(layer, "out_channels", getattr(layer, "out_features", 0))
    bn = norm(channels, momentum=momentum, affine=affine)
    nn.init.normal_(bn.running_mean)
    nn.init.uniform_(bn.running_var, 0.5, 2)
    if affine:
        nn.init.uniform_(bn.weight, -1.5, 1.5)
        nn.init.normal_(bn.bias)
    net = nn.Sequential(layer, bn).double()
    plain = copy.deepcopy(net)
    convert(net, "tqt")
    switch_of(net).started = True  # folded, no grid set: every quantizer passes
    return plain, net, torch.randn(N, *shape, dtype=torch.float64)


def step(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    net.zero_grad(set_to_none=True)
    y = net(x)
    (y.square() * torch.linspace(0.5, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    found = {"output": y.detach(), "input": x.grad}
    found |= {f"grad {n}": p.grad for n, p in net.named_parameters() if "lowbit" not in n}
    return found | {n: b.double().clone() for n, b in net.named_buffers() if "lowbit" not in n}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_batch_phase(name: str, momentum: float | None, affine: bool) -> None:
    plain, net, x = pair(name, momentum, affine)
    for _ in range(3):
        assert_close(step(net.train(), x), step(plain.train(), x))
        x = x * 1.5 + 0.1


@pytest.mark.parametrize("name", LAYERS)
def test_evaluation_and_frozen_phase(name: str) -> None:
    plain, net, x = pair(name)
    assert_close(step(net.eval(), x), step(plain.eval(), x))
    # Frozen: statistics are constants, gamma and beta and all else still train.
    net.train()
    for _, module in low_bit_modules(net):
        module.milestone("freeze_batch_norm", True)
    assert_close(step(net, x), step(plain, x))
    for _, module in low_bit_modules(net):
        module.milestone("freeze_batch_norm", False)
    assert_close(step(net, x), step(plain.train(), x))


@pytest.mark.parametrize("name", LAYERS)
def test_norm_kept_in_eval_by_the_user(name: str) -> None:
    plain, net, x = pair(name)
    for each in (plain, net):
        each.train()
        each[1].eval()
    assert_close(step(net, x), step(plain, x))


def test_one_value_per_channel_is_refused_as_torch_does() -> None:
    plain, net, _ = pair("linear")
    x = torch.randn(1, 4, dtype=torch.float64)
    for each in (plain, net):
        with pytest.raises(ValueError, match="more than"):
            each.train()(x)


def test_norm_along_another_axis_is_refused() -> None:
    # With three axes the norm counts channels along axis 1, the linear layer along the last; both are 4 here.
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    convert(net, "tqt")
    switch_of(net).started = True
    for training in (False, True):
        with pytest.raises(UnsupportedModelError, match=r"^0: .*skip=\['0'\]"):
            net.train(training)(torch.randn(3, 4, 4))


def test_unbatched_input_is_refused_where_the_norm_refuses_it() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    convert(net, "tqt", torch.randn(2, 3, 4, 4))
    for training in (False, True):
        with pytest.raises(ValueError, match="expected 4D"):
            net.train(training)(torch.randn(3, 4, 4))


def test_unbatched_input() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(-3), nn.Linear(4, 2))
    x = torch.randn(2, 3, 6, 6)
    convert(net, "tqt", x)
    net.eval()
    assert torch.equal(net(x)[0], net(x[0]))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(order: torch.memory_format) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.AvgPool2d(2))
    net = net.to(memory_format=order)
    x = torch.randn(2, 3, 7, 7).to(memory_format=order)
    convert(net, "tqt", x)
    assert net.eval()(x).is_contiguous(memory_format=order)
    assert net.train()(x).is_contiguous(memory_format=order)


def test_float64_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    convert(net, "tqt", x)
    y = net.train()(x)
    y.sum().backward()
    assert y.dtype == torch.float64
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in net.parameters())
    single = copy.deepcopy(net).float()
    assert torch.equal(single.eval()(x.float()).double(), net.eval()(x))  # exact integers in both


def test_output_size() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)

        def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
            return self.up(x, output_size=size)

    torch.manual_seed(0)
    net = Up()
    x = torch.randn(1, 2, 4, 4)
    convert(net, "tqt", (x, (8, 7)))
    assert net(x, (8, 7)).shape[2:] == (8, 7)
    assert net(x, (7, 7)).shape[2:] == (7, 7)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_sum_guard_agrees_with_brute_force(name: str, bits: int) -> None:
    """The reported bound is reached by the worst input, and exactness is claimed just below 2^24."""
    torch.manual_seed(2)
    make, norm, shape = LAYERS[name]
    layer = make()
    net = nn.Sequential(layer, norm(getattr(layer, "out_channels", getattr(layer, "out_features", 0))))
    x = torch.randn(N, *shape)
    convert(net, Tqt(weight_bits=bits, act_bits=bits, input_bits=bits), x)
    net.eval()
    low = net[0]
    assert isinstance(low, LowBitLayer)
    source, weight, unit = low.lowbit_input, low.lowbit_weight, low.accumulator_exponent()
    assert isinstance(source, Quantizer)
    assert isinstance(weight, Quantizer)
    assert unit is not None
    folded, bias = low.effective(low.weight)
    w = (weight.quantize(folded) / pow2(weight.exponent())).to(torch.int64)
    b = (low.lowbit_bias.quantize(bias) / pow2(unit)).to(torch.int64)
    grid = source.grid()
    out_axis, groups = low.out_axis, getattr(low, "groups", 1)
    worst = 0
    for group in range(groups):  # every output, by its definition
        rows = w.chunk(groups, 0)[group]
        rows = rows if out_axis == 0 else rows.transpose(0, 1)
        biases = b.chunk(groups)[group]
        for row, bias_code in zip(rows, biases, strict=True):
            worst = max(worst, int(row.abs().sum()) * max(-grid.qmin, grid.qmax) + abs(int(bias_code)))
    assert summarize(net)["0.sum"].exact == (worst < 2**24)


@pytest.mark.parametrize("name", LAYERS)
def test_exact_sums_are_the_integer_sums(name: str) -> None:
    torch.manual_seed(2)
    make, norm, shape = LAYERS[name]
    layer = make()
    net = nn.Sequential(layer, norm(getattr(layer, "out_channels", getattr(layer, "out_features", 0))))
    x = torch.randn(N, *shape)
    convert(net, "tqt", x)
    net.eval()
    assert summarize(net)["0.sum"].exact
    low = net[0]
    unit = low.accumulator_exponent()
    weight, bias = low.effective(low.weight)
    codes = [
        low.lowbit_input.quantize(x) / pow2(low.lowbit_input.exponent()),
        low.lowbit_weight.quantize(weight) / pow2(low.lowbit_weight.exponent()),
        low.lowbit_bias.quantize(bias) / pow2(unit),
    ]
    sums = low.op(*(code.detach().double() for code in codes))  # integers below 2^53
    assert torch.equal(net(x).detach().double(), sums * pow2(unit, torch.float64))


def test_observing_does_not_move_statistics() -> None:
    _, net, x = pair("conv2d")
    before = net[1].running_mean.clone()
    with mode([switch_of(net)], Mode.OBSERVE):
        net.train()(x)
    assert torch.equal(net[1].running_mean, before)
