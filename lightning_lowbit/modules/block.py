"""Block exponents: quantizers of schemes in which a tensor has int8 codes and one exponent (NITI sections 1 to 5)."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lowbit.modules.base import Scheme, Site, Switch
from lightning_lowbit.modules.carrier import Carrier, apply, carry, is_codes, plain
from lightning_lowbit.modules.lowering import Snap
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.exponent import EXPONENT_MIN, ceil_log2, clamp_exponent, pow2
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.niti_rules import PAYLOAD_BITS, drawn_range, input_codes, weight_codes_maxnorm
from lightning_lowbit.numerics.observers import AllReduce
from lightning_lowbit.numerics.rounding import Rounding

__all__ = ["BiasCodes", "BlockInput", "BlockRange", "ErrorRange", "WeightCodes", "largest_range", "stable_hash"]

BIAS_BITS = 15


def stable_hash(name: str) -> int:
    """A stable number for a path or a purpose."""
    return zlib.crc32(name.encode())


class BlockRange(Quantizer):
    """Where the range of one tensor is kept: the smallest k with max|x| <= 2^k, in units of the real values.

    Training follows it batch by batch, over all processes; evaluation uses the frozen one (Decision 1). Both are
    kept in float32, since weight averaging truncates integer buffers.
    """

    frozen: Tensor
    seen: Tensor
    scheme: Scheme
    switch: Switch
    narrow = True  # codes in [-127, 127]

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.register_buffer("frozen", torch.full((), float(EXPONENT_MIN)))
        self.register_buffer("seen", torch.full((), float(EXPONENT_MIN)))
        self.static = False  # training too uses the frozen range, renewed every few steps
        self.settled = False  # whether there is one
        self.watched: Tensor | None = None

    def follow(self, measure: Callable[[], Tensor], training: bool) -> Tensor:
        """The range to round with, int32 0-dim: what ``measure`` finds in training, over all processes, else frozen."""
        if not training:
            return self.range()
        run, here = self.switch.run, measure()
        if run.blank:
            here = torch.full_like(here, EXPONENT_MIN)
        static = self.static and self.settled
        if not static:
            here = run.reduce_max(here)
        # Kept as one process would see it; 128 stands for what is not finite.
        spread = run.error_bits if self.site.role == "error" else 0
        self.seen.copy_(torch.maximum(self.seen, torch.where(here < 128, here - spread, here) if spread else here))
        return self.range() + spread if static else here

    @property
    def path(self) -> str:
        return self.site.path

    def range(self) -> Tensor:
        return self.frozen.round().to(torch.int32)

    def settle(self, reset: bool) -> None:
        if not self.static:
            self.take_over(reset)

    def take_over(self, reset: bool) -> None:
        """Freeze the largest range seen in training; with ``reset`` watch anew."""
        self.frozen.copy_(torch.where(self.seen > EXPONENT_MIN, self.seen, self.frozen))
        self.settled = True
        if reset:
            self.seen.fill_(EXPONENT_MIN)

    # -- calibration, in float ----------------------------------------------------------------------------
    def observe(self, x: Tensor) -> None:
        largest = x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)
        if not torch.isfinite(largest):
            self.require_finite(int((~torch.isfinite(x)).sum()))
        self.watched = largest if self.watched is None else torch.maximum(self.watched, largest)

    def forget(self) -> None:
        self.watched = None

    def commit(self, all_reduce: AllReduce) -> None:
        if self.site.role != "error":  # there is none yet
            watched = torch.zeros_like(self.frozen) if self.watched is None else self.watched
            self.frozen.copy_(ceil_log2(all_reduce(watched, "max")))
            self.settled = True
        self.set_ready()

    def refresh(self) -> None:
        super().refresh()
        self.settled = bool(self.frozen > EXPONENT_MIN)

    # -- what all quantizers answer -----------------------------------------------------------------------
    def integer_state(self) -> dict[str, Tensor]:
        return {"range": self.range()}

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        """Float values, and sums that nobody followed, as a carrier of codes; other carriers have been rounded."""
        return x if is_codes(x) else apply(_Enter, x, self)

    def saturated(self, x: Tensor) -> Tensor:
        """Codes at the ends, as `QuantMonitor` counts them: those of a carrier are clipped already."""
        if isinstance(x, Carrier) and is_codes(x):
            return _at_ends(x.payload)
        return _at_ends(input_codes(plain(x), _present(self.range()), narrow=self.narrow)[0])

    def exponent(self) -> Tensor:
        return clamp_exponent(self.range() - PAYLOAD_BITS)

    def grid(self) -> Grid:
        return Grid(bits=8, exponent=int(self.exponent()), narrow=self.narrow)

    def as_snap(self) -> Snap:
        """``quantize`` of float values in evaluation."""
        exponent = clamp_exponent(_present(self.range()) - PAYLOAD_BITS)
        return Snap(int(exponent), -127 if self.narrow else -128, 127, Rounding.HALF_EVEN)


class ErrorRange(BlockRange):
    """Ranges of the errors of one module: of what it hands back, and of sums that come in where a tensor forked."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.arriving = BlockRange(replace(site, slot=f"{site.slot}.arriving"))

    def integer_state(self) -> dict[str, Tensor]:
        return {}  # of no use to evaluation

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "switch":
            self.arriving.switch = value


class BlockInput(BlockRange):
    """The range of data that come in as float: codes go down to -128 (NITI section 6).

    What comes as a carrier in training may come as float in evaluation, from a part that the user's code calls: then
    the frozen range holds those codes exactly.
    """

    narrow = False

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        if isinstance(x, Carrier) and self.training:
            self.seen.copy_(torch.maximum(self.seen, x.exponent + PAYLOAD_BITS))
        return super().quantize(x, rectify)


class _Enter(torch.autograd.Function):
    """q = round_half_even(x * 2^(7-b)), b the range of the batch; the error goes back as the values came."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranges: BlockRange) -> Tensor:
        found = _present(ranges.follow(lambda: largest_range(x), ranges.training))
        ctx.integer = isinstance(x, Carrier)
        return carry(*input_codes(plain(x), found, narrow=ranges.narrow), ranges)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad if ctx.integer else plain(grad), None


def _at_ends(codes: Tensor, bits: int = PAYLOAD_BITS) -> Tensor:
    """How many codes stand at an end of their range, -128 included, 0-dim."""
    ends: Tensor = (codes >= 2**bits - 1) | (codes <= 1 - 2**bits)
    return ends.sum()


def _present(found: Tensor) -> Tensor:
    """A range; of nothing but zeros, on any process, it is 1 by convention."""
    return torch.where(found > EXPONENT_MIN, found, 0)


def largest_range(x: Tensor) -> Tensor:
    """Smallest k with max|x| <= 2^k of a float tensor, int32 0-dim."""
    return ceil_log2(x.abs().amax() if x.numel() else torch.zeros((), device=x.device))


class WeightCodes(Quantizer):
    """int8 codes of a layer's weight and their exponent, which is fixed when training starts.

    The user's float32 parameter holds code * 2^exponent at all times; the codes are a cache of it, renewed when
    somebody else writes to the parameter.

    Args:
        site: the weight.
        redraw: draw the weight anew, Xavier uniform and scaled to its largest value (NITI section 5), from this seed.
        room: give the weight at least the range of such a draw: the clip at +-127 is no regularizer that anybody asked
            for, and smaller draws (torch's default is one) have to grow.
    """

    block_exponent: Tensor
    layer: Any
    bits = PAYLOAD_BITS
    dtype = torch.int8

    def __init__(self, site: Site, redraw: int | None = None, room: bool = False) -> None:
        super().__init__(site)
        self.redraw, self.room = redraw, room
        self.register_buffer("block_exponent", torch.zeros(()))
        self.watched: Tensor | None = None
        self.cache: tuple[int, int, Tensor] | None = None  # address and version of the weight, its codes

    def observe(self, x: Tensor) -> None:
        self.watched = x.detach().clone()

    def forget(self) -> None:
        self.watched = None

    def commit(self, all_reduce: AllReduce) -> None:
        assert self.watched is not None
        codes, exponent = self.first_codes(self.watched)
        self.block_exponent.copy_(exponent)
        self.store(codes)
        self.set_ready()

    def first_codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The codes that training starts from: a pure power of two on what was found (Decision 4)."""
        if self.redraw is None:
            return input_codes(weight, self.range_of(weight), narrow=True)
        generator = torch.Generator().manual_seed(self.redraw + stable_hash(self.site.path) & 0x7FFFFFFF)
        drawn = nn.init.xavier_uniform_(torch.empty(weight.shape), generator=generator)
        return weight_codes_maxnorm(drawn.to(weight.device))

    def range_of(self, weight: Tensor) -> Tensor:
        """The range that training has: what is found, or more of it; 1 where nothing is."""
        found = largest_range(weight)
        if self.room:
            found = found.clamp(min=drawn_range(weight.shape))
        return _present(found)

    def integer_state(self) -> dict[str, Tensor]:
        return {"codes": self.codes(), "exponent": self.exponent()}

    def target(self) -> Tensor:
        """The user's parameter that the codes belong to."""
        weight: Tensor = self.layer.weight
        return weight

    def codes(self) -> Tensor:
        target = self.target()
        key = (target.data_ptr(), target._version)
        if self.cache is None or self.cache[:2] != key:
            self.cache = (*key, self.rounded(target.detach(), self.exponent()))
        return self.cache[2]

    def rounded(self, values: Tensor, exponent: Tensor) -> Tensor:
        """Codes of float values on an exponent, half even, clipped."""
        limit = 2**self.bits - 1
        return torch.round(values.double() * pow2(-exponent, torch.float64)).clamp(-limit, limit).to(self.dtype)

    @torch.no_grad()
    def store(self, codes: Tensor) -> None:
        """Write codes into the parameter, as the values that they stand for."""
        target = self.target()
        target.copy_(codes.to(torch.float32) * pow2(self.exponent()))
        self.keep(codes)

    def keep(self, codes: Tensor) -> None:
        """Take codes that have just been written into the parameter as its cache."""
        target = self.target()
        self.cache = (target.data_ptr(), target._version, codes)

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        return x

    def saturated(self, x: Tensor) -> Tensor:
        """Codes at the ends: an update moves them no further."""
        return _at_ends(self.codes(), self.bits)

    def exponent(self) -> Tensor:
        return self.block_exponent.round().to(torch.int32)

    def grid(self) -> Grid:
        return Grid(bits=self.bits + 1, exponent=int(self.exponent()), narrow=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": None}


class BiasCodes(WeightCodes):
    """int16 codes of a bias, on an exponent of their own (Decision 3): 15 bits for the larger of bias and weight range.

    A batch norm that was folded keeps the merged bias in its own ``bias``.
    """

    bits = BIAS_BITS
    dtype = torch.int16

    def first_codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        of_weight = self.layer.lowbit_weight.range_of(self.layer.weight.detach())
        exponent = clamp_exponent(torch.maximum(largest_range(weight), of_weight) - self.bits)
        return self.rounded(weight, exponent), exponent

    def commit(self, all_reduce: AllReduce) -> None:
        super().commit(all_reduce)
        norm: _BatchNorm | None = self.layer.norm
        if norm is not None:  # what is left of it is the identity and the merged bias
            assert norm.running_mean is not None
            assert norm.running_var is not None
            with torch.no_grad():
                norm.running_mean.zero_()
                norm.running_var.fill_(1.0 - norm.eps)
                norm.weight.fill_(1.0)
                if self.layer.bias is not None:
                    self.layer.bias.zero_()

    def target(self) -> Tensor:
        norm: _BatchNorm | None = self.layer.norm
        bias: Tensor = self.layer.bias if norm is None else norm.bias
        return bias
