"""Integer convolutions and linear layers against float64 products that are rounded once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules.integer_twin import carrier, codes, grad_of, half_away, low, send_back, to_codes, values
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.modules.carrier import Carrier

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (4, 7)),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), (4, 7)),
    "linear unbatched": (lambda: nn.Linear(7, 5), (7,)),
    "linear on sequences": (lambda: nn.Linear(7, 5), (3, 4, 7)),
    "conv": (lambda: nn.Conv2d(3, 5, 3), (2, 3, 7, 6)),
    "conv stride padding": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 8, 7)),
    "conv dilated": (lambda: nn.Conv2d(3, 5, 3, dilation=2, padding=2), (2, 3, 7, 7)),
    "conv uneven": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), (2, 3, 8, 7)),
    "conv groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)),
    "conv depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), (2, 4, 5, 5)),
    "conv same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 6, 6)),
    "conv same, even kernel": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same", dilation=(1, 3)), (2, 3, 9, 10)),
    "conv valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 6, 6)),
    "conv pointwise": (lambda: nn.Conv2d(3, 4, 1), (2, 3, 1, 1)),
    "conv unbatched": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "conv1d settings": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (2, 4, 11)),
    "conv1d same, even kernel": (lambda: nn.Conv1d(3, 4, 4, padding="same"), (2, 3, 9)),
    "conv1d unbatched": (lambda: nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
}


@pytest.fixture(autouse=True)
def quiet_same_padding() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        yield


def made(name: str) -> tuple[Any, tuple[int, ...]]:
    """One layer that was converted alone."""
    build, shape = LAYERS[name]
    torch.manual_seed(1)
    return low(nn.Sequential(build()), torch.randn(shape))[0], shape  # type: ignore[index]


def twin(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The products alone, in float64."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    product = F.conv2d if isinstance(layer, nn.Conv2d) else F.conv1d
    return product(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)  # type: ignore[operator]


def with_bias(layer: Any, acc: Tensor, exponent: int) -> Tensor:
    if layer.bias is None:
        return acc
    moved = half_away(layer.lowbit_bias.codes().double() * 2.0 ** (int(layer.lowbit_bias.exponent()) - exponent))
    return acc + (moved if isinstance(layer, nn.Linear) else moved.reshape(-1, *[1] * (layer.weight.dim() - 2)))


@pytest.mark.parametrize("exponent", [-14, -7, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_both_backward_products(name: str, exponent: int) -> None:
    """The bias is shifted to the right at large exponents and to the left at small ones."""
    layer, shape = made(name)
    x = carrier(codes(*shape, low=-128), exponent, grad=True)
    y = layer(x)
    w, w_exponent = layer.lowbit_weight.codes().double().requires_grad_(), int(layer.lowbit_weight.exponent())
    x64 = x.payload.double().requires_grad_()
    acc = twin(layer, x64, w)
    want, shift = to_codes(with_bias(layer, acc.detach(), exponent + w_exponent))
    assert torch.equal(y.payload.double(), want)
    assert int(y.exponent) == exponent + w_exponent + shift

    err = codes(*y.shape, seed=2)
    send_back(y, err, -9)
    acc.backward(err.double())
    found, at = layer.gathered["weight"]
    assert torch.equal(found.double(), w.grad)  # type: ignore[arg-type]
    assert int(at) == -9 + exponent
    if layer.bias is not None:
        axis = err.dim() - 1 if isinstance(layer, nn.Linear) else err.dim() - layer.weight.dim() + 1
        others = [other for other in range(err.dim()) if other != axis]
        sums, at = layer.gathered["bias"]
        assert torch.equal(sums.double(), err.double().sum(others) if others else err.double())
        assert int(at) == -9
    assert x64.grad is not None
    back, shift = to_codes(x64.grad)
    assert torch.equal(grad_of(x), back * 2.0 ** (-9 + w_exponent + shift))
    assert layer.weight.grad is None


def test_the_second_batch_adds_exactly() -> None:
    layer, shape = made("conv")
    found = []
    for seed, exponent in ((1, -7), (2, -12)):
        y = layer(carrier(codes(*shape, seed=seed), -7))
        before = dict(layer.gathered)
        layer.gathered.clear()
        send_back(y, codes(*y.shape, seed=seed), exponent)
        found.append(layer.gathered["weight"])
        layer.gathered.update(before)
    (a, ea), (b, eb) = found
    layer.gathered.clear()
    for seed, exponent in ((2, -12), (1, -7)):  # in the other order
        y = layer(carrier(codes(*shape, seed=seed), -7))
        send_back(y, codes(*y.shape, seed=seed), exponent)
    total, at = layer.gathered["weight"]
    assert int(at) == int(eb) == int(ea) - 5
    assert torch.equal(total, a.long() * 32 + b.long())


@pytest.mark.parametrize("largest", [127, 128, 129])
def test_sums_of_128_are_clipped_not_wrapped(largest: int) -> None:
    layer = low(nn.Sequential(nn.Linear(2, 2, bias=False)), torch.ones(1, 2))[0]  # type: ignore[index]
    layer.lowbit_weight.store(torch.tensor([[1, 1], [-1, -1]], dtype=torch.int8))
    y = layer(carrier(torch.tensor([[64, largest - 64]], dtype=torch.int8)))
    want = {127: [127, -127], 128: [127, -127], 129: [65, -65]}[largest]
    assert y.payload.tolist() == [want]


def test_the_reference_wraps_128() -> None:
    net = low(nn.Sequential(nn.Linear(2, 2, bias=False)), torch.ones(1, 2), preset="reference")
    net[0].lowbit_weight.store(torch.tensor([[1, 1], [-1, -1]], dtype=torch.int8))  # type: ignore[index]
    assert net(carrier(torch.tensor([[64, 64]], dtype=torch.int8))).payload.tolist() == [[-128, -128]]


def test_evaluation_rounds_on_frozen_ranges() -> None:
    """A sample's result does not depend on the batch it comes in, unlike in training."""
    layer, _ = made("linear")
    layer.eval()
    x = codes(4, 7)
    quiet, loud = carrier(x.clone()[:1] // 16), carrier(torch.cat([x.clone()[:1] // 16, x]))
    assert torch.equal(values(layer(quiet))[0], values(layer(loud))[0])
    layer.train()
    assert int(layer(quiet).exponent) != int(layer(loud).exponent)


def test_float_input_to_an_inner_layer_is_refused() -> None:
    net = low(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4))
    with pytest.raises(UnsupportedModelError, match=r"^1: its input came in float"):
        net[1](torch.randn(3, 4))  # type: ignore[index, operator]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ConvTranspose2d(3, 3, 3), "ConvTranspose2d has no integer product"),
        (nn.Conv3d(3, 3, 3), "Conv3d has no integer product"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect' has no integer product"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_has_no_integer_product_stays_float_with_a_reason(layer: nn.Module, reason: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.fc = layer, nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            axes = tuple(range(2, x.dim()))
            y: Tensor = self.fc(self.odd(x).mean(axes))
            return y

    x = torch.randn(2, 3, 4, 4, 4) if isinstance(layer, nn.Conv3d) else torch.randn(2, 3, 4, 4)
    net = low(Net(), x)
    assert type(net.odd) is type(layer)
    report = net.fc.switch.conversion  # type: ignore[union-attr]
    assert reason in report.skipped["odd"]
    assert reason in str(report)
    net(x).sum().backward()
    assert layer.weight.grad is not None


def test_nothing_but_such_layers_is_refused_with_the_reasons() -> None:
    with pytest.raises(ConfigError, match=r"nothing to convert.*1 Conv3d has no integer product"):
        low(nn.Sequential(nn.Conv3d(1, 1, 1)), torch.randn(1, 1, 2, 2, 2))


def test_memory_between_forward_and_backward_is_codes() -> None:
    layer, shape = made("conv")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(carrier(codes(*shape), grad=True))
    assert isinstance(y, Carrier)
    assert {t.dtype for t in kept} == {torch.int8}
