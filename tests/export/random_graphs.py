"""Random small networks of every form that a program may take: each draws its layers and how they are joined.

    net, shape = random_net(random.Random(7), "tqt")  # a float network in evaluation, one sample's shape
    convert(net, SCHEMES["tqt"], net.example)

``random_nets`` is the same for hypothesis.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lowbit import Bnn, F8Net, IntegerProgram, Jacinto, Niti, Tqt, Wageubn, convert, lower
from lightning_lowbit.export.verify import Certificate, verify
from lightning_lowbit.modules.base import Scheme

__all__ = ["EMITTED", "SCHEMES", "random_batch", "random_net", "random_nets", "verified"]

ISLANDS: tuple[Callable[[Tensor], Tensor], ...] = (torch.sigmoid, F.silu, F.leaky_relu, F.hardswish, torch.tanh)
# Options with which evaluation is integers from end to end.
SCHEMES: dict[str, Scheme] = {
    "tqt": Tqt(), "niti": Niti(), "bnn": Bnn(first="int8", last="int8"), "f8net": F8Net(), "jacinto": Jacinto(),
    "wageubn": Wageubn(io="strict", first_last="int8"),
}  # fmt: skip
_ALL = frozenset({
    "quantize", "conv", "conv_transpose", "linear", "requantize", "add", "concat", "max_pool", "sum_pool", "sum",
    "divide", "pad", "slice", "reshape", "transpose", "gather", "argmax", "dequantize",
})  # fmt: skip
# Kinds of operations that a scheme's programs consist of, islands aside.
EMITTED = dict.fromkeys(SCHEMES, _ALL) | {
    "niti": _ALL - {"conv_transpose"}, "bnn": _ALL - {"conv_transpose", "divide"} | {"threshold", "normalize"},
    "wageubn": _ALL | {"normalize"},
}  # fmt: skip
# Behind a binary layer most of a network is float: what integers allow stands directly behind the first, 8-bit layer.
EARLY = frozenset({"bnn"})


class RandomNet(nn.Module):
    """Steps, each of the values at some places; the input is value 0.

    Args:
        steps: modules and functions.
        sources: of each, the places of its operands.
        outputs: places of the values that it returns.
        form: "tensor", "tuple", "list" or "dict".

    Attributes:
        example: a batch with which no tensor is all zeros, to calibrate with.
    """

    example: Tensor

    def __init__(
        self, steps: Sequence[Callable[..., Any]], sources: Sequence[tuple[int, ...]], outputs: Sequence[int], form: str
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): step for i, step in enumerate(steps) if isinstance(step, nn.Module)})
        self.functions = [None if isinstance(step, nn.Module) else step for step in steps]
        self.sources, self.outputs, self.form = list(sources), list(outputs), form

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for place, (function, sources) in enumerate(zip(self.functions, self.sources, strict=True)):
            step = self.layers[str(place)] if function is None else function  # which conversion may have replaced
            values.append(step(*[values[source] for source in sources]))
        found = [values[place] for place in self.outputs]
        if self.form == "tensor":
            return found[0]
        return {f"y{i}": y for i, y in enumerate(found)} if self.form == "dict" else type_of(self.form)(found)


def type_of(form: str) -> Callable[[Sequence[Tensor]], Any]:
    return tuple if form == "tuple" else list


def random_nets(
    scheme: str | None = None, islands: bool = False
) -> st.SearchStrategy[tuple[RandomNet, tuple[int, ...]]]:
    """What ``random_net`` returns, for hypothesis; fewer blocks are simpler."""
    return st.builds(
        lambda seed, blocks: random_net(random.Random(seed), scheme, islands=islands, blocks=blocks),
        st.integers(0, 2**32 - 1),
        st.integers(0, 5),
    )


def random_net(
    chance: random.Random, scheme: str | None = None, *, islands: bool = False, blocks: int | None = None
) -> tuple[RandomNet, tuple[int, ...]]:
    """A float network in evaluation, with statistics in its batch norms, and the shape of one sample.

    Args:
        chance: draws everything, weights too: the same one gives the same network.
        scheme: for which it is meant.
        islands: float functions stand between some layers.
        blocks: how many, between the input and the end; default none to five.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(chance.getrandbits(32))
        drawn = _Drawn(chance, scheme in EARLY and chance.random() < 0.5, islands)
        net = drawn.net(chance.randint(0, 5) if blocks is None else blocks)
    net.example = drawn.values[0]
    return net.eval(), drawn.shape


def random_batch(shape: Sequence[int], batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def verified(
    scheme: str, number: int, *, islands: bool = False, blocks: int | None = None
) -> tuple[IntegerProgram, Certificate]:
    """The program of random network ``number``, and what comparing the two found on three samples in two batches."""
    net, shape = random_net(random.Random(number), scheme, islands=islands, blocks=blocks)
    convert(net, SCHEMES[scheme], net.example)
    program = lower(net, random_batch(shape, 1))
    return program, verify(net, program, [random_batch(shape, 2, number + 1) * 2, random_batch(shape, 1, number + 2)])


class _Drawn:
    """Draws a network step by step; every step runs at once, so that the next one knows its shape."""

    def __init__(self, chance: random.Random, early: bool, islands: bool) -> None:
        self.chance, self.early, self.islands = chance, early, islands
        self.rank = chance.choice((1, 2, 2, 2, 2, 3))
        self.shape = (chance.randint(2, 4), *(chance.randint(4, 7) for _ in range(self.rank)))
        self.values = [torch.randn(4, *self.shape)]
        self.steps: list[Callable[..., Any]] = []
        self.sources: list[tuple[int, ...]] = []
        self.here = 0

    # -- writing -----------------------------------------------------------------------------------------------
    def step(self, step: Callable[..., Any], *sources: int) -> int:
        """One more value, by a module or a function, of ``sources`` or of the last one; its place.

        A step that leaves nothing but zeros is left out.
        """
        given = sources or (self.here,)
        if isinstance(step, nn.Module):
            step.eval()
        result = step(*[self.values[place] for place in given])
        if result.is_floating_point() and not result.any():  # zeros have no range to calibrate
            self.here = given[0]
            return self.here
        self.values.append(result)
        self.steps.append(step)
        self.sources.append(given)
        self.here = len(self.values) - 1
        return self.here

    def rectify(self, step: nn.Module) -> None:
        """A rectifier, where it leaves enough alive."""
        if (self.x > 0).float().mean() > 0.25:
            self.step(step)

    @property
    def x(self) -> Tensor:
        return self.values[self.here]

    def of(self, name: str) -> Any:
        """The class of torch.nn for this many axes."""
        return getattr(nn, f"{name}{self.rank}d")

    def maybe(self, share: float) -> bool:
        return self.chance.random() < share

    # -- the network -------------------------------------------------------------------------------------------
    def net(self, blocks: int) -> RandomNet:
        if self.early:
            self.first()
        elif self.maybe(0.1):
            self.transposed()
        else:
            self.convolution()
        for _ in range(blocks):
            self.chance.choice(_BLOCKS)(self)
        feature = self.here
        outputs = [self.end(feature)]
        if self.maybe(0.15):
            outputs.append(self.end(feature))
        if self.maybe(0.15):
            outputs.append(feature)
        if self.maybe(0.25):
            dim = self.chance.choice((1, -1))
            outputs[0] = self.step(lambda t: t.argmax(dim), outputs[0])
        form = self.chance.choice(("tuple", "list", "dict")) if len(outputs) > 1 else "tensor"
        return RandomNet(self.steps, self.sources, outputs, form)

    def first(self) -> None:
        """A layer without a batch norm, and what reads its integers."""
        channels, out = self.x.shape[1], self.chance.randint(2, 5)
        layer = self.of("Conv")(channels, out, 2)
        layer.bias.abs_()
        self.step(layer)
        self.rectify(nn.ReLU())
        self.chance.choice((_Drawn.averages, _Drawn.averaged_places, _Drawn.doubled))(self)

    def end(self, feature: int) -> int:
        """From an image to scores."""
        self.here = feature
        self.chance.choice(_ENDS)(self)
        return self.here

    def linear(self) -> None:
        if self.maybe(0.4):
            hidden = nn.Linear(self.x.shape[-1], self.chance.randint(4, 8))
            hidden.bias.uniform_(0, 1)
            self.step(hidden)
            self.rectify(nn.ReLU())
        self.step(nn.Linear(self.x.shape[-1], self.chance.randint(2, 5), bias=self.maybe(0.7)))

    def flat(self) -> None:
        self.step(lambda t: t.flatten(1))
        self.linear()

    def averaged(self) -> None:
        axes = list(range(2, 2 + self.rank))
        if self.maybe(0.6):
            self.step(lambda t: t.mean(axes))
        else:
            self.step(self.of("AdaptiveAvgPool")(1))
            self.step(lambda t: torch.flatten(t, 1))
        self.linear()

    def by_place(self) -> None:
        """A linear layer at every place, channels last."""
        order = (0, *range(2, 2 + self.rank), 1)
        self.step(lambda t: t.permute(order))
        self.linear()

    def wide(self) -> None:
        """A layer of so many products that float32 does not hold their sum."""
        self.rectify(nn.ReLU())
        self.step(lambda t: t.flatten(1))
        self.step(lambda t: t.repeat(1, -(-9000 // t.shape[1])))
        layer = nn.Linear(self.x.shape[-1], 3)
        layer.weight.uniform_(0.5, 1.0)
        self.step(layer)

    # -- blocks ------------------------------------------------------------------------------------------------
    def convolution(self, out: int | None = None, keep: bool = False) -> None:
        """A convolution, mostly with a batch norm and a rectifier behind it.

        Args:
            out: how many channels come out.
            keep: the other sizes stay as they are.
        """
        channels, space = self.x.shape[1], min(self.x.shape[2:])
        kernel = self.chance.choice((1, 3)) if keep else self.chance.randint(1, min(3, space))
        dilation = 2 if kernel > 1 and (keep or space >= 2 * kernel - 1) and self.maybe(0.2) else 1
        groups, out = self._groups(channels, out)
        if keep:
            padding: Any = self.chance.choice(("same", dilation * (kernel - 1) // 2))
        else:
            padding = self.chance.choice(("valid", 0, 1, kernel // 2))
        stride = 1 if keep else self.chance.choice((1, 1, 2))
        bias = self.maybe(0.5)
        mode = self.chance.choice(("zeros",) * 5 + (("reflect",) if space > 2 and self.rank < 3 else ("zeros",)))
        self.step(self.of("Conv")(channels, out, kernel, stride, padding, dilation, groups, bias, padding_mode=mode))
        self._normed()

    def _groups(self, channels: int, out: int | None) -> tuple[int, int]:
        which = self.chance.choice(("none", "none", "depthwise", "two"))
        if which == "depthwise" and (out is None or out % channels == 0):
            return channels, out or channels * self.chance.choice((1, 1, 2))
        if which == "two" and channels % 2 == 0 and (out is None or out % 2 == 0):
            return 2, out or self.chance.choice((2, 4, 6))
        return 1, out or self.chance.randint(2, 6)

    def _normed(self) -> None:
        """A batch norm that has seen data, or none, and perhaps a rectifier."""
        bias = getattr(self.steps[-1], "bias", None)  # of a convolution, unless that was left out
        if bias is None or self.maybe(0.6):
            norm = self.of("BatchNorm")(self.x.shape[1])
            norm.running_mean.normal_(0, 0.5)
            norm.running_var.uniform_(0.2, 3)
            norm.weight.uniform_(0.5, 1.5)
            norm.weight[0] *= self.chance.choice((1, -1))
            norm.bias.uniform_(-0.2, 0.8)
            norm.num_batches_tracked += 10
            self.step(norm)
        else:
            bias.abs_()  # mostly alive behind a rectifier
        self._rectified()

    def _rectified(self) -> None:
        if self.islands and self.maybe(0.4):
            function = self.chance.choice(ISLANDS)
            self.step(function)
        elif self.maybe(0.75):
            self.rectify(self.chance.choice((nn.ReLU, nn.ReLU, nn.ReLU6))())

    def transposed(self) -> None:
        channels, out = self.x.shape[1], self.chance.randint(2, 5)
        stride, kernel = self.chance.choice(((1, 2), (2, 2), (2, 3)))
        groups = 2 if channels % 2 == 0 and out % 2 == 0 and self.maybe(0.3) else 1
        padding = self.chance.choice((0, kernel // 2)) if min(self.x.shape[2:]) > 2 else 0
        more = self.chance.randint(0, stride - 1)
        settings = {"groups": groups, "bias": self.maybe(0.5)}
        self.step(self.of("ConvTranspose")(channels, out, kernel, stride, padding, more, **settings))
        self._normed()

    def residual(self) -> None:
        start = self.here
        self.convolution(out=self.x.shape[1], keep=True)
        self.step(lambda a, b: a + b, self.here, start)
        self._rectified()

    def doubled(self) -> None:
        """A tensor and itself turned around."""
        start = self.here
        self.step(lambda t: t.flip(2))
        self.step(lambda a, b: a + b, start, self.here)

    def averaged_places(self) -> None:
        """Means along one axis."""
        self.step(lambda t: t.mean(2, keepdim=True))

    def joined(self) -> None:
        """Branches side by side; one may be the input itself."""
        start, branches = self.here, []
        for number in range(self.chance.randint(2, 3)):
            self.here = start
            if number == 0 or self.maybe(0.7):
                self.convolution(keep=True)
            branches.append(self.here)
        if self.chance.random() < 0.2 and self.values[branches[0]].shape == self.values[branches[1]].shape:
            self.step(lambda *t: torch.stack(t, 2).flatten(1, 2), *branches[:2])
        else:
            self.step(lambda *t: torch.cat(t, 1), *branches)

    def largest(self) -> None:
        kernel, settings = self._window()
        self.step(self.of("MaxPool")(kernel, **settings))

    def averages(self) -> None:
        kernel, settings = self._window()
        settings["ceil_mode"] &= not settings["padding"]  # torch divides 0 by 0 where a window lies behind the border
        self.step(self.of("AvgPool")(kernel, **settings, count_include_pad=self.maybe(0.5)))

    def _window(self) -> tuple[int, dict[str, Any]]:
        kernel = self.chance.randint(2, 3) if min(self.x.shape[2:]) >= 3 else 1
        padding = self.chance.choice((0, kernel // 2))
        return kernel, {"stride": self.chance.randint(1, 2), "padding": padding, "ceil_mode": self.maybe(0.4)}

    def adaptive(self) -> None:
        """Windows that are regular, or overlap."""
        sizes = [self.chance.choice((1, size, (size + 1) // 2, max(size - 1, 1))) for size in self.x.shape[2:]]
        self.step(self.of(self.chance.choice(("AdaptiveAvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")))(sizes))

    def padded(self) -> None:
        border = [self.chance.randint(0, 1) for _ in range(2 * self.rank)]
        if any(border):
            self.step(lambda t: F.pad(t, border))

    def cut(self) -> None:
        """Every other place of an axis, without the first ones, or some channels."""
        if self.maybe(0.4) and self.x.shape[1] > 2:
            self.step(lambda t: t.chunk(2, 1)[0])
        elif self.x.shape[2] > 2:
            step = self.chance.randint(1, 2)
            self.step(lambda t: t[:, :, 1::step])

    def turned(self) -> None:
        """Axes swapped, flipped, rolled, doubled, or channels mixed."""
        half, space = self.x.shape[1] // 2, self.x.shape[2:]
        functions: list[tuple[str, Callable[[Tensor], Tensor]]] = [
            ("flip", lambda t: t.flip(2)),
            ("roll", lambda t: torch.roll(t, 1, 2)),
            ("swap", lambda t: t.transpose(2, t.dim() - 1)),
            ("halves", lambda t: t.reshape(-1, 2, half, *space).transpose(1, 2).flatten(1, 2)),
            ("shuffle", lambda t: F.pixel_shuffle(t, 2)),
            ("nearest", lambda t: F.interpolate(t, scale_factor=2, mode="nearest")),
        ]
        fits = {
            "swap": self.rank > 1, "halves": self.x.shape[1] % 2 == 0,
            "shuffle": self.rank == 2 and self.x.shape[1] % 4 == 0, "nearest": max(self.x.shape[2:]) < 8,
        }  # fmt: skip
        self.step(self.chance.choice([function for name, function in functions if fits.get(name, True)]))


_BLOCKS: tuple[Callable[[_Drawn], None], ...] = (
    _Drawn.convolution, _Drawn.transposed, _Drawn.residual, _Drawn.residual, _Drawn.joined, _Drawn.largest,
    _Drawn.averages, _Drawn.adaptive, _Drawn.padded, _Drawn.cut, _Drawn.turned, _Drawn.turned, _Drawn.doubled,
    _Drawn.averaged_places,
)  # fmt: skip
_ENDS: tuple[Callable[[_Drawn], None], ...] = (
    _Drawn.flat, _Drawn.flat, _Drawn.averaged, _Drawn.averaged, _Drawn.averaged, _Drawn.by_place, _Drawn.wide,
)  # fmt: skip
