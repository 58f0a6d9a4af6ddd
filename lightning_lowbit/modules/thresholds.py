"""Quantizers with power-of-two scales and trained thresholds, and the bias on the products' grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lowbit.modules.base import Site
from lightning_lowbit.modules.observed import ObservedQuantizer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.exponent import ceil_log2, log2_threshold, pow2
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.observers import AllReduce, RangeObserver
from lightning_lowbit.numerics.ranges import (
    exponent_candidates,
    mse_by_exponent,
    threshold_3sd,
    threshold_klj,
    threshold_max,
    threshold_mse_exponent,
    threshold_percentile,
)
from lightning_lowbit.numerics.rounding import Rounding, round_to
from lightning_lowbit.numerics.ste import fake_quantize, threshold_quantize

__all__ = ["AccumulatorQuantizer", "BiasQuantizer", "Initialization", "ThresholdQuantizer"]

Initialization = Literal["mse", "max", "3sd", "klj", "percentile"]
LOG2_T_LIMIT = 32
_INT32 = 32


class ThresholdQuantizer(ObservedQuantizer):
    """Signed: codes -2^(b-1) .. 2^(b-1)-1, s = 2^ceil(log2_t) / 2^(b-1); unsigned: 0 .. 2^b-1, s =
    2^ceil(log2_t) / 2^b.

    Members of a tie share ``log2_t`` (one Parameter under every member's path) and the step: unsigned members
    of a tie with a signed one take the signed step.

    Args:
        site: where it stands.
        bits: width of a code.
        initialization: how the first threshold is found (TQT section 6).
        percentile: of the percentile initialization.
        rounding: tie rule.
        trainable: whether log2_t is trained.
        narrow: leave out the most negative code.
    """

    bits: int
    log2_t: nn.Parameter
    frozen: Tensor

    def __init__(
        self, site: Site, bits: int, initialization: Initialization = "mse", percentile: float = 99.99,
        rounding: Rounding = Rounding.HALF_EVEN, trainable: bool = True, narrow: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(site)
        self.bits, self.initialization, self.percentile = bits, initialization, percentile
        self.histogram = initialization not in ("max", "3sd")
        self.rounding, self.narrow = rounding, narrow
        self.log2_t = nn.Parameter(torch.zeros(1, dtype=torch.float32), requires_grad=trainable)
        self.register_buffer("frozen", torch.zeros(()))

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1)) + int(self.narrow) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - int(self.signed))) - 1

    @property
    def point(self) -> int:
        """s = 2^(ceil(log2_t) - point)."""
        members = [m for m in self.group if isinstance(m, ThresholdQuantizer)]
        return int(max(m.bits for m in members)) - int(any(m.signed for m in members))

    def exponent(self) -> Tensor:
        ceiling = self.log2_t.detach().reshape(()).ceil().clamp(-LOG2_T_LIMIT, LOG2_T_LIMIT)
        return (ceiling - self.point).to(torch.int32)

    def grid(self) -> Grid:
        return Grid(
            bits=self.bits,
            exponent=int(self.exponent()),
            signed=self.signed,
            narrow=self.narrow and self.signed,
        )

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        return threshold_quantize(
            x,
            self.log2_t,
            qmin=self.qmin,
            qmax=self.qmax,
            point=self.point,
            rounding=self.rounding,
            rectify=rectify,
        )

    def saturated(self, x: Tensor) -> Tensor:
        codes = round_to(x.detach() / pow2(self.exponent(), x.dtype), self.rounding)
        return ((codes < self.qmin) | (codes > self.qmax)).sum()

    def log2_threshold(self) -> Tensor | None:
        return self.log2_t.detach()

    # -- ties and calibration -----------------------------------------------------------------------------
    def share(self, group: Sequence[Quantizer], same_grid: bool) -> None:
        for member in group:
            if isinstance(member, ThresholdQuantizer):
                member.log2_t = self.log2_t
                member.same_grid = same_grid

    def commit(self, all_reduce: AllReduce) -> None:
        seen = self.observed()
        for _, observer in seen:
            if observer.histogram is not None:
                observer.reduce(all_reduce)
        log2_t = self._initial_log2_t(seen)
        with torch.no_grad():
            self.log2_t.fill_(0.0 if log2_t is None else log2_t)
        self.set_ready(log2_t is not None)  # zero throughout: open until a later calibration sees something

    def _initial_log2_t(self, seen: list[tuple[ThresholdQuantizer, RangeObserver]]) -> float | None:
        """Section 6 of TQT over all members: the largest of their thresholds, or the least pooled error."""
        highs = [observer.stats.abs_max(member.signed) for member, observer in seen]
        if not any(bool(high > 0) for high in highs):
            return None
        if self.initialization == "mse":
            candidates = exponent_candidates(max(highs))
            errors = [
                mse_by_exponent(observer.histogram, candidates, m.qmin, m.qmax, self.point, m.rounding)
                for m, observer in seen
                if observer.histogram is not None
            ]
            best = threshold_mse_exponent(candidates, torch.stack(errors).sum(0))
            return None if best is None else best - 0.5  # the middle of the bin: only ceil(log2_t) acts
        thresholds = [
            threshold_max(observer.stats) if self.initialization == "max"
            else threshold_3sd(observer.stats) if self.initialization == "3sd"
            else self._from_histogram(m, observer)
            for m, observer in seen
        ]  # fmt: skip
        return float(log2_threshold(max(thresholds)))

    def _from_histogram(self, member: ThresholdQuantizer, observer: RangeObserver) -> Tensor:
        histogram = observer.histogram
        assert histogram is not None
        if self.initialization == "klj":
            return threshold_klj(histogram.magnitudes(member.signed), histogram.bin_width, member.bits, member.signed)
        return threshold_percentile(histogram, self.percentile, member.signed)


class AccumulatorQuantizer(ThresholdQuantizer):
    """On the sum of products: its step is never finer than theirs, so it is a right shift (section 4)."""

    layer: Any

    def _floor(self) -> Tensor:
        unit = self.layer.accumulator_exponent()
        return torch.full((), -LOG2_T_LIMIT, dtype=torch.int32) if unit is None else unit + self.point

    def exponent(self) -> Tensor:
        return torch.maximum(super().exponent(), (self._floor() - self.point).to(torch.int32))

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        log2_t = torch.maximum(self.log2_t, self._floor().to(self.log2_t.dtype))
        return threshold_quantize(
            x,
            log2_t,
            qmin=self.qmin,
            qmax=self.qmax,
            point=self.point,
            rounding=self.rounding,
            rectify=rectify,
        )


class BiasQuantizer(ThresholdQuantizer):
    """Bias on the accumulator's grid (one unit of the products, or of the accumulator's quantizer), or on its
    own.

    Args:
        bits: width; 32 on the products' grid.
        own: with a threshold of its own, trained, initialized by the maximum.
    """

    layer: Any

    def __init__(self, site: Site, bits: int, own: bool, trainable: bool = True) -> None:
        super().__init__(site, bits, "max", trainable=trainable and own)
        self.own = own
        if not own:
            del self.log2_t
            self.register_parameter("log2_t", None)

    def _unit(self, bias: Tensor) -> Tensor | None:
        """Exponent of the sums that the bias is added to; None while a grid beside it is open.

        Where 32 bits of it do not reach the largest bias (16-bit codes), what the bias is shifted by.
        """
        unit: Tensor | None = self.layer.accumulator_exponent()
        accumulator = self.layer.lowbit_accumulator
        unit = unit if unit is None or accumulator is None else accumulator.exponent()
        if unit is None or self.bits < _INT32 or not bias.numel():
            return unit
        return torch.maximum(unit, ceil_log2(bias.detach().abs().amax()) - (self.bits - 1))

    def exponent(self) -> Tensor:
        if self.own:
            return super().exponent()
        unit = self._unit(self.layer.in_evaluation()[1])
        return torch.zeros((), dtype=torch.int32) if unit is None else unit

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        if self.own:
            return super().quantize(x, rectify)
        unit = self._unit(x)
        return x if unit is None else fake_quantize(x, unit, qmin=self.qmin, qmax=self.qmax, rounding=self.rounding)

    def observe(self, x: Tensor) -> None:
        if self.own:
            super().observe(x)

    def close_pass(self, all_reduce: AllReduce) -> bool:
        return super().close_pass(all_reduce) if self.own else False

    def commit(self, all_reduce: AllReduce) -> None:
        if self.own:
            super().commit(all_reduce)
        else:
            self.set_ready()
