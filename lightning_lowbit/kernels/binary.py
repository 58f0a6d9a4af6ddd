"""Exact products of +-1 values that are packed as words of signs: dot = K - 2 popcount(a xor b).

With numba the words are multiplied as they are (`popcount`); without it, on other devices, or where `kernels.use` asks
for a named backend, they are unpacked and go through that backend's int8 product. The integers are the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.kernels import popcount
from lightning_lowbit.kernels.backends import choose
from lightning_lowbit.kernels.geometry import Geometry, Padding, Size, geometry
from lightning_lowbit.kernels.popcount import Threshold, words_of
from lightning_lowbit.kernels.words import (
    pack_images,
    pack_signs,
    pool_signs,
    regroup_images,
    unpack_images,
    unpack_signs,
    weight_words,
)

__all__ = [
    "BinaryWeight", "Threshold", "pack_images", "pack_signs", "pool_signs", "regroup_images", "unpack_images",
    "unpack_signs", "weight_words", "xnor_conv2d", "xnor_linear", "xnor_matmul",
]  # fmt: skip

_FLOAT_TERMS = 2**24


class BinaryWeight:
    """The packed weight of one layer, and the forms of it that the kernels want, made when first asked for.

    Args:
        words: int64, as `weight_words` makes them: (O, ceil(K / 64)) of a linear layer, or
            (O, kh, kw, ceil(C / groups / 64)) of a convolution.
        terms: K of a linear layer, C / groups of a convolution.

    Raises:
        ConfigError: words that do not hold so many terms.
    """

    def __init__(self, words: Tensor, terms: int) -> None:
        if words.dtype != torch.int64 or words.dim() not in (2, 4) or terms < 1 or words.shape[-1] != words_of(terms):
            raise ConfigError(
                f"BinaryWeight: got {words.dtype} of shape {tuple(words.shape)} for {terms} terms, expected int64 "
                f"(O, {words_of(terms)}) of a linear layer or (O, kh, kw, {words_of(terms)}) of a convolution"
            )
        self.words = words.contiguous()
        self.terms = terms
        self._values: Tensor | None = None
        self._panels: Tensor | None = None

    @property
    def outputs(self) -> int:
        """O."""
        return self.words.shape[0]

    @property
    def size(self) -> tuple[int, ...]:
        """Shape of the float weight: (O, K) or (O, C / groups, kh, kw)."""
        outputs, *kernel, _ = self.words.shape
        return (outputs, self.terms, *kernel)

    def values(self) -> Tensor:
        """int8 +-1 of shape `size`; a convolution's in channels_last memory."""
        if self._values is None:
            values = unpack_signs(self.words, self.terms)
            self._values = values if values.dim() == 2 else values.permute(0, 3, 1, 2)
        return self._values

    def panels(self) -> Tensor:
        """The words of a linear layer as `popcount.matmul` reads them."""
        if self._panels is None:
            self._panels = popcount.panels_of(self.words)
        return self._panels


@popcount.uncompiled
def xnor_matmul(a: Tensor, b: Tensor, k: int) -> Tensor:
    """The product of two matrices of signs: a times b transposed.

    Args:
        a: (M, ceil(k / 64)) int64, as `pack_signs` makes them.
        b: (N, ceil(k / 64)) int64.
        k: signs in each row.

    Returns:
        (M, N) int32: k - 2 popcount(a xor b).

    Raises:
        ConfigError: another type, or shapes that do not fit k.

    >>> signs = pack_signs(torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, 1.0]]))
    >>> xnor_matmul(signs, signs, 3)
    tensor([[3, 1],
            [1, 3]], dtype=torch.int32)
    """
    for operand in (a, b):
        if operand.dtype != torch.int64 or operand.dim() != 2 or k < 1 or operand.shape[1] != words_of(k):
            raise ConfigError(
                f"xnor_matmul: got {_said(a)} and {_said(b)} for k = {k}, expected int64 (M, {words_of(k)}) and "
                f"(N, {words_of(k)})"
            )
    if popcount.exact(a.device.type) and len(a) and len(b):
        return popcount.matmul(a.contiguous(), popcount.panels_of(b.contiguous()), len(b), k, torch.int32)
    return _matmul(unpack_signs(a, k), unpack_signs(b, k))


@popcount.uncompiled
def xnor_linear(x_words: Tensor, weight: BinaryWeight, threshold: Threshold | None = None) -> Tensor:
    """A linear layer of signs.

    Args:
        x_words: (M, ceil(K / 64)) int64.
        weight: (O, K).
        threshold: turns each dot into a sign.

    Returns:
        float32 (M, O) of exact dots, or with a threshold (M, ceil(O / 64)) int64.

    Raises:
        ConfigError: another type, or shapes that do not fit.
    """
    if len(weight.size) != 2 or x_words.dtype != torch.int64 or x_words.shape[1:] != weight.words.shape[1:]:
        raise ConfigError(
            f"xnor_linear: got {_said(x_words)} and a weight of size {weight.size}, expected int64 "
            f"(M, {words_of(weight.terms)}) and a weight (O, K)"
        )
    _check_terms("xnor_linear", weight.terms)
    threshold = _checked("xnor_linear", weight.outputs, threshold)
    if popcount.exact(x_words.device.type) and len(x_words) and weight.outputs:
        panels = weight.panels()
        return popcount.matmul(x_words.contiguous(), panels, weight.outputs, weight.terms, torch.float32, threshold)
    dot = _matmul(unpack_signs(x_words, weight.terms), weight.values())
    if threshold is None:
        return dot.to(torch.float32)
    low, flip = threshold
    return pack_signs(_signs(dot, low, flip))


@popcount.uncompiled
def xnor_conv2d(
    x_words: Tensor, weight: BinaryWeight, *, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1, pad_value: int = 0, threshold: Threshold | None = None,
) -> Tensor:  # fmt: skip
    """A convolution of signs.

    Args:
        x_words: (N, groups * ceil(C / groups / 64), H, W) int64, as `pack_images` makes them.
        weight: (O, C / groups, kh, kw).
        stride: one number or (vertical, horizontal).
        padding: around x: one number, (vertical, horizontal) or ((top, bottom), (left, right)).
        dilation: one number or (vertical, horizontal).
        groups: as in torch.nn.Conv2d.
        pad_value: 0, where a tap outside the image adds nothing, or 1.
        threshold: turns each dot into a sign.

    Returns:
        float32 (N, O, H', W') of exact dots, contiguous, or with a threshold (N, ceil(O / 64), H', W') int64.

    Raises:
        ConfigError: another type, shapes that do not fit, or another pad value.
    """
    planes = groups * words_of(weight.terms)
    if len(weight.size) != 4 or x_words.dtype != torch.int64 or x_words.dim() != 4 or x_words.shape[1] != planes:
        raise ConfigError(
            f"xnor_conv2d: got {_said(x_words)} and a weight of size {weight.size} in {groups} groups, expected int64 "
            f"(N, {planes}, H, W), each group in words of its own, and a weight (O, C / groups, kh, kw)"
        )
    if pad_value not in (0, 1):
        raise ConfigError(f"xnor_conv2d: got pad_value {pad_value}, expected 0 or 1")
    batch, _, *size = x_words.shape
    geo = geometry((batch, groups * weight.terms, *size), weight.size, stride, padding, dilation, groups)
    _check_terms("xnor_conv2d", geo.forward_terms)
    threshold = _checked("xnor_conv2d", weight.outputs, threshold)
    if popcount.exact(x_words.device.type) and 0 not in geo.output_size:
        return popcount.conv2d(x_words, weight.words, geo, pad_value, threshold)
    dot = _conv2d(unpack_images(x_words, geo.channels, groups), weight.values(), geo, pad_value)
    if threshold is None:
        return dot.to(torch.float32).contiguous()
    low, flip = (of[:, None, None] for of in threshold)
    return pack_images(_signs(dot, low, flip))


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """int8 (M, K) times (N, K) transposed: int32."""
    if 0 in (a.shape[0], b.shape[0]):
        return torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    return choose(a.device.type).matmul(a, b.t()).to(torch.int32)


def _conv2d(x: Tensor, w: Tensor, geo: Geometry, pad_value: int) -> Tensor:
    """int8 images and weights: int32 (N, O, H', W')."""
    if 0 in geo.output_size:
        return torch.zeros(geo.output_size, dtype=torch.int32, device=x.device)
    if pad_value:
        x = F.pad(x, (*geo.left_right, *geo.top_bottom), value=pad_value).contiguous(memory_format=torch.channels_last)
        geo = geometry(x.shape, w.shape, geo.stride, 0, geo.dilation, geo.groups)
    return choose(x.device.type).conv2d(x, w, geo).to(torch.int32)


def _signs(dot: Tensor, low: Tensor, flip: Tensor) -> Tensor:
    return torch.where((dot >= low) != flip, 1, -1).to(torch.int8)


def _check_terms(name: str, terms: int) -> None:
    if terms > _FLOAT_TERMS:
        raise ConfigError(f"{name}: dots of {terms} terms are not exact in float32, which holds {_FLOAT_TERMS}")


def _checked(name: str, outputs: int, threshold: Threshold | None) -> Threshold | None:
    if threshold is None:
        return None
    low, flip = threshold
    if low.dtype != torch.int32 or flip.dtype != torch.bool or low.shape != (outputs,) or flip.shape != (outputs,):
        raise ConfigError(
            f"{name}: got thresholds {_said(low)} and {_said(flip)}, expected int32 ({outputs},) and bool ({outputs},)"
        )
    return low.contiguous(), flip.contiguous()


def _said(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
