"""The one way from integer sums, or from float errors, to int8 codes: range, shift, rounding, clip."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_lowbit import kernels
from lightning_lowbit.modules.block import BlockRange, ErrorRange, largest_range, stable_hash
from lightning_lowbit.modules.carrier import Carrier, carry
from lightning_lowbit.modules.lowering import Builder, Codes, Snap, refuse
from lightning_lowbit.numerics.block import ShiftRounding
from lightning_lowbit.numerics.exponent import clamp_exponent, pow2
from lightning_lowbit.numerics.guards import FLOAT32_EXACT
from lightning_lowbit.numerics.niti_rules import PAYLOAD_BITS, act_shift
from lightning_lowbit.numerics.noise import combine, counter_bits
from lightning_lowbit.numerics.rounding import Rounding

__all__ = ["error_codes", "lower_carried", "lower_entry", "lower_rounded", "random_bits", "rounded"]


def random_bits(
    origin: Any, purpose: str, samples: int, per_sample: int, device: Any = None, batch: int | None = None,
    shared: bool = False,
) -> Tensor:  # fmt: skip
    """Random integers of 31 bits, [samples, per_sample]: a function of (seed, batch, layer, global sample) alone.

    Args:
        origin: the module that draws.
        purpose: keys the numbers beside the module's path.
        batch: of the numbers, default the present one.
        shared: the numbers do not depend on the sample (samples is 1).
    """
    run = origin.switch.run
    if run.injected is not None:
        given: Tensor = run.injected(origin.path, purpose, samples, per_sample)
        return given
    key = combine(origin.scheme.seed, run.batch if batch is None else batch, stable_hash(f"{origin.path}:{purpose}"))
    index = torch.arange(samples, device=device) * run.world + (0 if shared else run.rank)
    return counter_bits(key, index, per_sample)


def rounded(acc: Tensor, exponent: Tensor, origin: Any, ranges: BlockRange, purpose: str) -> Carrier:
    """Integer sums to a carrier: s = range - 7 in units of the sums, never to the left (NITI section 4).

    Args:
        acc: int32, int64 or float32 holding integers below 2^24; real value acc * 2**exponent.
        exponent: int32 0-dim.
        origin: the module that computes; its scheme rounds.
        ranges: where the range of this tensor is kept.
        purpose: "act" or "err"; chooses the rounding and keys its random numbers.
    """
    training = origin.training or purpose == "err"
    largest = ranges.follow(lambda: kernels.bit_width(acc) + exponent, training)
    shift = act_shift(largest - exponent)
    rounding, noise = origin.scheme.shift_rounding(purpose), None
    if rounding is ShiftRounding.STOCHASTIC:
        noise = random_bits(origin, purpose, acc.shape[0], acc.shape[1:].numel(), acc.device).reshape(acc.shape)
    codes = kernels.requantize(acc, shift, rounding=rounding, noise=noise)
    if origin.scheme.wraps:  # the published code: what needs no shift is cast, and +128 becomes -128
        codes = torch.where(shift == 0, acc.to(torch.int8), codes)
    made = carry(codes, exponent + shift, origin)
    if purpose == "act" and ranges.switch.tally is not None:
        ranges.switch.tally.count(ranges, made)
    return made


def lower_rounded(build: Builder, acc: Codes, origin: Any, ranges: BlockRange) -> Codes:
    """``rounded`` of evaluation: with the range the shift is frozen too."""
    scheme, shift = origin.scheme, int(act_shift(ranges.range() - acc.exponent))
    if scheme.shift_rounding("act") is not ShiftRounding.HALF_AWAY:
        raise refuse(
            origin.path, f"it rounds with act_rounding={scheme.act_rounding!r}, more than a shift and a tie rule",
            "Train, or evaluate, with act_rounding='half_away'.",
        )  # fmt: skip
    if scheme.wraps and shift == 0:
        if acc.low < -128 or acc.high > 127:
            raise refuse(
                origin.path, f"preset='reference' wraps its sums, {acc.low} to {acc.high}, to 8 bits without a shift",
                "Train, or evaluate, with preset='recommended', which clips them.",
            )  # fmt: skip
        return lower_carried(build, acc)
    return lower_carried(build, build.snap(acc, Snap(acc.exponent + shift, -127, 127, Rounding.HALF_AWAY)))


def lower_carried(build: Builder, codes: Codes) -> Codes:
    """``carry``: codes whose exponent would leave the range of float32 carriers are worth less or more."""
    inside = int(clamp_exponent(torch.tensor(codes.exponent)))
    return codes if inside == codes.exponent else build.scaled(codes, inside - codes.exponent)


def lower_entry(build: Builder, x: Codes, ranges: BlockRange | None) -> Codes:
    """``BlockRange.quantize``: what comes as codes stays; sums that nobody followed are read as float32."""
    if ranges is None or x.word == 8:
        return x
    exact = x.is_float or max(-x.low, x.high) < FLOAT32_EXACT
    return replace(build.snap(x if exact else build.floats(x), ranges), word=8)


def error_codes(grad: Tensor, origin: Any, ranges: ErrorRange) -> tuple[Tensor, Tensor]:
    """int8 codes and exponent of the error that reaches a module.

    A carrier brings its own; the exact sum of several is rounded once; a float gradient (any loss but the integer
    one, float code behind the module) is rounded stochastically on the range of the batch.
    """
    if isinstance(grad, Carrier):
        if grad.payload.dtype is not torch.int8:
            grad = rounded(grad.payload, grad.exponent, origin, ranges.arriving, "err")
        return grad.payload, grad.exponent
    origin.switch.run.float_errors.add(origin.path)
    run = origin.switch.run
    if run.blank:
        grad = torch.zeros_like(grad)
    if run.world & (run.world - 1):  # a mean over processes, in the units of the integer errors
        grad = grad * (2**run.error_bits / run.world)
    exponent = ranges.arriving.follow(lambda: largest_range(grad), True) - PAYLOAD_BITS
    # 16 bits below the code are kept for the rounding: what is finer than 2^-16 of a step is cut off.
    scaled = (grad.double() * pow2(16 - exponent, torch.float64)).clamp(-(2**30), 2**30).to(torch.int32)
    noise = random_bits(origin, "gate", grad.shape[0], grad.shape[1:].numel(), grad.device).reshape(grad.shape)
    shift = torch.full_like(exponent, 16)
    return kernels.requantize(scaled, shift, rounding=ShiftRounding.STOCHASTIC, noise=noise), exponent
