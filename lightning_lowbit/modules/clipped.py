"""Activations whose range follows the batches: percentile, running mean, limit rounded up (PACT2 of TI's QAT)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lowbit.modules.base import Mode, Site
from lightning_lowbit.modules.lowering import Snap, refuse
from lightning_lowbit.modules.quantizer import Quantizer, in_backward
from lightning_lowbit.numerics.clipping import Limits, clip_quantize, clip_saturated, limits_of
from lightning_lowbit.numerics.exponent import ceil_log2, clamp_exponent
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.observers import AllReduce
from lightning_lowbit.numerics.percentile import BINS, percentile_range, range_histogram, range_of_histogram
from lightning_lowbit.numerics.rounding import Rounding

__all__ = ["ClipFormat", "ClipQuantizer", "RangeSync"]

RangeSync = Literal["mean", "hist", "none"]

_FIRST_RANGE = 8.0  # before anything was seen


@dataclass(frozen=True)
class ClipFormat:
    """How a tensor is clipped and quantized.

    Attributes:
        bits: of a code.
        power2: the limit is rounded up to a power of two.
        symmetric: no zero point; False is a range from c0 to c1 with one.
        rounding: tie rule.
        percent: of the values that may fall off each end of a batch's range.
        floor: least share of a batch in the running mean.
        subsample: every how many rows and columns of a large map are looked at; ``batches`` says which.
        sync: how processes share ranges: their mean behind each batch, one histogram in each batch, or not.
        batch_ranges: training clips by the range of the batch itself, but for tensors that share one (concats).
    """

    bits: int = 8
    power2: bool = True
    symmetric: bool = True
    rounding: Rounding = Rounding.HALF_UP
    percent: float = 0.01
    floor: float = 0.001
    subsample: int = 1
    sync: RangeSync = "mean"
    batch_ranges: bool = False


class ClipQuantizer(Quantizer):
    """A tensor clipped to an estimated range (docs/jacinto.md, section 1).

        n += 1;  u = max(1 / max(n, 1), floor);  clips = (1 - u) clips + u range(x)      in training, n from -1
        A = ceil2(max |clips|);  y = clip(round(x s), qmin, qmax) / s                    s = codes / A

    The limit is rounded up behind the mean, so it moves in octaves. Gradients pass where -A <= x <= A (0 <= x <= A),
    and none reach the range. The range is that of what comes in, before a rectifier.

    Args:
        site: where it stands.
        form: how it clips and quantizes.
        fixed: a range that nothing moves.
        signed: whether there are negative codes; None goes by the range.

    Attributes:
        clips: float32 [2], the running mean of lower and upper ends.
        batches: n, counted also while the range stands still.
        skipped: batches with NaN or infinite values since it was last told, not saved.
        frozen: whether the range stands still.
        calls: how often a forward comes by; the batch's range is that of all calls, and moves behind the last.
        used: limits of the last training batch, where it clips by its own range.
        fused: whether the layer before it does its work, together with its own (modules.merging).
    """

    clips: Tensor
    batches: Tensor
    skipped: Tensor

    def __init__(
        self, site: Site, form: ClipFormat, fixed: tuple[float, float] | None = None, signed: bool | None = None
    ) -> None:
        super().__init__(site)
        self.form, self.fixed, self.flag = form, fixed, signed
        self.has_exponent = form.power2
        low = 0.0 if self.flag is False else -_FIRST_RANGE
        self.register_buffer(
            "clips", torch.tensor((low, _FIRST_RANGE) if fixed is None else fixed, dtype=torch.float32)
        )
        self.register_buffer("batches", torch.tensor(-1.0))
        self.register_buffer("skipped", torch.zeros(()), persistent=False)
        self.watched: _Watched | None = None  # in calibration
        self.frozen = self.fused = False
        self.calls, self.passed = 1, 0
        self.used: Limits | None = None
        self.pending: list[Tensor] = []

    # -- the grid -----------------------------------------------------------------------------------------
    @property
    def bits(self) -> int:
        """Of its codes; members of a tie have the most of theirs."""
        return max(member.form.bits for member in self.group if isinstance(member, ClipQuantizer))

    def limits(self) -> Limits:
        """The effective limits; members of a tie (a concat) have the widest of theirs."""
        members = [member for member in self.group if isinstance(member, ClipQuantizer)]
        if len(members) == 1:
            return limits_of(self.clips, self.flag, self.bits, self.form.power2, self.form.symmetric)
        widest = _union([m.clips if m.flag is not False else m.clips.clamp(min=0.0) for m in members])
        flags = {member.flag for member in members}
        flag = True if True in flags else False if flags == {False} else None
        return limits_of(widest, flag, self.bits, self.form.power2, self.form.symmetric)

    def exponent(self) -> Tensor:
        return clamp_exponent(-ceil_log2(self.limits().scale))

    def grid(self) -> Grid:
        limits = self.limits().to_host()
        signed, zero = limits.qmin < 0, int(limits.zero_point)
        if self.form.power2:
            return Grid(self.bits, int(self.exponent()), zero_point=zero, signed=signed)
        return Grid(self.bits, scale=1 / float(limits.scale), zero_point=zero, signed=signed)

    def as_snap(self) -> Snap:
        if not self.form.power2:
            raise refuse(self.site.key, "its step is no power of two", "Convert with Jacinto(power2=True).")
        return replace(super().as_snap(), rounding=self.form.rounding)

    # -- forward ------------------------------------------------------------------------------------------
    def forward(
        self, x: Tensor, rectify: bool = False, value: Tensor | None = None, seen: Tensor | None = None,
        closes: bool = False,
    ) -> Tensor:  # fmt: skip
        """Clip and quantize.

        Args:
            x: the tensor that carries the gradient.
            rectify: there is a rectifier before it.
            value: what is quantized, seen: what the range follows; x where they are not given.
            closes: the call of the layer that does its work, where one does.
        """
        if self.switch.mode is Mode.OBSERVE:
            self.observe(x.detach())
        if self.switch.mode is not Mode.LOWBIT or not (self.switch.started and self.ready):
            return F.relu(x) if rectify else x
        return x if self.fused and not closes else self._clip(x, value, seen, rectify)

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        return clip_quantize(self._rectified(x, rectify), self.limits(), self.form.rounding)

    def _clip(self, x: Tensor, value: Tensor | None, seen: Tensor | None, rectify: bool) -> Tensor:
        limits = self.follow((x if seen is None else seen).detach())
        x, value = self._rectified(x, rectify), None if value is None else self._rectified(value, rectify)
        if self.switch.tally is not None:
            shown = x if value is None else value
            self.switch.tally.count(self, F.relu(shown) if rectify else shown)
        y = clip_quantize(x, limits, self.form.rounding, value)
        return y if self.like is None or y.dtype != torch.float64 else y.to(self.like.weight.dtype)

    def _rectified(self, x: Tensor, rectify: bool) -> Tensor:
        """A lower limit of 0 is the rectifier, unless there are negative codes (a tie may have them)."""
        return F.relu(x) if rectify and (self.flag is not False or len(self.group) > 1) else x

    def saturated(self, x: Tensor) -> Tensor:
        return clip_saturated(x.detach(), self.limits(), self.form.rounding)

    def log2_threshold(self) -> Tensor | None:
        if self.fixed is not None:
            return None
        members = [member for member in self.group if isinstance(member, ClipQuantizer)]
        found = [limits_of(m.clips, m.flag, m.bits, power2=False, symmetric=m.form.symmetric) for m in members]
        return torch.stack([torch.maximum(-limits.low, limits.high) for limits in found]).amax().log2()

    # -- the range ----------------------------------------------------------------------------------------
    @property
    def follows(self) -> bool:
        """Whether a batch moves its range now."""
        return self.training and not self.frozen and self.fixed is None

    @torch.no_grad()
    def follow(self, x: Tensor) -> Limits:
        """Take one training batch into the running range; its limits from then on."""
        if self.follows and in_backward() and self.used is not None:
            return self.used  # a checkpointed block runs again: as it did
        if not self.training or in_backward():
            return self.limits()
        if self.calls > 1:  # one that is called once must not count: it would be compiled anew for every batch
            self.passed = (self.passed + 1) % self.calls
        if self.passed == 0:
            self.batches.add_(1)
        if not self.follows:
            return self.limits()
        seen = self._pooled(self.range_of(x).to(self.clips.dtype))
        if seen is None:
            return self.limits()
        known = torch.isfinite(seen).all()
        seen = torch.where(known, seen, self.clips)
        self.skipped.add_(1 - known.to(self.skipped.dtype))
        share = (1 / self.batches.clamp(min=1)).clamp(min=self.form.floor)
        self.clips.copy_((1 - share) * self.clips + share * seen)
        if self.form.batch_ranges and len(self.group) == 1:
            self.used = limits_of(seen, self.flag, self.bits, self.form.power2, self.form.symmetric)
            return self.used
        return self.limits()

    def _pooled(self, ends: Tensor) -> Tensor | None:
        """The range over all calls of one batch, at the last of them; None before."""
        if self.calls == 1:
            return ends
        self.pending.append(ends)
        if self.passed:
            return None
        pooled = _union(self.pending)
        self.pending.clear()
        return pooled

    def begin_batch(self) -> None:
        """Forget what a forward that was broken off has left."""
        if self.calls > 1:
            self.passed = 0
            self.pending.clear()

    def range_of(self, x: Tensor) -> Tensor:
        """Lower and upper end of one batch's values, on all processes where ranges come from one histogram."""
        x = self._part(x)
        run = self.switch.run
        if self.form.sync != "hist" or run.world == 1:
            return percentile_range(x, self.form.percent)
        ends = torch.stack([-x.amin(), x.amax()])
        negated, high = run.reduce_max(torch.where(torch.isnan(ends), torch.inf, ends)).unbind()
        low = -negated
        if self.form.percent == 0:
            return torch.stack([low, high])
        return range_of_histogram(run.reduce_sum(range_histogram(x, low, high)), low, high, self.form.percent)

    def _part(self, x: Tensor) -> Tensor:
        """Every n-th row and column of a large map, shifted by the number of the batch."""
        n = self.form.subsample
        if n == 1 or x.dim() != 4 or min(x.shape[2:]) <= 4:
            return x
        number = self.batches.clamp(min=0).long()  # of the device: a Python number would be compiled anew
        for axis, shift in ((2, number), (3, number // n)):
            places = torch.arange(0, x.shape[axis] - n + 1, n, device=x.device) + shift % n
            x = x.index_select(axis, places)
        return x

    def settle(self, reset: bool) -> None:
        if bool(self.skipped > 0):
            warnings.warn(
                f"{self.site.key}: NaN or infinite values in {int(self.skipped)} training batches; its range did not "
                "follow them. Look at the batches, the loss and the learning rate.",
                stacklevel=2,
            )
            self.skipped.zero_()

    # -- calibration --------------------------------------------------------------------------------------
    def observe(self, x: Tensor) -> None:
        watched = self.watched or _Watched(x.new_zeros(2), hist=self.form.sync == "hist")
        self.watched = watched
        watched.observe(self._part(x), self.form, self.calls)

    def forget(self) -> None:
        self.watched = None

    def close_pass(self, all_reduce: AllReduce) -> bool:
        again = self.form.sync == "hist" and self.form.percent > 0
        for member in self.group:
            if isinstance(member, ClipQuantizer):
                watched = member.watched or _Watched(member.clips.new_zeros(2), hist=self.form.sync == "hist")
                member.watched = watched
                watched.reduce(all_reduce, again)
                member.require_finite(watched.spoiled)
        return again

    def commit(self, all_reduce: AllReduce) -> None:
        ready = False
        for member in self.group:
            if not isinstance(member, ClipQuantizer):
                continue
            watched = member.watched
            assert watched is not None
            if watched.counts is not None:
                low, high = watched.clips.unbind()
                watched.clips = range_of_histogram(all_reduce(watched.counts, "sum"), low, high, self.form.percent)
            if watched.number >= 0 and member.fixed is None:
                member.clips.copy_(watched.clips)
                member.batches.fill_(watched.number)
            ready = ready or watched.number >= 0
            member.set_signed(bool(member.limits().qmin < 0))
        self.set_ready(ready)


def _union(ranges: list[Tensor]) -> Tensor:
    """The range that holds them all."""
    ends = torch.stack(ranges)
    return torch.stack([ends[:, 0].min(), ends[:, 1].max()])


@dataclass
class _Watched:
    """What passed in calibration: the running range of batches, or all of them in one histogram.

    Attributes:
        clips: running range, or the ends of everything seen.
        hist: which of the two.
        number: batches but one, as ``ClipQuantizer.batches``.
        counts: the histogram, in a second pass.
        spoiled: values that were NaN or infinite.
    """

    clips: Tensor
    hist: bool
    number: int = -1
    counts: Tensor | None = None
    reduced: bool = False
    spoiled: int = 0
    pending: list[Tensor] = field(default_factory=list)  # of the calls of one batch

    def observe(self, x: Tensor, form: ClipFormat, calls: int) -> None:
        if self.reduced:  # a second pass
            low, high = self.clips.unbind()
            found = range_histogram(x, low, high)
            self.counts = found if self.counts is None else self.counts + found
            return
        seen = percentile_range(x, 0.0 if self.hist else form.percent)
        self.spoiled += 0 if bool(torch.isfinite(seen).all()) else int((~torch.isfinite(x)).sum())
        self.pending.append(seen)
        if len(self.pending) < calls:
            return
        seen = _union(self.pending)
        self.pending.clear()
        self.number = self.number + 1
        if self.hist:
            first = self.number == 0
            low = seen[0] if first else torch.minimum(self.clips[0], seen[0])
            high = seen[1] if first else torch.maximum(self.clips[1], seen[1])
            self.clips = torch.stack([low, high])
        else:
            share = max(1 / max(self.number, 1), form.floor)
            self.clips = (1 - share) * self.clips + share * seen

    def reduce(self, all_reduce: AllReduce, again: bool) -> None:
        """Over processes: the mean of those that saw something, or the ends of them all; ``again``: to be counted."""
        self.reduced = True
        self.spoiled = int(all_reduce(self.clips.new_tensor(float(self.spoiled)), "sum"))
        seen = float(self.number >= 0)
        if self.hist:
            ends = self.clips * self.clips.new_tensor([-1, 1]) if seen else torch.full_like(self.clips, -torch.inf)
            ends = all_reduce(ends, "max") * ends.new_tensor([-1, 1])
            self.number = int(all_reduce(ends.new_tensor(float(self.number)), "max"))
            self.clips = ends if self.number >= 0 else torch.zeros_like(ends)
            self.counts = torch.zeros(BINS, dtype=torch.int64, device=ends.device) if again else None
        else:
            mine = torch.cat([self.clips * seen, self.clips.new_tensor([seen])])
            total = all_reduce(mine, "sum")
            self.number = int(all_reduce(mine.new_tensor(float(self.number)), "max"))
            self.clips = total[:2] / total[2].clamp(min=1)
