"""F8Net: 8-bit fixed-point multiplication only (Jin et al., ICLR 2022, arXiv:2202.05239)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError, listed
from lightning_lowbit.graph.plan import Union
from lightning_lowbit.graph.units import FROM_OUTSIDE, EdgeClass, edge_classes
from lightning_lowbit.modules.base import Milestone, Moment, Scheme, Site, UpdateRule
from lightning_lowbit.modules.elementwise import LowBitAvgPool, LowBitOp
from lightning_lowbit.modules.fixed_point import average, classify, multiply, operate
from lightning_lowbit.modules.fixed_point_lowering import lower_layer, lower_operation
from lightning_lowbit.modules.fixed_point_operands import EvaluationBias, FraclenWeight, ResultUnit
from lightning_lowbit.modules.fixed_point_wiring import Wiring, keeps_six
from lightning_lowbit.modules.fraclen import FraclenInput, InputFormat, Ties
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.moments import check_moment
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.fraclen_choice import METRICS, SELECTORS
from lightning_lowbit.schemes.options import (
    check_bits,
    check_choice,
    check_flags,
    each_override,
    option_of,
    require_effects,
    require_matches,
)

if TYPE_CHECKING:
    from lightning_lowbit.graph.network import Flow
    from lightning_lowbit.graph.plan import Plan
    from lightning_lowbit.modules.lowering import Builder

__all__ = ["F8Net"]

Select = Literal["rms", "std", "mae", "grid", "histogram"]
_OVERRIDABLE = ("weight_bits", "act_bits")
_CLOSED_FORM_BITS = 8
_PIXEL_FRACLEN = 8  # pixels are n / 256
_LEAST_STRICT_BITS = 4


@dataclass(frozen=True)
class F8Net(Scheme):
    """Fixed-point numbers throughout: int8 and uint8 codes n 2^-fraclen, int32 sums, shifts, and no other scale.

    Fractional lengths follow the statistics of what passes. Tensors are counted in units of a trained clip alpha,
    which the weights on both sides take up, so that nothing is divided at run time.

    Args:
        bits: what weight_bits and act_bits are if they are not given; 8 by itself.
        weight_bits: bits of weights, signed (2 to 16).
        act_bits: bits of what layers read, unsigned behind a rectifier.
        select: how the fraclen of an activation is chosen: by its rms, std or mean magnitude (mae), or by a search for
            the least error, over all values (grid) or a histogram. Closed forms are for 8 bits; other widths search.
        weight_select: the same for weights.
        momentum: of the moving average that evaluation rounds to a fraclen.
        clip: train a clip alpha (PACT) for each edge class: tensors that are added or joined, and what only moves them.
        ties: what the readers of one edge class share: "shared", clip and fraclen; "realign", the clip, and a shift
            brings tensors from one fraclen to another; "reference", the clip, with the published units.
        ste: which values pass gradients: "strict" (published: none from the last codes and from what rounds to an
            unsigned 0) or "clip". Below 4 bits always "clip".
        rescale: factor on the last linear layer's products: "stddev" (keeps a float network's function), "constant"
            (published, for networks trained with it) or "none".
        bias: "int32" on the products' grid in evaluation, or "float".
        avgpool: "exact" division; "shift" by a power of two, the rest in the weights that read it; "reference" without.
        pixels: the network's input is n / 256 and keeps 8 fraction bits; else it is signed and has its own fraclen.
        alpha_lr: learning rate of the clips; None takes that of the optimizer that holds their layers' weights.
        train: "all", or "statistics": weights and clips stand still, batch norms and fraclens follow the batches.
        freeze_fraclen: from when on fraclens stand still; None never.
        freeze_batch_norm: when folding goes over from batch to moving statistics.
        warmup: when quantizers start in training from scratch.
        floating: train the float network with its clips, as the published recipes do first.
        preset: "recommended", or "reference" with the published code's order: averages move within the forward.
        per_channel: in "reference", one fraclen a channel.
        own_average: in "reference", whether each reader has a moving average of its own.
        overrides: weight_bits and act_bits per module-path pattern, those of the layer that reads: {"fc": {"act_bits":
            4}} is 4 bits for what fc reads.

    Fractions in ``freeze_*`` count from the start of quantization to the end of the run.
    """

    name: ClassVar[str] = "f8net"

    bits: int | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    select: Select = "rms"
    weight_select: Select = "grid"
    momentum: float = 0.1
    clip: bool = True
    ties: Ties = "shared"
    ste: Literal["strict", "clip"] = "strict"
    rescale: Literal["stddev", "constant", "none"] = "stddev"
    bias: Literal["int32", "float"] = "int32"
    avgpool: Literal["exact", "shift", "reference"] = "exact"
    pixels: bool = False
    alpha_lr: float | None = None
    train: Literal["all", "statistics"] = "all"
    freeze_fraclen: Moment | None = 0.5
    freeze_batch_norm: Moment | None = 0.75
    warmup: Moment = 0.3
    floating: bool = False
    preset: Literal["recommended", "reference"] = "recommended"
    per_channel: bool = False
    own_average: bool = True
    overrides: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base = 8 if self.bits is None else self.bits
        for option in ("weight_bits", "act_bits"):
            if getattr(self, option) is None:
                object.__setattr__(self, option, base)
            check_bits(type(self), option, getattr(self, option))
        object.__setattr__(self, "bits", None)  # spent: two ways to say the same are equal
        for option in ("weight_select", "select"):
            if getattr(self, option) not in SELECTORS:
                raise ConfigError(f"F8Net({option}={getattr(self, option)!r}): expected one of {', '.join(SELECTORS)}.")
        for option in ("ties", "ste", "rescale", "bias", "avgpool", "train", "preset"):
            check_choice(type(self), option, getattr(self, option))
        for option in ("warmup", "freeze_fraclen", "freeze_batch_norm"):
            check_moment(f"F8Net: {option}", getattr(self, option))
        check_flags(self, "clip", "pixels", "floating", "per_channel", "own_average")
        if not _is_number(self.momentum) or not 0 < self.momentum <= 1:
            raise ConfigError(f"F8Net(momentum={self.momentum!r}): expected a number in (0, 1].")
        if self.alpha_lr is not None and not (_is_number(self.alpha_lr) and 0 <= self.alpha_lr < float("inf")):
            raise ConfigError(f"F8Net(alpha_lr={self.alpha_lr!r}): expected a learning rate, or None.")
        if self.warmup is None:
            raise ConfigError("F8Net(warmup=None): expected a moment, 0 for at once.")
        if self.preset != "reference" and (self.per_channel or not self.own_average):
            raise ConfigError(
                f"F8Net(per_channel={self.per_channel}, own_average={self.own_average}): expected preset='reference' "
                "with these; leave them out, or take F8Net.reference(...)."
            )
        widths = {_known(self.weight_bits), _known(self.act_bits)}
        for pattern, option, value in each_override(type(self), self.overrides, _OVERRIDABLE):
            check_bits(type(self), f"overrides[{pattern!r}].{option}", value)
            widths.add(value)
        if self.per_channel and widths != {_CLOSED_FORM_BITS}:
            raise ConfigError(
                f"F8Net(per_channel=True): got widths of {', '.join(map(str, sorted(widths)))} bits, expected "
                f"{_CLOSED_FORM_BITS}, which its closed forms are for. Leave per_channel out."
            )

    def replace(self, **options: Any) -> F8Net:
        if "bits" in options:  # says anew what was settled when this one was made
            options = {"weight_bits": None, "act_bits": None, **options}
        return super().replace(**options)

    @classmethod
    def conventional(cls, **options: Any) -> F8Net:
        """Fine-tuning of weights, batch norms and clips: the published long recipe, from any float network."""
        return cls(**options)

    @classmethod
    def tiny(cls, **options: Any) -> F8Net:
        """Tiny fine-tuning: no clips, weights stand still; N training batches renew batch norms and fraclens."""
        settings: dict[str, Any] = {
            "clip": False, "select": "grid", "train": "statistics", "rescale": "none",
            "freeze_fraclen": None, "freeze_batch_norm": None,
        }  # fmt: skip
        return cls(**{**settings, **options})

    @classmethod
    def reference(cls, **options: Any) -> F8Net:
        """As the published code computes, its unaligned residual units included."""
        settings: dict[str, Any] = {
            "preset": "reference", "ties": "reference", "select": "std", "weight_select": options.get("select", "std"),
            "rescale": "constant", "freeze_fraclen": None, "freeze_batch_norm": None,
        }  # fmt: skip
        return cls(**{**settings, **options})

    # -- the seam ----------------------------------------------------------------------------------------------
    def quantizer(self, site: Site) -> Quantizer | None:
        if site.role == "input":
            return self._input(site) if self.clip or not self.floating else None
        if _is_operand(site):
            return FraclenInput(site, self._form(site)) if site.read else None
        if site.role == "unit":
            return None if self._rescales(site) else ResultUnit(site)
        if self.floating:
            return None
        if site.role == "weight":
            bits = self._bits(site.path, "weight_bits")
            select, small = self._select(self.weight_select, bits), self.preset != "reference"
            return FraclenWeight(site, bits, select, self._ste(bits), self.per_channel, small)
        integer = self.bias == "int32" and not self.per_channel
        both = self._bits(site.path, "act_bits") + self._bits(site.path, "weight_bits")
        return EvaluationBias(site, both) if site.role == "bias" and integer else None

    def _input(self, site: Site) -> FraclenInput:
        pixels = site.first and self.pixels
        fixed = _PIXEL_FRACLEN if pixels else None
        made = FraclenInput(
            site,
            self._form(site, rounding=not (pixels and self.preset == "reference")),
            fixed,
            absorbs=not self._rescales(site),
        )
        if pixels:
            made.set_signed(False)
        return made

    def _form(self, site: Site, rounding: bool = True) -> InputFormat:
        bits = self._bits(site.path, "act_bits")
        return InputFormat(
            bits, self._select(self.select, bits), self._ste(bits) if rounding else "clip", self.ties,
            self.own_average, self.momentum,
            at_once=self.preset == "reference", per_channel=self.per_channel, rounding=rounding and not self.floating,
        )  # fmt: skip

    def _bits(self, path: str, option: str) -> int:
        return int(option_of(self, path, option))

    def _select(self, select: str, bits: int) -> str:
        return "grid" if select in METRICS and bits != _CLOSED_FORM_BITS else select

    def _ste(self, bits: int) -> str:
        return self.ste if bits >= _LEAST_STRICT_BITS else "clip"

    def _rescales(self, site: Site) -> bool:
        return site.last and site.op == "linear" and (self.rescale != "none" or self.preset == "reference")

    def batch_norm(self, site: Site, norm: nn.Module) -> str:
        return "fold"

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        source = layer.lowbit_input
        if source is not None and layer.switch.quantizing and source.ready and not source.absorbs:
            return classify(layer, x, self.rescale)
        return layer.quantized(x)  # type: ignore[no-any-return]

    def compute(self, layer: Any, *operands: Any, **settings: Any) -> Tensor:
        if isinstance(layer, LowBitLayer):
            return multiply(layer, *operands)
        shifts = self.avgpool == "reference" or layer.__dict__.get("by_shift")
        if shifts and isinstance(layer, LowBitAvgPool) and layer.switch.quantizing:
            return average(layer, *operands, **settings)
        return operate(layer, *operands, **settings)

    def lower(self, build: Builder, module: Any, *operands: Any, **settings: Any) -> Any:
        if isinstance(module, LowBitLayer):
            return lower_layer(build, module, operands[0], self.rescale)
        if isinstance(module, LowBitOp):
            by_shift = self.avgpool == "reference" or bool(module.__dict__.get("by_shift"))
            return lower_operation(build, module, *operands, by_shift=by_shift, **settings)
        return module.lower(build, *operands, **settings)

    def tied(self, root: nn.Module, flow: Flow, plan: Plan) -> list[list[str]]:
        """Edge classes in one unit: the reader that runs first, the results that are counted in it, other readers."""
        clipped = self._clipped(edge_classes(root, flow, plan), flow)
        return [tie for edges in clipped for tie in self._ties_of(edges, plan)]

    def _clipped(self, classes: list[EdgeClass], flow: Flow) -> list[EdgeClass]:
        """Edge classes with a trained clip."""
        return [edges for edges in classes if self.clip and self._unclipped(edges, flow) is None]

    def _unclipped(self, edges: EdgeClass, flow: Flow) -> str | None:
        """Why an edge class can have no trained clip; None where it can."""
        if edges.open is not None:
            return edges.open
        if six := keeps_six(edges, flow):
            return f"{six} has readers that do not clip"
        if edges.rectified_at_six and len({self._bits(path, "act_bits") for path in edges.consumers}) > 1:
            return f"{edges.rectified_at_six[0].name} has readers of several widths, whose clips are not all at 6"
        return None

    def _leader(self, edges: EdgeClass) -> str:
        """The reader whose clip the unit is made of: the first one, at mixed widths the first of the narrowest.

        In the unit of a narrow one wider codes have room behind the point; the other way round a fraclen could have to
        be negative. Behind a mean values are small, whatever the width.
        """
        behind = {path for pool in edges.pools for path in pool.consumers}
        widths = {path: self._bits(path, "act_bits") for path in edges.consumers}
        if len(set(widths.values())) == 1:
            return edges.consumers[0]
        return min(widths, key=lambda path: (path in behind, widths[path]))

    def _ties_of(self, edges: EdgeClass, plan: Plan) -> list[list[str]]:
        inputs = [f"{path}.lowbit_input" for path in edges.consumers]
        if self.ties != "reference":
            first = f"{self._leader(edges)}.lowbit_input"
            results = [f"{path}.lowbit_unit" for path in edges.producers]
            return [[first, *results, *(key for key in inputs if key != first)]]
        last = {layer.path for layer in plan.layers if layer.last and layer.op == "linear"}
        union, ties = Union(), defaultdict[str, list[str]](list)
        for path in edges.consumers:  # published: through identity skips alone, and never with the classifier
            union.join([path, *(other for other in edges.skipped[path] if not last & {path, other})])
        for path, own in zip(edges.consumers, inputs, strict=True):
            self._require_one_width(path, union.find(path))
            results = [f"{p}.lowbit_unit" for p, following in edges.following.items() if following == path]
            ties[union.find(path)] += [own, *results]
        return list(ties.values())

    def _require_one_width(self, path: str, other: str) -> None:
        bits, others = self._bits(path, "act_bits"), self._bits(other, "act_bits")
        if bits != others:
            raise ConfigError(
                f"F8Net(ties='reference', overrides=...): got {bits} act_bits for {path} and {others} for {other}, "
                "expected one width: published units are made of one clip and one largest code. Give both the same "
                "act_bits, or take ties='shared'."
            )

    def _require_readers(self, plan: Plan) -> None:
        """ConfigError for a width of what nothing reads, such as one on the path of the layer before."""
        layers = [Site(layer.path, "weight", layer.op) for layer in plan.layers]
        operands = [replace(site, readers=()) for site in plan.sites if _is_operand(site) and site.read]
        require_effects(self, plan, {"weight_bits": layers, "act_bits": layers + operands})

    def connect(self, root: nn.Module, flow: Flow, plan: Plan) -> list[str]:
        require_matches(type(self), self.overrides, plan)
        self._require_readers(plan)
        classes = edge_classes(root, flow, plan)
        wiring, clipped = Wiring(root, flow, plan), self._clipped(classes, flow)
        wiring.absorb_before_norms()
        wiring.clip(clipped, private=self.ties != "reference")
        wiring.narrow()
        wiring.leave_rectifiers(clipped, sums=self.preset != "reference")
        notes = wiring.shift_means(classes) if self.avgpool == "shift" else []
        without: dict[str, list[str]] = defaultdict(list)
        for edges in classes if self.clip else ():
            if edges not in clipped and edges.consumers and edges.open != FROM_OUTSIDE:
                without[self._unclipped(edges, flow) or ""] += edges.consumers
        for reason, paths in without.items():
            notes.append(f"no trained clip on what {listed(paths)} read{'s' * (len(paths) == 1)}: {reason}")
        return notes

    def update_rule(self, modules: dict[str, nn.Module]) -> UpdateRule:
        from lightning_lowbit.schemes.f8net_training import FraclenRule

        return FraclenRule(self, modules)

    def start(self, pretrained: bool) -> Moment:
        return 0 if pretrained else self.warmup

    def milestones(self) -> tuple[Milestone, ...]:
        return (
            Milestone(self.freeze_fraclen, "freeze_fraclen"),
            Milestone(self.freeze_batch_norm, "freeze_batch_norm"),
        )

    def activation_bits(self) -> int:
        return 16  # sums of 8-bit products: bfloat16 counts to 256 only


def _is_operand(site: Site) -> bool:
    """Whether sums, or nothing that is converted, read it, and float code or a mean made it."""
    made = site.slot.startswith("lowbit_operand") or site.op in ("avg_pool", "activation")
    return site.role == "operand" and made


def _known(bits: int | None) -> int:
    assert bits is not None
    return bits


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
