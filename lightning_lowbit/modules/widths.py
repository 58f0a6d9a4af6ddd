"""Activations in a format of so many bits, whose integer bits follow the data (WAGEUBN)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lowbit.errors import ConfigError, InvariantError
from lightning_lowbit.modules.base import Run, Site
from lightning_lowbit.modules.error_gate import ErrorForm, ErrorGate
from lightning_lowbit.modules.observed import ObservedQuantizer
from lightning_lowbit.modules.planes import Operand, digits
from lightning_lowbit.modules.quantizer import in_backward
from lightning_lowbit.numerics.direct import fixed_width_codes, fixed_width_values, rectified_values
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.observers import AllReduce
from lightning_lowbit.numerics.through import require_first_order
from lightning_lowbit.numerics.width_changes import Hysteresis
from lightning_lowbit.numerics.widths import Criterion, Format, Policy, fixed_unit, fixed_width, integer_bits

__all__ = ["WidthForm", "WidthQuantizer", "require_grid"]


@dataclass(frozen=True)
class WidthForm:
    """How a tensor finds its format, and when that changes.

    Args:
        bits: of a code ("fixed_width"), or one more than the bits behind the point ("fixed_unit").
        policy: which of the two stays.
        criterion, percent: how many integer bits calibration gives, as of `numerics.widths.integer_bits`.
        share, patience: as of `Hysteresis`.
        integer: integer bits that are given, and stay; None leaves them to the data.
        check: whether every tensor is looked at.
    """

    bits: int = 8
    policy: Policy = "fixed_width"
    criterion: Criterion = "max"
    percent: float = 99.99
    share: float = 1e-4
    patience: int = 1000
    integer: int | None = None
    check: bool = False


class WidthQuantizer(ObservedQuantizer):
    """y = clip(round(x 2^f), -M or 0, M) 2^-f, ties to even; back, the errors on their grid, straight through.

    Of a rectifier, errors pass where x > 0. In training each tensor is looked at, and the integer bits change between
    steps by the rule of `Hysteresis`: members of a tie share one state, that of their first.

    Args:
        site: where it stands.
        form: how its format is found.
        error: how errors that come back are rounded; None leaves them.

    Attributes:
        width: state of the rule, float32 [9].
        integer: integer bits now, a Python copy.
        gate: what rounds the errors, or None.
    """

    width: Tensor
    whole = ("width",)

    def __init__(self, site: Site, form: WidthForm, error: ErrorForm | None = None) -> None:
        super().__init__(site)
        self.form = form
        self.histogram = form.criterion != "max" and form.integer is None
        self.integer = form.integer or 0
        self.gate = None if error is None else ErrorGate(error, site.key)
        self.register_buffer("width", self.rule.start(self.integer))
        self.rule.freeze(self.width, form.integer is not None)

    # -- the format ---------------------------------------------------------------------------------------
    @property
    def rule(self) -> Hysteresis:
        form, fraction = self.form, self.form.bits - 1 if self.form.policy == "fixed_unit" else None
        return Hysteresis(form.bits, self.signed, fraction, form.share, form.patience)

    @property
    def leader(self) -> WidthQuantizer:
        """The member of its tie whose state all of them follow."""
        return self.group[0] if isinstance(self.group[0], WidthQuantizer) else self

    @property
    def format(self) -> Format:
        of = fixed_unit if self.form.policy == "fixed_unit" else fixed_width
        return of(self.form.bits, self.leader.integer, self.signed)

    def exponent(self) -> Tensor:
        return torch.full((), -self.format.fraction, dtype=torch.int32)

    def grid(self) -> Grid:
        return self.format.grid()

    def share(self, group: Any, same_grid: bool) -> None:
        members = [member for member in group if isinstance(member, WidthQuantizer)]
        given = {m.site.path: m.form for m in members if m.form.integer is not None}
        if len(set(given.values())) > 1:
            raise ConfigError(
                f"{', '.join(given)}: tensors that are joined have one format, and these were given different ones. "
                "Give it for one of them."
            )
        for member in members:
            member.same_grid = same_grid
            member.take(next(iter(given.values()), self.form))

    def take(self, form: WidthForm) -> None:
        """The form of its tie."""
        self.form, self.integer = form, form.integer or 0
        self.width.copy_(self.rule.start(self.integer))
        self.rule.freeze(self.width, form.integer is not None)

    def refresh(self) -> None:
        super().refresh()
        self.integer = round(float(self.width[0]))

    def keep(self, integer: int) -> None:
        """Take over the integer bits that were decided for its tie."""
        for member in self.group:
            if isinstance(member, WidthQuantizer):
                member.integer = integer
                if member is not self:
                    member.width[0] = integer

    # -- forward ------------------------------------------------------------------------------------------
    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        if self.training and not in_backward():
            self.rule.observe(self.leader.width, x)
        f = self.format
        if rectify and self.signed:  # tied to a tensor with negative values
            x, rectify = F.relu(x), False
        if rectify:
            y = _Rectified.apply(x, f, self.site.key, self.errors)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        else:
            y = fixed_width_values(x, f.fraction, bits=f.total, signed=f.signed)
            if self.gate is not None and y.requires_grad:
                y.register_hook(self.errors)  # type: ignore[no-untyped-call]  # torch does not type it
        if self.form.check:
            require_grid(self.site.key, y, f.fraction, f.limits)
        result: Tensor = y
        return result

    def errors(self, g: Tensor, keep: Tensor | None = None) -> Tensor:
        """What comes back, on its grid once that has begun; 0 where ``keep`` (bool) says so."""
        run: Run = self.switch.run
        if self.gate is not None and self.gate.on:
            return self.gate.values(g, run, keep)
        return g if keep is None else g * keep

    def operand(self, x: Tensor) -> Operand:
        """The codes of a tensor that has come by here."""
        f = self.format
        codes = fixed_width_codes(x, f.fraction, bits=f.total, signed=f.signed)
        return Operand(digits(codes, f.limits[1]), -f.fraction)

    def saturated(self, x: Tensor) -> Tensor:
        f = self.format
        codes = torch.round(x.detach().to(torch.float64) * 2.0**f.fraction)
        return ((codes < f.limits[0]) & f.signed | (codes > f.limits[1])).sum()

    # -- calibration --------------------------------------------------------------------------------------
    def commit(self, all_reduce: AllReduce) -> None:
        if self.form.integer is None:
            found = []
            for member, observer in self.observed():
                if observer.histogram is not None:
                    observer.reduce(all_reduce)
                form, fraction = member.form, member.rule.fraction
                if bool(observer.stats.abs_max(member.signed) > 0):
                    observer.signed = member.signed
                    found.append(
                        integer_bits(observer, form.criterion, form.bits, member.signed, form.percent, fraction)
                    )
            most = max(found, default=0)
            self.width.copy_(self.rule.start(most))
            self.keep(most)
        self.set_ready()


class _Rectified(torch.autograd.Function):
    """The rectified and rounded value; back, the rounded errors where x > 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Format, name: str, errors: Any) -> Tensor:
        y, positive = rectified_values(x, f.fraction, f.total)
        ctx.name, ctx.errors = name, errors
        ctx.save_for_backward(positive)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        require_first_order(ctx.name)
        (positive,) = ctx.saved_tensors
        if g.stride() != positive.stride():  # a skip connection keeps what a mean behind it has made of the layout
            g = torch.empty_like(positive, dtype=g.dtype).copy_(g)
        return ctx.errors(g, positive), None, None, None


def require_grid(name: str, x: Tensor, fraction: int, limits: tuple[int, int] | None = None) -> None:
    """InvariantError where a finite value of ``x`` is no multiple of 2^-fraction, or its code beyond ``limits``."""
    codes = x.detach().to(torch.float64) * 2.0**fraction
    off = torch.isfinite(codes) & (codes != codes.round())
    if limits is not None:
        off |= torch.isfinite(codes) & ((codes < limits[0]) | (codes > limits[1]))
    if bool(off.any()):
        worst = float(x.detach()[off].reshape(-1)[0])
        raise InvariantError(
            f"{name}: {int(off.sum())} of {x.numel()} values are off their grid, the first {worst!r}; expected "
            f"multiples of 2^-{fraction}" + ("" if limits is None else f" with codes in {limits}") + "."
        )
