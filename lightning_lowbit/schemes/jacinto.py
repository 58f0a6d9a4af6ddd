"""TI's quantization-aware training for its accelerators (edgeai; the devices of the Jacinto family)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import Milestone, Moment, Scheme, Site, UpdateRule
from lightning_lowbit.modules.bias_calibration import calibrate_biases
from lightning_lowbit.modules.clipped import ClipFormat, ClipQuantizer, RangeSync
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.elementwise import LowBitAvgPool, LowBitOp
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.merged import BiasRule, MergedBias, MergedWeight, WeightFormat, merge_norm
from lightning_lowbit.modules.merging import Backward, merged_layer
from lightning_lowbit.modules.merging_lowering import lower_merged, lower_operation
from lightning_lowbit.modules.merging_sums import operation
from lightning_lowbit.modules.merging_wiring import group_layers
from lightning_lowbit.modules.moments import check_moment
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.rounding import Rounding
from lightning_lowbit.schemes.jacinto_presets import DEFAULTS, settings_of
from lightning_lowbit.schemes.options import (
    check_bits,
    check_choice,
    check_flags,
    check_number,
    each_override,
    option_at,
    option_of,
    require_effects,
    require_joined,
    require_matches,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_lowbit.graph.network import Flow
    from lightning_lowbit.graph.plan import Plan
    from lightning_lowbit.modules.lowering import Builder
    from lightning_lowbit.numerics.observers import AllReduce

__all__ = ["Jacinto"]

_OVERRIDABLE = ("weight_bits", "act_bits", "signed", "range")
_SYMMETRIC_BIAS = ("tidl", "tidl_scale")


@dataclass(frozen=True)
class Jacinto(Scheme):
    """Merged weights and activations on symmetric power-of-two grids from ranges that follow the batches.

    The value of every layer is computed from quantized operands with the batch norm merged, its gradient goes through
    the float layer. Nothing is trained beside the network itself.

    Args:
        preset: a name for many of these options at once: "recommended", "reference" (as published), "simple" and
            "advanced" (calibration without training), or a format such as "WT8SYMP2_AT8SYMP2" or "WC4_AT8".
        bits: what weight_bits and act_bits are if they are not given.
        weight_bits: bits of weights, signed (2 to 16; 8).
        act_bits: bits of activations, unsigned where none is negative (2 to 16; 8).
        power2: ranges are rounded up to powers of two; else they are what they are.
        symmetric: activations have no zero point.
        per_channel: weights have one scale a tensor ("none"), in depthwise convolutions one an output channel
            ("depthwise"), or so everywhere ("all").
        range_shrink: percent of an activation's values that may fall off each end of a batch's range.
        range_floor: least share of a batch in the running range; above 1 / share batches it is a moving average.
        range_subsample: look at every n-th row and column of large maps only.
        range_sync: how processes share ranges: "mean" behind each batch, "hist" one histogram in each, or "none".
        batch_ranges: training clips by each batch's own range, but for concats.
        weight_shrink: percent of the weights that may fall off each end of their range.
        weight_cap: largest range of weights.
        act_range: one fixed range for all activations, 0 or its negative to it.
        ste_weights: the weight that the backward pass sees: "float", "quantized" (the quantized one with its batch norm
            taken out again) or "folded" (the merged quantized one, statistics as constants).
        bn_value: statistics that normalize training's values: "running" (published), or the "batch"'s.
        bias: "int32" on the grid of the products, "tidl" (an 8-bit weight times a constant, in 16 bits, as published),
            "tidl_scale" (weights give way to the bias), "own" (a grid of its own) or "float".
        act_round: ties of activations: half_up (published), half_even or half_away.
        constrain_weights: clip outliers of weights when quantization begins.
        snap_weights_at_start: put float weights on their grid in the first training batch.
        dead_channels: channels whose variance is nil are merged as the "constant" that they are, or like others
            ("merge", published).
        avgpool: "exact" division, quantized, or a "float" mean (published).
        quantize_in: whether the network's input is quantized.
        quantize_out: whether its results are.
        bias_calibration: rate at which biases take up the shift of means behind calibration; 0 leaves them.
        freeze_batch_norm: when batch norms stop following the batches (0.75; in "reference" "half-1"); None never.
        freeze_ranges: when ranges do (0.8; in "reference" "half+1").
        warmup: when quantizers start in training from scratch.
        overrides: options per module-path pattern: weight_bits, act_bits, signed (None: as the range is) and range (a
            limit or a pair). act_bits of a layer are those of what it reads; the path of an activation, a norm or a
            pool names what that gives.
    """

    name: ClassVar[str] = "jacinto"
    runs_norms: ClassVar[bool] = True

    preset: str | None = None
    bits: int | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    power2: bool | None = None
    symmetric: bool | None = None
    per_channel: Literal["none", "depthwise", "all"] | None = None
    range_shrink: float | None = None
    range_floor: float = 0.001
    range_subsample: int = 1
    range_sync: RangeSync = "mean"
    batch_ranges: bool = False
    weight_shrink: float = 0.0
    weight_cap: float | None = None
    act_range: float | None = None
    ste_weights: Backward = "float"
    bn_value: Literal["running", "batch"] = "running"
    bias: BiasRule | None = None
    act_round: Literal["half_up", "half_even", "half_away"] = "half_up"
    constrain_weights: bool | None = None
    snap_weights_at_start: bool | None = None
    dead_channels: Literal["constant", "merge"] | None = None
    avgpool: Literal["exact", "float"] | None = None
    quantize_in: bool = True
    quantize_out: bool = True
    bias_calibration: float | None = None
    freeze_batch_norm: Moment | None = "auto"
    freeze_ranges: Moment | None = "auto"
    warmup: Moment = 0.3
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = {} if self.preset is None else settings_of(self.preset)
        if self.bits is not None:
            settings |= {"weight_bits": self.bits, "act_bits": self.bits}
        for option, value in (DEFAULTS | settings).items():
            if getattr(self, option) == _unset(option):
                object.__setattr__(self, option, value)
        object.__setattr__(self, "preset", None)  # spent, as bits are: two ways to say the same are equal
        object.__setattr__(self, "bits", None)
        self._check()

    def _check(self) -> None:
        for option in ("weight_bits", "act_bits"):
            check_bits(type(self), option, getattr(self, option))
        for option in (
            "per_channel", "range_sync", "ste_weights", "bn_value", "bias", "act_round", "dead_channels", "avgpool",
        ):  # fmt: skip
            check_choice(type(self), option, getattr(self, option))
        check_flags(
            self, "power2", "symmetric", "batch_ranges", "constrain_weights", "snap_weights_at_start", "quantize_in",
            "quantize_out",
        )  # fmt: skip
        for option in ("warmup", "freeze_batch_norm", "freeze_ranges"):
            check_moment(f"Jacinto: {option}", getattr(self, option))
        for option, low, high in (
            ("range_shrink", 0, 50), ("weight_shrink", 0, 50), ("range_floor", 0, 1), ("bias_calibration", 0, 1),
        ):  # fmt: skip
            check_number(type(self), option, getattr(self, option), low, high)
        for option in ("weight_cap", "act_range"):
            if getattr(self, option) is not None:
                check_number(type(self), option, getattr(self, option), 2.0**-16, 2.0**16)
        if self.range_subsample not in (1, 2, 3, 4):
            raise ConfigError(f"Jacinto(range_subsample={self.range_subsample!r}): expected 1 (all), 2, 3 or 4.")
        if self.warmup is None:
            raise ConfigError("Jacinto(warmup=None): expected a moment, 0 for at once.")
        if self.bias in _SYMMETRIC_BIAS and not self.symmetric:
            raise ConfigError(
                f"Jacinto(bias={self.bias!r}, symmetric=False): the rule is for inputs without a zero point. Take "
                "bias='int32', or symmetric=True."
            )
        for pattern, option, value in each_override(type(self), self.overrides, _OVERRIDABLE):
            if option.endswith("bits"):
                check_bits(type(self), f"overrides[{pattern!r}].{option}", value)
            elif option == "range":
                _fixed(value, pattern)
            elif value not in (True, False, None):
                raise ConfigError(f"Jacinto(overrides[{pattern!r}].signed={value!r}): expected True, False or None.")

    def replace(self, **options: Any) -> Jacinto:
        if options.get("preset") is not None:  # says all anew that presets say
            options = {**{option: _unset(option) for option in (*DEFAULTS, "weight_cap", "act_range")}, **options}
        if options.get("bits") is not None:
            options = {"weight_bits": None, "act_bits": None, **options}
        return super().replace(**options)

    @classmethod
    def reference(cls, **options: Any) -> Jacinto:
        """As the published code computes."""
        return cls(**{"preset": "reference", **options})

    # -- the seam ----------------------------------------------------------------------------------------------
    def quantizer(self, site: Site) -> Quantizer | None:
        if site.role == "weight":
            return MergedWeight(site, self._weights(site), self.bias or "int32")
        if site.role == "bias":
            bits = option_of(self, site.path, "weight_bits")
            return None if self.bias == "float" else MergedBias(site, self.bias or "int32", bits, bool(self.power2))
        mean = site.op == "avg_pool" and site.slot == "lowbit_output"
        wanted = {
            "input": site.source is None and (self.quantize_in or not site.first),
            "output": not mean or self.avgpool == "exact",
            "operand": not mean or self.avgpool == "exact",
            "result": True,
        }
        left = not site.read and site.last and not self.quantize_out
        if left or not wanted.get(site.role, False):
            return None
        fixed = option_of(self, site.path, "range", self.act_range)
        limits = site.clips if fixed is None else _fixed(fixed, site.path)
        signed = option_of(self, site.path, "signed", False if site.signed is False else None)
        return ClipQuantizer(site, self._activations(site), limits, signed)

    def _weights(self, site: Site) -> WeightFormat:
        return WeightFormat(
            option_of(self, site.path, "weight_bits"), bool(self.power2),
            self.per_channel == "all" or (self.per_channel == "depthwise" and site.depthwise),
            self.weight_shrink, self.weight_cap, bool(self.constrain_weights), bool(self.snap_weights_at_start),
            self.dead_channels == "constant",
        )  # fmt: skip

    def _activations(self, site: Site) -> ClipFormat:
        return ClipFormat(
            option_at(self, site, "act_bits"), bool(self.power2), bool(self.symmetric), Rounding(self.act_round),
            float(self.range_shrink or 0.0), self.range_floor, self.range_subsample, self.range_sync, self.batch_ranges,
        )  # fmt: skip

    def batch_norm(self, site: Site, norm: nn.Module) -> str:
        return "fold"

    def tied(self, root: nn.Module, flow: Flow, plan: Plan) -> list[list[str]]:
        """What is joined has one grid; what is added has each its own."""
        return plan.joined()

    def connect(self, root: nn.Module, flow: Flow, plan: Plan) -> list[str]:
        require_matches(type(self), self.overrides, plan)
        sites = [quantizer.site for _, quantizer in quantizers(root)]
        weights = [site for site in sites if site.role == "weight"]
        clipped = [site for site in sites if site.role not in ("weight", "bias")]
        own = [replace(site, readers=()) for site in clipped]
        require_effects(self, plan, {"weight_bits": weights, "act_bits": clipped, "range": own, "signed": own})
        require_joined(self, plan, lambda site: option_at(self, site, "act_bits"))
        return group_layers(root, flow, plan)

    def merge(self, layer: Any, weight: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        return merge_norm(layer, weight, mean, var, constant=self.dead_channels == "constant")

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        if not layer.switch.quantizing or not layer.lowbit_weight.ready:
            return layer.quantized(x)  # type: ignore[no-any-return]  # float, or calibration
        return merged_layer(layer, x, self.ste_weights, self.bn_value == "batch")

    def compute(self, layer: Any, *operands: Any, **settings: Any) -> Tensor:
        if self.avgpool == "float" and isinstance(layer, LowBitAvgPool):
            return layer.function(*operands, **{**layer.settings, **settings})
        if isinstance(layer, LowBitOp):
            return operation(layer, *operands, **settings)
        return layer.op(*operands, **settings)  # type: ignore[no-any-return]  # layers have op

    def lower(self, build: Builder, module: Any, *operands: Any, **settings: Any) -> Any:
        if isinstance(module, LowBitLayer):
            return lower_merged(build, module, operands[0])
        if isinstance(module, LowBitOp):
            return lower_operation(build, module, *operands, float_means=self.avgpool == "float", **settings)
        return module.lower(build, *operands, **settings)

    def refine(self, root: nn.Module, run: Callable[[], int], all_reduce: AllReduce) -> None:
        if self.bias_calibration:
            calibrate_biases(root, run, self.bias_calibration, all_reduce)

    def update_rule(self, modules: dict[str, nn.Module]) -> UpdateRule:
        from lightning_lowbit.schemes.jacinto_training import RangeRule

        return RangeRule(self, modules)

    def start(self, pretrained: bool) -> Moment:
        return 0 if pretrained else self.warmup

    def milestones(self) -> tuple[Milestone, ...]:
        return (
            Milestone(self.freeze_batch_norm, "freeze_batch_norm"),
            Milestone(self.freeze_ranges, "freeze_ranges"),
        )

    def activation_bits(self) -> int:
        given = [options.get(name, 0) for options in self.overrides.values() for name in ("weight_bits", "act_bits")]
        return int(max([self.weight_bits or 0, self.act_bits or 0, *given]))


def _unset(option: str) -> str | None:
    """What stands for not given; None says never for a moment."""
    return "auto" if option.startswith("freeze_") else None


def _fixed(value: Any, where: str) -> tuple[float, float]:
    """A fixed range as a pair."""
    pair = (-value, value) if _is_finite(value) else value
    ends = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_finite, pair))
    if not ends or not pair[0] < pair[1]:
        raise ConfigError(f"Jacinto: range={value!r} of {where!r}: expected a limit above 0, or a pair (low, high).")
    return float(pair[0]), float(pair[1])


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
