"""Forwards of every kind: what is followed, what is named and left, arguments, functions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules.watch import watch
from modules.zoo import Flags, images
from torch import Tensor, nn

from lightning_lowbit import Tqt, convert, float_mode, summarize
from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.modules.base import low_bit_modules, switch_of
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.selection import Selection
from lightning_lowbit.plugins.swap import swap


def ran(net: nn.Module, *args: Any, **kwargs: Any) -> set[str]:
    """Paths of the layers that one call runs."""
    switch = switch_of(net)
    switch.ran = set()
    net(*args, **kwargs)
    found, switch.ran = switch.ran, None
    return found


def converted(net: nn.Module) -> list[str]:
    return [path for path, module in low_bit_modules(net) if isinstance(module, LowBitLayer)]


# -- data flow that cannot be followed ----------------------------------------------------------------------
class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.act, self.pool, self.last = nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if x.mean() > 100:
            x = -x
        return self.last(self.pool(self.act(x)))


def test_control_flow() -> None:
    """The container is named with function and line; its parts are followed on their own."""
    torch.manual_seed(0)
    net, x = Branching(), images()
    report = convert(net, Tqt(bits=4), x)
    line = Branching.forward.__code__.co_firstlineno + 2
    assert len(report.uncovered) == 1
    assert f"Branching (test_flow.py:{line} in forward)" in report.uncovered[0]
    assert converted(net) == ["body.0", "body.3", "last"]
    rows = summarize(net)
    assert rows["body.2.output"].grid.signed is False  # inside the followed part, all is as ever
    assert rows["last.input"].grid.signed is False  # on its own: the data decide
    net.eval()
    assert watch(net, rows, x).off == []
    assert type(net.pool) is nn.AvgPool2d


class Deciding(nn.Module):
    """A batch norm in each of two parts, of which one cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.stem, self.norm, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(self.body(x)))
        return x if x.mean() < 100 else self.other(x)


def test_what_is_not_followed_is_said_at_once_with_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_lowbit.plugins.swap.rank_zero_info", said.append)
    swap(Deciding(), Tqt(), False, Selection())
    line = Deciding.forward.__code__.co_firstlineno + 2
    where = f"Deciding (test_flow.py:{line} in forward): control flow (if, while, a loop) on a tensor or its shape"
    assert len(said) == 1
    assert said[0].startswith(f"lightning_lowbit: not followed: {where}; torch.fx: ")
    assert "its batch norms stay float (norm), and there is no export to C. Move that out of forward" in said[0]
    swap(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), Tqt(), False, Selection())
    assert len(said) == 1
    net = nn.Sequential(Deciding()).eval()
    with pytest.raises(ConfigError, match=r"^0.other: converted, but it did not run in calibration") as caught:
        convert(net, "tqt", images())
    assert f"0 ({where.partition('(')[2]}" in str(caught.value)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.body(x)) + x
        if self.training:
            return self.head(x), self.aux(x)
        return self.head(x)


def test_branch_of_training_alone() -> None:
    torch.manual_seed(0)
    net, x = Auxiliary(), torch.randn(6, 4)
    net.train()
    from lightning_lowbit.modules.calibrate import calibrate

    report = convert(net)
    assert "training" in report.uncovered[0]
    calibrate(net, lambda: (net(x), 1)[1], accept_silent=lambda path: path == "aux")
    assert ran(net.train(), x) == {"body", "head", "aux"}
    assert ran(net.eval(), x) == {"body", "head"}
    main, aux = net.train()(x)
    (main.sum() + aux.sum()).backward()


class Stateful(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.count, self.seen = how, 0, []
        self.register_buffer("steps", torch.zeros(()))
        self.linear = nn.Linear(3, 3)

    def log(self, *args: Any) -> None:
        self.seen.append("logged")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.linear(x)) + x
        if self.how == "attribute":
            self.last = x
        elif self.how == "counter":
            self.count += 1
        elif self.how == "list":
            self.seen.append(x)
        elif self.how == "log":
            self.log("mean", x.mean())
        elif self.how == "constant":
            x = x + torch.arange(3)
        elif self.how == "noise":
            x = x * (1 if torch.rand(()) > 2 else 2)
        return x


@pytest.mark.parametrize("how", ["attribute", "counter", "list", "log", "constant", "noise"])
def test_a_forward_that_does_more_than_compute_keeps_doing_it(how: str) -> None:
    """A recording would drop the effect, or repeat what was drawn while tracing."""
    torch.manual_seed(0)
    net, x = Stateful(how), torch.randn(4, 3)
    state = torch.get_rng_state()
    report = convert(net, "tqt")
    assert torch.equal(torch.get_rng_state(), state)
    assert report.uncovered, "it must be said that its functional operations stay float"
    assert (net.count, net.seen, hasattr(net, "last")) == (0, [], False)
    convert_state = dict(vars(net))
    assert "forward" not in convert_state
    net(x)
    effects = {"attribute": hasattr(net, "last"), "counter": net.count == 1, "list": len(net.seen) == 1}
    effects["log"] = net.seen == ["logged"]
    assert effects.get(how, True)


# -- arguments -----------------------------------------------------------------------------------------------
def test_arguments_of_every_kind() -> None:
    torch.manual_seed(0)
    net, x = Flags(), torch.randn(4, 4)
    plain = copy.deepcopy(net)
    convert(net, "tqt", x)
    net.eval()
    mask = torch.rand(4, 4)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}), ((), {"x": x}), ((x, None, True), {}), ((x,), {"flag": True}), ((x, None, False, x, x),
        {}), ((x,), {"times": 2}), ((x,), {"other": 3, "mask": None}), ((x,), {"mask": mask}),
    ]  # fmt: skip
    for args, kwargs in calls:
        with float_mode(net):
            assert torch.equal(net(*args, **kwargs), plain(*args, **kwargs))
        torch.testing.assert_close(net(*args, **kwargs), plain(*args, **kwargs), rtol=0.1, atol=0.1)
    assert torch.equal(net(x, flag=True), -net(x))
    with pytest.raises(TypeError):
        net(x, None, True, flag=False)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        y = self.a(x)
        if shift is not None:
            y = y + shift
        return self.b(y + x)


def test_a_call_that_leaves_the_plan_is_refused_by_line() -> None:
    """Its first add would otherwise pass for the only one that was planned, on a grid of another tensor."""
    net, x = Shifted(), torch.randn(4, 4)
    convert(net, "tqt", x)
    net(x)
    line = Shifted.forward.__code__.co_firstlineno + 4
    message = rf"^Shifted: with these .* training, its forward makes other calls .*\(add in test_flow.py:{line}"
    with pytest.raises(UnsupportedModelError, match=message):
        net(x, shift=x)


class Numbers(nn.Module):
    """Numbers where the plan can only see arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, shift: float, *, scale: float, offset: float = 0.0) -> Tensor:
        return self.b(self.a(x * scale + offset) + shift)


def test_numbers_as_arguments() -> None:
    torch.manual_seed(0)
    net, x = Numbers(), torch.randn(8, 4)
    plain = copy.deepcopy(net)
    from lightning_lowbit.modules.calibrate import calibrate

    convert(net)
    calibrate(net, lambda: (net(x, 0.5, scale=2.0, offset=0.25), 1)[1])
    net.eval()
    for options in ({"scale": 2.0}, {"scale": 2.0, "offset": 0.25}, {"offset": 0.1, "scale": 1.5}):
        with float_mode(net):
            assert torch.equal(net(x, 0.5, **options), plain(x, 0.5, **options))
        torch.testing.assert_close(net(x, 0.5, **options), plain(x, 0.5, **options), rtol=0.1, atol=0.1)


class Wrapper(nn.Module):
    """Hands on whatever it is given, and returns a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.pick, self.linear = Pick(), nn.Linear(4, 4)

    def forward(self, *inputs: Tensor) -> dict[str, Any]:
        first = self.pick(inputs[0], scale=inputs[1])
        return {"both": (first, F.relu(self.linear(first + inputs[1]))), "none": None}


class Pick(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor] | Tensor:
        x = self.linear(x)
        return x if scale is None else x + scale


def test_star_arguments_and_structures() -> None:
    torch.manual_seed(0)
    net, a, b = Wrapper(), torch.randn(3, 4), torch.randn(3, 4)
    report = convert(net, "tqt", (a, b))
    assert report.uncovered == []
    net.eval()
    result = net(a, b)
    assert result["none"] is None
    assert len(result["both"]) == 2
    rows = summarize(net)
    assert {"lowbit_add.operand_1", "pick.lowbit_add.operand_1"} <= {f"{r.site}.{r.role}" for r in rows.rows}


# -- functions --------------------------------------------------------------------------------------------
class FunctionalNet(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.LazyConv2d(2, 1)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.body(self.a(x), self.b(x)))


BODIES = {
    "F.relu": lambda a, b: F.relu(a), "torch.relu": lambda a, b: torch.relu(a), "relu": lambda a, b: a.relu(),
    "relu_": lambda a, b: a.relu_(), "F.relu_inplace": lambda a, b: F.relu(a, inplace=True), "F.relu6": lambda
    a, b: F.relu6(a), "torch.relu_": lambda a, b: torch.relu_(a), "relu_keyword": lambda a, b:
    F.relu(input=a), "clamp": lambda a, b: a.clamp(0, 6), "hardtanh": lambda a, b: F.hardtanh(a), "leaky":
    lambda a, b: F.leaky_relu(a, 0.2), "plus": lambda a, b: a + b, "add": lambda a, b: a.add(b), "torch.add":
    lambda a, b: torch.add(a, other=b), "add_": lambda a, b: a.add_(b), "alpha": lambda a, b: torch.add(a, b,
    alpha=2), "number": lambda a, b: a + 1, "sum": lambda a, b: sum([a, b, a]), "self": lambda a, b: a + a,
    "cat": lambda a, b: torch.cat((a, b), dim=1), "cat_axis": lambda a, b: torch.concat([a, b], axis=1),
    "stack": lambda a, b: torch.stack([a, b], 1).flatten(1, 2), "pad": lambda a, b: F.pad(a.relu(), (1, 1)),
    "chunk": lambda a, b: a.chunk(2, 1)[1], "slice": lambda a, b: a[:, :, ::2] + b[:, :, ::2], "cat_pool":
    lambda a, b: F.max_pool2d(torch.cat([a, b], 1), 2), "avg_keyword": lambda a, b: F.avg_pool2d(input=a,
    kernel_size=2), "adaptive": lambda a, b: F.adaptive_avg_pool2d(a, 3), "mean": lambda a, b: torch.mean(a,
    dim=(2, 3), keepdim=True), "upsample": lambda a, b: F.interpolate(a, None, 2.0, "nearest"), "bilinear":
    lambda a, b: F.interpolate(a, None, 2.0, "bilinear"), "product": lambda a, b: a * torch.sigmoid(b),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_functions(name: str) -> None:
    torch.manual_seed(0)
    net, x = FunctionalNet(BODIES[name]), images()
    net(x)  # the last layer gets its shape
    plain = copy.deepcopy(net)
    convert(net, "tqt", x)
    net.eval()
    with float_mode(net):
        assert torch.equal(net(x), plain.eval()(x))
    assert watch(net, summarize(net), x).off == []
    with torch.no_grad():
        difference = (net(x) - plain(x)).abs().max() / plain(x).abs().max()
    assert 0 < difference < 0.1
