"""Exact integer products of 8-bit tensors and of packed signs, by several backends that agree bit for bit.

The int8 functions take int8 tensors with any strides (convolutions are fastest on channels_last memory, weights
included); the activations, which are the first operand of a forward product and of a weight's gradient, may also be
uint8. They return accumulators: int32, or int64 where so many products could wrap int32. With ``exact_float=True`` the
result may be float32 that holds the very same integers, which saves a conversion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.kernels.backends import choose, use
from lightning_lowbit.kernels.binary import pack_signs, xnor_matmul
from lightning_lowbit.kernels.geometry import Geometry, Padding, Size, geometry, int32_terms
from lightning_lowbit.kernels.ledger import report as backend_report
from lightning_lowbit.kernels.requantize import bit_width, compile_policy, requantize, update_weights

__all__ = [
    "backend_report",
    "bit_width",
    "compile_policy",
    "int8_conv1d",
    "int8_conv1d_input",
    "int8_conv1d_weight",
    "int8_conv2d",
    "int8_conv2d_input",
    "int8_conv2d_weight",
    "int8_matmul",
    "pack_signs",
    "requantize",
    "update_weights",
    "use",
    "xnor_matmul",
]

_ACTIVATIONS = (torch.int8, torch.uint8)


def int8_matmul(a: Tensor, b: Tensor, *, backend: str | None = None, exact_float: bool = False) -> Tensor:
    """The matrix product of 8-bit matrices, exactly.

    Args:
        a: (M, K) int8, or uint8 activations.
        b: (K, N) int8; fastest as the transposed view of a contiguous (N, K).
        backend: see `use`; None takes the innermost `use`, else the environment, else the fastest exact one.
        exact_float: allow float32 that holds the integers.

    Returns:
        (M, N) int32; int64 where K * 128 * 128, of uint8 K * 255 * 128, exceeds int32.

    Raises:
        ConfigError: not of these dtypes, sizes that do not fit, or an unknown backend.

    >>> a = torch.tensor([[127, -128]], dtype=torch.int8)
    >>> int8_matmul(a, a.t())
    tensor([[32513]], dtype=torch.int32)
    >>> int8_matmul(torch.tensor([[255, 255]], dtype=torch.uint8), a.t())
    tensor([[-255]], dtype=torch.int32)
    """
    if a.dtype not in _ACTIVATIONS or b.dtype != torch.int8 or a.dim() != 2 or b.dim() != 2 or a.shape[1] != len(b):
        raise ConfigError(
            f"int8_matmul: got {_said(a)} and {_said(b)}, expected int8 (M, K) and int8 (K, N); the first may be uint8"
        )
    product = choose(a.device.type, backend, a.dtype).matmul
    size = (a.shape[0], b.shape[1])
    if 0 in (*size, a.shape[1]):
        return _empty(size, a)
    return _finished(product(a, b), a.shape[1], exact_float, a.dtype)


def int8_conv2d(
    x: Tensor, w: Tensor, *, stride: Size = 1, padding: Padding = 0, dilation: Size = 1, groups: int = 1,
    backend: str | None = None, exact_float: bool = False, nonnegative: bool = False,
) -> Tensor:  # fmt: skip
    """The convolution of 8-bit images, exactly.

    Args:
        x: (N, C, H, W) int8, or uint8 activations.
        w: (O, C / groups, kh, kw) int8.
        stride: one number or (vertical, horizontal).
        padding: zeros around x: one number, (vertical, horizontal) or ((top, bottom), (left, right)).
        dilation: one number or (vertical, horizontal).
        groups: as in torch.nn.Conv2d.
        backend: see `use`.
        exact_float: allow float32 that holds the integers.
        nonnegative: a promise that no element of x is negative, as after a ReLU; it saves a pass. Of uint8 it is known.

    Returns:
        (N, O, H', W') accumulators in channels_last memory, int32, or int64 where they could exceed it.

    Raises:
        ConfigError: not of these dtypes, sizes that do not fit, or an unknown backend.
    """
    _check("int8_conv2d", x, w, activations=True)
    geo = geometry(x.shape, w.shape, stride, padding, dilation, groups)
    product = choose(x.device.type, backend, x.dtype).conv2d
    if 0 in (*geo.output_size, geo.forward_terms):
        return _empty(geo.output_size, x)
    return _image(product(x, w, geo, nonnegative), geo.forward_terms, exact_float, x.dtype)


def int8_conv2d_input(
    err: Tensor, w: Tensor, input_size: tuple[int, ...], *, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1, backend: str | None = None, exact_float: bool = False,
) -> Tensor:  # fmt: skip
    """The gradient of `int8_conv2d` with respect to x, given the int8 errors (N, O, H', W') at its output.

    Args:
        err: (N, O, H', W') int8.
        w: (O, C / groups, kh, kw) int8.
        input_size: (N, C, H, W).
        stride, padding, dilation, groups, backend, exact_float: as in `int8_conv2d`.

    Returns:
        Accumulators of shape input_size in channels_last memory.
    """
    _check("int8_conv2d_input", err, w)
    geo = geometry(torch.Size(input_size), w.shape, stride, padding, dilation, groups)
    _check_size("int8_conv2d_input", err, geo)
    product = choose(err.device.type, backend).conv2d_input
    if 0 in (*geo.input_size, geo.input_terms, *geo.output_size):
        return _empty(geo.input_size, err)
    return _image(product(err, w, geo), geo.input_terms, exact_float)


def int8_conv2d_weight(
    x: Tensor, err: Tensor, weight_size: tuple[int, ...], *, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1, backend: str | None = None, exact_float: bool = False,
) -> Tensor:  # fmt: skip
    """The gradient of `int8_conv2d` with respect to w, given the int8 errors (N, O, H', W') at its output.

    Args:
        x: (N, C, H, W) int8, or uint8 activations.
        err: (N, O, H', W') int8.
        weight_size: (O, C / groups, kh, kw).
        stride, padding, dilation, groups, backend, exact_float: as in `int8_conv2d`.

    Returns:
        Accumulators of shape weight_size in channels_last memory; int64 where N * H' * W' products could
        exceed int32.
    """
    _check("int8_conv2d_weight", x, err, activations=True)
    geo = geometry(x.shape, torch.Size(weight_size), stride, padding, dilation, groups)
    _check_size("int8_conv2d_weight", err, geo)
    product = choose(x.device.type, backend, x.dtype).conv2d_weight
    if 0 in (*geo.weight_size, geo.weight_terms, *geo.input_size):
        return _empty(geo.weight_size, x)
    return _image(product(x, err, geo), geo.weight_terms, exact_float, x.dtype)


def int8_conv1d(
    x: Tensor, w: Tensor, *, stride: int = 1, padding: int | tuple[int, int] = 0, dilation: int = 1, groups: int = 1,
    backend: str | None = None, exact_float: bool = False, nonnegative: bool = False,
) -> Tensor:  # fmt: skip
    """`int8_conv2d` of signals: x (N, C, L), w (O, C / groups, k), padding one number or (left, right)."""
    _check("int8_conv1d", x, w, 3, activations=True)
    acc = int8_conv2d(
        x.unsqueeze(2), w.unsqueeze(2), stride=(1, stride), padding=_sides(padding), dilation=(1, dilation),
        groups=groups, backend=backend, exact_float=exact_float, nonnegative=nonnegative,
    )  # fmt: skip
    return acc.squeeze(2)


def int8_conv1d_input(
    err: Tensor, w: Tensor, input_size: tuple[int, ...], *, stride: int = 1, padding: int | tuple[int, int] = 0,
    dilation: int = 1, groups: int = 1, backend: str | None = None, exact_float: bool = False,
) -> Tensor:  # fmt: skip
    """`int8_conv2d_input` of signals: err (N, O, L'), input_size (N, C, L)."""
    _check("int8_conv1d_input", err, w, 3)
    batch, channels, length = input_size
    acc = int8_conv2d_input(
        err.unsqueeze(2), w.unsqueeze(2), (batch, channels, 1, length), stride=(1, stride), padding=_sides(padding),
        dilation=(1, dilation), groups=groups, backend=backend, exact_float=exact_float,
    )  # fmt: skip
    return acc.squeeze(2)


def int8_conv1d_weight(
    x: Tensor, err: Tensor, weight_size: tuple[int, ...], *, stride: int = 1, padding: int | tuple[int, int] = 0,
    dilation: int = 1, groups: int = 1, backend: str | None = None, exact_float: bool = False,
) -> Tensor:  # fmt: skip
    """`int8_conv2d_weight` of signals: x (N, C, L), err (N, O, L'), weight_size (O, C / groups, k)."""
    _check("int8_conv1d_weight", x, err, 3, activations=True)
    outputs, channels, taps = weight_size
    acc = int8_conv2d_weight(
        x.unsqueeze(2), err.unsqueeze(2), (outputs, channels, 1, taps), stride=(1, stride), padding=_sides(padding),
        dilation=(1, dilation), groups=groups, backend=backend, exact_float=exact_float,
    )  # fmt: skip
    return acc.squeeze(2)


def _said(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


def _check(name: str, first: Tensor, second: Tensor, axes: int = 4, activations: bool = False) -> None:
    dtypes = _ACTIVATIONS if activations else (torch.int8,)
    if first.dtype not in dtypes or second.dtype != torch.int8 or first.dim() != axes or second.dim() != axes:
        also = "; the first may be uint8" if activations else ""
        raise ConfigError(f"{name}: got {_said(first)} and {_said(second)}, expected int8 tensors of {axes} axes{also}")


def _check_size(name: str, err: Tensor, geo: Geometry) -> None:
    if err.shape != geo.output_size:
        raise ConfigError(f"{name}: got errors of size {tuple(err.shape)}, expected the output's {geo.output_size}")


def _sides(padding: int | tuple[int, int]) -> Padding:
    left_right = (padding, padding) if isinstance(padding, int) else padding
    return ((0, 0), left_right)


def _empty(size: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=like.device)


def _finished(acc: Tensor, terms: int, exact_float: bool, dtype: torch.dtype = torch.int8) -> Tensor:
    if exact_float and acc.dtype == torch.float32:
        return acc
    return acc.to(torch.int32 if terms <= int32_terms(dtype) else torch.int64)


def _image(acc: Tensor, terms: int, exact_float: bool, dtype: torch.dtype = torch.int8) -> Tensor:
    return _finished(acc.contiguous(memory_format=torch.channels_last), terms, exact_float, dtype)
