"""Lowering: what a program holds, which code of users it follows, and what is refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_lowbit
from lightning_lowbit import Tqt, convert, lower
from lightning_lowbit.errors import ConfigError, InvariantError, UnsupportedModelError
from lightning_lowbit.export.builder import smallest
from lightning_lowbit.export.moves import moved
from lightning_lowbit.export.products import whole_codes

KINDS_OF_MOVES: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "view": (lambda x: x.view(x.size(0), 2, -1), ["reshape"]),
    "flatten": (lambda x: x.flatten(1), ["reshape"]),
    "unsqueeze": (lambda x: x.unsqueeze(1), ["reshape"]),
    "merged batch": (lambda x: x.reshape(-1, 6), ["reshape"]),
    "permute": (lambda x: x.permute(0, 3, 1, 2), ["transpose"]),
    "transpose": (lambda x: x.transpose(1, -1), ["transpose"]),
    "slice": (lambda x: x[:, 1:, ::2], ["slice"]),
    "last": (lambda x: x[..., -1], ["slice", "reshape"]),
    "select": (lambda x: x[:, 2], ["slice", "reshape"]),
    "cut and turned": (lambda x: x[:, 1:3].movedim(1, -1), ["slice", "transpose"]),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1)), ["pad"]),
    "pad and cut": (lambda x: F.pad(x, (-1, 2)), ["gather"]),
    "flip": (lambda x: x.flip(-1), ["gather"]),
    "roll": (lambda x: x.roll(1, 2), ["gather"]),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), ["gather"]),
    "shuffle": (lambda x: F.pixel_shuffle(x, 2), ["gather"]),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), ["gather"]),
    "unshuffle": (lambda x: F.pixel_unshuffle(x, 2), ["gather"]),
    "nearest exact": (lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"), ["gather"]),
    "reflect": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), ["gather"]),
    "split": (lambda x: x.split([1, 3], 1)[1], ["slice"]),
    "zeros": (lambda x: torch.cat([x, torch.zeros(x.shape[0], 2, 6, 6)], 1), ["gather", "concat"]),
    "zeros like": (lambda x: torch.cat([torch.zeros_like(x), x], -1), ["gather", "concat"]),
    "dropout": (lambda x: F.dropout2d(x, training=False), []),
}


class Net(nn.Module):
    """One convolution, then what is tried, then sums over all that is left."""

    def __init__(self, behind: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.behind = nn.Conv2d(3, 4, 3, padding=1), behind

    def forward(self, x: Tensor) -> Any:
        return self.behind(F.relu(self.conv(x)))


def low(net: nn.Module, *inputs: Tensor, scheme: Any = "tqt") -> nn.Module:
    convert(net.eval(), scheme, inputs if len(inputs) > 1 else inputs[0])
    return net


def images(batch: int = 4, size: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(found, np.ndarray) and np.array_equal(found, expected.detach().numpy())
    keys = expected if isinstance(expected, dict) else range(len(expected))
    return type(found) is type(expected) and all(same(found[key], expected[key]) for key in keys)


@pytest.mark.parametrize("name", KINDS_OF_MOVES)
def test_moves_are_what_they_do(name: str) -> None:
    function, kinds = KINDS_OF_MOVES[name]
    torch.manual_seed(1)
    net = low(Net(function), images(4, 6))
    program = lower(net, images(2))
    behind = [op.kind for op in program.ops if op.kind not in ("quantize", "conv", "requantize", "dequantize")]
    assert behind == kinds
    for batch in (1, 3):
        x = images(batch, seed=batch)
        assert same(program.run(x.numpy()), net(x))


def test_several_results_of_one_call() -> None:
    net = low(Net(lambda x: [*x.chunk(2, 1), x.unbind(-1)[1]]), images())
    program, x = lower(net, images()), images(5, seed=3)
    assert same(program(x), net(x))


def test_outputs_keep_their_structure() -> None:
    net = low(Net(lambda x: {"a": (x, [x.mean((2, 3))]), "best": x.flatten(1).argmax(1)}), images())
    program, x = lower(net, images(1)), images(7, seed=4)
    assert same(program.run(x), net(x))
    codes = program.run(x, integers=True)
    values, exponent = codes["a"][0]
    assert np.array_equal(values * 2.0**exponent, net(x)["a"][0].detach().numpy())


def test_a_part_of_a_network_and_two_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 6), nn.Linear(5, 6)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.relu(self.left(a) + self.right(b))

    torch.manual_seed(0)
    a, b = torch.randn(6, 4), torch.randn(6, 5)
    net = low(Two(), a, b)
    program = lower(net, (a, b))
    assert same(program.run(a, b), net(a, b))
    assert same(lower(net.left, a).run(a), net.left(a))


def test_lowering_within_inference_mode() -> None:
    net = low(Net(lambda x: x.flatten(1)), images())
    with torch.inference_mode():
        program = lower(net, images())
        assert same(program(images(3)), net(images(3)))


def test_inputs_that_the_network_checks() -> None:
    class Pixels(Net):
        def forward(self, x: Tensor) -> Any:
            assert float(x.min()) >= 0
            assert float(x.max()) <= 1
            return super().forward(x)

    net, x = Pixels(lambda x: x), torch.rand(4, 3, 6, 6)
    low(net, x)
    with pytest.warns(
        UserWarning, match=r"^the forward takes numbers out of tensors \(test_lowering.py:\d+ in forward, "
    ):
        program = lower(net, x)
    assert same(program.run(x), net(x))


def test_an_example_of_zeros_hides_nothing() -> None:
    net = low(Net(lambda x: x / (1 + float(x.detach().max()))), images())
    with pytest.raises(UnsupportedModelError, match="for one batch and with"):
        lower(net, torch.zeros(1, 3, 6, 6))


def test_constants_that_are_repeated_for_every_sample() -> None:
    torch.manual_seed(0)
    token = torch.randn(1, 4, 6, 6)
    net = low(Net(lambda x: x + token.expand(len(x), -1, -1, -1)), images())
    assert same(lower(net, images()).run(images(5)), net(images(5)))


def test_calls_that_only_check_something_are_left_out() -> None:
    def behind(x: Tensor) -> Tensor:
        if bool(x.abs().sum() > 1e9):
            raise ValueError("overflow")
        return x

    net = low(Net(behind), images())
    with pytest.warns(UserWarning, match="in behind"):
        program = lower(net, images())
    assert [op.kind for op in program.ops] == ["quantize", "conv", "requantize", "dequantize"]
    assert same(program(images(3)), net(images(3)))


def test_the_module_is_left_as_it_was() -> None:
    net = low(Net(lambda x: x), images())
    net.train()
    net.conv.eval()
    lower(net, images())
    assert net.training
    assert not net.conv.training


def test_sums_that_float32_does_not_hold() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(160, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 600), nn.Linear(600, 3)
    )
    net[0].weight.data.uniform_(0.8, 1.0)
    net[5].weight.data.uniform_(0.8, 1.0)
    x = torch.rand(4, 160, 6, 6)
    low(net, x, scheme=Tqt(act_init="max", weight_init="max"))
    program = lower(net, x)
    widest = max(value.high for value in program.values.values() if value.dtype == "int")
    assert widest > 2**24
    assert net(x).dtype == torch.float32
    assert same(program.run(x), net(x))


@pytest.mark.parametrize("bits", [8, 16])
def test_means_that_float32_does_not_hold(bits: int) -> None:
    torch.manual_seed(0)
    scheme = Tqt(act_bits=bits, operand_bits=bits, act_init="max")
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AvgPool2d(31, 1), nn.Conv2d(4, 2, 1)).eval()
    x = torch.rand(4, 3, 64, 64)
    low(net, x, scheme=scheme)
    assert same(lower(net, x).run(x), net(x))


@pytest.mark.parametrize(
    "options",
    [{"bias": "own"}, {"bias": "own", "bias_bits": 4}, {"bias": "float"}, {"bias": "float", "acc_bits": 12}],
    ids=str,
)
def test_biases_on_steps_of_their_own(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    net = Net(lambda x: x)
    net.conv.bias.data *= 3
    program = lower(low(net, images(), scheme=Tqt(**options)), images())
    exact = not any(op.kind == "island" for op in program.ops)
    assert exact is (options["bias"] == "own")
    if exact:
        assert same(program(images(3)), net(images(3)))
    np.testing.assert_allclose(program(images(3)), net(images(3)).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_proved_bounds_hold_what_is_seen() -> None:
    from lightning_lowbit.export.runtime import trace

    net, x = low(Net(lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)), images()), images(8, seed=5) * 3
    program = lower(net, x)
    for name, array in trace(program, x.numpy()).items():
        value = program.values[name]
        if value.dtype == "int":
            assert value.low <= int(array.min())
            assert int(array.max()) <= value.high


def test_float_stretches_are_islands() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b, self.norm = nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.log_softmax(self.norm(self.b(self.act(self.a(x)))), -1)

    torch.manual_seed(0)
    x = torch.randn(5, 6)
    net = low(Mixed(), x)
    program = lower(net, x)
    assert [op.attributes["function"] for op in program.ops if op.kind == "island"] == [
        "silu",
        "layer_norm",
        "log_softmax",
    ]
    np.testing.assert_allclose(program.run(x), net(x).detach().numpy(), rtol=1e-4, atol=1e-5)


# -- what is refused ---------------------------------------------------------------------------------------------------
def test_a_network_that_runs_in_float() -> None:
    with pytest.raises(ConfigError, match="no low-bit layer found"):
        lower(nn.Linear(2, 2), torch.zeros(1, 2))
    net = nn.Sequential(nn.Linear(2, 2))
    convert(net, "tqt")
    with pytest.raises(ConfigError, match="Sequential: got a network that runs in float"):
        lower(net, torch.zeros(1, 2))


def test_no_example() -> None:
    with pytest.raises(ConfigError, match="got no example input"):
        lower(low(nn.Sequential(nn.Linear(2, 2)), torch.randn(3, 2)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.roll(1, 0), "one sample to another"),
        (lambda x: x.to(torch.int32).float(), "goes over to torch.int32"),
        (lambda x: x.double() * 0.1, "goes over to torch.float64"),
        (lambda x: x.mean(), "mean over the batch|has no integer form"),
        (lambda x: torch.cat([x, x]), "joins along the batch|one sample to another"),
        (lambda x: torch.fft.fft(x).real, "fft_fft: it goes over to torch.complex64"),
        (lambda x: x if x.shape[0] == 2 else x + x, "other calls for another batch, of 3 samples"),
        (lambda x: x * x.shape[0], "computes with 2 for one batch and with 3 for another"),
        (lambda x: x / float(x.detach().abs().max()), "for one batch and with"),
        (lambda x: x.roll(int(x.detach().sum()), 2), "for one batch and with"),
        (lambda x: x + torch.rand(1, 4, 1, 1), "computes with a tensor"),
        (lambda x: x + torch.from_numpy(x.detach().numpy() * 2), "computes with a tensor"),
        (lambda x: torch.cat([x, torch.ones_like(x)], 1), "tensor that the inputs do not reach|computes with a tensor"),
        (lambda x: F.dropout(x, 0.5, True), "draws random numbers|other calls|computes with"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=-3), "divides by -3"),
        (lambda x: F.max_pool2d(x, 2, return_indices=True), "max_pool2d_with_indices: it goes over to torch.int64"),
        (lambda x: torch.ones(3), "returns nothing that it computed|returns a Tensor"),
        (lambda x: x.cumsum(1), "cumsum has no integer form"),
    ],
    ids=[
        "roll",
        "int32",
        "float64",
        "mean",
        "cat",
        "fft",
        "branch",
        "batch size",
        "largest",
        "sum",
        "random",
        "numpy",
        "ones",
        "dropout",
        "divisor",
        "indices",
        "constant",
        "cumsum",
    ],
)
def test_what_has_no_program(function: Callable[[Tensor], Any], message: str) -> None:
    net = low(Net(function), images())
    with pytest.raises(UnsupportedModelError, match=message):
        lower(net, images())


def test_a_hook_that_changes_what_a_layer_is_given() -> None:
    net = low(Net(lambda x: x), images())
    net.conv.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with pytest.raises(UnsupportedModelError, match="conv: a forward_pre_hook changes what it is given"):
        lower(net, images())


def test_layers_called_by_the_names_of_torch() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.up = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(input=torch.relu(self.bn(input=self.conv(input=x))), output_size=[6, 6])

    torch.manual_seed(0)
    net = low(Named(), images())
    assert same(lower(net, images()).run(images(3)), net(images(3)))


def test_output_sizes_of_a_layer_that_is_called_twice() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[12, 11]).flatten(1)[:, :9] + self.up(x).flatten(1)[:, :9]

    torch.manual_seed(0)
    net = low(Up(), images())
    assert same(lower(net, images()).run(images(3)), net(images(3)))


def test_layers_of_zeros_are_float() -> None:
    net = Net(lambda x: x)
    nn.init.zeros_(net.conv.weight)
    program = lower(low(net, images()), images())
    assert [op.attributes["function"] for op in program.ops if op.kind == "island"] == ["conv", "relu"]
    np.testing.assert_allclose(program(images(2)), net(images(2)).detach().numpy(), atol=1e-6)


def test_writing_into_a_view() -> None:
    def behind(x: Tensor) -> Tensor:
        x[:, 0] = 0.0
        return x

    with pytest.raises(UnsupportedModelError, match="written to in place through a view"):
        lower(low(Net(behind), images()), images())


def test_rules_that_no_device_has() -> None:
    net = low(Net(lambda x: x), images(), scheme=Tqt(act_round="dpu"))
    with pytest.raises(UnsupportedModelError, match="it rounds by 'dpu'"):
        lower(net, images())


def test_numbers_that_are_no_floats() -> None:
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.table(x))

    ids = torch.arange(6).reshape(3, 2)
    with pytest.raises(UnsupportedModelError, match=r"input 0 is torch\.int64, expected float32"):
        lower(low(Ids(), ids), ids)


def test_values_off_their_grid_are_our_mistake() -> None:
    with pytest.raises(InvariantError, match=r"conv: 1 values of its weight are off the grid"):
        whole_codes(torch.tensor([0.5, 0.3]), torch.tensor([-1]), "conv", "weight", None)


def test_public_names() -> None:
    assert lightning_lowbit.lower is lower
    assert smallest(np.array([-129])).dtype == np.int16
    assert moved.__module__ in sys.modules
