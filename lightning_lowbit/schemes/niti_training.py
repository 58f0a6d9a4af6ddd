"""NITI's update: integer gradients, summed over processes, shifted down to mu bits and subtracted (section 8)."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lowbit import kernels
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import StepContext, UpdateRule
from lightning_lowbit.modules.block import BlockRange, WeightCodes
from lightning_lowbit.modules.integer_layers import collect
from lightning_lowbit.modules.integer_rounding import random_bits
from lightning_lowbit.numerics.block import ShiftRounding, shift_round
from lightning_lowbit.numerics.niti_rules import decayed, grad_shift
from lightning_lowbit.schemes.values import Values

if TYPE_CHECKING:
    from lightning_lowbit.schemes.niti import Niti

__all__ = ["NitiRule"]

_ALL_BITS = 31
_BIAS_FRACTION = 8  # a bias is an int8 code with 8 fraction bits: the same mu moves both by the same share


class NitiRule(UpdateRule):
    """Moves integer weights and biases; keeps what they have below their codes, and their momentum.

    Attributes:
        schedule: of the bits of an update.
        masters: by parameter path, int16 weights with fraction bits below the int8 code.
        kept: by parameter path, the last update, for momentum.
        silent: by layer, consecutive steps without a gradient.
        current: by parameter path, the codes that the last update left.
    """

    inert: ClassVar[Mapping[str, str]] = {
        "gradient_clip_val": "mu bounds every update",
        "lr_scheduler": "mu and mu_at of the scheme take its place",
        "weight_decay": "weight_decay of the scheme takes its place",
        "momentum": "momentum of the scheme takes its place",
    }

    def __init__(self, scheme: Niti, modules: dict[str, nn.Module]) -> None:
        self.scheme = scheme
        self.layers: dict[str, Any] = {path: m for path, m in modules.items() if hasattr(m, "gathered")}
        self.ranges = [q for m in modules.values() for q in m.modules() if isinstance(q, BlockRange)]
        self.schedule = Values("mu", scheme.schedule)
        self.masters: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.silent: dict[str, Tensor] = {}
        self.current: dict[str, Tensor] = {}

    @property
    def mu(self) -> int:
        return self.schedule.now

    def milestone(self, what: str, reached: bool, when: int) -> None:
        self.schedule.follow(what, reached)

    def waiting(self) -> list[str]:
        return [path for path, layer in self.layers.items() if layer.gathered]

    def logged(self) -> dict[str, float]:
        return {"mu": float(self.mu)}

    # -- one step -----------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, owned: set[str], context: StepContext) -> None:
        gathered: list[tuple[str, str, Tensor]] = []
        for path, others in self._groups(sorted(owned & self.layers.keys())):
            layer = self.layers[path]
            for other in others:  # they share this layer's parameters: one update from all their gradients
                for name, (acc, exponent) in self.layers[other].gathered.items():
                    collect(layer, name, acc, exponent)
                self.layers[other].gathered.clear()
            for name in sorted(layer.gathered):
                gathered.append((path, name, layer.gathered[name][0]))
            layer.gathered.clear()
        sums = _reduced([acc for _, _, acc in gathered], context)
        for (path, name, _), acc in zip(gathered, sums, strict=True):
            self._update(path, name, acc)
        if self.scheme.frozen_shifts is not None and (context.step + 1) % self.scheme.frozen_shifts == 0:
            self._renew(context)

    def _groups(self, paths: list[str]) -> list[tuple[str, list[str]]]:
        """Layers by weight parameter: the first of each, and the others that share it."""
        sharing: dict[int, list[str]] = defaultdict(list)
        for path in paths:
            sharing[id(self.layers[path].weight)].append(path)
        return [(first, others) for first, *others in sharing.values()]

    def _update(self, path: str, name: str, acc: Tensor) -> None:
        layer, key = self.layers[path], f"{path}.{name}"
        quantizer: WeightCodes = getattr(layer, f"lowbit_{name}")
        is_bias = name == "bias"
        if self.scheme.weight_decay and not is_bias:
            acc = decayed(acc, quantizer.codes())
        width = kernels.bit_width(acc)
        fraction_bits = 0 if is_bias else self.scheme.master_bits
        below = _BIAS_FRACTION if is_bias else fraction_bits
        mu = self._mu(path) + below
        # A gradient of ones and zeros has width 0 and moves nothing (section 4).
        shift = torch.where(width > 0, grad_shift(width, mu), _ALL_BITS)
        rounding, noise = self.scheme.shift_rounding("grad"), None
        if rounding is ShiftRounding.STOCHASTIC:  # gradients are global: so are these numbers, on every rank
            noise = random_bits(layer, f"grad.{name}", 1, acc.numel(), acc.device, shared=True).reshape(acc.shape)
        if self.scheme.momentum:
            update = shift_round(acc, shift, rounding, noise)
            acc, shift, noise = self._with_momentum(key, update, below), torch.zeros_like(shift), None
        if is_bias:
            limit = 2**quantizer.bits - 1
            moved = quantizer.codes().to(torch.int64) - shift_round(acc, shift, rounding, noise)
            quantizer.store(moved.clamp(-limit, limit).to(quantizer.dtype))
            return
        self.silent[path] = torch.where(width > 0, 0, self.silent.get(path, 0) + 1)
        moved = kernels.update_weights(
            self._master(key, quantizer), acc, shift, rounding=rounding, weight=quantizer.target().detach(),
            exponent=quantizer.exponent(), fraction_bits=fraction_bits, noise=noise,
        )  # fmt: skip
        quantizer.keep(moved)
        self.current[key] = moved

    def _mu(self, path: str) -> int:
        offsets = [offset for pattern, offset in self.scheme.mu_offsets.items() if fnmatch.fnmatchcase(path, pattern)]
        return self.mu + sum(offsets)

    def _master(self, key: str, quantizer: WeightCodes) -> Tensor:
        """What the update moves: the codes, or int16 with fraction bits below them."""
        codes = quantizer.codes()
        if not self.scheme.master_bits:
            return codes
        # Somebody else may have written to the weight (a load, a hook): then the master begins at its codes.
        known = self.current.get(key, codes)
        if key not in self.masters or not (known is codes or torch.equal(known, codes)):
            self.masters[key] = codes.to(torch.int16) << self.scheme.master_bits
        return self.masters[key]

    def _with_momentum(self, key: str, update: Tensor, below: int) -> Tensor:
        """m = clip(trunc(m * M / 16) + G), with ``below`` fraction bits; what is subtracted is m."""
        kept = self.kept.get(key)
        if kept is not None:
            update = update + torch.div(kept.to(update.dtype) * self.scheme.momentum, 16, rounding_mode="trunc")
        limit = 127 << below
        self.kept[key] = update.clamp(-limit, limit).to(torch.int16)
        return self.kept[key].to(torch.int32)

    def _renew(self, context: StepContext) -> None:
        """Static ranges become the largest of the last steps, over all processes: one exchange for all of them."""
        seen = context.reduce_max(torch.stack([ranges.seen for ranges in self.ranges]).to(torch.int32))
        for ranges, value in zip(self.ranges, seen, strict=True):
            ranges.seen.copy_(value)
            ranges.take_over(reset=True)

    # -- reports and state --------------------------------------------------------------------------------
    def stopped(self, steps: int = 10) -> list[str]:
        """Layers whose gradient has been zero for that many steps."""
        return [path for path, count in self.silent.items() if int(count) >= steps]

    def state_dict(self) -> dict[str, Any]:
        return {
            "masters": {key: value.clone() for key, value in self.masters.items()},
            "kept": {key: value.clone() for key, value in self.kept.items()},
            "silent": {key: int(value) for key, value in self.silent.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        unknown = sorted({key.rpartition(".")[0] for key in state["masters"]} - self.layers.keys())
        if unknown:
            raise ConfigError(
                f"{unknown[0]}: the checkpoint holds its wide weight, this network has no such low-bit layer. Load "
                "into the code that was trained, with the same skip= and include=."
            )
        self.masters = {key: value.clone() for key, value in state["masters"].items()}
        self.kept = {key: value.clone() for key, value in state["kept"].items()}
        self.silent = {key: torch.tensor(value) for key, value in state["silent"].items()}


def _reduced(sums: list[Tensor], context: StepContext) -> list[Tensor]:
    """Sums over the processes, exact: in int32 with a flag for each that may wrap, and those once more in int64."""
    if context.world == 1 or not sums:
        return sums
    spare = (context.world - 1).bit_length()
    wide = torch.stack([kernels.bit_width(acc) + spare > 30 for acc in sums]).to(torch.int32)
    *totals, wide = context.reduce_sums([*(acc.to(torch.int32) for acc in sums), wide])
    again = [place for place, processes in enumerate(wide.tolist()) if processes]
    for place, total in zip(again, context.reduce_sums([sums[place].to(torch.int64) for place in again]), strict=True):
        totals[place] = total
    return totals
