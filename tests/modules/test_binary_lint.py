"""What is said about a network before it trains on signs: each rule where it holds, and silence where it does not."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from modules.zoo import ZOO, build
from torch import Tensor, nn

from lightning_lowbit.graph.network import follow
from lightning_lowbit.graph.ops import COMPUTE
from lightning_lowbit.graph.patterns import make_plan
from lightning_lowbit.modules.binary_lint import Finding, binary_findings

LAYERS = tuple(COMPUTE)


def lint(net: nn.Module, *binary: str, replaced: tuple[str, ...] = ()) -> list[str]:
    """Findings before the plan; they must be the same behind it, which calls float code's operations FLOAT."""
    flow = follow(net)
    found = binary_findings(net, flow, set(binary), set(replaced))
    make_plan(net, flow, set(binary), set())
    assert binary_findings(net, flow, set(binary), set(replaced)) == found
    return [str(finding) for finding in found]


def chain(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def conv(planes_in: int = 4, planes: int = 4, bias: bool = False, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(planes_in, planes, 3, padding=1, bias=bias, **settings)


def between(*middle: nn.Module) -> nn.Sequential:
    """A right binary layer in ``b`` behind a float one, a norm and ``middle``, named m0, m1 ..."""
    named = {f"m{index}": module for index, module in enumerate(middle)}
    return chain(a=conv(3), an=nn.BatchNorm2d(4), **named, b=conv(), bn=nn.BatchNorm2d(4), end=conv())


class Functional(nn.Module):
    """``body`` between a normalized layer and a right binary one."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.an, self.b, self.bn, self.end = conv(3), nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4), conv()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.end(self.bn(self.b(self.body(self.an(self.a(x))))))
        return y


# -- networks that are right -----------------------------------------------------------------------------------
def test_a_finding_reads_as_one_line() -> None:
    assert str(Finding("features.1", "all signs are +1", "write nn.Hardtanh")) == (
        "features.1: all signs are +1; write nn.Hardtanh"
    )


def test_the_reference_block_is_right() -> None:
    net = chain(
        a=conv(3), p0=nn.MaxPool2d(2), n0=nn.BatchNorm2d(4), h0=nn.Hardtanh(),
        b=conv(), p1=nn.MaxPool2d(2), n1=nn.BatchNorm2d(4), h1=nn.Hardtanh(), flat=nn.Flatten(),
        c=nn.Linear(64, 6, bias=False), drop=nn.Dropout(0.5), n2=nn.BatchNorm1d(6), h2=nn.Hardtanh(),
        end=nn.Linear(6, 3),
    )  # fmt: skip
    assert lint(net, "b", "c") == []
    assert lint(net, "a", "b", "c") == []


class BiReal(nn.Module):
    """A shortcut around every convolution; where the shape changes, a pool and a float convolution."""

    def __init__(self, planes_in: int, planes: int) -> None:
        super().__init__()
        self.conv, self.norm = conv(planes_in, planes), nn.BatchNorm2d(planes)
        grows = planes_in != planes
        side = (nn.AvgPool2d(1), nn.Conv2d(planes_in, planes, 1, bias=False), nn.BatchNorm2d(planes)) if grows else ()
        self.side = nn.Sequential(*side)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x)) + self.side(x)
        return y


class BiRealNet(nn.Module):
    def __init__(self, depth: int = 3, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.norm, self.middle = conv(3, 4), nn.BatchNorm2d(4), middle or nn.Identity()
        self.blocks = nn.Sequential(*(BiReal(4, 4) for _ in range(depth)), BiReal(4, 8), BiReal(8, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.blocks(self.middle(self.norm(self.stem(x)))).mean((2, 3)))
        return y

    def binary(self) -> list[str]:
        return [path for path, _ in self.named_modules() if path.endswith(".conv")]


def test_a_bi_real_net_is_right() -> None:
    net = BiRealNet()
    assert lint(net, *net.binary()) == []


def test_a_deep_chain_of_shortcuts_is_followed_once() -> None:
    """Paths double with every shortcut: 60 of them could not be walked one by one."""
    net = BiRealNet(60)
    flow = follow(net)
    assert binary_findings(net, flow, set(net.binary())) == []


def test_pre_activation_is_right() -> None:
    """The next norm stands behind a sum (ResNet v2), or behind a rectifier and a pool (XNOR-Net)."""

    class Pre(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.n1, self.c1, self.n2, self.c2 = (
                conv(3),
                nn.BatchNorm2d(4),
                conv(),
                nn.BatchNorm2d(4),
                conv(),
            )
            self.n3, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.c1(self.n1(x))
            x = x + self.c2(self.n2(x))
            y: Tensor = self.fc(F.relu(self.n3(x)).mean((2, 3)))
            return y

    assert lint(Pre(), "c1", "c2") == []
    xnor = chain(
        a=conv(3), r0=nn.ReLU(), p0=nn.MaxPool2d(2), n1=nn.BatchNorm2d(4), b=conv(), r1=nn.ReLU(), p1=nn.AvgPool2d(2),
        n2=nn.BatchNorm2d(4), c=conv(), r2=nn.ReLU(), n3=nn.BatchNorm2d(4), end=conv(),
    )  # fmt: skip
    assert lint(xnor, "b", "c") == []


@pytest.mark.parametrize("name", sorted(ZOO))
def test_no_binary_layer_no_finding(name: str) -> None:
    net, _ = build(name)
    assert binary_findings(net, follow(net), set()) == []


# -- rectifiers in front of a sign -----------------------------------------------------------------------------
ONE_SIGN = "never negative, so that every sign taken of its values by b is +1"
REPLACE = 'Bnn(relu="hardtanh") or Bnn(relu="prelu") replaces it, or write nn.Hardtanh'
REWRITE = "write nn.Hardtanh in its place"


@pytest.mark.parametrize("rectifier", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()], ids=["relu", "in_place", "six"])
def test_a_rectifier_leaves_one_sign(rectifier: nn.Module) -> None:
    assert lint(between(rectifier), "b") == [f"m0: {ONE_SIGN}; {REPLACE}"]


@pytest.mark.parametrize(
    "module",
    [nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid(), nn.Softmax(1), nn.Hardtanh(0, 1), nn.Threshold(0.5, 0.0)],
    ids=lambda module: type(module).__name__,
)
def test_other_functions_that_are_never_negative(module: nn.Module) -> None:
    assert lint(between(module), "b") == [f"m0: {ONE_SIGN}; {REWRITE}"]


@pytest.mark.parametrize(
    "module",
    [nn.Hardtanh(), nn.Tanh(), nn.PReLU(), nn.LeakyReLU(), nn.GELU(), nn.Threshold(-1.0, -1.0), nn.LogSigmoid()],
    ids=lambda module: type(module).__name__,
)
def test_functions_of_both_signs(module: nn.Module) -> None:
    assert lint(between(module), "b") == []


def test_looking_through_what_keeps_signs() -> None:
    for module in (nn.Identity(), nn.ZeroPad2d(0), nn.AvgPool2d(1), nn.Tanh(), nn.Hardtanh()):
        net = between(nn.ReLU(), module)
        fix = REPLACE if isinstance(module, (nn.Identity, nn.ZeroPad2d)) else REWRITE
        assert lint(net, "b") == [f"m0: {ONE_SIGN}; {fix}"], module
    assert lint(between(nn.ReLU(), nn.BatchNorm2d(4)), "b") == []
    assert lint(between(nn.ReLU(), nn.LogSigmoid()), "b") == []
    dropped = lint(between(nn.ReLU(), nn.Dropout(0.1), nn.MaxPool2d(2)), "b")
    assert [line.split(":")[0] for line in dropped] == ["m0", "m1", "m2"]
    assert dropped[0] == f"m0: {ONE_SIGN}; {REPLACE}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (F.relu, f"relu: {ONE_SIGN}; {REPLACE}"),
        (torch.relu, f"relu: {ONE_SIGN}; {REPLACE}"),
        (lambda x: x.relu(), f"relu: {ONE_SIGN}; {REPLACE}"),
        (lambda x: F.relu(x, inplace=True), f"relu: {ONE_SIGN}; {REPLACE}"),
        (lambda x: x.relu_(), f"relu: {ONE_SIGN}; {REPLACE}"),
        (F.relu6, f"relu6: {ONE_SIGN}; {REPLACE}"),
        (torch.sigmoid, f"sigmoid: {ONE_SIGN}; {REWRITE}"),
        (lambda x: x.sigmoid(), f"sigmoid: {ONE_SIGN}; {REWRITE}"),
        (F.softplus, f"softplus: {ONE_SIGN}; {REWRITE}"),
        (torch.abs, f"abs: {ONE_SIGN}; {REWRITE}"),
        (lambda x: x.clamp(min=0), f"clamp: {ONE_SIGN}; {REWRITE}"),
        (lambda x: x.clamp(0, 1), f"clamp: {ONE_SIGN}; {REWRITE}"),
        (lambda x: F.hardtanh(x, 0.0, 1.0), f"hardtanh: {ONE_SIGN}; {REWRITE}"),
        (lambda x: F.hardtanh(x, min_val=0.0), f"hardtanh: {ONE_SIGN}; {REWRITE}"),
        (F.hardtanh, None),
        (lambda x: x.clamp(-1, 1), None),
        (lambda x: x.clamp(max=1), None),
        (torch.tanh, None),
        (lambda x: F.relu(x) - 0.5, None),
        (lambda x: F.relu(x) + x, None),
        (lambda x: F.relu(x) + -0.5, None),
        (lambda x: torch.add(x.relu(), x.relu(), alpha=-1), None),
        (lambda x: 0.5 * x, None),
    ],
    ids=lambda value: "" if callable(value) else "silent" if value is None else value.split(":")[0],
)
def test_functions_and_methods(body: Callable[[Tensor], Tensor], expected: str | None) -> None:
    assert lint(Functional(body), "b") == ([] if expected is None else [expected])


def test_sums_of_nonnegative_operands() -> None:
    both = lint(Functional(lambda x: F.relu(x) + torch.sigmoid(x)), "b")
    assert both == [f"relu: {ONE_SIGN}; {REWRITE}", f"sigmoid: {ONE_SIGN}; {REWRITE}"]
    assert lint(Functional(lambda x: F.avg_pool2d(F.relu(x) + x.abs(), 2)), "b") == [
        f"relu: {ONE_SIGN}; {REWRITE}",
        f"abs: {ONE_SIGN}; {REWRITE}",
    ]


def test_one_branch_of_a_concat() -> None:
    """Its channels are constant, whatever the others hold; behind a selection nobody knows which they are."""

    class Cat(nn.Module):
        def __init__(self, part: bool) -> None:
            super().__init__()
            self.norm, self.b, self.bn, self.end = nn.BatchNorm2d(4), conv(4 if part else 8), nn.BatchNorm2d(4), conv()
            self.part = part

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            x = torch.cat([x, torch.relu(x)], 1)
            y: Tensor = self.end(self.bn(self.b(x[:, :4] if self.part else x)))
            return y

    assert lint(Cat(False), "b") == [f"relu: {ONE_SIGN}; {REWRITE}"]
    assert lint(Cat(True), "b") == []


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.MaxPool2d(1)], ids=["dropout", "max_pool"])
def test_a_concat_passes_every_branch_on(layer: nn.Module) -> None:
    """Dropout and pool of one branch reach the sign; sums of another one reach it without a norm."""

    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.m, self.b = conv(), nn.BatchNorm2d(4), layer, conv(8)
            self.bn, self.end = nn.BatchNorm2d(4), conv()

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y: Tensor = self.end(self.bn(self.b(torch.cat([x, self.m(self.norm(x))], 1))))
            return y

    expected = dropped("m", "b") if isinstance(layer, nn.Dropout) else skewed("m", "b")
    assert lint(Cat(), "a", "b") == [spread("a", 36), expected]


class Forks(nn.Module):
    """One rectifier read by three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU()
        self.b, self.c, self.d = conv(), conv(), conv()
        self.bn, self.cn = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.end = conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(x))
        y: Tensor = self.end(self.bn(self.b(x)) + self.cn(self.c(x)) + self.d(x))
        return y


def test_a_fork_gives_one_finding() -> None:
    expected = "relu: never negative, so that every sign taken of its values by b and c is +1"
    assert [line.split(";")[0] for line in lint(Forks(), "b", "c")] == [expected]
    assert "values by c is" in lint(Forks(), "c")[0]
    assert "values by b, c and d is" in lint(Forks(), "b", "c", "d")[0]
    assert lint(Forks(), "a") == []


def test_replaced_rectifiers_are_no_finding() -> None:
    assert lint(between(nn.ReLU()), "b", replaced=("m0",)) == []
    assert lint(Functional(F.relu), "b", replaced=("relu",)) == []
    twice = between(nn.ReLU(), nn.ReLU())  # what stands in the second one's place reads nothing negative
    assert [line.split(":")[0] for line in lint(twice, "b", replaced=("m1",))] == ["m0"]


def test_what_stands_there_now_counts() -> None:
    net = between(nn.ReLU())
    flow = follow(net)
    net.m0 = nn.Hardtanh()
    assert binary_findings(net, flow, {"b"}) == []

    first, second = between(nn.Identity()), between(nn.ReLU())
    first.m0 = second.m0  # known by the first of its names
    net = chain(first=first, neck=conv(4, 3), second=second)
    flow = follow(net)
    second.m0 = nn.Hardtanh()
    assert [finding.path for finding in binary_findings(net, flow, {"first.b", "second.b"})] == ["first.m0"]
    assert binary_findings(net, flow, {"second.b"}) == []
    first.m0, second.m0 = second.m0, first.m0
    (finding,) = binary_findings(net, flow, {"first.b", "second.b"})
    assert (finding.path, finding.fix) == ("first.m0", REPLACE)


class SharedBlock(nn.Module):
    """torchvision's block: one nn.ReLU for both calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        y: Tensor = self.relu(out)
        return y


def test_a_shared_rectifier_is_named_once() -> None:
    net = chain(stem=conv(3), norm=nn.BatchNorm2d(4), one=SharedBlock(), two=SharedBlock(), end=conv())
    found = lint(net, *(f"{block}.conv{n}" for block in ("one", "two") for n in (1, 2)))
    assert [line.split(",")[0] for line in found] == ["one.relu: never negative", "two.relu: never negative"]
    assert "taken of its values by one.conv2 and two.conv1 is" in found[0]
    assert "taken of its values by two.conv2 is" in found[1]


def test_a_shared_layer_is_named_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.relu = nn.Linear(8, 8), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.relu(self.b(self.relu(self.b(x)))))  # type: ignore[no-any-return]

    found = lint(Twice(), "b")
    assert [line.split(",")[0].split(":")[0] for line in found] == ["b", "relu"]


# -- a sum that no norm brings into the window ---------------------------------------------------------------------
INSIDE = {6: 32, 7: 29, 8: 28, 12: 23, 18: 19, 27: 15, 36: 13}  # percent of a normal distribution of variance K


def spread(path: str, k: int, norm: str = "nn.BatchNorm2d") -> str:
    return (
        f"{path}: no normalization follows it: a sum of {k} signs has a standard deviation of {math.sqrt(k):.3g}, so "
        f"that only {INSIDE[k]}% of its units lie in a window of [-1, 1]; put {norm} behind it"
    )


def odd(path: str, k: int, norm: str) -> str:
    return (
        f"{path}: no normalization follows it: a sum of {k} signs is an odd integer, never inside an open window like "
        f"nn.Hardtanh's, which then passes no gradient at all; put {norm} behind it"
    )


@pytest.mark.parametrize(
    ("layer", "k", "norm"),
    [
        (nn.Linear(6, 6, bias=False), 6, "nn.BatchNorm1d"),
        (nn.Linear(7, 7), 7, "nn.BatchNorm1d"),  # a bias moves odd sums into the window
        (nn.Conv1d(4, 4, 3, padding=1, bias=False), 12, "nn.BatchNorm1d"),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), 18, "nn.BatchNorm2d"),
        (nn.Conv3d(2, 2, (1, 3, 3), bias=False), 18, "nn.BatchNorm3d"),
    ],
    ids=["linear", "biased", "conv1d", "grouped", "conv3d"],
)
def test_no_norm(layer: nn.Module, k: int, norm: str) -> None:
    for behind in (nn.Hardtanh(), nn.ReLU(), nn.Dropout(), nn.Identity()):
        assert lint(chain(b=layer, act=behind, end=nn.Linear(6, 2)), "b") == [spread("b", k, norm)]
    assert lint(chain(b=layer), "b") == [spread("b", k, norm)]


@pytest.mark.parametrize(
    ("layer", "k", "norm"),
    [
        (nn.Linear(7, 7, bias=False), 7, "nn.BatchNorm1d"),
        (nn.Conv2d(3, 4, 3, bias=False), 27, "nn.BatchNorm2d"),
        (nn.Conv2d(6, 4, 3, groups=2, bias=False), 27, "nn.BatchNorm2d"),
    ],
    ids=["linear", "conv", "grouped"],
)
def test_odd_sums(layer: nn.Module, k: int, norm: str) -> None:
    assert lint(chain(b=layer, act=nn.Hardtanh(), end=nn.Linear(6, 2)), "b") == [odd("b", k, norm)]
    assert lint(chain(b=layer, pool=nn.AvgPool2d(2), act=nn.Hardtanh()), "b") == [spread("b", k, norm)]


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm([4, 8, 8])],
    ids=lambda norm: type(norm).__name__,
)
def test_every_normalization_will_do(norm: nn.Module) -> None:
    assert lint(chain(b=conv(), pool=nn.MaxPool2d(2), drop=nn.Dropout(), norm=norm, end=conv()), "b") == []


def test_other_code_that_multiplies() -> None:
    class Net(nn.Module):
        def __init__(self, rnn: bool) -> None:
            super().__init__()
            self.b, self.rnn, self.norm = nn.Linear(6, 6), nn.RNN(6, 6) if rnn else None, nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(x)
            y: Tensor = self.norm(x @ x.T if self.rnn is None else self.rnn(x)[0])
            return y

    assert lint(Net(False), "b") == lint(Net(True), "b") == [spread("b", 6, "nn.BatchNorm1d")]


def test_functional_norms() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.c = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
            self.mean, self.var = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            x = F.layer_norm(self.b(x), (6,))
            return F.batch_norm(self.c(x), self.mean, self.var)

    assert lint(Net(), "b", "c") == [
        "c: batch_norm takes its bias away again, whose gradient is rounding noise that an adaptive optimizer turns "
        "into steps; write bias=False"
    ]


def test_a_norm_on_a_parallel_branch_only() -> None:
    """What another layer takes signs of must be normalized; what else reads the sum is its own affair."""

    class Net(nn.Module):
        def __init__(self, signs: bool) -> None:
            super().__init__()
            self.b, self.bn, self.c, self.cn = conv(), nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4)
            self.signs = signs

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.b(x)
            y = self.bn(x)
            return {"y": self.cn(self.c(x if self.signs else y)), "sums": x, "normalized": y}

    assert lint(Net(True), "b", "c") == [spread("b", 36)]
    assert lint(Net(False), "b", "c") == []


def test_code_that_is_not_known_gives_nothing() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0)) / x.std(0)

    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.std() if x.sum() > 0 else x

    class Exits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = conv()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.b(x)
            return x, x / x.std()

    for norm in (Own(), Blind()):
        assert lint(chain(b=conv(), norm=norm, end=conv()), "b") == []
    assert lint(Exits(), "b") == []

    class Outside(nn.Module):
        """What becomes of the parts' results is decided by a forward that cannot be followed."""

        def __init__(self) -> None:
            super().__init__()
            self.alone, self.part = conv(groups=4, bias=True), chain(b=conv())

        def forward(self, x: Tensor) -> Tensor:
            x = self.part(self.alone(x))
            return x if x.sum() > 0 else x / x.std()

    assert lint(Outside(), "alone", "part.b") == []


# -- the other rules ---------------------------------------------------------------------------------------------
def bias_noise(path: str, norm: str) -> str:
    return (
        f"{path}: {norm} takes its bias away again, whose gradient is rounding noise that an adaptive optimizer turns "
        "into steps; write bias=False"
    )


def test_a_bias_before_a_batch_norm() -> None:
    assert lint(chain(b=conv(bias=True), bn=nn.BatchNorm2d(4), end=conv()), "b") == [bias_noise("b", "bn")]
    pooled = chain(b=conv(bias=True), pool=nn.MaxPool2d(2), bn=nn.BatchNorm2d(4), end=conv())
    assert lint(pooled, "b") == [bias_noise("b", "bn")]
    assert lint(pooled, "end")[0].startswith("end: no normalization")  # of a float layer nothing is said
    for middle in (nn.Hardtanh(), nn.Dropout(), nn.ZeroPad2d(1)):
        assert lint(chain(b=conv(bias=True), m=middle, bn=nn.BatchNorm2d(4), end=conv()), "b") == []
    assert lint(chain(b=conv(bias=True), gn=nn.GroupNorm(2, 4), end=conv()), "b") == []
    frozen = chain(b=conv(bias=True), bn=nn.BatchNorm2d(4), end=conv())
    frozen.b.bias.requires_grad_(False)
    assert lint(frozen, "b") == []


def test_a_bias_that_something_else_reads() -> None:
    class Net(nn.Module):
        def __init__(self, leaves: bool) -> None:
            super().__init__()
            self.b, self.bn, self.end = conv(bias=True), nn.BatchNorm2d(4), conv()
            self.leaves = leaves

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.b(x)
            y = self.bn(x)
            return self.end(y if self.leaves else y + x), x if self.leaves else y

    assert lint(Net(True), "b") == lint(Net(False), "b") == []


def dropped(path: str, layer: str) -> str:
    return (
        f"{path}: values dropped on the way into {layer} become sign(0) = +1, a constant, not an absence; place it "
        "before the batch norm, or remove it"
    )


@pytest.mark.parametrize("drop", [nn.Dropout(0.2), nn.Dropout2d(0.2)], ids=["dropout", "dropout2d"])
def test_dropout_behind_the_norm(drop: nn.Module) -> None:
    assert lint(between(drop), "b") == [dropped("m0", "b")]
    assert lint(between(nn.Hardtanh(), drop), "b") == [dropped("m1", "b")]
    assert lint(between(drop, nn.Hardtanh(), nn.Identity()), "b") == [dropped("m0", "b")]
    assert lint(between(drop, nn.BatchNorm2d(4)), "b") == []
    assert lint(between(nn.Dropout(0.0)), "b") == []


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (lambda x: F.dropout(x, 0.2), "dropout"),
        (F.dropout, "dropout"),
        (lambda x: torch.dropout(x, 0.2, True), "dropout"),
        (lambda x: F.dropout2d(x, p=0.2), "dropout2d"),
        (lambda x: F.dropout(x, p=0.0), None),
        (lambda x: x + F.dropout(x, 0.2), None),
        (lambda x: F.max_pool2d(F.hardtanh(x), 2), "max_pool2d"),
        (lambda x: torch.max_pool2d(x, 2), "max_pool2d"),
        (lambda x: F.adaptive_max_pool2d(x, 4), "adaptive_max_pool2d"),
        (lambda x: F.avg_pool2d(x, 2), None),
    ],
    ids=["given", "plain", "torch", "named", "none", "sum", "pool", "torch_pool", "adaptive", "average"],
)
def test_functional_dropout_and_pools(body: Callable[[Tensor], Tensor], name: str | None) -> None:
    expected = [] if name is None else [skewed(name, "b") if "pool" in name else dropped(name, "b")]
    assert lint(Functional(body), "b") == expected


def test_depthwise() -> None:
    net = chain(b=conv(groups=4), bn=nn.BatchNorm2d(4), c=conv(groups=2), cn=nn.BatchNorm2d(4), d=nn.Conv2d(4, 1, 1))
    assert lint(net, "b", "c") == [
        "b: a depthwise binary convolution, of 9 signs a sum, which loses most by binarization; leave it float (the "
        "default, or skip=['b'])"
    ]
    one = chain(b=nn.Conv2d(1, 4, 3, bias=False), bn=nn.BatchNorm2d(4), end=conv())
    assert lint(one, "b") == []


def skewed(path: str, layer: str) -> str:
    return (
        f"{path}: maxima of normalized values skew the signs at the input of {layer} to +1; pool the sums, before the "
        "batch norm"
    )


def test_max_pool_behind_the_norm() -> None:
    for middle in ((nn.MaxPool2d(2),), (nn.MaxPool2d(2), nn.Hardtanh()), (nn.AdaptiveMaxPool2d(2), nn.Identity())):
        assert lint(between(*middle), "b") == [skewed("m0", "b")]
    assert lint(between(nn.Hardtanh(), nn.MaxPool2d(2)), "b") == [skewed("m1", "b")]
    assert lint(between(nn.MaxPool2d(2), nn.BatchNorm2d(4)), "b") == []
    bare = chain(a=conv(3), pool=nn.MaxPool2d(2), b=conv(), bn=nn.BatchNorm2d(4), end=conv())
    assert lint(bare, "b") == []  # there is no norm to place it before
    stem = BiRealNet(middle=nn.MaxPool2d(2))
    assert lint(stem, *stem.binary()) == [skewed("middle", "blocks.0.conv")]


# -- whole networks ----------------------------------------------------------------------------------------------
class Wrong(nn.Module):
    """Every rule once."""

    def __init__(self) -> None:
        super().__init__()
        self.features = chain(
            a=conv(3), n0=nn.BatchNorm2d(4), act=nn.ReLU(), drop=nn.Dropout(),
            b=conv(groups=4, bias=True), n1=nn.BatchNorm2d(4), pool=nn.MaxPool2d(2), flat=nn.Flatten(),
        )  # fmt: skip
        self.c, self.d, self.end = nn.Linear(64, 9), nn.Linear(9, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.end(F.hardtanh(self.d(torch.relu(self.c(self.features(x))))))
        return y


WRONG = [
    "features.act: never negative, so that every sign taken of its values by {}features.b is +1",
    "features.drop: values dropped",
    "features.b: a depthwise binary convolution, of 9",
    "features.b: {}features.n1 takes its bias away",
    "features.pool: maxima",
    "c: no normalization follows it: a sum of 64",
    "relu: never negative, so that every sign taken of its values by {}d is +1",
    "d: no normalization follows it: a sum of 9 signs is an odd",
]


class WithForward(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Wrong()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class WithStep(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Wrong()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


@pytest.mark.parametrize(
    ("net", "prefix"),
    [(Wrong(), ""), (nn.Sequential(Wrong()), "0."), (WithForward(), "net."), (WithStep(), "net.")],
    ids=["module", "sequential", "forward", "step"],
)
def test_findings_come_in_the_order_of_execution(net: nn.Module, prefix: str) -> None:
    paths = [path for path, module in net.named_modules() if isinstance(module, LAYERS)]
    found = lint(net, *paths[1:-1])
    assert len(found) == len(WRONG)
    for line, start in zip(found, WRONG, strict=True):
        assert line.startswith(prefix + start.format(prefix)), line


def test_a_result_that_goes_into_a_loss() -> None:
    class Step(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Linear(8, 8)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.nll_loss(F.log_softmax(self.b(F.relu(batch[0])), 1), batch[1])

    found = lint(Step(), "b")
    assert [line.split(",")[0] for line in found] == ["relu: never negative", spread("b", 8).split(",")[0]]


def test_every_network_of_the_zoo_can_be_read() -> None:
    """Whatever stands in it: each finding names a module or a call of the network, and none twice."""
    for name in ZOO:
        net, _ = build(name)
        flow = follow(net)
        layers = {path for path, module in net.named_modules() if isinstance(module, LAYERS)}
        found = binary_findings(net, flow, layers)
        assert len(set(found)) == len(found), name
        names = [call.name for call in flow.calls]
        assert {finding.path for finding in found} <= set(names), name
        places = [names.index(finding.path) for finding in found if names.count(finding.path) == 1]
        assert places == sorted(places), name
