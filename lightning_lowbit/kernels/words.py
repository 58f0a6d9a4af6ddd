"""Signs in 64-bit words: a bit is 1 where the value is negative, element j of 64 is bit j, bits past the end are 0.

Two layouts. Rows, (..., ceil(K / 64)), pack the last axis. Planes, (N, groups * ceil(C / groups / 64), H, W), pack the
channels of images group by group and keep pixels side by side, so that a convolution reads neighbors as one vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.kernels import popcount
from lightning_lowbit.kernels.popcount import WORD, words_of

__all__ = [
    "pack_images", "pack_signs", "pool_signs", "regroup_images", "unpack_images", "unpack_signs", "weight_words",
]  # fmt: skip

# Eight bytes of 0 or 1, times this, leave byte i's bit at bit 56 + i: no two of the 64 partial products meet.
_GATHER = 0x0102040810204080


@popcount.uncompiled
def pack_signs(x: Tensor) -> Tensor:
    """The signs of the last axis as words: a bit is 1 where x < 0, so that 0, -0.0 and NaN are +1.

    Args:
        x: (..., K), any real type and any strides.

    Returns:
        (..., ceil(K / 64)) int64.

    >>> pack_signs(torch.tensor([[1.0, -2.0, -0.0, float("nan"), -1.0], [0.0, 0.0, 0.0, 0.0, 0.0]]))
    tensor([[18],
            [ 0]])
    """
    if x.dim() == 0 or x.is_complex():
        raise ConfigError(f"pack_signs: got {x.dtype} of shape {tuple(x.shape)}, expected real numbers (..., K)")
    floats = _as_floats(x)
    if floats is None or x.numel() == 0:
        return _packed(x < 0)
    rows = floats.contiguous().reshape(-1, x.shape[-1])
    return popcount.pack_rows(rows).reshape(*x.shape[:-1], -1)


def unpack_signs(words: Tensor, k: int) -> Tensor:
    """The first k signs of each row of words as int8 +-1: (..., ceil(k / 64)) to (..., k).

    >>> unpack_signs(torch.tensor([18]), 5)
    tensor([ 1, -1,  1,  1, -1], dtype=torch.int8)
    """
    _check_words("unpack_signs", words, words.dim() - 1, k)
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    octets = words.reshape(-1).view(torch.uint8)
    negative = (octets[:, None] >> places & 1).reshape(*words.shape[:-1], words.shape[-1] * WORD)
    return 1 - 2 * negative[..., :k].to(torch.int8)


@popcount.uncompiled
def pack_images(x: Tensor, groups: int = 1) -> Tensor:
    """The signs of the channels of images as planes of words.

    Args:
        x: (N, C, H, W), any real type; fastest in contiguous or channels_last memory.
        groups: of the convolution that reads them; each group begins a new word.

    Returns:
        (N, groups * ceil(C / groups / 64), H, W) int64, contiguous.
    """
    if x.dim() != 4 or x.is_complex() or groups < 1 or x.shape[1] % groups:
        raise ConfigError(
            f"pack_images: got {x.dtype} of shape {tuple(x.shape)} in {groups} groups, expected real numbers "
            "(N, C, H, W) with C a multiple of the groups"
        )
    floats = _as_floats(x)
    if floats is not None and x.numel():
        last = floats.is_contiguous(memory_format=torch.channels_last)
        return popcount.pack_images(floats if last else floats.contiguous(), groups)
    grouped = (x < 0).reshape(len(x), groups, x.shape[1] // groups, *x.shape[2:]).permute(0, 3, 4, 1, 2)
    return _packed(grouped).flatten(-2).permute(0, 3, 1, 2).contiguous()


def unpack_images(planes: Tensor, channels: int, groups: int = 1) -> Tensor:
    """The signs of `pack_images` as int8 +-1: (N, channels, H, W) in channels_last memory."""
    _check_planes("unpack_images", planes, channels, groups)
    grouped = planes.reshape(len(planes), groups, planes.shape[1] // groups, *planes.shape[2:]).permute(0, 3, 4, 1, 2)
    return unpack_signs(grouped, channels // groups).flatten(-2).permute(0, 3, 1, 2)


def regroup_images(planes: Tensor, channels: int, groups: int) -> Tensor:
    """Planes of one group as a convolution in groups reads them; the same planes where groups fill their words."""
    _check_planes("regroup_images", planes, channels, 1)
    if channels % groups:
        raise ConfigError(f"regroup_images: {channels} channels do not split into {groups} groups")
    if groups == 1 or channels // groups % WORD == 0:
        return planes
    return pack_images(unpack_images(planes, channels), groups)


def weight_words(weight: Tensor) -> Tensor:
    """The signs of a weight in the form that is stored and that `BinaryWeight` reads.

    Args:
        weight: of a linear layer (O, K) or of a convolution (O, C / groups, kh, kw).

    Returns:
        int64 (O, ceil(K / 64)), or (O, kh, kw, ceil(C / groups / 64)): the channels of one tap lie together.
    """
    if weight.dim() not in (2, 4):
        raise ConfigError(
            f"weight_words: got a weight of shape {tuple(weight.shape)}, expected (O, K) or (O, C, kh, kw)"
        )
    return pack_signs(weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1))


def pool_signs(
    planes: Tensor, flip: Tensor, kernel: int | tuple[int, int], stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1, ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    """Max pooling of the sums before a batch norm, done on the signs after it.

    Where the norm's slope is positive the sign of the largest sum is +1 iff any sign in the window is; where it is
    negative (``flip``) iff all are. Padding takes no part.

    Args:
        planes: (N, ceil(C / 64), H, W) int64.
        flip: (C,) bool, the slope of the channel's norm is negative.
        kernel, stride, padding, dilation, ceil_mode: as in torch.nn.MaxPool2d; stride None is the kernel.

    Returns:
        (N, ceil(C / 64), H', W') int64.
    """
    _check_planes("pool_signs", planes, flip.shape[0], 1)
    # A negative sign is a 1: AND of bits is "any +1". The channels that flip are complemented before and after.
    turned = pack_signs(-flip.to(torch.int8))[:, None, None]
    sizes, steps, sides, holes = (
        (value, value) if isinstance(value, int) else value
        for value in (kernel, kernel if stride is None else stride, padding, dilation)
    )
    pooled = planes ^ turned
    for axis in (2, 3):
        window = sizes[axis - 2], steps[axis - 2], sides[axis - 2], holes[axis - 2]
        pooled = _and_along(pooled, axis, *window, ceil_mode)
    return pooled ^ turned


def _and_along(x: Tensor, axis: int, size: int, step: int, side: int, hole: int, ceil_mode: bool) -> Tensor:
    length, reach = x.shape[axis], hole * (size - 1) + 1
    room = length + 2 * side - reach
    if room < 0 or not 0 <= side <= size // 2:
        raise ConfigError(
            f"pool_signs: a window of {size} with dilation {hole} and padding {side} does not fit a length of {length}"
        )
    out = (room + (step - 1 if ceil_mode else 0)) // step + 1
    if ceil_mode and (out - 1) * step >= length + side:
        out -= 1  # torch's rule: the last window begins inside the image or its left padding
    right = max((out - 1) * step + reach - length - side, 0)
    pads = (side, right) if axis == 3 else (0, 0, side, right)
    padded = F.pad(x, pads, value=-1) if side or right else x
    last = (out - 1) * step + 1
    taps = [padded.narrow(axis, tap * hole, last) for tap in range(size)]
    taps = [tap[:, :, ::step] if axis == 2 else tap[..., ::step] for tap in taps]
    pooled = taps[0].clone()
    for tap in taps[1:]:
        pooled &= tap
    return pooled


def _packed(negative: Tensor) -> Tensor:
    """(..., K) bool to (..., ceil(K / 64)) int64."""
    length = negative.shape[-1]
    size = (*negative.shape[:-1], words_of(length))
    padded = F.pad(negative.to(torch.uint8), (0, size[-1] * WORD - length))
    # Flat, as a view of other width asks: a contiguous axis of one element may have any stride.
    eights = padded.reshape(-1).view(torch.int64)
    return ((eights * _GATHER) >> 56).to(torch.uint8).view(torch.int64).reshape(size)


def _as_floats(x: Tensor) -> Tensor | None:
    """x in float32, where that keeps each sign and the compiled loops pack it."""
    exact = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and popcount.exact(x.device.type)
    return x.detach().to(torch.float32) if exact else None


def _check_words(name: str, words: Tensor, axis: int, k: int) -> None:
    if words.dtype != torch.int64 or words.dim() == 0 or k < 0 or words.shape[axis] != words_of(k):
        raise ConfigError(
            f"{name}: got {words.dtype} of shape {tuple(words.shape)}, expected int64 with {words_of(k)} words "
            f"for {k} signs"
        )


def _check_planes(name: str, planes: Tensor, channels: int, groups: int) -> None:
    words = groups * words_of(channels // max(groups, 1))
    if planes.dtype != torch.int64 or planes.dim() != 4 or groups < 1 or planes.shape[1] != words:
        raise ConfigError(
            f"{name}: got {planes.dtype} of shape {tuple(planes.shape)}, expected int64 (N, {words}, H, W) for "
            f"{channels} channels in {groups} groups"
        )
