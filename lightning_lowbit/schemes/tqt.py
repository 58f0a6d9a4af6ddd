"""TQT: trained power-of-two thresholds (Jain, Gural, Wu, Dick, MLSys 2020, arXiv:1903.08066)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import Milestone, Moment, Scheme, Site, UpdateRule
from lightning_lowbit.modules.elementwise import LowBitAvgPool
from lightning_lowbit.modules.exact import exact_mean, exact_product, narrow_for_others
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.moments import check_moment
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.modules.thresholds import (
    AccumulatorQuantizer,
    BiasQuantizer,
    Initialization,
    ThresholdQuantizer,
)
from lightning_lowbit.numerics.rounding import Rounding
from lightning_lowbit.schemes.options import (
    check_bits,
    check_choice,
    each_override,
    option_of,
    pattern_of,
    require_effects,
    require_joined,
    require_matches,
)

if TYPE_CHECKING:
    from lightning_lowbit.graph.network import Flow
    from lightning_lowbit.graph.plan import Plan

__all__ = ["Tqt"]

Mode = Literal["static", "retrain_wt", "retrain_wt_th", "retrain_th", "label_free"]
_OVERRIDABLE = ("weight_bits", "act_bits", "input_bits", "operand_bits", "acc_bits")


@dataclass(frozen=True)
class Tqt(Scheme):
    """Uniform quantizers without zero point; scales are powers of two, clipping thresholds are trained.

    Args:
        bits: what weight_bits and act_bits are if they are not given; 8 by itself.
        weight_bits: bits of weights, signed (2 to 16).
        act_bits: bits of what layers read (unsigned behind a rectifier).
        input_bits: bits of the network's input, signed.
        operand_bits: bits of tensors that feed an add, a concat or an average pool, and of pooled features.
        first_last_weight_bits: least bits of the first and the last layer's weights, where overrides name none.
        bias: "int32" on the grid of the products, "own" with a threshold of its own at bias_bits, or "float".
        bias_bits: bits of a bias with its own threshold.
        acc_bits: bits of a quantizer on the sum of products (16 in the paper); None leaves the full sum.
        mode: what is trained after calibration: weights and thresholds ("retrain_wt_th"), one of them, nothing
            ("static"), or blocks against the float network without labels ("label_free").
        weight_init: threshold initialization of weights: mse (over exponents), max, 3sd, klj or percentile.
        act_init: the same for activations.
        percentile: of the percentile initialization.
        act_round: tie rule of activations: half_even, half_up or dpu.
        narrow: leave out the most negative weight code.
        threshold_optimizer: private optimizer of the thresholds: adam or normed_sgd.
        threshold_lr: its learning rate.
        threshold_beta2: its second-moment decay.
        threshold_schedule: of its learning rate over the quantized part of the run: cosine, staircase or constant.
        lr_step: steps between two staircase cuts by half.
        freeze_thresholds: from when on thresholds freeze one after the other; None never.
        freeze_thresholds_end: when the last one is frozen.
        freeze_batch_norm: when folding goes over from batch to moving statistics.
        warmup: when quantizers start in training from scratch.
        reconstruct_steps: Adam steps per block in mode "label_free".
        reconstruct_lr: learning rate of the weights there; thresholds take threshold_lr.
        overrides: options per module-path pattern, e.g. {"layer3.*": {"weight_bits": 8}}: weight_bits, act_bits,
            input_bits, operand_bits, acc_bits. act_bits of a layer are those of what it reads; the path of an
            activation, a norm or a pool names what that gives.

    Fractions in ``freeze_*`` count from the start of quantization to the end of the run.
    """

    name: ClassVar[str] = "tqt"

    bits: int | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    input_bits: int = 8
    operand_bits: int = 8
    first_last_weight_bits: int = 8
    bias: Literal["int32", "own", "float"] = "int32"
    bias_bits: int = 16
    acc_bits: int | None = None
    mode: Mode = "retrain_wt_th"
    weight_init: Initialization = "mse"
    act_init: Initialization = "mse"
    percentile: float = 99.99
    act_round: Literal["half_even", "half_up", "dpu"] = "half_even"
    narrow: bool = False
    threshold_optimizer: Literal["adam", "normed_sgd"] = "adam"
    threshold_lr: float = 1e-2
    threshold_beta2: float = 0.999
    threshold_schedule: Literal["cosine", "staircase", "constant"] = "cosine"
    lr_step: int = 1000
    freeze_thresholds: Moment | None = 0.5
    freeze_thresholds_end: Moment = 0.9
    freeze_batch_norm: Moment | None = 0.5
    warmup: Moment = 0.3
    reconstruct_steps: int = 200
    reconstruct_lr: float = 1e-5
    overrides: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base = 8 if self.bits is None else self.bits
        for option in ("weight_bits", "act_bits"):
            if getattr(self, option) is None:
                object.__setattr__(self, option, base)
        object.__setattr__(self, "bits", None)  # spent: two ways to say the same are equal
        for option in (*_OVERRIDABLE, "first_last_weight_bits", "bias_bits"):
            value = getattr(self, option)
            if value is not None:
                check_bits(type(self), option, value)
        for option in ("warmup", "freeze_batch_norm", "freeze_thresholds", "freeze_thresholds_end"):
            check_moment(f"Tqt: {option}", getattr(self, option))
        for pattern, option, value in each_override(type(self), self.overrides, _OVERRIDABLE):
            check_bits(type(self), f"overrides[{pattern!r}].{option}", value)
        for option in (
            "mode",
            "weight_init",
            "act_init",
            "act_round",
            "bias",
            "threshold_optimizer",
            "threshold_schedule",
        ):
            check_choice(type(self), option, getattr(self, option))

    def replace(self, **options: Any) -> Tqt:
        if "bits" in options:  # says anew what was settled when this one was made
            options = {"weight_bits": None, "act_bits": None, **options}
        return super().replace(**options)

    @classmethod
    def paper(cls, batch_size: int, **options: Any) -> Tqt:
        """The published recipe (section 7): absolute steps scaled by 24 / batch_size."""
        scale = 24 / batch_size
        settings: dict[str, Any] = {
            "weight_init": "3sd",
            "act_init": "klj",
            "acc_bits": 16,
            "threshold_schedule": "staircase",
            "lr_step": max(1, round(1000 * scale)),
            "freeze_thresholds": f"{round(1000 * scale)} steps",
            "freeze_batch_norm": 1,
        }
        return cls(**{**settings, **options})

    # -- the seam ----------------------------------------------------------------------------------------------
    def quantizer(self, site: Site) -> Quantizer | None:
        rounding, train = Rounding(self.act_round), self.mode in ("retrain_wt_th", "retrain_th", "label_free")
        if site.role == "weight":
            bits = option_of(self, site.path, "weight_bits")
            if (site.first or site.last) and pattern_of(self, site.path, "weight_bits") is None:
                bits = max(bits, self.first_last_weight_bits)
            return ThresholdQuantizer(
                site, bits, self.weight_init, self.percentile, Rounding.HALF_EVEN, train, self.narrow
            )
        if site.role == "bias":
            if self.bias == "float":
                return None
            own = self.bias == "own"
            acc_bits = option_of(self, site.path, "acc_bits")
            return BiasQuantizer(site, self.bias_bits if own else (acc_bits or 32), own, train)
        if site.role == "accumulator":
            acc_bits = option_of(self, site.path, "acc_bits")
            return (
                None
                if acc_bits is None
                else AccumulatorQuantizer(site, acc_bits, self.act_init, self.percentile, rounding, train)
            )
        if site.role in ("input", "output", "operand"):
            bits = self._activation_bits(site)
            if site.arrives is not None and self._passes(site, bits):
                return None  # it arrives on a grid that is coarse enough
            return ThresholdQuantizer(site, bits, self.act_init, self.percentile, rounding, train)
        return None  # errors and weight gradients are float, straight through the rounding

    def connect(self, root: nn.Module, flow: Flow, plan: Plan) -> list[str]:
        require_matches(type(self), self.overrides, plan)
        self._require_effects(plan)
        narrow_for_others(root, flow, plan)
        return []

    def compute(self, layer: Any, *operands: Any, **settings: Any) -> Tensor:
        if isinstance(layer, LowBitLayer):
            return exact_product(layer, *operands)
        if isinstance(layer, LowBitAvgPool):
            return exact_mean(layer, *operands, **settings)
        return layer.op(*operands, **settings)  # type: ignore[no-any-return]  # operations have op

    def batch_norm(self, site: Site, norm: nn.Module) -> str:
        return "fold"

    def update_rule(self, modules: dict[str, nn.Module]) -> UpdateRule:
        from lightning_lowbit.schemes.tqt_training import ThresholdRule

        return ThresholdRule(self, modules)

    def start(self, pretrained: bool) -> Moment:
        return 0 if pretrained or self.mode == "label_free" else self.warmup

    def reconstruction(self) -> dict[str, Any] | None:
        if self.mode != "label_free":
            return None
        return {"steps": self.reconstruct_steps, "lr": self.reconstruct_lr, "threshold_lr": self.threshold_lr}

    def milestones(self) -> tuple[Milestone, ...]:
        frozen = self.mode in ("static", "retrain_th", "label_free")
        return (
            Milestone(0 if frozen else self.freeze_batch_norm, "freeze_batch_norm"),
            Milestone(self.freeze_thresholds, "freeze_ranges"),
            Milestone(None if self.freeze_thresholds is None else self.freeze_thresholds_end, "ranges_frozen"),
        )

    def activation_bits(self) -> int:
        options = ("act_bits", "input_bits", "operand_bits", "weight_bits", "first_last_weight_bits", "acc_bits")
        given = [bits for options in self.overrides.values() for bits in options.values()]
        return max([getattr(self, option) or 0 for option in options] + given)

    # -- bits --------------------------------------------------------------------------------------------------
    def _activation_bits(self, site: Site) -> int:
        """Bits of a tensor. ``act_bits`` of its own path counts wherever its own option is not named."""
        option = self._option(site)
        if pattern_of(self, site.path, option) is None and pattern_of(self, site.path, "act_bits") is not None:
            option = "act_bits"
        bits = int(option_of(self, site.path, option))
        if site.role != "output" or pattern_of(self, site.path, option) is not None:
            return bits
        # Readers may widen or narrow what only they read; pooled features if each of them is named.
        if option == "act_bits" or all(pattern_of(self, path, "act_bits") is not None for path in site.readers):
            return max((int(option_of(self, path, "act_bits")) for path in site.readers), default=bits)
        return bits

    def _option(self, site: Site) -> str:
        """The option that a tensor's bits come from."""
        if site.role == "operand" or site.op == "avg_pool":
            return "operand_bits"
        return "input_bits" if site.role == "input" and site.first else "act_bits"

    def _named(self, site: Site) -> str | None:
        """The pattern that gives a tensor its bits."""
        own = pattern_of(self, site.path, self._option(site))
        return pattern_of(self, site.path, "act_bits") if own is None else own

    def _passes(self, site: Site, bits: int) -> bool:
        """Whether a layer reads a tensor on the grid that it arrives on."""
        arrives = site.arrives
        assert arrives is not None
        pooled = arrives.role == "output" and arrives.op == "avg_pool"
        follows = pooled or pattern_of(self, arrives.path, "act_bits") is not None
        return (follows and self._named(site) is None) or bits >= self._activation_bits(arrives)

    def _require_effects(self, plan: Plan) -> None:
        sites = [replace(site, readers=()) for site in plan.sites]  # who reads has an input of that path
        layers = [Site(layer.path, "weight", layer.op) for layer in plan.layers]
        own = {option: [site for site in sites if self._option(site) == option] for option in _OVERRIDABLE}
        own["act_bits"] += [site for site in sites if pattern_of(self, site.path, self._option(site)) is None]
        require_effects(self, plan, own | {"weight_bits": layers, "acc_bits": layers})
        require_joined(self, plan, self._activation_bits)
        results = {site.path for site in sites if site.slot == "lowbit_output"}
        for site in sites:
            if site.arrives is None or self._named(site) is None or site.path in results:
                continue
            bits, most = self._activation_bits(site), self._activation_bits(site.arrives)
            if bits > most:
                raise ConfigError(
                    f"Tqt(overrides=...): got {bits} bits for what {site.path} reads, which is {site.arrives.path} on "
                    f"{most} bits, expected no more. Widen that, {{{site.arrives.path!r}: {{'act_bits': {bits}}}}}, or "
                    f"leave {site.path} to it."
                )
