"""Jacinto's golden vectors of a small residual network: the converted network, step by step, in float32."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from schemes.jacinto_vectors_twin import Twin
from schemes.vector_table import Comparison
from torch import Tensor, nn

from lightning_lowbit.modules.base import low_bit_modules, switch_of
from lightning_lowbit.modules.clipped import ClipQuantizer
from lightning_lowbit.modules.convert import convert_module, quantizers
from lightning_lowbit.schemes.jacinto import Jacinto

__all__ = ["QUANTIZERS", "Model", "Net", "check_clean", "check_steps", "converted", "in_norm"]

SINGLE = 1e-6
GRADIENT = 2e-6
QUANTIZERS = {
    "conv1.activation_in": "conv1.lowbit_input",
    "relu1": "relu1.lowbit_output",
    "bn2.activation_q": "bn2.lowbit_output",
    "relu2": "relu2.lowbit_output",
    "fc.activation_q": "fc.lowbit_output",
}
NORMS = ("bn1", "bn2")


class Net(nn.Module):
    """Two convolutions with batch norm, the first one's result added to the second's; global mean, classifier."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(skip)) + skip)
        y: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return y


def converted(net: nn.Module, scheme: Jacinto, dtype: torch.dtype = torch.float32) -> nn.Module:
    """``net`` in low bits and training, its ranges where they start; no calibration."""
    convert_module(net, scheme)
    switch = switch_of(net.to(dtype).train())
    switch.started = switch.managed = True
    for _, quantizer in quantizers(net):
        quantizer.set_ready()
    return net


class Model:
    """The converted network of a file.

    Attributes:
        quantizers: of activations, by the names that they have in the file.
        results: what they gave last.
    """

    def __init__(self, v: Comparison, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.v = v
        first, last = v["init.conv1.weight"], v["init.fc.weight"]
        net = Net(first.shape[1], first.shape[0], last.shape[0])
        net.load_state_dict({match[1]: v[match[0]] for match in v.matching(r"init\.(.*)")})
        self.net = converted(net, Jacinto.reference(**{"snap_weights_at_start": False, **options}), dtype)
        found = {quantizer.site.key: quantizer for _, quantizer in quantizers(net)}
        self.results: dict[str, Tensor] = {}
        self.quantizers: dict[str, ClipQuantizer] = {}
        for name, key in QUANTIZERS.items():
            quantizer = found[key]
            assert isinstance(quantizer, ClipQuantizer)
            quantizer.register_forward_hook(partial(self._keep, name))
            self.quantizers[name] = quantizer

    def _keep(self, name: str, module: nn.Module, args: Any, result: Tensor) -> None:
        self.results[name] = result.detach()

    @property
    def steps(self) -> int:
        return len(self.v.matching(r"s\d+\.x"))

    def freeze(self, step: int) -> None:
        """What no longer moves in this step of the file, stands still."""
        for _, module in low_bit_modules(self.net):
            module.milestone("freeze_batch_norm", self._stands("running_mean.bn1", step))
        for name, quantizer in self.quantizers.items():
            quantizer.frozen = self._stands(f"clips_act.{name}", step)

    def _stands(self, key: str, step: int) -> bool:
        return step > 0 and torch.equal(self.v[f"s{step - 1}.{key}"], self.v[f"s{step}.{key}"])

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """Output and loss of one batch, gradients in their places."""
        dtype = self.net.conv1.weight.dtype  # type: ignore[union-attr]  # a tensor
        y = self.net(self.v[f"s{step}.x"].to(dtype))  # type: ignore[arg-type]
        loss = F.cross_entropy(self.v.number("logit_scale") * y, self.v[f"s{step}.t"])
        self.net.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        return y, loss

    @torch.no_grad()
    def descend(self) -> None:
        for parameter in self.net.parameters():
            assert parameter.grad is not None
            parameter.sub_(self.v.number("lr") * parameter.grad)

    def state(self, step: int) -> dict[str, Tensor]:
        """Everything that a step changes, by the keys of the file."""
        parameters = {f"param_after.{name}": p.data for name, p in self.net.named_parameters()}
        clips = {f"clips_act.{name}": quantizer.clips for name, quantizer in self.quantizers.items()}
        return {f"s{step}.{key}": value for key, value in {**parameters, **clips, **in_norm(self.net)}.items()}


def in_norm(net: nn.Module) -> dict[str, Tensor]:
    return {
        f"{statistic}.{name}": net.get_submodule(name).get_buffer(statistic)
        for name in NORMS for statistic in ("running_mean", "running_var")
    }  # fmt: skip


# -- comparison ----------------------------------------------------------------------------------------------
def check_steps(v: Comparison, snap: bool = False) -> None:
    """Each step from the state that the file has before it: what is on a grid exactly, what is not closely."""
    model = Model(v, snap_weights_at_start=snap)
    for n in range(model.steps):
        model.freeze(n)
        y, loss = model.step(n)
        v.exact(f"s{n}.y", y)
        v.close(f"s{n}.loss", loss, SINGLE)
        for name, parameter in model.net.named_parameters():
            assert parameter.grad is not None
            close_l2(v, f"s{n}.grad.{name}", parameter.grad)
        for name, quantizer in model.quantizers.items():
            limits = quantizer.limits()
            v.exact(f"s{n}.limits.{name}", torch.stack([limits.low, limits.high]))
            v.exact(f"s{n}.act.{name}", model.results[name])
        model.descend()
        for key, value in model.state(n).items():
            v.close(key, value, SINGLE)
            value.copy_(v[key])
    model.net.eval()
    with torch.no_grad():
        v.exact("eval.y", model.net(v["eval.x"]))


def close_l2(v: Comparison, key: str, got: Tensor) -> None:
    want = v[key].double()
    error, length = (got.double() - want).norm(), want.norm()
    assert error <= GRADIENT * length, f"{key}: off by {error / length:.3g} of its length, allowed {GRADIENT}"
    v.close(key, got, GRADIENT * math.sqrt(want.numel()))  # no more than that allows


def check_clean(v: Comparison) -> None:
    """The file, and bit for bit a plain float32 evaluation of the same formulas."""
    check_steps(v)
    model, twin = Model(v), Twin({match[1]: v[match[0]] for match in v.matching(r"init\.(.*)")})
    rate, scale = v.number("lr"), v.number("logit_scale")
    for n in range(model.steps):
        y, loss = model.step(n)
        expected, gradients = twin.step(v[f"s{n}.x"], v[f"s{n}.t"], scale)
        same("output", n, y, expected["y"])
        same("loss", n, loss, expected["loss"])
        for name, parameter in model.net.named_parameters():
            same(f"gradient of {name}", n, parameter.grad, gradients[name])
        for name, result in model.results.items():
            same(name, n, result, expected[name])
        for key, value in in_norm(model.net).items():
            same(key, n, value, twin.statistics[key])
        model.descend()
        twin.descend(rate)
    model.net.eval()
    with torch.no_grad():
        same("evaluation", model.steps, model.net(v["eval.x"]), twin.evaluate(v["eval.x"]))


def same(what: str, step: int, got: Tensor | None, want: Tensor) -> None:
    assert got is not None
    differ = int((got.detach() != want.detach()).sum())
    assert got.shape == want.shape
    assert differ == 0, f"step {step}, {what}: {differ} of {want.numel()} differ from the plain evaluation"
