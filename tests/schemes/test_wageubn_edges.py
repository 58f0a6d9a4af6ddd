"""WAGEUBN on zeros, on what is not finite, and in networks unlike a chain of convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from schemes.conformance import differing
from schemes.jacinto_nets import off
from schemes.wageubn_nets import (
    chain,
    converted,
    finite,
    images,
    labels,
    on_grid,
    rule,
    sgd,
    state,
    step,
    train,
    weights,
    widths,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lowbit import convert, lowbit_step
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.plane_layers import multiplies_integers


# -- zeros and constants -------------------------------------------------------------------------------------
def test_zero_inputs_give_zeros_and_biases_learn() -> None:
    net = converted(chain(), check=True)
    before = copy.deepcopy(net.state_dict())
    step(net, sgd(net, 0.25), torch.zeros(8, 3, 8, 8))
    assert finite(net)
    assert rule(net).skipped == 0
    assert torch.equal(net[0].weight, before["0.weight"].mul(2**23).round().div(2**23))  # no gradient, no step
    assert not torch.equal(net[9].bias, before["9.bias"])


def test_calibration_on_zeros_is_taken_up_by_training() -> None:
    net = converted(chain(), torch.zeros(8, 3, 8, 8), width_share=0.0, check=True)
    quantizer = widths(net)["0.lowbit_input"]
    assert (quantizer.integer, quantizer.ready) == (0, True)
    optimizer = sgd(net, 0.01)
    for number in range(4):
        step(net, optimizer, images(seed=number))
    assert quantizer.integer >= 2
    assert finite(net)


@pytest.mark.parametrize("form", ["flag8", "shift8", "flag16", "shift16"])
def test_zero_errors_are_a_step_of_nothing(form: str) -> None:
    net = train(converted(chain(), e1="shift8", e2=form, check=True), 1, lr=0.25)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    step(net, sgd(net, 0.25, 0.0), images(), lambda y: y.sum() * 0.0)
    assert rule(net).skipped == 0
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_no_error_passes_a_rectifier_at_zero() -> None:
    net = converted(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), images(8, 6))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    step(net, sgd(net, 0.25), images(8, 6))
    assert not bool(net[0].bias.any())
    assert not bool(net[0].weight.any())


def test_a_constant_channel_is_its_beta_and_does_not_explode_in_evaluation() -> None:
    net = chain()
    with torch.no_grad():
        net[2].weight[:3] = 0.0
        net[3].bias.fill_(0.25)
    net = converted(net, norm_momentum=0.5, check=True)
    seen: list[Tensor] = []
    net[3].register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    for number in range(24):
        net(images(seed=number))
    assert bool((seen[-1][:, :3] == 0.25).all())
    assert float(net[3].running_var[0]) == 0.0
    step(net, sgd(net, 0.25), images())
    assert finite(net)
    with torch.no_grad():
        net[2].weight[0] = 0.01  # what was constant no longer is
        net.eval()(images(gain=3.0))
    values = 8 * 4 * 4
    assert float(seen[-1][:, 0].abs().max()) <= 2.0 * values**0.5 + 0.25


def test_one_sample_trains_where_norms_see_many_values() -> None:
    net = converted(chain())
    step(net, sgd(net, 0.25), images(1, 3, 8, 8))
    assert finite(net)
    with pytest.raises(ValueError, match="expected more than one value per channel"):
        converted(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), images(4, 3))(
            images(1, 3)
        )


# -- what is not finite --------------------------------------------------------------------------------------
def in_input(value: float) -> Callable[[Any, Any], None]:
    def spoil(net: Any, optimizer: Any) -> None:
        x = images(seed=9)
        x[1, 2, 3, 4] = value
        step(net, optimizer, x)

    return spoil


def in_loss(value: float) -> Callable[[Any, Any], None]:
    return lambda net, optimizer: step(net, optimizer, images(seed=9), lambda y: y.sum() * value) and None


def in_gradient(name: str) -> Callable[[Any, Any], None]:
    def spoil(net: Any, optimizer: Any) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images(seed=9)), labels())
            loss.backward()
            net.get_parameter(name).grad.view(-1)[1] = torch.inf
            return loss

        lowbit_step(net, optimizer, closure)

    return spoil


def in_error(net: Any, optimizer: Any) -> None:
    hook = net[4].register_forward_hook(lambda m, a, y: y.register_hook(lambda g: g / 0.0) and None)
    step(net, optimizer, images(seed=9))
    hook.remove()


BAD: dict[str, Callable[[Any, Any], None]] = {
    "NaN in input": in_input(torch.nan), "inf in input": in_input(torch.inf), "-inf in input": in_input(-torch.inf),
    "NaN in loss": in_loss(torch.nan), "inf in loss": in_loss(torch.inf), "in an error": in_error,
    "in a weight's gradient": in_gradient("2.weight"), "in a bias's gradient": in_gradient("5.bias"),
    "in gamma's gradient": in_gradient("3.weight"), "in a float layer's gradient": in_gradient("9.weight"),
}  # fmt: skip


VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {}, "float ends": {"first_last": "float"}, "fake": {"update": "fake"}, "float": {"update": "float"},
    "plain": {"gradients": False, "update": "float", "first_last": "float"}, "wide": {"act_format": "fixed_unit"},
}  # fmt: skip


SPOILED = [(which, "int8") for which in BAD] + [
    (which, variant)
    for variant in VARIANTS
    for which in ("NaN in input", "inf in loss", "in a float layer's gradient")
    if variant != "int8"
]


@pytest.mark.parametrize(("which", "variant"), SPOILED)
def test_a_step_with_what_is_not_finite_is_left_out_and_counted(which: str, variant: str) -> None:
    net = train(converted(chain(), **VARIANTS[variant]), 2)
    optimizer = sgd(net, 0.25, 0.5, weight_decay=0.1)
    step(net, optimizer, images())
    before, memory = state(net), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.warns(UserWarning, match=r"step \d: NaN or infinite values .*skipped_steps"):
        BAD[which](net, optimizer)
    assert rule(net).skipped == 1
    assert rule(net).logged()["skipped_steps"] == 1
    kept = {name for name in before if name.startswith(("master", "acc")) or name in dict(net.named_parameters())}
    assert kept & set(differing(before, state(net))) == set()
    for key, value in optimizer.state_dict()["state"].items():
        assert differing({"": value["momentum_buffer"]}, {"": memory[key]["momentum_buffer"]}) == [], key
    assert finite(net)
    for number in range(2):  # and training goes on
        step(net, optimizer, images(seed=number))
    assert finite(net)
    assert not torch.equal(net[2].weight, before["2.weight"])
    assert rule(net).skipped == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["NaN", "inf"])
def test_what_is_not_finite_does_not_reach_running_statistics(value: float) -> None:
    net = train(converted(chain(), skip=["0", "2"]), 2)  # what the norm reads is float
    before = {name: t.clone() for name, t in net[3].named_buffers() if name.startswith("running")}
    with torch.no_grad():
        net[2].bias = nn.Parameter(torch.full((8,), value))
    net(images())
    assert all(torch.equal(net[3].get_buffer(name), t) for name, t in before.items())
    net[2].bias = None
    net(images())
    assert not any(torch.equal(net[3].get_buffer(name), t) for name, t in before.items())


# -- odd networks --------------------------------------------------------------------------------------------
class Dense(nn.Module):
    """Concatenations that norms read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.n1, self.n2, self.fc = nn.BatchNorm2d(4), nn.BatchNorm2d(8), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.a(F.relu(self.n1(x)))], 1)
        x = torch.cat([x, self.b(F.relu(self.n2(x)))], 1)
        y: Tensor = self.fc(F.relu(x).mean((2, 3)))
        return y


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.norm, self.fc = (
            nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 4)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(2):
            x = F.relu(self.norm(self.shared(x)))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def tail(channels: int, dims: int) -> list[nn.Module]:
    pools = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
    return [pools[dims](1), nn.Flatten(), nn.Linear(channels, 4)]


def around(layer: nn.Module, norm: nn.Module, act: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), layer, norm, act or nn.ReLU(), *tail(6, 2))


ODD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 6, 3, stride=2),
                                     nn.ReLU(), *tail(6, 1)), (8, 3, 12)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 6, 2), nn.ReLU(),
                                     *tail(6, 3)), (8, 2, 5, 5, 5)),
    "transposed": (lambda: around(nn.ConvTranspose2d(6, 6, 3, stride=2), nn.BatchNorm2d(6)), (8, 3, 6, 6)),
    "depthwise": (lambda: around(nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)), (8, 3, 8, 8)),
    "grouped": (lambda: around(nn.Conv2d(6, 6, 3, groups=3), nn.BatchNorm2d(6)), (8, 3, 8, 8)),
    "dilated": (lambda: around(nn.Conv2d(6, 6, 3, dilation=2), nn.BatchNorm2d(6)), (8, 3, 8, 8)),
    "reflect": (lambda: around(nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)), (8, 3, 8, 8)),
    "same": (lambda: around(nn.Conv2d(6, 6, 3, padding="same"), nn.BatchNorm2d(6)), (8, 3, 8, 8)),
    "linear 3-D": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Flatten(),
                                         nn.Linear(42, 4)), (8, 7, 5)),
    "no affine": (lambda: around(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, affine=False)), (8, 3, 8, 8)),
    "no statistics": (lambda: around(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)), (8, 3, 8, 8)),
    "sync": (lambda: around(nn.Conv2d(6, 6, 3), nn.SyncBatchNorm(6)), (8, 3, 8, 8)),
    "group norm": (lambda: around(nn.Conv2d(6, 6, 3), nn.GroupNorm(2, 6)), (8, 3, 8, 8)),
    "dropout": (lambda: around(nn.Conv2d(6, 6, 3), nn.Dropout(0.25)), (8, 3, 8, 8)),
    "hardtanh": (lambda: around(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Hardtanh()), (8, 3, 8, 8)),
    "relu6": (lambda: around(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU6()), (8, 3, 8, 8)),
    "gelu": (lambda: around(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.GELU()), (8, 3, 8, 8)),
    "in place": (lambda: around(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)), (8, 3, 8, 8)),
    "max pool": (lambda: around(nn.Conv2d(6, 6, 3), nn.MaxPool2d(2)), (8, 3, 8, 8)),
    "dense": (Dense, (8, 3, 8, 8)),
    "twice": (Twice, (8, 3, 8, 8)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "io"),
    [(name, "outputs") for name in ODD] + [(name, "strict") for name in ("transposed", "dense", "twice", "gelu")],
)
def test_odd_networks_train_on_their_grids(name: str, io: str) -> None:
    torch.manual_seed(0)
    make, shape = ODD[name]
    net, x = make(), images(*shape)
    want = copy.deepcopy(net).train()(x).detach()
    net = converted(net, x, io=io, check=True, weight_range="fit")
    for _ in range(8):  # calibration saw norms that knew nothing: widths grow by a bit a step
        step(net, sgd(net, 0.0), x)
    assert len(weights(net)) == sum(isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) for m in net.modules())
    if name != "dropout":
        assert off(net(x), want) < 0.15
    before = {key: value.clone() for key, value in net.named_parameters()}
    optimizer = sgd(net, 0.25)
    losses = [float(step(net, optimizer, x)) for _ in range(6)]
    assert finite(net)
    assert losses[-1] < losses[0] or name == "dropout"
    assert [key for key, p in net.named_parameters() if torch.equal(p, before[key])] == []
    for key, codes in rule(net).masters.items():
        p, stored = net.get_parameter(key), rule(net).stored[key]
        assert on_grid(p.detach() * 2.0**-stored.power, 23)
        assert torch.equal((codes.double() * 2.0 ** (stored.power - 23)).float(), p)
    assert rule(net).skipped == 0
    y = net.eval()(x)
    assert torch.equal(y, net(x))


KERNELS = {"conv1d", "depthwise", "grouped", "dilated", "same", "linear 3-D"}


@pytest.mark.parametrize("name", [*sorted(KERNELS), "transposed", "conv3d", "reflect"])
def test_layers_with_a_kernel_multiply_integers_and_others_the_same_numbers(name: str) -> None:
    torch.manual_seed(0)
    make, shape = ODD[name]
    net = converted(make(), images(*shape))
    kinds = [multiplies_integers(layer) for layer in net.modules() if isinstance(layer, LowBitLayer)]
    assert all(kinds) == (name in KERNELS)
    x = images(*shape, seed=2)
    seen = []
    layer: Any = next(m for m in list(net.modules())[2:] if isinstance(m, LowBitLayer))
    layer.register_forward_hook(lambda m, a, y: seen.append((a[0].double(), y.double())))
    net(x)
    a, y = seen[0]
    fraction = layer.lowbit_weight.fraction
    weight = (layer.weight.double() * 2.0**fraction).round().clamp(-127, 127) * 2.0**-fraction
    bias = None if layer.bias is None else (layer.bias.double() * 2.0**15).round() * 2.0**-15
    assert torch.equal(y, layer.op(a, weight, bias))


def test_a_network_of_two_layers_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"first_last='float' \('int8' converts it\)"):
        convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "wageubn", images(8, 4))
    assert len(weights(converted(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), images(8, 4)))) == 2


def test_frozen_norms_keep_their_statistics_and_their_formula() -> None:
    net = train(converted(chain(), check=True), 3)
    x = images(seed=7)
    net[3].eval()
    before = {name: value.clone() for name, value in net[3].named_buffers()}
    seen: list[Tensor] = []
    net[3].register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    gamma = net[3].weight.detach().clone()
    net[:5](x)
    net.eval()[:5](x)
    assert torch.equal(seen[0], seen[1])
    net.train()
    net[3].eval()
    step(net, sgd(net, 0.25), x)
    assert all(torch.equal(value, before[name]) for name, value in net[3].named_buffers())
    assert not torch.equal(net[3].weight, gamma)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
def test_a_checkpointed_block_has_the_bits_of_a_plain_one(reentrant: bool) -> None:
    found = []
    for again in (False, True):
        net = converted(chain(), width_patience=1)
        optimizer = sgd(net, 0.25)
        switch_of(net).managed = True
        for number in range(2):
            x = images(seed=number, gain=2.0 + number).requires_grad_()
            optimizer.zero_grad()
            y = checkpoint(net[:6], x, use_reentrant=reentrant) if again else net[:6](x)
            F.cross_entropy(net[6:](y), labels()).backward()
            lowbit_step(net, optimizer)
        found.append(state(net))
    assert differing(*found) == []


def test_values_under_autocast_are_those_of_float32() -> None:
    found = []
    for mixed in (False, True):
        net = converted(chain(), check=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            net[:8](images()).sum().backward()
        found.append([p.grad for p in net[:8].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_copy_trains_on_its_own() -> None:
    net = train(converted(chain()), 2)
    twin, before = copy.deepcopy(net), state(net)
    train(twin, 2)
    assert differing(state(net), before) == []
