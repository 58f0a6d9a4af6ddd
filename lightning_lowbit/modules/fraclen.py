"""Fixed-point quantizers whose fractional lengths follow statistics, and the units that tensors travel in (F8Net)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_lowbit.modules.base import Site
from lightning_lowbit.modules.lowering import Snap, refuse
from lightning_lowbit.modules.observed import ObservedQuantizer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.exponent import pow2
from lightning_lowbit.numerics.fraclen import fix_quant, largest_code, largest_fraclen
from lightning_lowbit.numerics.fraclen_choice import METRICS, choose, measure
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.observers import AllReduce, RangeObserver
from lightning_lowbit.numerics.ranges import exponent_candidates, mse_by_exponent, threshold_mse_exponent

__all__ = ["ALPHA_MIN", "FraclenInput", "InputFormat", "Ties", "beyond", "grid_of", "tell_range"]

Ties = Literal["shared", "realign", "reference"]

ALPHA_MIN = 1e-3
"""Least clip: a producer divides by it."""

_FIRST_FRACLEN = 6.0  # before anything was seen


@dataclass(frozen=True)
class InputFormat:
    """How a tensor that layers read is quantized; within a network only widths differ, and what follows from them.

    Attributes:
        bits: of a code.
        select: statistic that fractional lengths are chosen by (numerics.fraclen_choice.SELECTORS).
        ste: gradient mask, strict or clip.
        ties: what the readers of one edge class share. shared: clip and fractional length; realign: the clip, and
            tensors move by a power of two where fractional lengths differ; reference: the clip, and they do not.
        own_average: in "reference", whether the moving average is each reader's own.
        momentum: of the moving average where it moves in the forward itself (``at_once``).
        at_once: the average moves in the forward, not with the optimizer's step.
        per_channel: one fractional length a channel.
        rounding: False only clips: the float network that is trained with the clip.
    """

    bits: int = 8
    select: str = "rms"
    ste: str = "strict"
    ties: Ties = "shared"
    own_average: bool = True
    momentum: float = 0.1
    at_once: bool = False
    per_channel: bool = False
    rounding: bool = True


class FraclenInput(ObservedQuantizer):
    """A tensor that a layer reads (F8Net sections 3.3 and 4).

        q     = fix_quant(x; fraclen)              x in the unit of its edge class
        unit  = 2^fraclen |alpha| / M              fraclen: moving average, rounded; 1 without alpha

    In training the fraclen is that of the batch. All members of a tie share alpha (one Parameter under every member's
    path); what else they share is the format's.

    Args:
        site: where it stands.
        form: how it quantizes.
        fixed: a fraclen that nothing moves (pixels).
        absorbs: whether the layer's weights take up the unit; a rescaled classifier multiplies by it instead.

    Attributes:
        fraclen: moving average, float32 [1], or [C] per channel; of a private one how far it is from its leader's, so
            that it stays what it is when the leader's, and with it the unit, moves.
        current: of the present batch, not saved.
        sums: statistics since the last optimizer step, not saved.
        private: whether it has a fraclen of its own where its tie shares one: means are smaller than what they are of,
            and codes of another width end elsewhere.
        limit: largest clip, where that does the work of a rectifier with an upper bound.
        reader: the layer that multiplies what it gives; None of an operand.
        mean: the mean by a shift that it reads (fixed_point.average), with the factor that weights make up for.
        frozen: whether the fraclen stands still.
        inherited: whether its clip came with the weights.
        ran: whether a training batch passed since the last optimizer step.
    """

    fraclen: Tensor
    current: Tensor
    sums: Tensor
    alpha: nn.Parameter | None

    def __init__(self, site: Site, form: InputFormat, fixed: int | None = None, absorbs: bool = True) -> None:
        super().__init__(site)
        self.form, self.fixed, self.absorbs = form, fixed, absorbs
        channels = site.channels if form.per_channel and site.channels is not None else 1
        self.register_buffer("fraclen", torch.full((channels,), _FIRST_FRACLEN if fixed is None else float(fixed)))
        self.register_buffer("current", self.fraclen.clone(), persistent=False)
        self.register_buffer("sums", torch.zeros_like(self._measure(torch.zeros(1, channels))), persistent=False)
        self.register_parameter("alpha", None)
        self.limit: float | None = None
        self.private = False
        self.__dict__["mean"] = self.__dict__["reader"] = None
        self.frozen = self.ran = self.inherited = False

    # -- formats ------------------------------------------------------------------------------------------
    @property
    def qmax(self) -> int:
        return largest_code(self.form.bits, self.signed)

    @property
    def leader(self) -> FraclenInput:
        """The member of its tie whose clip the unit is made of: of those as narrow as it, the one that runs first."""
        return next(member for member in self.group if isinstance(member, FraclenInput))

    @property
    def relative(self) -> bool:
        """Whether it keeps how far its fraclen is from its leader's."""
        return self.private and self.leader is not self

    @property
    def chooser(self) -> FraclenInput:
        """The member that chooses its fraclen in a training batch."""
        return self.leader if self.form.ties == "shared" and not self.private else self

    @property
    def counted(self) -> FraclenInput:
        """The member whose fraclen the unit goes by."""
        return self.leader if self.form.ties == "shared" or self.private else self

    @property
    def average(self) -> FraclenInput:
        """The member whose moving average it uses."""
        return self.chooser if self.form.own_average else self.leader

    def rounded(self) -> Tensor:
        """The fraclen that evaluation, and the unit in all modes, goes by."""
        if self.fixed is None and not self.form.rounding:  # float with a clip: none is chosen, and none is needed
            return torch.full_like(self.fraclen, _FIRST_FRACLEN)
        fraclen = self.average.fraclen.detach().round()
        if self.relative:
            fraclen = self.leader.rounded() + fraclen
        return fraclen.clamp(0, largest_fraclen(self.form.bits, self.signed))

    def unit(self) -> Tensor | None:
        """What 1 in the tensor is worth, 0-dim or [C] per channel; None is 1."""
        if self.alpha is None or not self.ready or not self.switch.quantizing:
            return None
        unit = pow2(self.counted.rounded().to(torch.int32), self.alpha.dtype) * self.clip() / self.counted.qmax
        return unit if unit.numel() > 1 else unit.reshape(())

    def clip(self) -> Tensor:
        assert self.alpha is not None
        return self.alpha.abs().clamp(min=ALPHA_MIN)

    def exponent(self) -> Tensor:
        exponent = -self.rounded().to(torch.int32)
        return exponent if exponent.numel() > 1 else exponent.reshape(())

    def grid(self) -> Grid:
        return grid_of(self.exponent(), self.form.bits, self.signed, axis=1)

    def as_snap(self) -> Snap:
        if self.form.per_channel:
            raise refuse(
                self.site.key, "it has a fractional length per channel", "Train with F8Net(per_channel=False)."
            )
        if not self.form.rounding and self.fixed is None:
            raise refuse(self.site.key, "it clips and does not round", "Convert with F8Net(floating=False).")
        return super().as_snap()  # of pixels that are not rounded too: they are codes already

    def moved(self) -> int:
        """By how much its codes' fraclen exceeds the one that they are rounded to (``ties="realign"``)."""
        realigned = self.form.ties == "realign" and self.alpha is not None and self.counted is not self.leader
        return int(self.rounded()) - int(self.leader.rounded()) if realigned else 0

    # -- forward ------------------------------------------------------------------------------------------
    def forward(self, x: Tensor, rectify: bool = False) -> Tensor:
        reader = self.__dict__["reader"]  # sums come in float64, to an open one too
        y = super().forward(x, rectify)
        return y if reader is None else y.to(reader.weight.dtype)

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        form, x = self.form, self._realigned(x)
        if not form.rounding and self.alpha is None:
            return x if self.signed else torch.relu(x)  # there is nothing to clip
        return fix_quant(
            x, self._fraclen(x), bits=form.bits, signed=self.signed, ste=form.ste, axis=1, rounding=form.rounding
        )

    def _realigned(self, x: Tensor) -> Tensor:
        """In its own unit: codes stay, and their label moves by the difference of two fraclens."""
        if self.form.ties != "realign" or self.alpha is None or self.counted is self.leader:
            return x
        return x * pow2((self.leader.rounded() - self.rounded()).to(torch.int32), x.dtype)

    def _fraclen(self, x: Tensor) -> Tensor:
        if not self.training or self.frozen or self.fixed is not None or not self.form.rounding:
            return self.rounded()
        source = self.chooser
        if source is self:
            self._follow(x.detach(), torch.is_grad_enabled())
        return source.current

    @torch.no_grad()
    def _follow(self, x: Tensor, learning: bool) -> None:
        """Choose by a training batch, and learn from it where there are gradients; by nothing, nothing changes."""
        sums = self._measure(x, None if self.form.at_once or self.relative else self.unit())
        chosen = choose(sums, self.form.select, self.form.bits, self.signed).to(self.fraclen.dtype)
        known = sums[..., 0] > 0
        self.current.copy_(torch.where(known, chosen, self.rounded()))
        if not learning:
            return
        if self.form.at_once:
            average = self.average.fraclen
            average.lerp_(torch.where(known, chosen, average), self.form.momentum)
        else:
            self.ran = True
            self.sums.add_(sums)

    def _measure(self, x: Tensor, unit: Tensor | None = None) -> Tensor:
        """Statistics in true units: by those of the stream a fraclen, which is part of its unit, would drive itself."""
        axis = 1 if self.form.per_channel else None
        select = self.form.select
        as_it_comes = self.form.at_once and select in METRICS  # published: not of what is left of it
        return measure(x, select, self.form.bits, self.signed or as_it_comes, axis, unit)

    def absorb(self, weight: Tensor) -> Tensor:
        if self.__dict__["mean"] is not None and self.switch.quantizing:
            weight = weight * self.__dict__["mean"].__dict__.get("factor", 1.0)
        unit = self.unit() if self.absorbs else None
        if unit is None:
            return weight
        if unit.dim() == 0:
            return weight * unit
        axis = 1 if weight.shape[1] == unit.numel() else 0  # depthwise: one input channel for each output channel
        return weight * unit.reshape([-1 if i == axis else 1 for i in range(weight.dim())])

    def saturated(self, x: Tensor) -> Tensor:
        return beyond(self._realigned(x.detach()), self.exponent(), self.qmax, self.signed, axis=1)

    def log2_threshold(self) -> Tensor | None:
        return None if self.alpha is None else self.clip().detach().log2()

    def set_signed(self, signed: bool) -> None:
        super().set_signed(signed)
        self._make_room()

    def _make_room(self) -> None:
        """Statistics of unsigned codes are of one fraclen more."""
        empty = torch.zeros_like(self._measure(self.fraclen.new_zeros(1, self.fraclen.numel())))
        if empty.shape != self.sums.shape:
            self.sums = empty

    def refresh(self) -> None:
        super().refresh()
        self._make_room()
        self.current.copy_(self.fraclen.round().clamp(min=0))  # until a batch says otherwise

    # -- ties and calibration -----------------------------------------------------------------------------
    def share(self, group: Sequence[Quantizer], same_grid: bool) -> None:
        alpha = nn.Parameter(torch.tensor(8.0))
        for member in group:
            if isinstance(member, FraclenInput):
                member.alpha, member.same_grid = alpha, True  # one unit has one M

    def inherit(self, state: dict[str, Tensor]) -> None:
        """Weights that were trained with a clip keep it; calibration then finds fraclens alone."""
        if "alpha" not in state:
            return
        if self.alpha is None:
            warnings.warn(
                f"{self.site.key}: the weights were trained with a clip at {float(state['alpha']):g}, and there is "
                "none here. Take clip=True with the same layers, or weights that were trained without.",
                stacklevel=2,
            )
            return
        with torch.no_grad():
            self.alpha.copy_(state["alpha"])
        self.leader.inherited = True

    def commit(self, all_reduce: AllReduce) -> None:
        seen = self.observed()
        for _, observer in seen:
            observer.reduce(all_reduce)
        high = torch.stack([observer.stats.abs_max(member.signed) for member, observer in seen]).max()
        candidates = exponent_candidates(high, 12)
        errors = {member: member._errors(observer, candidates) for member, observer in seen}
        clipped = [member for member in errors if not member.relative]  # alpha is the clip of all of them
        best = self._best(candidates, torch.stack([errors[member] for member in clipped]).sum(0))
        if best is not None:
            with torch.no_grad():
                # The unit begins as a power of two, 1 where the fraclen has room for it.
                if self.alpha is not None and not self.inherited:
                    self.alpha.fill_(min(self.qmax * 2.0**-best, self.limit or torch.inf))
                for member in errors:
                    own = member._best(candidates, errors[member]) if member.relative else best
                    member._begin(best if own is None else own, best)
        if best is not None and self.alpha is None and self.fixed is None:
            most = largest_fraclen(self.form.bits, self.signed)
            tell_range(self.site.key, float(high), best < 0, most, self.form.bits, self.signed)
        self.set_ready(best is not None)  # zero throughout: open until a later calibration sees something

    def _begin(self, fraclen: int, of_unit: int) -> None:
        """Start at the best fraclen for values in true units; ``of_unit`` is that of the tie."""
        if self.fixed is None:
            most = largest_fraclen(self.form.bits, self.signed)
            self.fraclen.fill_(fraclen - of_unit if self.relative else min(max(fraclen, 0), most))
            self.current.copy_(self.rounded())
            if self.relative and (needed := int(self.leader.rounded()) + fraclen - of_unit) < 0:
                warnings.warn(
                    f"{self.site.key}: {self.form.bits}-bit codes would need {needed} bits behind the point in the "
                    f"unit that {self.leader.site.path} sets with {self.leader.form.bits}, expected at least 0: large "
                    f"values are clipped. Give {self.site.path} more act_bits, or {self.leader.site.path} fewer.",
                    stacklevel=2,
                )

    def _errors(self, observer: RangeObserver, candidates: Tensor) -> Tensor:
        assert observer.histogram is not None
        least = -self.qmax if self.signed else 0
        point = largest_fraclen(self.form.bits, self.signed)
        return mse_by_exponent(observer.histogram, candidates, least, self.qmax, point)

    def _best(self, candidates: Tensor, errors: Tensor) -> int | None:
        """The fraclen of the least error; None where all was zero."""
        threshold = threshold_mse_exponent(candidates, errors)
        return None if threshold is None else largest_fraclen(self.form.bits, self.signed) - threshold


def grid_of(exponent: Tensor, bits: int, signed: bool, axis: int) -> Grid:
    """The grid of fixed-point codes; ``axis`` is that of an exponent per channel."""
    if exponent.dim():
        return Grid(bits, tuple(exponent.tolist()), signed=signed, narrow=True, axis=axis)
    return Grid(bits, int(exponent), signed=signed, narrow=True)


def beyond(x: Tensor, exponent: Tensor, largest: int, signed: bool, axis: int) -> Tensor:
    """How many values round to codes beyond ``largest``, 0-dim; ``axis`` is that of an exponent per channel."""
    shape = [-1 if i == axis else 1 for i in range(x.dim())] if exponent.dim() else []
    codes = torch.round(x * pow2(-exponent, x.dtype).reshape(shape))
    return (codes.abs() if signed else codes).gt(largest).sum()


def tell_range(key: str, high: float, too_large: bool, most: int, bits: int, signed: bool) -> None:
    """Say where values are too large, or too small, for every fraclen up to ``most``."""
    if too_large:
        what = f"which no fraclen holds: they are clipped at {largest_code(bits, signed)}"
    elif high * 2**most < 1:
        what = f"which {most} bits behind the point round to one code or none"
    else:
        return
    warnings.warn(
        f"{key}: calibration saw values up to {high:.3g}, {what}. Normalize what enters the network; inside it a "
        "trained clip (clip=True, less skip=) moves such values into the format.",
        stacklevel=2,
    )
