"""Networks converted to WAGEUBN, steps by hand, and a straight-line twin of a whole training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from schemes.jacinto_nets import Wired, images
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from lightning_lowbit import Wageubn, lowbit_step
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.error_gate import ErrorQuantizer
from lightning_lowbit.modules.fixed_norm import NormGrids
from lightning_lowbit.modules.stored import StoredWeight
from lightning_lowbit.modules.widths import WidthQuantizer
from lightning_lowbit.plugins.precision import rule_of
from lightning_lowbit.schemes import convert
from lightning_lowbit.schemes.wageubn_training import ClosedRule

__all__ = [
    "Twin", "Wired", "chain", "constant", "converted", "direct", "draws", "errors", "finite", "images", "labels",
    "leave", "norms", "on_grid", "reach", "residual", "rule", "scale", "sgd", "state", "step", "train", "weights",
    "widths",
]  # fmt: skip


def residual(seed: int = 0) -> Any:
    """conv-bn-relu-conv-bn-add-relu-conv-pool, for images [n, 3, 8, 8]; norms with parameters of their own."""
    torch.manual_seed(seed)

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.relu1(net.bn1(net.conv1(x)))
        x = net.relu2(net.bn2(net.conv2(x)) + x)
        y: Tensor = net.pool(net.conv3(x))
        return y

    net = Wired(
        forward, conv1=nn.Conv2d(3, 6, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(6), relu1=nn.ReLU(),
        conv2=nn.Conv2d(6, 6, 3, padding=1), bn2=nn.BatchNorm2d(6), relu2=nn.ReLU(), conv3=nn.Conv2d(6, 4, 3),
        pool=nn.AvgPool2d(2),
    )  # fmt: skip
    for norm in (net.bn1, net.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    return net


def chain(classes: int = 4, width: int = 8) -> Any:
    """Three convolutions with norms and rectifiers, a mean, a classifier: for images [n, 3, 8, 8]."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, classes),
    )  # fmt: skip


def labels(samples: int = 8, classes: int = 4) -> Tensor:
    return torch.arange(samples) % classes


def converted(net: Any, x: Tensor | None = None, skip: Sequence[str] = (), **options: Any) -> Any:
    """All layers in low bits unless told otherwise, formats from ``x``; in training mode."""
    convert(net, Wageubn(**{"first_last": "int8", **options}), images() if x is None else x, skip=skip)
    return net.train()


def rule(net: nn.Module) -> ClosedRule:
    found = rule_of(net)
    assert isinstance(found, ClosedRule)
    return found


def weights(net: nn.Module) -> dict[str, StoredWeight]:
    return {path: q for path, q in quantizers(net) if isinstance(q, StoredWeight)}


def widths(net: nn.Module) -> dict[str, WidthQuantizer]:
    return {path: q for path, q in quantizers(net) if isinstance(q, WidthQuantizer)}


def norms(net: nn.Module) -> dict[str, NormGrids]:
    return {path.rsplit(".", 1)[0]: q for path, q in quantizers(net) if isinstance(q, NormGrids)}


def errors(net: nn.Module) -> dict[str, ErrorQuantizer]:
    return {path: q for path, q in quantizers(net) if isinstance(q, ErrorQuantizer)}


def reach(net: nn.Module, *milestones: str, reached: bool = True) -> None:
    """What a schedule does at a milestone."""
    for what in milestones:
        for _, module in low_bit_modules(net):
            module.milestone(what, reached)
        rule(net).milestone(what, reached, 0)


def leave(net: nn.Module, *milestones: str) -> None:
    reach(net, *milestones, reached=False)


def sgd(net: nn.Module, lr: float = 0.05, momentum: float = 0.25, weight_decay: float = 0.0) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr, momentum, weight_decay=weight_decay)


def step(
    net: Any, optimizer: Any, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None, context: Any = None
) -> Tensor:
    """One step of cross entropy, or of another loss of the result; returns its value."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        y = net(x)
        value = F.cross_entropy(y, labels(len(y), y.shape[1])) if loss is None else loss(y)
        value.backward()
        return value.detach()

    value: Tensor = lowbit_step(net, optimizer, closure, context)
    return value


def train(net: Any, steps: int = 3, lr: float = 0.25, first: int = 0) -> Any:
    optimizer = sgd(net, lr)
    net.train()
    for number in range(first, first + steps):
        step(net, optimizer, images(seed=100 + number))
    return net


def state(net: nn.Module) -> dict[str, Tensor]:
    """All that a checkpoint of the network and its rule holds."""
    held = rule(net)
    found = {key: value.clone() for key, value in net.state_dict().items()}
    found |= {f"master {name}": codes.clone() for name, codes in held.masters.items()}
    return found | {f"acc {name}": codes.clone() for name, codes in held.accumulators.items()}


def finite(net: nn.Module) -> bool:
    """Whether every parameter and buffer is."""
    return all(bool(torch.isfinite(t).all()) for t in (*net.parameters(), *net.buffers()))


def on_grid(x: Tensor, fraction: int, most: float = float("inf"), least: float | None = None) -> bool:
    """Whether all codes x 2^fraction are whole, from ``least`` (-most) to ``most``."""
    codes = x.detach().double() * 2.0**fraction
    low = -most if least is None else least
    return bool(torch.equal(codes, codes.round()) and codes.min() >= low and codes.max() <= most)


def draws(name: str, purpose: str, samples: int, values: int) -> Tensor:
    """Uniform numbers of a parameter, for both sides of a comparison."""
    return torch.rand(samples * values, generator=torch.Generator().manual_seed(sum(map(ord, name))))


# -- the formulas, on float64 numbers -------------------------------------------------------------------------
def direct(x: Tensor, bits: int) -> Tensor:
    """Q(x, k) = round(x 2^(k-1)) / 2^(k-1)."""
    return torch.round(x * 2.0 ** (bits - 1)) * 2.0 ** (1 - bits)


def scale(x: Tensor) -> Tensor:
    """R(x) = 2^round(log2 max|x|); 1 of zeros."""
    largest = x.abs().max()
    return 2.0 ** torch.round(torch.log2(largest)) if largest > 0 else torch.ones_like(largest)


def shift(x: Tensor, bits: int = 8) -> Tensor:
    d = 2.0 ** (1 - bits)
    return scale(x) * direct(x / scale(x), bits).clamp(-1 + d, 1 - d)


def flag(x: Tensor, bits: int = 8) -> Tensor:
    sc = scale(x) * 2.0 ** (1 - bits)
    v, most = x / sc, 2 ** (bits - 1) - 1
    return sc * torch.where(v.abs() >= 1, torch.round(v).clamp(-most, most), direct(v, bits))


def constant(x: Tensor, u: Tensor, dr: int = 128) -> Tensor:
    n = dr * x / scale(x)
    rounded = n.sign() * (n.abs().floor() + (n.abs() - n.abs().floor() > u))
    return rounded.clamp(1 - dr, dr - 1) * 2.0**-14


class Twin:
    """The residual network's training step written out, from the numbers that a converted one starts with.

    Every tensor is kept under a name in ``seen``: forward, errors that arrive at a module's result (``d ...``),
    gradients (``grad ...``), parameters and statistics behind the update.
    """

    bits = 8  # of weights and activations

    def __init__(self, net: Any) -> None:
        self.p = {name: value.detach().double() for name, value in net.named_parameters()}
        self.acc = {name: torch.zeros_like(value) for name, value in self.p.items()}
        self.running = {n: b.double() for n, b in net.named_buffers() if n.split(".")[-1].startswith("running")}
        self.power = {path.split(".")[0]: q.power for path, q in weights(net).items()}
        self.widths = {path.split(".")[0]: q for path, q in widths(net).items()}
        self.seen: dict[str, Tensor] = {}

    def activation(self, name: str, x: Tensor) -> Tensor:
        """clip(round(x 2^f)): 8 bits in all, of which the quantizer found i before the point."""
        q = self.widths[name]
        most = 127 if q.signed else 255
        f = (7 if q.signed else 8) - q.integer
        self.seen[name] = y = torch.round(x * 2.0**f).clamp(-127 if q.signed else 0, most) * 2.0**-f
        return y

    def weight(self, layer: str) -> Tensor:
        unit = 2.0 ** (self.power[layer] - 7)
        return torch.round(self.p[f"{layer}.weight"] / unit).clamp(-127, 127) * unit

    def layer(self, name: str, x: Tensor, padding: int) -> Tensor:
        bias = self.p.get(f"{name}.bias")
        y = F.conv2d(x, self.weight(name), None if bias is None else direct(bias, 16), padding=padding)
        self.seen[name] = y
        return y

    def layer_back(self, name: str, x: Tensor, error: Tensor, padding: int) -> Tensor:
        """E2, then both products with its result."""
        self.seen[f"d {name}"] = error
        error = flag(error)
        weight = self.weight(name)
        self.grad(f"{name}.weight", conv2d_weight(x, weight.shape, error, padding=padding))
        if f"{name}.bias" in self.p:
            self.grad(f"{name}.bias", error.sum((0, 2, 3)))
        back: Tensor = conv2d_input(x.shape, weight, error, padding=padding).float().double()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return back

    def grad(self, name: str, value: Tensor) -> None:
        self.seen[f"grad {name}"] = value.float().double()  # autograd's tensors are float32

    def norm(self, name: str, layer: str, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """mu, s, xhat on their grids, in units of the layer's range; statistics move by a tenth."""
        unit = 2.0 ** self.power[layer]
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        for which, value, of in (("mean", mean, unit), ("var", var, unit**2)):
            key = f"{name}.running_{which}"
            self.running[key] = direct((0.9 * self.running[key] + 0.1 * value) / of, 16).mul(of).float().double()
        x, mean, deviation = x / unit, mean / unit, var.sqrt() / unit
        mu, s = direct(mean, 16), direct(deviation, 16) + 2.0**-15
        wide = lambda t: t.reshape(1, -1, 1, 1)  # noqa: E731
        xhat = direct((x - wide(mu)) / wide(s), 16)
        gamma = direct(self.p[f"{name}.weight"], 8)
        self.seen[name] = y = wide(gamma) * xhat + wide(direct(self.p[f"{name}.bias"], 8))
        return y, {"x": x, "mu": mu, "mean": mean, "deviation": deviation, "s": s, "xhat": xhat, "unit": unit}

    def norm_back(self, name: str, error: Tensor, kept: dict[str, Any]) -> Tensor:
        """By torch's own differentiation, all quantizers straight through."""
        self.seen[f"d {name}"] = error
        self.grad(f"{name}.weight", (error * kept["xhat"]).sum((0, 2, 3)))
        self.grad(f"{name}.bias", error.sum((0, 2, 3)))
        x = kept["x"].clone().requires_grad_()
        mean, deviation = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False).sqrt()
        mu, s = mean + (kept["mu"] - mean).detach(), deviation + (kept["s"] - deviation).detach()
        wide = lambda t: t.reshape(1, -1, 1, 1)  # noqa: E731
        y = wide(direct(self.p[f"{name}.weight"], 8)) * (x - wide(mu)) / wide(s)
        (back,) = torch.autograd.grad(y, x, error)
        return (back / kept["unit"]).float().double()

    def rectifier_back(self, name: str, of: Tensor, error: Tensor) -> Tensor:
        self.seen[f"d {name}"] = error
        return shift(error) * (of > 0)

    def run(self, x: Tensor, error: Tensor) -> None:
        """Forward, and backward from the error of the result."""
        x = self.activation("conv1", x.double())
        n1, kept1 = self.norm("bn1", "conv1", self.layer("conv1", x, 1))
        a1 = self.activation("relu1", n1.clamp(min=0))
        n2, kept2 = self.norm("bn2", "conv2", self.layer("conv2", a1, 1))
        total = (n2 + a1).float().double()
        a2 = self.activation("relu2", total.clamp(min=0))
        self.activation("pool", F.avg_pool2d(self.layer("conv3", a2, 0), 2))
        error = error.double().repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
        error = self.rectifier_back("relu2", total, self.layer_back("conv3", a2, error, 0))
        inner = self.layer_back("conv2", a1, self.norm_back("bn2", error, kept2), 1)
        error = self.rectifier_back("relu1", n1, (inner + error).float().double())
        self.layer_back("conv1", x, self.norm_back("bn1", error, kept1), 1)

    def update(self, lr: float, momentum: float, decay: float) -> None:
        """g, then full = mom acc + g, w - lr full and Q(full, 13): all exact but the last."""
        lr, momentum = (float(direct(torch.tensor(v, dtype=torch.float64), k)) for v, k in ((lr, 10), (momentum, 3)))
        for name, w in self.p.items():
            gradient, power = self.seen[f"grad {name}"], 0
            if name.startswith("conv") and name.endswith("weight"):
                power = self.power[name.split(".")[0]]
                gradient = (gradient.float() + decay * w.float()).double() if decay else gradient
                u = draws(name, "gradient", 1, w.numel()).reshape(w.shape)
                g = constant(gradient, u)
            else:
                g = direct(gradient, 15)
            full = momentum * self.acc[name] + g
            w = direct(w * 2.0**-power, 24) - lr * full
            if name.startswith("conv") and name.endswith("weight"):
                w = w.clamp(-127 / 128, 127 / 128)
            self.p[name] = w * 2.0**power
            self.acc[name] = direct(full, 13)
            self.seen |= {name: self.p[name], f"acc {name}": self.acc[name]}
        self.seen |= self.running
