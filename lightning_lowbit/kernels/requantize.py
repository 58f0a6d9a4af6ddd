"""Requantization and the weight update: a range pass, then one pass that shifts, rounds and clips.

One formula runs compiled, or operation by operation over slices that stay in cache; `numerics.block` is the slow
twin, equal bit for bit, and runs where neither applies (inside somebody's tracing, on a device without compiler).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lowbit.errors import InvariantError
from lightning_lowbit.kernels.fusion import compile_policy, flat_as, is_dense, route, run, same_order
from lightning_lowbit.numerics import block
from lightning_lowbit.numerics.block import MAX_SHIFT, ShiftRounding, shift_round
from lightning_lowbit.numerics.exponent import pow2

__all__ = ["bit_width", "compile_policy", "requantize", "update_weights"]

_LIMIT = 127
_STAGE = 1 << 20
_BITS = {torch.int32: 31, torch.int64: 63}


def bit_width(acc: Tensor) -> Tensor:
    """Smallest bw >= 0 with max|acc| <= 2**bw, as `numerics.block.bit_width`; int32, 0-dim, on acc's device."""
    acc = acc.detach()
    if acc.numel() == 0 or acc.device.type != "cpu" or route(acc) == "reference":
        return block.bit_width(acc)
    flat = flat_as(acc, acc) if is_dense(acc) else acc
    # For floats two reductions are faster than the joint one, which is not vectorized as well.
    low, high = (flat.amin(), flat.amax()) if flat.is_floating_point() else torch.aminmax(flat)
    return torch.tensor((max(int(high), -int(low), 1) - 1).bit_length(), dtype=torch.int32)


def requantize(
    acc: Tensor,
    shift: int | Tensor,
    *,
    rounding: ShiftRounding | str = ShiftRounding.HALF_AWAY,
    limit: int = _LIMIT,
    rectify: bool = False,
    keep: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Accumulators to int8: clip(shift_round(acc, shift), -limit, limit), and what a ReLU does, in one pass.

    Args:
        acc: integers of any shape and strides: int32 with |acc| < 2^31, int64 with |acc| < 2^63, or float32 that
            holds integers with |acc| < 2^24.
        shift: int, or integer 0-dim tensor; below 1 nothing is shifted.
        rounding: see `numerics.block.shift_round`.
        limit: the largest code, at most 127.
        rectify: negative codes become 0.
        keep: acc's shape; codes become 0 where keep <= 0 (backward through a ReLU with this input or output).
        noise: STOCHASTIC only, int32 or int64 of acc's shape; see `numerics.block.shift_round`.
    Returns:
        int8, acc's shape and, where acc's elements fill their memory, acc's strides.

    Raises:
        InvariantError: keep or noise of another shape, or stochastic rounding without noise.

    >>> requantize(torch.tensor([-13, -3, 2, 3, 13, 600], dtype=torch.int32), 2, limit=100)
    tensor([ -3,  -1,   1,   1,   3, 100], dtype=torch.int8)
    """
    rounding = ShiftRounding(rounding)
    noise = _noise("requantize", acc, rounding, noise)
    if keep is not None and keep.shape != acc.shape:
        raise InvariantError(f"requantize: got keep {tuple(keep.shape)}, expected acc's {tuple(acc.shape)}")
    acc, how = acc.detach(), route(acc)
    if how == "reference":
        codes = shift_round(acc.to(torch.int64), shift, rounding, noise).clamp(0 if rectify else -limit, limit)
        return (codes if keep is None else codes.masked_fill(keep <= 0, 0)).to(torch.int8)
    # Inference and training share one compiled loop, and the result may be saved for backward.
    with torch.inference_mode(False), torch.no_grad():
        codes = torch.empty_like(acc, dtype=torch.int8)
        setting = (*_setting(rounding, acc, noise), 0 if rectify else -limit, limit)
        tensors = [None if x is None else flat_as(x.detach(), codes) for x in (codes, acc, keep, noise)]
        run(_requantize, rounding, _requantize_numbers, setting, shift, tensors, how == "compiled")
    return codes


def update_weights(
    codes: Tensor,
    acc: Tensor,
    shift: int | Tensor,
    *,
    rounding: ShiftRounding | str,
    weight: Tensor | None = None,
    exponent: int | Tensor | None = None,
    fraction_bits: int = 0,
    noise: Tensor | None = None,
) -> Tensor:
    """One update of NITI in place, codes = clip(codes - shift_round(acc, shift)), and the float weight it stands for.

    Args:
        codes: int8 in [-127, 127], or with ``fraction_bits`` an int16 master of code * 2**fraction_bits, clipped to
            +-(127 << fraction_bits); any shape. Changed in place.
        acc: the summed gradient, codes' shape in any strides; dtypes as in :func:`requantize`.
        shift, rounding, noise: see :func:`requantize`.
        weight: float32, codes' shape; int8 code * 2**exponent is written into it.
        exponent: int or integer 0-dim tensor; given with weight.
        fraction_bits: 0 to 8. The int8 code is the master shifted by them, PSEUDO_STOCHASTIC, and clipped.
    Returns:
        the int8 codes: ``codes`` itself, or a new tensor where there are fraction bits.

    Raises:
        InvariantError: shapes that differ, a dtype of codes that does not fit fraction_bits, weight without exponent.

    >>> codes, weight = torch.tensor([5, -127], dtype=torch.int8), torch.zeros(2)
    >>> update_weights(codes, torch.tensor([9, 40]), 3, rounding="half_away", weight=weight, exponent=-7)
    tensor([   4, -127], dtype=torch.int8)
    >>> weight.tolist()
    [0.03125, -0.9921875]
    """
    rounding = ShiftRounding(rounding)
    noise = _noise("update_weights", acc, rounding, noise)
    dtype = torch.int16 if fraction_bits else torch.int8
    shapes = [tuple(x.shape) for x in (codes, acc, weight) if x is not None]
    if codes.dtype != dtype or len(set(shapes)) > 1 or (weight is None) != (exponent is None):
        raise InvariantError(
            f"update_weights: got {codes.dtype} codes for {fraction_bits} fraction bits, shapes {shapes}, exponent "
            f"{exponent}; expected {dtype}, equal shapes, and weight and exponent together"
        )
    scale = None if exponent is None else pow2(torch.as_tensor(exponent, device=codes.device).detach())
    how = route(codes) if is_dense(codes) else "reference"
    if how == "reference":
        narrow = _update_reference(codes.detach(), acc.detach(), shift, rounding, weight, scale, fraction_bits, noise)
        return narrow if fraction_bits else codes
    with torch.inference_mode(False), torch.no_grad():
        shown = torch.empty_like(codes, dtype=torch.int8) if fraction_bits else None
        # A weight in another memory order than its codes is written beside and copied.
        beside = weight is not None and not same_order(weight, codes)
        floats = torch.empty_like(codes, dtype=torch.float32) if beside else weight
        flats = [None if x is None else flat_as(x.detach(), codes) for x in (codes, acc, shown, floats, noise)]
        setting = (*_setting(rounding, acc, noise), fraction_bits)
        if how == "compiled" and fraction_bits:
            _update_staged(flats, scale, rounding, setting, shift)
        else:
            run(_update, rounding, _update_numbers, setting, shift, [*flats, scale], how == "compiled")
        if beside and weight is not None and floats is not None:
            weight.detach().copy_(floats)
    return codes if shown is None else shown


def _update_staged(
    flats: list[Tensor | None],
    scale: Tensor | None,
    rounding: ShiftRounding,
    setting: tuple[ShiftRounding, int, int, int],
    shift: int | Tensor,
) -> None:
    """Part by part through int32: torch's compiler does not vectorize int16, which takes ten times as long."""
    length = max(x.numel() for x in flats if x is not None)
    parts = max(1, round(length / _STAGE))
    for part in zip(*([None] * parts if x is None else x.tensor_split(parts) for x in flats), strict=True):
        master, *others = part
        stage = master.to(torch.int32)
        run(_update, rounding, _update_numbers, setting, shift, [stage, *others, scale], True)
        master.copy_(stage)


def _update_reference(
    codes: Tensor,
    acc: Tensor,
    shift: int | Tensor,
    rounding: ShiftRounding,
    weight: Tensor | None,
    scale: Tensor | None,
    fraction_bits: int,
    noise: Tensor | None,
) -> Tensor:
    limit = _LIMIT << fraction_bits
    # Beyond twice the limit a step changes nothing more; without the clip the difference could overflow.
    step = shift_round(acc.to(torch.int64), shift, rounding, noise).clamp(-2 * limit, 2 * limit)
    moved = (codes.to(torch.int64) - step).clamp(-limit, limit)
    codes.copy_(moved)
    shown = shift_round(moved, fraction_bits, ShiftRounding.PSEUDO_STOCHASTIC).clamp(-_LIMIT, _LIMIT)
    if weight is not None and scale is not None:
        weight.detach().copy_(shown * scale)
    return shown.to(torch.int8)


def _noise(where: str, acc: Tensor, rounding: ShiftRounding, noise: Tensor | None) -> Tensor | None:
    if rounding is not ShiftRounding.STOCHASTIC:
        return None
    if noise is None or noise.shape != acc.shape or noise.dtype not in _BITS:
        got = "none" if noise is None else f"{noise.dtype} {tuple(noise.shape)}"
        raise InvariantError(f"{where}: got noise {got}, expected int32 or int64 of acc's shape {tuple(acc.shape)}")
    return noise


def _setting(rounding: ShiftRounding, acc: Tensor, noise: Tensor | None) -> tuple[ShiftRounding, int, int]:
    word = _word(acc, noise)
    return rounding, _BITS[word], 31 if noise is not None and noise.dtype == torch.int32 else MAX_SHIFT


def _word(acc: Tensor, noise: Tensor | None) -> torch.dtype:
    """int32 is twice as fast; it holds float32's integers below 2^24 too."""
    wide = acc.dtype in (torch.int64, torch.float64) or (noise is not None and noise.dtype == torch.int64)
    return torch.int64 if wide else torch.int32


def _requantize_numbers(
    rounding: ShiftRounding, word_bits: int, noise_bits: int, low: int, high: int, s: int
) -> tuple[int, ...]:
    return low, high, *_shift_numbers(rounding, word_bits, noise_bits, s)


def _update_numbers(
    rounding: ShiftRounding, word_bits: int, noise_bits: int, fraction_bits: int, s: int
) -> tuple[int, ...]:
    fraction = _shift_numbers(ShiftRounding.PSEUDO_STOCHASTIC, word_bits, 0, fraction_bits)
    return _LIMIT << fraction_bits, *_shift_numbers(rounding, word_bits, noise_bits, s), *fraction


def _shift_numbers(rounding: ShiftRounding, word_bits: int, noise_bits: int, s: int) -> tuple[int, ...]:
    """The shifts and masks of :func:`_rounded` for a shift s in [0, 63], such that no shift exceeds the word."""

    def mask(bits: int) -> int:
        return (1 << min(bits, word_bits)) - 1

    if s > MAX_SHIFT:
        return word_bits, 0, 0, 0, 0
    whole, h = min(s, word_bits), s >> 1
    if rounding is ShiftRounding.HALF_AWAY:
        return whole, min(max(s - 1, 0), word_bits), int(s > 0), 0, 0
    if rounding is ShiftRounding.PSEUDO_STOCHASTIC:
        return whole, h, mask(s - h), mask(h), s & 1
    return whole, max(s - noise_bits, 0), mask(s), mask(min(s, noise_bits)), 0


def _rounded(x: Tensor, numbers: Sequence[Any], rounding: ShiftRounding, noise: Tensor | None) -> Tensor:
    """`numerics.block.shift_round` on int32 or int64; comparisons are sign bits of differences, which vectorize."""
    a, sign_bit = x.abs(), _BITS[x.dtype]
    if rounding is ShiftRounding.HALF_AWAY:
        whole, before, one = numbers[:3]
        q = a >> whole
        q += a.bitwise_right_shift_(before).bitwise_and_(one)  # not (a + 2^(s-1)) >> s, which overflows
    elif rounding is ShiftRounding.PSEUDO_STOCHASTIC:
        whole, h, high, low, odd = numbers
        up = (a & low).bitwise_left_shift_(odd).sub_((a >> h).bitwise_and_(high))
        q = a.bitwise_right_shift_(whole).sub_(up.bitwise_right_shift_(sign_bit))
    else:
        assert noise is not None
        whole, drop, dropped, random = numbers[:4]
        up = (noise.to(x.dtype) & random).sub_((a & dropped).bitwise_right_shift_(drop))
        q = a.bitwise_right_shift_(whole).sub_(up.bitwise_right_shift_(sign_bit))
    signed: Tensor = q.mul_(x.sign())
    return signed


def _requantize(
    numbers: Sequence[Any],
    rounding: ShiftRounding,
    codes: Tensor,
    acc: Tensor,
    keep: Tensor | None,
    noise: Tensor | None,
) -> None:
    low, high, *shift = numbers
    q = _rounded(acc.to(_word(acc, noise)), shift, rounding, noise).clamp_(low, high)
    if keep is not None:
        positive = (keep if keep.dtype == torch.int8 else keep.sign()).to(q.dtype)
        q = torch.ops.aten.threshold_backward(q, positive, 0)  # where(positive > 0, q, 0), vectorized
    codes.copy_(q)


def _update(
    numbers: Sequence[Any],
    rounding: ShiftRounding,
    codes: Tensor,
    acc: Tensor,
    shown: Tensor | None,
    weight: Tensor | None,
    noise: Tensor | None,
    scale: Tensor | None,
) -> None:
    limit, shift, fraction = numbers[0], numbers[1:6], numbers[6:]
    word = _word(acc, noise)
    step = _rounded(acc.to(word), shift, rounding, noise).clamp_(-2 * limit, 2 * limit)
    q = codes.to(word).sub_(step).clamp_(-limit, limit)
    codes.copy_(q)
    if shown is not None:
        q = _rounded(q, fraction, ShiftRounding.PSEUDO_STOCHASTIC, None).clamp_(-_LIMIT, _LIMIT)
        shown.copy_(q)
    if weight is not None and scale is not None:
        weight.copy_(q * scale)
