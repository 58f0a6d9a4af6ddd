"""Errors on their way back: put on a grid found from their largest value, or made integer operands (WAGEUBN)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError, InvariantError
from lightning_lowbit.modules.base import Run, Site
from lightning_lowbit.modules.planes import Operand, Plane, digits, values_of
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.exponent import pow2
from lightning_lowbit.numerics.flag import flag_planes, flag_quantize
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.shift import max_abs, shift_codes, shift_quantize

__all__ = ["ErrorForm", "ErrorGate", "ErrorQuantizer"]

_BYTE = 8  # bits of the codes whose rectifier is applied to them
_WORDS = re.compile(r"(shift|flag)(\d+)")


@dataclass(frozen=True)
class ErrorForm:
    """How errors are rounded.

    Args:
        kind: "shift" (one unit for a tensor) or "flag" (two).
        bits: of a code, 2 to 16.
        clip_to_one: of "shift", whether the largest code is 2^(bits-1), one more than the bits hold.
        shared: whether all processes take their unit from the largest value of all.
        check: whether what comes out is looked at.
    """

    kind: str
    bits: int
    clip_to_one: bool = False
    shared: bool = False
    check: bool = False

    @classmethod
    def parse(cls, words: str, where: str, **settings: bool) -> Self | None:
        """From "flag8", "shift16" and so on; None of "off".

        >>> ErrorForm.parse("flag8", "e2"), ErrorForm.parse("off", "e2")
        (ErrorForm(kind='flag', bits=8, clip_to_one=False, shared=False, check=False), None)
        """
        if words == "off":
            return None
        found = _WORDS.fullmatch(words) if isinstance(words, str) else None
        if found is None or not 2 <= int(found[2]) <= 16:
            raise ConfigError(f"{where}={words!r}: expected 'shift' or 'flag' with 2 to 16 bits ('flag8'), or 'off'.")
        return cls(found[1], int(found[2]), **settings)


class ErrorGate:
    """What happens to the errors of one tensor.

    Args:
        form: how they are rounded.
        name: of the tensor, for messages.

    Attributes:
        on: whether they are rounded by now.
    """

    def __init__(self, form: ErrorForm, name: str) -> None:
        self.form, self.name, self.on = form, name, True

    def values(self, g: Tensor, run: Run, keep: Tensor | None = None) -> Tensor:
        """The errors ``g`` on their grid, 0 where ``keep`` is False; that one is not finite is noted in ``run``."""
        peak, form = self._peak(g, run), self.form
        if keep is not None and not (form.check or form.clip_to_one) and form.kind == "shift" and form.bits <= _BYTE:
            return self._kept(g, peak, run, keep)
        if form.kind == "flag":
            y, finite = flag_quantize(g, form.bits, peak=peak)
        else:
            y, finite = shift_quantize(g, form.bits, clip_to_one=form.clip_to_one, peak=peak)
        run.nonfinite = run.nonfinite + (~finite).to(torch.int64)
        if form.check and not form.clip_to_one and bool(finite):
            self._require_grid(y, self._operand(g, peak)[0])
        return y.to(g.dtype) if keep is None else (y * keep).to(g.dtype)

    def _kept(self, g: Tensor, peak: Tensor | None, run: Run, keep: Tensor) -> Tensor:
        """The same by way of codes, which are dropped before they are four times as long."""
        codes, exponent, finite = shift_codes(g, self.form.bits, peak=peak)
        run.nonfinite = run.nonfinite + (~finite).to(torch.int64)
        return codes.mul_(keep.view(torch.int8)).to(g.dtype).mul_(pow2(exponent, torch.float32).to(g.dtype))

    def operand(self, g: Tensor, run: Run) -> Operand:
        """The same as integers; zeros where one is not finite."""
        operand, finite = self._operand(g, self._peak(g, run))
        run.nonfinite = run.nonfinite + (~finite).to(torch.int64)
        return operand

    def _operand(self, g: Tensor, peak: Tensor | None) -> tuple[Operand, Tensor]:
        bits = self.form.bits
        most = (1 << (bits - 1)) - 1
        if self.form.kind == "shift":
            codes, exponent, finite = shift_codes(g, bits, peak=peak)
            return Operand(digits(codes, most), exponent), finite
        flags = flag_planes(g, bits, peak=peak)
        big = [Plane(codes, shift + bits - 1) for codes, shift in digits(flags.big, most)]
        return Operand((*digits(flags.small, most), *big), flags.exponent_small), flags.finite

    def _peak(self, g: Tensor, run: Run) -> Tensor | None:
        if not self.form.shared or run.world == 1:
            return None
        peak = max_abs(g)
        # inf, not NaN: processes agree on the maximum of numbers only.
        return run.reduce_max(torch.where(torch.isfinite(peak), peak, torch.inf))

    def _require_grid(self, y: Tensor, operand: Operand) -> None:
        if not torch.equal(y, values_of(operand, y.dtype)):
            raise InvariantError(f"{self.name}: errors are not on the {self.form.bits}-bit grid that they were put on.")


class ErrorQuantizer(Quantizer):
    """Stands in a layer's slot for errors: what comes back to the layer's result.

    Args:
        site: where it stands.
        form: how errors are rounded.
    """

    has_grid = False

    def __init__(self, site: Site, form: ErrorForm) -> None:
        super().__init__(site)
        self.gate = ErrorGate(form, site.key)

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        return self.gate.values(x, self.switch.run)

    def exponent(self) -> Tensor:
        return torch.zeros((), dtype=torch.int32)

    def grid(self) -> Grid:
        return Grid(bits=self.gate.form.bits, exponent=0)
