"""WAGEUBN: full 8-bit training (Yang et al., Neural Networks 125, 2020, arXiv:1909.02384).

Weights, activations, gradients, errors, updates and batch norm are fixed-point numbers with units that are powers of
two. Layers multiply 8-bit integers forward and backward; the update closes in integers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.modules.base import Milestone, Moment, Scheme, Site, UpdateRule
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.elementwise import LowBitAdd, LowBitAvgPool
from lightning_lowbit.modules.error_gate import ErrorForm, ErrorQuantizer
from lightning_lowbit.modules.fixed_norm import NormGrids, fixed_norm
from lightning_lowbit.modules.lowering import Builder
from lightning_lowbit.modules.norm import LowBitBatchNorm, has_seen_data
from lightning_lowbit.modules.plane_layers import connect_sums, multiplies_integers, plane_layer
from lightning_lowbit.modules.plane_lowering import lower_plane
from lightning_lowbit.modules.plane_ops import exact_op
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.modules.stored import StoredBias, StoredWeight
from lightning_lowbit.modules.widths import WidthForm, WidthQuantizer
from lightning_lowbit.numerics.momentum import UpdateFormat
from lightning_lowbit.numerics.normalize import NormFormat
from lightning_lowbit.numerics.normalize_format import OFF
from lightning_lowbit.numerics.widths import Criterion, Policy
from lightning_lowbit.schemes.options import option_at, option_of, require_effects, require_joined, require_matches
from lightning_lowbit.schemes.values import value_milestones
from lightning_lowbit.schemes.wageubn_options import DEFAULTS, check_options, settings_of

if TYPE_CHECKING:
    from lightning_lowbit.graph.network import Flow
    from lightning_lowbit.graph.plan import Plan

__all__ = ["Wageubn"]

Backend = Literal["auto", "int8", "simulate", "reference", "cuda"]
_ACTIVATIONS = (Kind.RELU, Kind.ACTIVATION)
_SUMS = (Kind.ADD, Kind.CAT, Kind.AVG_POOL)
_SUM_BITS = 16  # of layers' results, where these are rounded


@dataclass(frozen=True)
class Wageubn(Scheme):
    """Fixed-point training: 8-bit operands of every product, integer momentum, batch norm on grids.

    A width of k bits is a sign and k - 1 bits behind the point; integer bits come on top, but for fixed_width.

    Args:
        preset: "recommended", "paper", "authors" (their code) or "pypi" (the package of that name: forward only).
        bits: what weight_bits, act_bits and the bits of e1 are if they are not given; 8 by itself.
        weight_bits: bits of weights, signed (2 to 16).
        act_bits: bits of activations and of what layers read.
        act_format: "fixed_width" (codes of act_bits, the unit follows the data) or "fixed_unit" (published: unit
            2^-(act_bits-1), the width follows the data).
        act_init: how many integer bits calibration gives: max, percentile, mse or kl_j.
        percentile: of the percentile.
        width_share: share of saturated values above which a tensor gets an integer bit more.
        width_patience: steps without use of the top bit after which it gets one less.
        io: what else is quantized between modules: "none", "outputs" (sums, concats, pools) or "strict" (every result,
            those of layers in 16 bits).
        weight_range: "one" (published: what is beyond +-1 is clipped), "fit" (each layer's power of two that holds its
            weights), "room" (up to 4 times that, at most what holds 1) or "auto": fit where weights come from
            elsewhere, else room.
        e1: errors that arrive at an activation: "shift8", another width, or "off".
        e2: errors at a layer's result, which enter both products: "flag8", "shift8", "flag16", "shift16" or "off".
        clip_to_one: e1 keeps the published code's largest code, one more than its bits hold.
        sync_range: all processes take the unit of errors from the largest value of all.
        norms: whether batch norms are quantized.
        mean_bits: bits of a batch norm's mean (2 to 24, or 32 for no grid; so are the four below).
        deviation_bits: bits of its standard deviation.
        xhat_bits: bits of its normalized value.
        gamma_bits: bits of its factor, in what it computes.
        beta_bits: bits of its offset.
        running_bits: of running statistics; 32 leaves them.
        norm_momentum: share of a batch in them; None takes each norm's own.
        bias_bits: of the biases of layers, which enter sums that are wider.
        gradient_bits: bits of the gradients that enter the update.
        momentum_bits: bits of its momentum factor.
        accumulator_bits: bits of what it keeps of earlier gradients.
        lr_bits: bits of its learning rate.
        stored_bits: bits of the weights that it adds to, of which layers see the leading weight_bits.
        exact: refuse widths with which the update would round.
        gradients: whether gradients of weights are quantized.
        update: "integer" momentum, "fake" (the user's optimizer, then the stored grid) or "float".
        lr_scale: times the optimizer's learning rate is that of the update: for an optimizer whose own rate is small.
        momentum: of the update; None takes that of the optimizer's group.
        clip_stored: stored weights stay within the range of the 8-bit ones.
        dr: ranges of quantized gradients, powers of two.
        dr_at: when each begins.
        rounding: of gradients: "stochastic" or "nearest".
        seed: of its random numbers.
        first_last: first and last layers stay "float", or are "int8".
        quantize_norms: when batch norms are quantized from; 0 with everything else.
        quantize_errors: the same for errors.
        quantize_gradients: the same for gradients of weights.
        freeze_widths: from when on integer bits stand still; None never.
        backend: of the integer products; "auto" is the fastest exact one.
        check: look at every tensor, and raise where one is off its grid: slow.
        overrides: options per module-path pattern: weight_bits, act_bits, act_format (also (total, integer) bits). The
            last two of a layer are those of what it reads; the path of an activation or a pool names what that gives.
    """

    name: ClassVar[str] = "wageubn"
    runs_norms: ClassVar[bool] = True
    integer_kernels: ClassVar[bool] = True

    preset: str | None = None
    bits: int | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    act_format: Policy | None = None
    act_init: Criterion = "max"
    percentile: float = 99.99
    width_share: float = 1e-4
    width_patience: int = 1000
    io: Literal["none", "outputs", "strict"] | None = None
    weight_range: Literal["auto", "one", "fit", "room"] | None = None
    e1: str | None = None
    e2: str | None = None
    clip_to_one: bool | None = None
    sync_range: bool = False
    norms: bool = True
    mean_bits: int = 16
    deviation_bits: int = 16
    xhat_bits: int | None = None
    gamma_bits: int = 8
    beta_bits: int = 8
    running_bits: int | None = None
    norm_momentum: float | None = None
    bias_bits: int | None = None
    gradient_bits: int = 15
    momentum_bits: int = 3
    accumulator_bits: int = 13
    lr_bits: int = 10
    stored_bits: int = 24
    exact: bool = True
    gradients: bool | None = None
    update: Literal["integer", "fake", "float"] | None = None
    lr_scale: float = 1.0
    momentum: float | None = None
    clip_stored: bool | None = None
    dr: tuple[int, ...] | None = None
    dr_at: tuple[Moment, ...] | None = None
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    seed: int = 0
    first_last: Literal["float", "int8"] | None = None
    quantize_norms: Moment = 0
    quantize_errors: Moment = 0
    quantize_gradients: Moment = 0
    freeze_widths: Moment | None = 0.9
    backend: Backend = "auto"
    check: bool = False
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = dict(DEFAULTS) if self.preset is None else DEFAULTS | settings_of(self.preset)
        if self.bits is not None:
            settings |= {"weight_bits": self.bits, "act_bits": self.bits}
            settings["e1"] = settings["e1"] if settings["e1"] == "off" else f"shift{self.bits}"
        for option, value in settings.items():
            if getattr(self, option) is None:
                object.__setattr__(self, option, value)
        object.__setattr__(self, "preset", None)  # spent, as bits are: two ways to say the same are equal
        object.__setattr__(self, "bits", None)
        for option in ("dr", "dr_at"):
            value = getattr(self, option)
            object.__setattr__(self, option, tuple(value) if isinstance(value, (tuple, list)) else (value,))
        check_options(self)

    def replace(self, **options: Any) -> Wageubn:
        if options.get("preset") is not None:  # says all anew that presets say
            options = {**dict.fromkeys((*DEFAULTS, "momentum", "norm_momentum")), **options}
        if options.get("bits") is not None:
            options = {"weight_bits": None, "act_bits": None, "e1": "off" if self.e1 == "off" else None, **options}
        return super().replace(**options)

    # -- formats -----------------------------------------------------------------------------------------------
    @property
    def norm_format(self) -> NormFormat:
        assert self.xhat_bits is not None
        return NormFormat(self.mean_bits, self.deviation_bits, self.xhat_bits, self.gamma_bits, self.beta_bits)

    @property
    def update_format(self) -> UpdateFormat:
        return UpdateFormat(
            self.gradient_bits, self.momentum_bits, self.accumulator_bits, self.lr_bits, self.stored_bits, self.exact
        )

    def error_form(self, option: str) -> ErrorForm | None:
        """How the errors of "e1" or "e2" are rounded; None where they are not."""
        return ErrorForm.parse(
            getattr(self, option), f"Wageubn: {option}", shared=self.sync_range, check=self.check,
            clip_to_one=option == "e1" and bool(self.clip_to_one),
        )  # fmt: skip

    def _width(self, site: Site) -> WidthForm:
        given = option_at(self, site, "act_format")
        total, integer = given if not isinstance(given, str) else (option_at(self, site, "act_bits"), None)
        kept: Policy = given if isinstance(given, str) else "fixed_width"  # type: ignore[assignment]  # checked
        return WidthForm(
            total, kept, self.act_init, self.percentile, self.width_share, self.width_patience, integer, self.check
        )

    # -- the seam ----------------------------------------------------------------------------------------------
    def adapted_to(self, root: nn.Module, pretrained: bool) -> Wageubn:
        seen = pretrained or any(has_seen_data(module) for module in root.modules())
        return self.replace(weight_range="fit" if seen else "room") if self.weight_range == "auto" else self

    def like(self, other: Scheme) -> Wageubn:
        decided = isinstance(other, Wageubn) and self.weight_range == "auto"
        return self.replace(weight_range=other.weight_range) if decided else self  # type: ignore[attr-defined]

    def leaves_float(self, site: Site, module: nn.Module) -> str | None:
        if self.first_last == "float" and (site.first or site.last):
            return f"{'first' if site.first else 'last'} layer, by first_last='float' ('int8' converts it)"
        return None

    def quantizer(self, site: Site) -> Quantizer | None:
        if site.role == "weight":
            chosen = "room" if self.weight_range == "auto" else self.weight_range
            return StoredWeight(site, option_of(self, site.path, "weight_bits"), chosen)  # type: ignore[arg-type]
        if site.role == "bias":
            return StoredBias(site, self.bias_bits or 16)
        if site.role == "error":
            form = self.error_form("e2")
            layer = site.op not in (Kind.BATCH_NORM, *_ACTIVATIONS, *_SUMS)
            return ErrorQuantizer(site, form) if form is not None and layer else None
        if site.role == "sum":
            momentum = self.norm_momentum
            grids = NormGrids(site, self.norm_format, self.running_bits or OFF, momentum, self.check)
            return grids if site.op == Kind.BATCH_NORM else None
        if site.role == "accumulator":
            return WidthQuantizer(site, WidthForm(_SUM_BITS)) if self.io == "strict" else None
        return self._activation(site)

    def _activation(self, site: Site) -> Quantizer | None:
        rectifies = site.op in _ACTIVATIONS and site.slot == "lowbit_output"
        leaves = rectifies or self.io == "strict"
        read = leaves or site.multiplied or (site.op in _SUMS and self.io != "none")
        wanted = {"input": site.source is None or site.dropped, "output": read, "operand": read, "result": leaves}
        if not wanted.get(site.role, False):
            return None
        return WidthQuantizer(site, self._width(site), self.error_form("e1") if rectifies else None)

    def batch_norm(self, site: Site, norm: nn.Module) -> str:
        return "island" if self.norms else "keep"

    def tied(self, root: nn.Module, flow: Flow, plan: Plan) -> list[list[str]]:
        """What is joined has one format, and so have layers with one weight; what is added has each its own."""
        return plan.joined() + [tie for tie in plan.ties if tie[0].endswith(".lowbit_weight")]

    def connect(self, root: nn.Module, flow: Flow, plan: Plan) -> list[str]:
        require_matches(type(self), self.overrides, plan)
        self._require_effects(root, plan)
        layers = {layer.path for layer in plan.layers}
        for call in flow.calls:
            if call.kind is not Kind.BATCH_NORM or call.path not in plan.islands:
                continue
            norm = root.get_submodule(call.path)
            grids = getattr(norm, "lowbit_accumulator", None)
            if isinstance(grids, NormGrids):
                grids.__dict__["norm"] = norm
                source = call.inputs[0].path if len(call.inputs) == 1 else None
                grids.__dict__["behind"] = root.get_submodule(source) if source in layers else None
        connect_sums(root, flow, plan)
        return []

    def _require_effects(self, root: nn.Module, plan: Plan) -> None:
        sites = [quantizer.site for _, quantizer in quantizers(root)]
        weights = [site for site in sites if site.role == "weight"]
        widths = [site for site in sites if site.role in ("input", "output", "operand", "result")]
        open_ = [site for site in widths if isinstance(option_at(self, site, "act_format"), str)]
        require_effects(self, plan, {"weight_bits": weights, "act_format": widths, "act_bits": open_})
        made = {site.key for site in open_}
        require_joined(self, plan, lambda s: option_at(self, s, "act_bits") if s.key in made else None)

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        if not layer.switch.quantizing or not layer.lowbit_weight.ready:
            return layer.quantized(x)  # type: ignore[no-any-return]  # float, or calibration
        return plane_layer(layer, x)

    def compute(self, layer: Any, *operands: Any, **settings: Any) -> Tensor:
        if isinstance(layer, LowBitBatchNorm):
            return fixed_norm(layer, *operands)
        if isinstance(layer, (LowBitAdd, LowBitAvgPool)):
            return exact_op(layer, *operands, **settings)
        return layer.op(*operands, **settings)  # type: ignore[no-any-return]  # layers and operations have op

    def lower(self, build: Builder, module: Any, *operands: Any, **settings: Any) -> Any:
        return lower_plane(build, module, *operands, **settings)

    def proves_sums(self, layer: Any) -> bool:
        return multiplies_integers(layer)

    def update_rule(self, modules: dict[str, nn.Module]) -> UpdateRule:
        from lightning_lowbit.schemes.wageubn_training import ClosedRule

        return ClosedRule(self, modules)

    def milestones(self) -> tuple[Milestone, ...]:
        assert self.dr is not None
        assert self.dr_at is not None
        return (
            Milestone(self.quantize_norms, "quantize_norms"),
            Milestone(self.quantize_errors, "quantize_errors"),
            Milestone(self.quantize_gradients, "quantize_gradients"),
            *value_milestones("dr", self.dr, self.dr_at),
            Milestone(self.freeze_widths, "freeze_widths"),
        )

    def activation_bits(self) -> int:
        return 16  # sums of 8-bit products: bfloat16 counts to 256 only
