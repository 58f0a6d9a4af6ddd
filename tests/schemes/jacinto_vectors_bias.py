"""Jacinto's golden vectors of bias calibration, as published: batch by batch, snapped weights, the float path watched.

The package's own ``calibrate_biases`` watches the sums of quantized operands instead and snaps nothing; what is the
published way lives here, and drives the package's merged layers and ranges.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from schemes.jacinto_vectors_models import SINGLE, converted
from schemes.vector_table import Comparison
from torch import Tensor, nn

from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.modules.clipped import ClipQuantizer
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.schemes.jacinto import Jacinto

__all__ = ["check_bias_calibration"]

BITS, RATE = 4, 0.05
QUANTIZERS = {
    "c1.activation_in": "c1.lowbit_input",
    "r1": "r1.lowbit_output",
    "r2": "r2.lowbit_output",
    "fc.activation_q": "fc.lowbit_output",
}
CORRECTED = {"c1": "r1", "b2": "r2", "fc": "fc.activation_q"}  # module with a bias: the quantizer that closes its group


class Net(nn.Module):
    def __init__(self, v: Comparison) -> None:
        super().__init__()
        first, second, last = (v[f"init.{name}.weight"] for name in ("c1", "c2", "fc"))
        self.c1 = nn.Conv2d(first.shape[1], first.shape[0], first.shape[2], padding=first.shape[2] // 2)
        self.r1 = nn.ReLU()
        self.c2 = nn.Conv2d(second.shape[1], second.shape[0], second.shape[2], padding=second.shape[2] // 2, bias=False)
        self.b2 = nn.BatchNorm2d(second.shape[0])
        self.r2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last.shape[1], last.shape[0])
        self.load_state_dict({match[1]: v[match[0]] for match in v.matching(r"init\.(.*)")})

    def forward(self, x: Tensor) -> Tensor:
        x = self.r2(self.b2(self.c2(self.r1(self.c1(x)))))
        y: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return y


@torch.no_grad()
def check_bias_calibration(v: Comparison) -> None:
    plain = Net(v).eval()
    net = converted(Net(v), Jacinto.reference(bits=BITS))
    for _, module in low_bit_modules(net):
        module.milestone("freeze_batch_norm", True)
    found = {quantizer.site.key: quantizer for _, quantizer in quantizers(net)}
    means: dict[str, Tensor] = {}
    for name, closing in CORRECTED.items():
        plain.get_submodule(name).register_forward_hook(partial(_note, means, name))
        bias = net.get_submodule(name).get_parameter("bias")
        hook = partial(_correct, means, name, bias)
        found[QUANTIZERS[closing]].register_forward_pre_hook(hook, with_kwargs=True)
    for n in range(len(v.matching(r"s\d+\.x"))):
        x = v[f"s{n}.x"]
        plain(x)
        v.exact(f"s{n}.y", net(x))
        for match in v.matching(rf"s{n}\.param\.(.*)"):
            v.close(match[0], net.get_parameter(match[1]), SINGLE)
            net.get_parameter(match[1]).copy_(v[match[0]])
        for name, key in QUANTIZERS.items():
            quantizer = found[key]
            assert isinstance(quantizer, ClipQuantizer)
            v.close(f"s{n}.clips_act.{name}", quantizer.clips, SINGLE)


def _mean(x: Tensor) -> Tensor:
    """Of each channel."""
    return x.mean([axis for axis in range(x.dim()) if axis != 1])


def _note(means: dict[str, Tensor], name: str, module: nn.Module, args: Any, result: Tensor) -> None:
    means[name] = _mean(result)


def _correct(
    means: dict[str, Tensor], name: str, bias: Tensor, quantizer: nn.Module, args: Any, settings: dict[str, Any]
) -> None:
    """Once the group has computed its quantized sums: what a correction moves, acts from the next batch on."""
    if settings.get("closes"):
        bias += RATE * (means[name] - _mean(args[0]))
