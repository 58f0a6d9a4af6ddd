"""Biases that take up what quantization shifts the means by: against a twin in plain loops and int64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from schemes.jacinto_integers import codes, layer
from schemes.jacinto_nets import chain, clips, images, layers, on_batches, seen
from torch import Tensor, nn

from lightning_lowbit import Jacinto, convert

BATCHES = [images(seed=seed, gain=1.0 + 0.1 * seed) for seed in range(4)]
NORMED = {"0": "1", "3": "4", "8": "8"}  # layer -> what gives the sums, and holds the bias


def calibrated(rate: float, bits: int = 4, **options: Any) -> Any:
    net = seen(chain(), torch.cat(BATCHES))
    convert(net, Jacinto(bits=bits, bias_calibration=rate, **options))
    on_batches(net, BATCHES)
    return net


def channel_means(y: Tensor) -> Tensor:
    return y.double().transpose(0, 1).flatten(1).mean(1)


def twin(rate: float) -> Any:
    """bias += rate * (mean of the float layer - mean of the quantized sums), layer by layer, batch by batch."""
    plain = seen(chain(), torch.cat(BATCHES))
    wanted: list[dict[str, Tensor]] = []
    for path, place in NORMED.items():
        plain.get_submodule(place).register_forward_hook(
            lambda m, a, y, path=path: wanted[-1].update({path: channel_means(y)})
        )
    with torch.no_grad():
        for batch in BATCHES:
            wanted.append({})
            plain(batch)
    net = seen(chain(), torch.cat(BATCHES))
    convert(net, Jacinto(bits=4))
    on_batches(net, BATCHES)
    for path, place in NORMED.items():
        source = clips(net)[{"0": "0.lowbit_input", "3": "2.lowbit_output", "8": "6.lowbit_output"}[path]]

        def correct(module: Any, args: Any, y: Tensor, path: str = path, place: str = place, q: Any = source) -> None:
            sums = layer(codes(args[0], q), module, None, bits=4).real()
            shift = wanted[0][path] - channel_means(sums)
            bias = net.get_submodule(place).bias
            bias.add_(shift.to(bias.dtype), alpha=rate)

        net.get_submodule(path).register_forward_hook(correct)
    with torch.no_grad():
        for batch in BATCHES:
            net(batch)
            wanted.pop(0)
    return net


def test_it_is_what_plain_loops_give() -> None:
    got, want = calibrated(0.25), twin(0.25)
    start = seen(chain(), torch.cat(BATCHES))
    for place in NORMED.values():
        ours, theirs = (net.get_submodule(place).bias.detach() for net in (got, want))
        assert not torch.equal(ours, start.get_submodule(place).bias)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    others = {name for name, p in got.named_parameters() if not torch.equal(p, start.state_dict()[name])}
    assert others == {"1.bias", "4.bias", "8.bias"}


@pytest.mark.parametrize("bias", ["int32", "own", "float"])
def test_means_are_nearer_to_the_float_network_s(bias: Any) -> None:
    plain = seen(chain(), torch.cat(BATCHES))
    x = images(seed=9)

    def shift(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(x).mean(0) - plain(x).mean(0)).abs().sum())

    shifts = [shift(calibrated(rate, bias=bias, quantize_out=False)) for rate in (0.0, 0.3)]
    assert shifts[1] < 0.7 * shifts[0]


def test_it_moves_nothing_else_and_leaves_the_network_as_it_was() -> None:
    net, without = calibrated(0.05), calibrated(0.0)
    states = net.state_dict(), without.state_dict()
    assert {key for key in states[0] if not torch.equal(states[0][key], states[1][key])} == {
        "1.bias", "4.bias", "8.bias"
    }  # fmt: skip
    assert all(module.group.tap is None for module in layers(net).values())
    assert not any(module._forward_hooks for module in layers(net).values())
    assert not net.training
    copy.deepcopy(net)


def test_a_layer_without_any_bias_is_left() -> None:
    make = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    net = seen(make(), images())
    weight = net[0].weight.detach().clone()
    convert(net, Jacinto(preset="advanced"), images())
    assert torch.equal(net[0].weight, weight)


def test_it_is_undisturbed_by_dropout_and_a_failing_batch() -> None:
    net = seen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(4, 2, 1)), images())
    convert(net.train(), Jacinto(bias_calibration=0.5))

    def broken(x: Tensor) -> Tensor:
        raise ValueError("no more batches")

    hook = net.register_forward_pre_hook(lambda m, args: broken(args[0]) if len(args[0]) == 3 else None)
    with pytest.raises(ValueError, match="no more batches"):
        on_batches(net, [images(), images(3, 3, 8, 8)])
    assert net.training
    hook.remove()
    on_batches(net, [images()])
    assert all(module.group.tap is None for module in layers(net).values())
