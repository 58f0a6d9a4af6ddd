"""Jacinto's golden vectors of the straight-through variants, in float64, along the trajectory of the clean steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from schemes.jacinto_vectors_models import Model, in_norm
from schemes.vector_table import Comparison
from torch import Tensor, nn

from lightning_lowbit.modules.layers import LowBitLayer

__all__ = ["check_ste_variants"]

DOUBLE = 1e-9
VARIANTS = {"float": "float", "wq": "quantized", "fold": "folded"}
GROUPS = {"relu1": "conv1", "bn2": "conv2", "fc": "fc"}
RESULTS = {
    "inp": "conv1.activation_in", "relu1": "relu1", "bn2": "bn2.activation_q", "relu2": "relu2", "fc": "fc.activation_q"
}  # fmt: skip


def check_ste_variants(v: Comparison) -> None:
    clean = trajectory()
    statistics = [check_variant(v, clean, name) for name in VARIANTS]
    for key, first in statistics[0].items():  # no variant moves them differently
        assert all(torch.equal(first, other[key]) for other in statistics)


def trajectory() -> Comparison:
    """The file of the clean steps, from the same folder."""
    parent = os.environ.get("LOWBIT_VECTORS") or Path(__file__).parents[1] / "vectors"
    with np.load(Path(parent) / "jacinto" / "model_steps_clean.npz", allow_pickle=False) as file:
        return Comparison({key: file[key] for key in file.files})


def check_variant(v: Comparison, clean: Comparison, name: str) -> dict[str, Tensor]:
    model = Model(clean, torch.float64, ste_weights=VARIANTS[name])
    operands = {group: _Operands(model.net.get_submodule(path)) for group, path in GROUPS.items()}
    for n in range(len(v.matching(rf"{name}\.s\d+\.y"))):
        y, _ = model.step(n)
        v.close(f"{name}.s{n}.y", y, DOUBLE)
        for parameter_name, parameter in model.net.named_parameters():
            assert parameter.grad is not None
            v.close(f"{name}.s{n}.grad.{parameter_name}", parameter.grad, DOUBLE)
            parameter.data.copy_(clean[f"s{n}.param_after.{parameter_name}"])
        for group, found in operands.items():
            v.exact(f"s{n}.{group}.Wq", found.weight)
            v.exact(f"s{n}.{group}.bq", found.bias)
            v.exact(f"s{n}.{group}.ws", found.scale)
        for key, quantizer in RESULTS.items():
            v.exact(f"s{n}.{key}.y", model.results[quantizer])
    return in_norm(model.net)


class _Operands:
    """What a layer's weight and bias quantizers gave last.

    Attributes:
        weight, bias: quantized, batch norm merged.
        scale: codes per unit of the weight.
    """

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, LowBitLayer)
        assert layer.lowbit_weight is not None
        assert layer.lowbit_bias is not None
        self.weight = self.bias = self.scale = torch.empty(0)
        layer.lowbit_weight.register_forward_hook(self._keep_weight, with_kwargs=True)
        layer.lowbit_bias.register_forward_hook(self._keep_bias)

    def _keep_weight(self, module: nn.Module, args: Any, settings: dict[str, Tensor], result: Tensor) -> None:
        self.weight, self.scale = result.detach(), settings["scale"]

    def _keep_bias(self, module: nn.Module, args: Any, result: Tensor) -> None:
        self.bias = result.detach()
