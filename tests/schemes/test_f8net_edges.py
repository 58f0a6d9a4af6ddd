"""F8Net between float code, dead tensors and odd ranges: what a user's network may hold beside clean blocks."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit import F8Net, lowbit_step
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.schemes import convert


class Residual(nn.Module):
    """A sum that ``between`` reads, and a second sum behind it."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.between, self.fc = between, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.between(y + self.b(y))
        y = y + self.c(y)
        return self.fc(y.mean((2, 3)))


class Heads(nn.Module):
    def __init__(self, join: str) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.join = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3), join

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        return torch.cat([self.a(y), self.b(y)], 1) if self.join == "cat" else self.a(y) + self.b(y)


class Siamese(nn.Module):
    """One reader of a shared layer's results is behind a rectifier, one is not."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.rectified, self.plain = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rectified(F.relu(self.shared(x))) + self.plain(self.shared(x / 2))


def off(got: Tensor, want: Tensor) -> float:
    return float(((got - want).norm() / want.norm()).detach())


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def seeded(make: Any) -> Any:
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize(
    "between",
    [nn.BatchNorm2d, lambda n: nn.GroupNorm(2, n), nn.PReLU, lambda n: nn.Conv2d(n, n, 1)],
    ids=["batch_norm", "group_norm", "prelu", "skipped"],
)
def test_float_code_behind_a_sum_reads_the_network_s_dtype(between: Any) -> None:
    net = seeded(lambda: Residual(between(8))).eval()
    x = images(4, 3, 6, 6)
    want = net(x)
    convert(net, F8Net(), x, skip=["between"])
    got = net(x)
    assert got.dtype == torch.float32
    assert off(got, want) < 0.05


@pytest.mark.parametrize("join", ["cat", "add"])
def test_what_leaves_the_network_has_its_dtype(join: str) -> None:
    net, x = seeded(lambda: Heads(join)), images(5, 6)
    convert(net, F8Net(), x)
    assert net.eval()(x).dtype == net.train()(x).dtype == torch.float32


def test_a_rectifier_is_not_left_to_a_signed_reader() -> None:
    net, x = seeded(Siamese), images(64, 6)
    want = net(x)
    convert(net, F8Net(bits=12), x)
    assert net.rectified.lowbit_input.signed  # it shares a unit with a reader of negative values
    assert off(net.eval()(x), want) < 0.01


def test_training_mode_without_gradients_goes_by_its_own_batch_after_a_load() -> None:
    net, x = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))), 20 * images(64, 6)
    twin = copy.deepcopy(net)
    convert(net, F8Net(), x)
    convert(twin, F8Net(), images(64, 6))
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.train()(x), net.train()(x))


@pytest.mark.parametrize("factor", [0.0, 1e-9], ids=["zero", "small"])
@pytest.mark.parametrize("kind", ["stddev", "constant"])
def test_a_head_that_rounds_to_zero_learns(factor: float, kind: str) -> None:
    net, x = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))), images(64, 6)
    with torch.no_grad():
        net[2].weight.mul_(factor)
    with warnings.catch_warnings(record=True):  # such weights are named
        warnings.simplefilter("always")
        convert(net, F8Net(rescale=kind, weight_select="histogram"), x)  # type: ignore[arg-type]  # one of its words
    optimizer, target = torch.optim.SGD(net.parameters(), 0.1), x.argmax(1) % 3
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(net.train()(x), target)
        loss.backward()
        lowbit_step(net, optimizer)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert all(bool(p.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize(
    ("scale", "said"),
    [(1e4, "no fraclen holds: they are clipped at 127"), (1e-4, "7 bits behind the point round to one code or none")],
    ids=["large", "small"],
)
def test_inputs_beyond_the_format_are_named(scale: float, said: str) -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    with pytest.warns(UserWarning, match=f"0.lowbit_input: calibration saw values up to .*{said}.*Normalize"):
        convert(net, F8Net(), scale * images(64, 6))


def test_weights_beyond_the_format_are_named() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    with torch.no_grad():
        net[2].weight.mul_(5e3)
    with pytest.warns(UserWarning, match=r"2\.lowbit_weight: .*clipped at 127") as told:
        convert(net, F8Net(), images(64, 6))
    assert len(told) == 1


def test_a_tensor_that_was_zero_in_calibration_stays_float_behind_a_mean() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
            nn.init.constant_(self.conv.bias, -100.0)  # type: ignore[arg-type]  # it has one

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.conv(x)).mean((2, 3)))

    net, x = seeded(Dead), images(4, 3, 6, 6)
    convert(net, F8Net(), x)
    assert torch.equal(net.eval()(x), net.fc.bias.expand(4, 2))


def test_floating_clips_only_where_there_is_a_clip() -> None:
    net, x = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))), 5 * images(64, 6)
    want = net(x)
    convert(net, F8Net(floating=True, rescale="none"), x)
    source = net[0].lowbit_input
    assert isinstance(source, FraclenInput)
    assert source.alpha is None
    assert float(source.fraclen) < 4  # calibrated for the run in 8 bits that follows
    assert off(net.eval()(x), want) < 1e-2


@pytest.mark.parametrize("select", ["grid", "histogram"])
def test_a_sign_that_calibration_finds_is_measured_by(select: str) -> None:
    net, x = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3))), images(64, 6)
    convert(net, F8Net(select=select), x)  # type: ignore[arg-type]  # one of its words
    assert not net[2].lowbit_input.signed
    net.train()(x).sum().backward()
    assert net[2].lowbit_input.sums[0] == 64 * 8


def test_double_networks_stay_double() -> None:
    net, x = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))).double(), images(64, 6).double()
    want = net(x)
    convert(net, F8Net(), x)
    assert net.eval()(x).dtype == torch.float64
    assert off(net(x), want) < 0.05


@pytest.mark.parametrize("bits", [8, 4])
def test_small_weights_keep_their_bits(bits: int) -> None:
    """The published format ends at bits - 1 bits behind the point: 4 codes of 127 for weights within 1/32."""
    make = lambda: nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))  # noqa: E731
    x = images(64, 256)
    error = {}
    for scheme in (F8Net(weight_bits=bits), F8Net.reference(weight_bits=bits, ties="shared", rescale="stddev")):
        net = seeded(make)
        with torch.no_grad():
            net[0].weight.mul_(0.25)
        want = net(x)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            convert(net, scheme, x)
        error[scheme.preset] = off(net.eval()(x), want)
    assert error["recommended"] < {8: 0.02, 4: 0.2}[bits]
    assert error["reference"] > 5 * error["recommended"]


@pytest.mark.parametrize(
    "wrong",
    [{"momentum": "0.1"}, {"momentum": 0}, {"alpha_lr": "x"}, {"alpha_lr": float("inf")}, {"clip": "no"},
     {"pixels": None}, {"warmup": None}, {"per_channel": True}, {"rescale": None}, {"bits": 1}, {"select": "max"}],
    ids=lambda wrong: "-".join(wrong),
)  # fmt: skip
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    (option,) = wrong
    with pytest.raises(ConfigError, match=rf"F8Net\((weight_)?{option}="):
        F8Net(**wrong)
