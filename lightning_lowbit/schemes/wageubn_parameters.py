"""Which parameters WAGEUBN's update moves: weights of layers, their biases, gammas and betas of batch norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_lowbit.modules.fixed_norm import NormGrids
from lightning_lowbit.modules.stored import StoredBias, StoredWeight

__all__ = ["Stored", "stored_parameters"]


@dataclass(frozen=True)
class Stored:
    """A parameter that is stored in low bits.

    Args:
        parameter: the user's.
        quantizer: of a layer's weight, whose stored codes count in units of 2^power; None of a bias, gamma or beta.
    """

    parameter: nn.Parameter
    quantizer: StoredWeight | None = None

    @property
    def weight(self) -> bool:
        return self.quantizer is not None

    @property
    def power(self) -> int:
        return 0 if self.quantizer is None else self.quantizer.power


def stored_parameters(modules: dict[str, nn.Module]) -> dict[str, Stored]:
    """By name; a parameter that several modules share once, under the first of its names."""
    found: dict[str, Stored] = {}
    seen: set[int] = set()

    def add(path: str, name: str, quantizer: StoredWeight | None = None) -> None:
        module = modules[path]
        parameter = getattr(module, f"{name}_orig", getattr(module, name, None))  # pruned: what the mask hides
        if isinstance(parameter, nn.Parameter) and id(parameter) not in seen:
            seen.add(id(parameter))
            found[f"{path}.{name}"] = Stored(parameter, quantizer)

    for path in sorted(modules):
        module: Any = modules[path]
        weight = getattr(module, "lowbit_weight", None)
        if isinstance(weight, StoredWeight):
            add(path, "weight", weight)
        if isinstance(getattr(module, "lowbit_bias", None), StoredBias):
            add(path, "bias")
        if isinstance(getattr(module, "lowbit_accumulator", None), NormGrids):
            add(path, "weight")
            add(path, "bias")
    return found
