"""The integer products on CPUs with int8 dot-product instructions: `torch._int_mm` and oneDNN's quantized convolution.

Activations may be uint8: the matrix products take them as int8 less 128, the convolution as they are.

Neither is documented to be exact: on CPUs without such instructions both saturate pairs of products in 16 bits and
say nothing. `backends` uses this module only after a probe; the convolution is probed for each geometry besides.
The choices between routes are measured, with one thread and 32 images (benchmarks of the kernels).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lightning_lowbit.kernels import simulate
from lightning_lowbit.kernels.columns import (
    add_patches,
    images,
    matrix,
    pad_or_crop,
    patch_rows,
    patches,
    pixels,
    weight_rows,
)
from lightning_lowbit.kernels.geometry import CODE_MAX, INT32_TERMS, Geometry, int32_terms
from lightning_lowbit.kernels.ledger import note, refusals, silent
from lightning_lowbit.numerics.guards import FLOAT32_EXACT

__all__ = ["conv2d", "conv2d_input", "conv2d_weight", "convolve_unsigned", "matmul"]

# Patches are gathered for about so many rows at a time, so that they are still in the cache when they are multiplied.
_ROWS = 2048
# oneDNN's convolution wins up to so many channels; above them it loses what the re-ordering of the weights costs.
_UNSIGNED_CHANNELS = 128
# Up to so many channels floats are as fast.
_FLOAT_CHANNELS = 4
# For the gradient of the weight of a narrow layer, a patch is too short a piece of memory to gather: up to so many
# channels whole planes are shifted, up to so many patch rows are gathered, for so many rows at a time.
_PLANE_CHANNELS = 8
_ROW_CHANNELS = 32
_NARROW_ROWS = 32768
# Groups are multiplied together up to about so many channels.
_BUNDLE_CHANNELS = 64


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) int8 or uint8 times (K, N) int8: int32, or int64 where int32 might wrap."""
    _note(a.shape[1])
    return _product(a, b)


def conv2d(x: Tensor, w: Tensor, geo: Geometry, nonnegative: bool = False) -> Tensor:
    """Accumulators of the convolution, x int8 or uint8: int32, float32 where that is exact, or int64."""
    nonnegative |= x.dtype is torch.uint8
    if geo.pointwise:
        _note(geo.channels)
        rows = pixels(x[:, :, :: geo.stride[0], :: geo.stride[1]]).flatten(0, 2)
        return images(_product(rows, w.flatten(1).t()), geo.out)
    if _unsigned_pays(w, geo, nonnegative, x.dtype):
        note("int8", "onednn convolution")
        return convolve_unsigned(x, w, geo, nonnegative)
    if geo.groups > 1 or geo.channels <= _FLOAT_CHANNELS or geo.forward_terms > int32_terms(x.dtype):
        return simulate.conv2d(x, w, geo)
    return _by_patches(x, weight_rows(w).t(), geo)


def conv2d_input(err: Tensor, w: Tensor, geo: Geometry) -> Tensor:
    """Gradient of the input: int32, float32 where that is exact, or int64."""
    if geo.groups == 1 and geo.input_terms <= INT32_TERMS:
        if geo.stride != (1, 1):
            return _scattered(err, w, geo)
        if geo.pointwise:
            _note(geo.outputs)
            return images(_product(pixels(err).flatten(0, 2), w.flatten(1)), geo.size)
    if geo.stride == (1, 1):
        grown, turned = _turned(err, geo)
        weight = w.reshape(geo.groups, -1, *w.shape[1:]).transpose(1, 2).flatten(0, 1)
        if _unsigned_pays(weight, turned):
            note("int8", "onednn convolution")
            return convolve_unsigned(grown, weight.flip(2, 3), turned)
        if geo.groups == 1 and geo.input_terms <= INT32_TERMS:
            return _by_patches(grown, w.permute(2, 3, 0, 1).flip(0, 1).flatten(0, 2), turned)
    return simulate.conv2d_input(err, w, geo)


def conv2d_weight(x: Tensor, err: Tensor, geo: Geometry) -> Tensor:
    """Gradient of the weight, x int8 or uint8: int32, or int64 where int32 might wrap."""
    _note(geo.weight_terms)
    if geo.groups > 1:
        return _weight_in_groups(x, err, geo)
    return _weight(x, err, geo)


def convolve_unsigned(x: Tensor, w: Tensor, geo: Geometry, nonnegative: bool = False) -> Tensor:
    """The convolution by oneDNN's quantized operator: uint8 activations, int32 sums, given out as float32.

    Only for geometries whose accumulators are below 2^24. Signed codes enter as x + 128 with zero point 128,
    which the operator takes back in the integers; codes known to be nonnegative, uint8 or int8, enter as they are.
    """
    if geo.symmetric:
        padding = [geo.top_bottom[0], geo.left_right[0]]
    else:
        x, padding = pad_or_crop(pixels(x), geo.top_bottom, geo.left_right).permute(0, 3, 1, 2), [0, 0]
    rows = pixels(x)
    # x + 128 as an unsigned byte is x with its top bit turned over.
    unsigned = (rows if nonnegative else rows.bitwise_xor(-128)).view(torch.uint8).permute(0, 3, 1, 2)
    zero_point = 0 if nonnegative else 128
    scale, zero = _unit_scale(geo.outputs)
    stride, dilation = list(geo.stride), list(geo.dilation)
    packed = torch.ops.onednn.qconv_prepack(w, scale, 1.0, zero_point, stride, padding, dilation, geo.groups, None)
    acc: Tensor = torch.ops.onednn.qconv_pointwise(
        unsigned, 1.0, zero_point, packed, scale, zero, None, stride, padding, dilation, geo.groups,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return acc


@lru_cache(maxsize=256)
def _unit_scale(outputs: int) -> tuple[Tensor, Tensor]:
    return torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)


def _unsigned_pays(w: Tensor, geo: Geometry, nonnegative: bool = False, dtype: torch.dtype = torch.int8) -> bool:
    if not _unsigned_exact(geo, nonnegative, dtype):
        return False
    return geo.forward_terms <= simulate.float32_terms(dtype) or simulate.rows_exact(weight_rows(w), dtype)


@lru_cache(maxsize=4096)
def _unsigned_exact(geo: Geometry, nonnegative: bool, dtype: torch.dtype = torch.int8) -> bool:
    """Whether `convolve_unsigned` is fast for a geometry, and right on operands that saturate 16 bits and on others.

    The operator is private and has faults in corners: with padding or holes beyond the image, or a few channels,
    oneDNN 3.12 returns wrong numbers or crashes. Those geometries are kept from it; each other one is tried.
    """
    channels = geo.channels // geo.groups
    reach = geo.reach
    inside = geo.size[0] > reach[0] and geo.size[1] > reach[1]
    if not inside or max(geo.top_bottom) > reach[0] or max(geo.left_right) > reach[1]:
        return False
    depthwise = geo.groups == geo.channels == geo.outputs >= 8
    if not (depthwise or _FLOAT_CHANNELS < channels <= _UNSIGNED_CHANNELS):
        return False
    geo = geo._replace(batch=min(geo.batch, 2))
    generator = torch.Generator().manual_seed(577)
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    x = torch.randint(low, high + 1, geo.input_size, dtype=dtype, generator=generator)
    w = torch.randint(-127, 128, geo.weight_size, dtype=torch.int8, generator=generator)
    # At their largest, with sums that still fit float32.
    most = min(127, (FLOAT32_EXACT - 1) // (CODE_MAX[dtype] * geo.forward_terms))
    largest = torch.full_like(w, most)
    pairs = (
        (x, w),
        (torch.full_like(x, high), largest),
        # Of 255, weights of both signs: their pairs saturate also where the largest weights had to be small.
        (torch.full_like(x, low), largest) if low else (torch.full_like(x, high), w.sign() * 127),
        (x.sign() * high, -largest),
    )
    try:
        for codes, weight in pairs:
            codes = codes.clamp(min=0) if nonnegative and low else codes
            with silent():
                expected = simulate.conv2d(codes, weight, geo)
            found = convolve_unsigned(codes, weight, geo, nonnegative)
            if not torch.equal(found.to(torch.int64), expected.to(torch.int64)):
                refusals["onednn convolution"] = f"wrong at {tuple(geo)}"
                return False
    # A build without the operators, or with another signature, may raise anything.
    except Exception as error:
        refusals["onednn convolution"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return False
    return True


def _note(terms: int) -> None:
    note("int8", "_int_mm" if terms <= INT32_TERMS else "_int_mm in int64 chunks")


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype is torch.uint8:
        b = matrix(b)
        acc = _product(_less_128(a), b)
        return (acc if a.shape[1] <= int32_terms(a.dtype) else acc.to(torch.int64)).sub_(_of_128(b))
    if a.shape[1] <= INT32_TERMS:
        return torch._int_mm(matrix(a), matrix(b))
    acc = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int64)
    for left, right in zip(torch.split(a, INT32_TERMS, 1), torch.split(b, INT32_TERMS, 0), strict=True):
        acc += torch._int_mm(matrix(left), matrix(right))
    return acc


def _less_128(x: Tensor) -> Tensor:
    """uint8 numbers less 128, as int8: the same bytes with their top bits turned over."""
    return x.view(torch.int8).bitwise_xor(-128)


def _of_128(b: Tensor) -> Tensor:
    """What `_less_128` adds to each row of a product with b (K, N): (1, N). As a product, faster than as a sum."""
    return _product(torch.full((1, b.shape[0]), -128, dtype=torch.int8), b)


def _images_per_chunk(rows_per_image: int, rows: int = _ROWS) -> int:
    return max(1, rows // rows_per_image)


def _by_patches(x: Tensor, weight: Tensor, geo: Geometry) -> Tensor:
    """The convolution as patches times weights (kh * kw * C, O)."""
    note("int8", "_int_mm")
    padded, weight = pad_or_crop(pixels(x), geo.top_bottom, geo.left_right), matrix(weight)
    shift = None
    if x.dtype is torch.uint8:
        padded, shift = _less_128(padded), _of_128(weight)
    per_image = geo.out[0] * geo.out[1]
    acc = torch.empty(geo.batch * per_image, geo.outputs, dtype=torch.int32)
    count = _images_per_chunk(per_image)
    for chunk, target in zip(torch.split(padded, count), torch.split(acc, count * per_image), strict=True):
        torch._int_mm(matrix(patches(chunk, geo)), weight, out=target)
        if shift is not None:
            target -= shift
    return images(acc, geo.out)


def _turned(err: Tensor, geo: Geometry) -> tuple[Tensor, Geometry]:
    """The gradient of the input, at stride 1, as a convolution of the errors with the weights turned around."""
    reach = geo.reach
    top_bottom = (reach[0] - geo.top_bottom[0], reach[0] - geo.top_bottom[1])
    left_right = (reach[1] - geo.left_right[0], reach[1] - geo.left_right[1])
    if min(*top_bottom, *left_right) < 0:
        # More padding than the kernel reaches: the outermost errors saw zeros only.
        err = pad_or_crop(pixels(err), top_bottom, left_right).permute(0, 3, 1, 2)
        top_bottom = left_right = (0, 0)
    return err, geo._replace(
        channels=geo.outputs, outputs=geo.channels, size=(err.shape[2], err.shape[3]), out=geo.size,
        top_bottom=top_bottom, left_right=left_right,
    )  # fmt: skip


def _scattered(err: Tensor, w: Tensor, geo: Geometry) -> Tensor:
    """The gradient of the input as errors times weights, each product added to its pixel."""
    note("int8", "_int_mm")
    errors, weight = pixels(err), weight_rows(w)
    acc = torch.zeros(geo.batch, *geo.padded, geo.channels, dtype=torch.int32)
    count = _images_per_chunk(geo.out[0] * geo.out[1])
    for chunk, target in zip(torch.split(errors, count), torch.split(acc, count), strict=True):
        add_patches(_product(chunk.flatten(0, 2), weight), target, geo)
    top, left = geo.top_bottom[0], geo.left_right[0]
    return acc[:, top : top + geo.size[0], left : left + geo.size[1]].permute(0, 3, 1, 2)


def _weight(x: Tensor, err: Tensor, geo: Geometry) -> Tensor:
    padded, errors = pad_or_crop(pixels(x), geo.top_bottom, geo.left_right), pixels(err)
    shift = None
    if x.dtype is torch.uint8:
        # One number for each output: every tap of every channel meets all of its errors once.
        padded, shift = _less_128(padded), _of_128(errors.flatten(0, 2)).t()
    if geo.stride == (1, 1) and geo.channels <= _PLANE_CHANNELS and geo.kernel != (1, 1):
        product, rows, errors = _taps_by_planes, _NARROW_ROWS, pad_or_crop(errors, *((0, way) for way in geo.reach))
    elif geo.stride[0] == 1 and geo.channels <= _ROW_CHANNELS and geo.kernel[0] > 1:
        product, rows, errors = _taps_by_rows, _NARROW_ROWS, pad_or_crop(errors, (0, geo.reach[0]), (0, 0))
    else:
        product, rows = _taps_by_patches, _ROWS
    count = _images_per_chunk(geo.out[0] * geo.out[1], rows)
    dtype = torch.int32 if geo.weight_terms <= int32_terms(x.dtype) else torch.int64
    chunks = zip(torch.split(padded, count), torch.split(errors, count), strict=True)
    acc = product(*next(chunks), geo).to(dtype)
    for image, error in chunks:
        acc += product(image, error, geo)
    if shift is not None:
        acc -= shift
    return acc.view(geo.outputs, *geo.kernel, geo.channels).permute(0, 3, 1, 2)


def _taps_by_patches(padded: Tensor, errors: Tensor, geo: Geometry) -> Tensor:
    """The gradient of the weight as errors times patches: (O, kh * kw * C)."""
    return _product(errors.flatten(0, 2).t(), patches(padded, geo))


def _taps_by_rows(padded: Tensor, errors: Tensor, geo: Geometry) -> Tensor:
    """The same at vertical stride 1, from one row of each patch: a third of the memory where a kernel has three.

    Row i of the patch at (h, w) is the patch row at (h + i d, w): in the list of all patch rows, i d W' places
    further on. Rows of zero errors below each image keep the two lists in step.
    """
    pieces, flat = patch_rows(padded, geo), errors.flatten(0, 2)
    step, last = geo.dilation[0] * geo.out[1], geo.reach[0] * geo.out[1]
    length = flat.shape[0] - last
    left = flat[:length].t()
    return torch.cat([_product(left, pieces[start : start + length]) for start in range(0, last + 1, step)], 1)


def _taps_by_planes(padded: Tensor, errors: Tensor, geo: Geometry) -> Tensor:
    """The same at stride 1 for few channels, from one shifted copy of the channel planes for each tap.

    The pixel under tap (i, j) of the patch at (h, w) is i d Wp + j d places further on in the list of all pixels.
    Zero errors below and beside each image keep the two lists in step.
    """
    planes, flat = padded.flatten(0, 2).t().contiguous(), errors.flatten(0, 2)
    width = geo.padded[1]
    length = flat.shape[0] - geo.reach[0] * width - geo.reach[1]
    starts = [
        i * geo.dilation[0] * width + j * geo.dilation[1] for i in range(geo.kernel[0]) for j in range(geo.kernel[1])
    ]
    taps = torch.cat([planes[:, start : start + length] for start in starts])
    return _product(taps, flat[:length]).t().contiguous()


def _weight_in_groups(x: Tensor, err: Tensor, geo: Geometry) -> Tensor:
    """Some groups together as if they were one, of which the blocks on the diagonal are kept."""
    channels, outputs = geo.channels // geo.groups, geo.outputs // geo.groups
    bundle = max(1, _BUNDLE_CHANNELS // channels)
    found = []
    for inputs, errors in zip(torch.split(x, bundle * channels, 1), torch.split(err, bundle * outputs, 1), strict=True):
        part = geo._replace(channels=inputs.shape[1], outputs=errors.shape[1], groups=1)
        full = _weight(inputs, errors, part).reshape(-1, outputs, errors.shape[1] // outputs, channels, *geo.kernel)
        found.append(full.diagonal(dim1=0, dim2=2).movedim(-1, 0).flatten(0, 1))
    return torch.cat(found)
