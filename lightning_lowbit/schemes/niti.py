"""NITI: training in integers only (Wang et al., arXiv 2009.13108). int8 weights, activations and errors, int32 sums.

Section numbers in this file are those of docs/niti.md. A tensor is int8 codes and one exponent; every sum of products
is rounded back to 8 bits with a shift taken from its largest value, and the update of a weight is the int32 gradient
shifted down to ``mu`` bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError, listed
from lightning_lowbit.modules.base import Milestone, Moment, Scheme, Site, UpdateRule
from lightning_lowbit.modules.block import BiasCodes, BlockInput, BlockRange, ErrorRange, WeightCodes
from lightning_lowbit.modules.elementwise import LowBitAdd, LowBitAvgPool, LowBitCat, LowBitReLU
from lightning_lowbit.modules.integer_layers import integer_layer, lower_layer, unsupported
from lightning_lowbit.modules.integer_means import integer_mean, lower_mean
from lightning_lowbit.modules.integer_norm import integer_norm, lower_norm
from lightning_lowbit.modules.integer_ops import (
    integer_add,
    integer_cat,
    integer_dropout,
    integer_dropout_channels,
    integer_relu,
    lower_add,
    lower_cat,
    lower_relu,
)
from lightning_lowbit.modules.integer_pooling import integer_max_pool
from lightning_lowbit.modules.integer_wiring import reads_floats
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.loss import integer_cross_entropy
from lightning_lowbit.modules.lowering import Builder
from lightning_lowbit.modules.moments import check_moment
from lightning_lowbit.modules.norm import LowBitBatchNorm, has_seen_data
from lightning_lowbit.modules.quantizer import Quantizer, on
from lightning_lowbit.numerics.block import ShiftRounding
from lightning_lowbit.schemes.niti_training import NitiRule
from lightning_lowbit.schemes.options import check_choice
from lightning_lowbit.schemes.values import value_milestones

if TYPE_CHECKING:
    from lightning_lowbit.graph.network import Flow
    from lightning_lowbit.graph.plan import Plan

__all__ = ["Niti"]

Rounding = Literal["half_away", "pseudo_stochastic", "stochastic"]

# mu over the run, and fraction bits below a weight's code: to learn from scratch, and to keep a pretrained network.
_RECIPES: dict[str, tuple[tuple[int, ...], int]] = {"scratch": ((5, 4, 3), 0), "finetune": ((-2, -3, -4), 8)}

_OPERATIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    LowBitReLU: integer_relu,
    LowBitAdd: integer_add,
    LowBitCat: integer_cat,
    LowBitAvgPool: integer_mean,
    LowBitBatchNorm: integer_norm,
}

_LOWERINGS: dict[type[nn.Module], Callable[..., Any]] = {
    LowBitLayer: lower_layer,
    LowBitReLU: lower_relu,
    LowBitAdd: lower_add,
    LowBitCat: lower_cat,
    LowBitAvgPool: lower_mean,
}

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: integer_cross_entropy,
    F.max_pool1d: integer_max_pool(1),
    F.max_pool2d: integer_max_pool(2),
    torch.max_pool1d: integer_max_pool(1),
    torch.max_pool2d: integer_max_pool(2),
    F.dropout: integer_dropout,
    F.dropout1d: integer_dropout_channels,
    F.dropout2d: integer_dropout_channels,
    F.dropout3d: integer_dropout_channels,
}


@dataclass(frozen=True)
class Niti(Scheme):
    """Integer-only training.

    Args:
        mu: bits of an update, of the int8 weight's steps: an update moves the weight by at most 2^mu of them. None
            takes the recipe's.
        mu_at: when each mu begins: fractions of the run, epochs (int), or "500 steps".
        accumulate_bits: fraction bits that updates accumulate below a weight's code: 8 makes weights of 16
            bits, 0 none. None takes the recipe's.
        recipe: "scratch" (mu 5, 4, 3), "finetune" (mu -2, -3, -4 on 16-bit weights) or "auto": finetune where weights
            come from elsewhere (init_from=, or batch norms that have seen data), else scratch.
        norms: batch norms "fold" into the layer before them, or are an "island" (integers in and out, statistics
            exact); "auto" folds them where they have seen data.
        act_rounding: of activations: half_away, pseudo_stochastic or stochastic.
        err_rounding: the same for errors.
        grad_rounding: the same for the update of weights.
        frozen_shifts: take shifts from ranges that are renewed every so many steps, with one exchange over processes;
            None takes them from each batch.
        momentum: sixteenths of the last update that the next one keeps, 0 to 15.
        weight_decay: add the weight to its gradient, at 2^-8 of the largest gradient for a weight of 127.
        init: "keep" the weights found, or "xavier": draw them anew.
        dropout: "per_sample" masks, or one that the whole batch shares.
        mu_offsets: added to mu, by module path.
        seed: of all random integers.
        preset: "recommended", or "reference" with the quirks of the published code.
    """

    name: ClassVar[str] = "niti"
    carries_errors: ClassVar[bool] = True
    integer_kernels: ClassVar[bool] = True
    reproducible: ClassVar[bool] = True

    mu: int | tuple[int, ...] | None = None
    mu_at: tuple[Moment, ...] = (0, 0.5, 0.75)
    accumulate_bits: int | None = None
    recipe: Literal["auto", "scratch", "finetune"] = "auto"
    norms: Literal["auto", "fold", "island"] = "auto"
    act_rounding: Rounding = "half_away"
    err_rounding: Rounding = "half_away"
    grad_rounding: Rounding = "pseudo_stochastic"
    frozen_shifts: int | None = None
    momentum: int = 0
    weight_decay: bool = False
    init: Literal["keep", "xavier"] = "keep"
    dropout: Literal["per_sample", "shared"] = "per_sample"
    mu_offsets: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    preset: Literal["recommended", "reference"] = "recommended"

    def __post_init__(self) -> None:
        for option in ("recipe", "norms", "act_rounding", "err_rounding", "grad_rounding", "init", "dropout", "preset"):
            check_choice(type(self), option, getattr(self, option))
        if self.mu is not None:
            object.__setattr__(self, "mu", tuple(self.mu) if isinstance(self.mu, (tuple, list)) else (self.mu,))
        object.__setattr__(self, "mu_at", tuple(self.mu_at))
        for moment in self.mu_at:
            check_moment("Niti: mu_at", moment)
        _check_range("mu", self.schedule, -8, 7)
        if len(self.schedule) > len(self.mu_at):
            raise ConfigError(
                f"Niti(mu={self.mu!r}, mu_at={self.mu_at!r}): {len(self.schedule)} values and {len(self.mu_at)} "
                "moments. Give a moment for each value of mu."
            )
        _check_range("accumulate_bits", (self.master_bits,), 0, 8)
        _check_range("momentum", (self.momentum,), 0, 15)
        if self.frozen_shifts is not None:
            _check_range("frozen_shifts", (self.frozen_shifts,), 1, 10**9)

    @property
    def schedule(self) -> tuple[int, ...]:
        """The values of mu, in their order."""
        return _RECIPES[self._recipe][0] if self.mu is None else self.mu  # type: ignore[return-value]  # never an int

    @property
    def master_bits(self) -> int:
        """Fraction bits below a weight's code."""
        return _RECIPES[self._recipe][1] if self.accumulate_bits is None else self.accumulate_bits

    @property
    def _recipe(self) -> str:
        return "scratch" if self.recipe == "auto" else self.recipe

    @property
    def wraps(self) -> bool:
        """Whether a code of +128 becomes -128 where no shift is needed, as in the published code."""
        return self.preset == "reference"

    @property
    def shared_dropout(self) -> bool:
        return self.dropout == "shared"

    def shift_rounding(self, purpose: str) -> ShiftRounding:
        return ShiftRounding(getattr(self, f"{purpose}_rounding"))

    # -- the seam ----------------------------------------------------------------------------------------------
    def adapted_to(self, root: nn.Module, pretrained: bool) -> Niti:
        seen = pretrained or any(has_seen_data(module) for module in root.modules())
        return self._decided("finetune" if seen else "scratch", "fold" if seen else "island")

    def like(self, other: Scheme) -> Niti:
        return self._decided(other.recipe, other.norms) if isinstance(other, Niti) else self

    def _decided(self, recipe: str, norms: str) -> Niti:
        return self.replace(
            recipe=recipe if self.recipe == "auto" else self.recipe, norms=norms if self.norms == "auto" else self.norms
        )

    def leaves_float(self, site: Site, module: nn.Module) -> str | None:
        return unsupported(module)

    def tied(self, root: nn.Module, flow: Flow, plan: Plan) -> list[list[str]]:
        return []  # exponents are aligned when values are added

    def quantizer(self, site: Site) -> Quantizer | None:
        made: BlockRange | WeightCodes | None = None
        if site.role == "weight":
            redraw = self.seed if self.init == "xavier" else None
            made = WeightCodes(site, redraw, room=self._recipe == "scratch")
        elif site.role == "bias":
            made = BiasCodes(site)
        elif site.role == "error":
            made = ErrorRange(site)
        elif site.role == "input" and site.source is not None:
            made = None  # it comes as integers
        elif site.role == "input" or site.slot.startswith("lowbit_operand") or site.op == "activation":
            made = BlockInput(site)
        elif site.role == "accumulator" or (site.role == "sum" and site.op in ("add", "avg_pool", "batch_norm")):
            made = BlockRange(site)
        return self._told(made) if isinstance(made, BlockRange) else made

    def connect(self, root: nn.Module, flow: Flow, plan: Plan) -> list[str]:
        kinds, paths = {layer.path: layer.op for layer in plan.layers}, reads_floats(root, flow, plan)
        for path in paths:
            layer: Any = root.get_submodule(path)
            entry = BlockInput(Site(path, "input", kinds[path], slot="lowbit_input"))
            layer.lowbit_input = self._told(entry).to(layer.weight.device).train(layer.training)
            layer.lowbit_input.switch, layer.__dict__["input_grid"] = layer.switch, layer.lowbit_input
        return [f"floats are quantized anew where {listed(paths)} read{'s' * (len(paths) == 1)} them"] if paths else []

    def _told(self, ranges: BlockRange) -> BlockRange:
        ranges.__dict__["scheme"] = self
        for part in ranges.modules():  # an error's range has a second one for sums that arrive
            part.__dict__["static"] = self.frozen_shifts is not None
        return ranges

    def batch_norm(self, site: Site, norm: nn.Module) -> str:
        return "fold_or_island" if self.norms == "fold" and norm.affine else "island"

    def prepare(self, layer: nn.Module) -> None:
        if not isinstance(layer, LowBitLayer):
            layer.ungraded = ("weight", "bias")  # type: ignore[assignment]  # a LowBitBatchNorm: its sums are global
            return
        layer.ungraded = ("weight", "bias") if layer.bias is not None else ("weight",)
        layer.__dict__["gathered"] = {}

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        if not layer.switch.quantizing:
            return layer.quantized(x)  # type: ignore[no-any-return]  # calibration: float, and the ranges watch
        return integer_layer(layer, on(layer.lowbit_input, x))

    def compute(self, layer: Any, *operands: Any, **settings: Any) -> Tensor:
        integer = next((function for kind, function in _OPERATIONS.items() if isinstance(layer, kind)), None)
        if integer is not None and layer.switch.quantizing:
            return on(layer.lowbit_accumulator, integer(layer, *operands, **settings))
        result: Tensor = layer.op(*operands, **settings)
        return result if isinstance(layer, LowBitLayer) else on(layer.lowbit_accumulator, result)

    def lower(self, build: Builder, module: Any, *operands: Any, **settings: Any) -> Any:
        if isinstance(module, LowBitBatchNorm) and module.island:
            return lower_norm(build, module, *operands)
        twin = next((function for kind, function in _LOWERINGS.items() if isinstance(module, kind)), None)
        if twin is not None:
            return twin(build, module, *operands, **settings)
        return super().lower(build, module, *operands, **settings)

    def functions(self) -> Mapping[Any, Callable[..., Any]]:
        return _FUNCTIONS

    def update_rule(self, modules: dict[str, nn.Module]) -> UpdateRule:
        return NitiRule(self, modules)

    def milestones(self) -> tuple[Milestone, ...]:
        return value_milestones("mu", self.schedule, self.mu_at)


def _check_range(option: str, values: tuple[int, ...], low: int, high: int) -> None:
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(f"Niti({option}={value!r}): expected an integer from {low} to {high}.")
