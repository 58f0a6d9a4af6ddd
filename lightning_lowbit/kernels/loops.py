"""The loops around the micro-kernels: packing, matrix products and convolutions of words, compiled by numba.

All arguments are int64 numbers; those called x, out, words and the like are addresses of contiguous memory.
The functions hold no lock of the interpreter and no state, so any number of threads may call them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit, types

from lightning_lowbit.kernels.microkernel import (
    BITS_OF_LANES,
    BITS_OF_ROWS,
    FLOATS,
    INTS,
    LANES,
    ROWS,
    add_signs,
    as_pointer,
    copy_vector,
    micro_kernel,
    signs_of_8,
    signs_of_64,
)

__all__ = ["convolve", "make_panels", "multiply", "pack_channels", "pack_pixels", "pack_rows"]

# Rows of about so many bytes stay in the second cache while the panels pass by.
_BLOCK = 2**18
# So many pixels of a plane of words stay in the first cache while their channels pass by.
_PIXELS = 1024


def _compiled(numbers: int) -> Callable[[Callable[..., None]], Any]:
    """Compile a function of so many numbers now, or take it from the folder where the last process left it."""

    def compiled(function: Callable[..., None]) -> Any:
        signature = types.void(*[types.int64] * numbers)
        try:
            return njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:  # no such folder can be written
            return njit(signature, nogil=True)(function)

    return compiled


def _inner(function: Callable[..., Any]) -> Any:
    return njit(nogil=True)(function)


_ints, _int = (micro_kernel(rows, False, INTS) for rows in (ROWS, 1))
_floats, _float = (micro_kernel(rows, False, FLOATS) for rows in (ROWS, 1))
_masked_floats, _masked_float = (micro_kernel(rows, True, FLOATS) for rows in (ROWS, 1))
_lane_bits, _lane_bit = (micro_kernel(rows, False, BITS_OF_LANES) for rows in (ROWS, 1))
_row_bits, _row_bit = (micro_kernel(rows, False, BITS_OF_ROWS) for rows in (ROWS, 1))
_masked_row_bits, _masked_row_bit = (micro_kernel(rows, True, BITS_OF_ROWS) for rows in (ROWS, 1))


@_inner
def _sign_word(x: int, count: int) -> Any:
    """The signs of up to 64 floats side by side."""
    if count == 64:
        return signs_of_64(x)
    word = np.int64(0)
    for place in range(0, count - 7, 8):
        word |= signs_of_8(x + 4 * place) << place
    values = carray(as_pointer(x), (count,), np.float32)
    for place in range(count & -8, count):
        word |= np.int64(values[place] < 0) << place
    return word


@_compiled(4)
def pack_rows(x: int, out: int, rows: int, length: int) -> None:
    """float32 (rows, length) to (rows, ceil(length / 64)) words."""
    words = (length + 63) // 64
    packed = carray(as_pointer(out), (rows, words), np.int64)
    for row in range(rows):
        for word in range(words):
            packed[row, word] = _sign_word(x + 4 * (row * length + 64 * word), min(64, length - 64 * word))


@_compiled(6)
def pack_pixels(x: int, out: int, images: int, pixels: int, groups: int, channels: int) -> None:
    """float32 (images, pixels, groups, channels), channels_last memory, to planes (images, groups, words, pixels)."""
    words = (channels + 63) // 64
    packed = carray(as_pointer(out), (images, groups * words, pixels), np.int64)
    for image in range(images):
        for pixel in range(pixels):
            start = x + 4 * (image * pixels + pixel) * groups * channels
            for group in range(groups):
                for word in range(words):
                    packed[image, group * words + word, pixel] = _sign_word(
                        start + 4 * (group * channels + 64 * word), min(64, channels - 64 * word)
                    )


@_compiled(6)
def pack_channels(x: int, out: int, images: int, pixels: int, groups: int, channels: int) -> None:
    """float32 (images, groups, channels, pixels) to planes (images, groups, words, pixels)."""
    words = (channels + 63) // 64
    packed = carray(as_pointer(out), (images * groups * words, pixels), np.int64)
    values = carray(as_pointer(x), (images * groups * channels, pixels), np.float32)
    for plane in range(images * groups * words):
        first = plane // words * channels + plane % words * 64
        count = min(64, channels - plane % words * 64)
        for begin in range(0, pixels, _PIXELS):
            end = min(begin + _PIXELS, pixels)
            whole = end - (end - begin) % 16
            packed[plane, begin:end] = 0
            for bit in range(count):
                for pixel in range(begin, whole, 16):
                    add_signs(out + 8 * (plane * pixels + pixel), x + 4 * ((first + bit) * pixels + pixel), bit)
                for pixel in range(whole, end):
                    packed[plane, pixel] |= np.int64(values[first + bit, pixel] < 0) << bit


@_compiled(4)
def make_panels(words: int, out: int, rows: int, length: int) -> None:
    """Words (rows, length) to panels (ceil(rows / LANES), length, LANES); lanes past the last row are 0."""
    source = carray(as_pointer(words), (rows, length), np.int64)
    panels = carray(as_pointer(out), ((rows + LANES - 1) // LANES, length, LANES), np.int64)
    for panel in range(panels.shape[0]):
        count = min(LANES, rows - panel * LANES)
        for word in range(length):
            for lane in range(count):
                panels[panel, word, lane] = source[panel * LANES + lane, word]
            panels[panel, word, count:] = 0


@_inner
def _limits(low: int, flip: int, count: int, edge: Any, sense: Any) -> None:
    """not((dot >= low) != flip), as (dot ^ sense) < edge; -1 is the sense of a flip, for which ~dot < -low."""
    lows = carray(as_pointer(low), (count,), np.int32)
    flips = carray(as_pointer(flip), (count,), np.uint8)
    for place in range(count):
        turned = flips[place] != 0
        edge[place] = -max(lows[place], -(2**31) + 1) if turned else lows[place]
        sense[place] = -1 if turned else 0
    edge[count:] = -(2**31)  # never negative
    sense[count:] = 0


@_compiled(14)
def multiply(
    a: int, panels: int, out: int, first_row: int, last_row: int, first_panel: int, last_panel: int, words: int,
    outputs: int, k: int, form: int, low: int, flip: int, step: int,
) -> None:  # fmt: skip
    """Some rows of words (M, words) times some panels (ceil(O / LANES), words, LANES) of the transposed right operand.

    Args:
        form: INTS or FLOATS: out is (M, outputs) of 4 bytes; BITS_OF_LANES: out is (M, step) bytes, zero, with step a
            multiple of 8, and low int32 and flip bool (outputs,) are read.
        step: bytes from one row of out to the next.
    """
    base = np.full(LANES, k, np.int32)
    edge, sense = np.zeros(LANES, np.int32), np.zeros(LANES, np.int32)
    tile = np.empty((ROWS, LANES), np.int32)
    block = max(ROWS, _BLOCK // (8 * words) // ROWS * ROWS)
    for begin in range(first_row, last_row, block):
        end = min(begin + block, last_row)
        for panel in range(first_panel, last_panel):
            columns = panels + 8 * panel * words * LANES
            count = min(LANES, outputs - panel * LANES)
            if form == BITS_OF_LANES:
                _limits(low + 4 * panel * LANES, flip + panel * LANES, count, edge, sense)
            row = begin
            while row < end:
                rows = ROWS if row + ROWS <= end else 1
                if form == BITS_OF_LANES:
                    _by_lanes(
                        rows, form, a + 8 * row * words, columns, words, base, edge, sense,
                        out + row * step + panel * (LANES // 8), step,
                    )  # fmt: skip
                elif count == LANES:
                    _by_lanes(
                        rows, form, a + 8 * row * words, columns, words, base, edge, sense,
                        out + row * step + 4 * panel * LANES, step,
                    )  # fmt: skip
                else:
                    _by_lanes(
                        rows, form, a + 8 * row * words, columns, words, base, edge, sense, tile.ctypes.data, 4 * LANES
                    )
                    for m in range(rows):
                        line = carray(
                            as_pointer(out + (row + m) * step + 4 * panel * LANES), (count,), np.int32
                        )
                        line[:] = tile[m, :count]
                row += rows


@_inner
def _by_lanes(
    rows: int, form: int, a: int, panel: int, words: int, base: Any, edge: Any, sense: Any, out: int, step: int
) -> None:
    ends = base.ctypes.data, edge.ctypes.data, sense.ctypes.data
    if form == FLOATS:
        if rows == ROWS:
            _floats(a, 8 * words, panel, 0, words, ends[0], 0, 0, out, step, 0)
        else:
            _float(a, 8 * words, panel, 0, words, ends[0], 0, 0, out, step, 0)
    elif form == INTS:
        if rows == ROWS:
            _ints(a, 8 * words, panel, 0, words, ends[0], 0, 0, out, step, 0)
        else:
            _int(a, 8 * words, panel, 0, words, ends[0], 0, 0, out, step, 0)
    elif rows == ROWS:
        _lane_bits(a, 8 * words, panel, 0, words, ends[0], ends[1], ends[2], out, step, 0)
    else:
        _lane_bit(a, 8 * words, panel, 0, words, ends[0], ends[1], ends[2], out, step, 0)


@_inner
def _by_rows(
    rows: int, form: int, masked: int, a: int, panel: int, masks: int, words: int, base: int, edge: int, sense: int,
    out: int, step: int, bit: int,
) -> None:  # fmt: skip
    if form == FLOATS:
        if rows == ROWS:
            if masked:
                _masked_floats(a, 8 * words, panel, masks, words, base, 0, 0, out, step, 0)
            else:
                _floats(a, 8 * words, panel, 0, words, base, 0, 0, out, step, 0)
        elif masked:
            _masked_float(a, 8 * words, panel, masks, words, base, 0, 0, out, step, 0)
        else:
            _float(a, 8 * words, panel, 0, words, base, 0, 0, out, step, 0)
    elif rows == ROWS:
        if masked:
            _masked_row_bits(a, 8 * words, panel, masks, words, base, edge, sense, out, step, bit)
        else:
            _row_bits(a, 8 * words, panel, 0, words, base, edge, sense, out, step, bit)
    elif masked:
        _masked_row_bit(a, 8 * words, panel, masks, words, base, edge, sense, out, step, bit)
    else:
        _row_bit(a, 8 * words, panel, 0, words, base, edge, sense, out, step, bit)


@_compiled(28)
def convolve(
    x: int, weight: int, out: int, form: int, low: int, flip: int, first_panel: int, last_panel: int, masked: int,
    images: int, groups: int, words: int, channels: int, outputs: int, tall: int, wide: int, top: int, left: int,
    height: int, width: int, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, hole_h: int, hole_w: int,
    out_h: int, out_w: int,
) -> None:  # fmt: skip
    """Some panels of LANES pixels of a convolution: its patches are gathered for one panel at a time.

    Args:
        x: padded planes (images, groups * words, tall, wide) int64 and 8 words more; padding is 0.
        weight: (outputs, kernel_h * kernel_w * words) int64.
        out: FLOATS: float32 (images, outputs, pixels). BITS_OF_ROWS: int64 (images, ceil(outputs / 64), pixels), with
            thresholds low int32 and flip bool (outputs,).
        masked: 1 where a tap outside the image, (height, width) at (top, left), counts nothing.
        words, channels: of one group.
    """
    pixels, taps, planes = out_h * out_w, kernel_h * kernel_w, (outputs + 63) // 64
    terms, per_group, area = taps * words, outputs // groups, tall * wide
    edge, sense = np.empty(outputs, np.int32), np.empty(outputs, np.int32)
    if form == BITS_OF_ROWS:
        _limits(low, flip, outputs, edge, sense)
    panel, masks = np.zeros(terms * LANES + 8, np.int64), np.zeros((terms, LANES // 8), np.uint8)
    base, tile = np.full(LANES, taps * channels, np.int32), np.empty((ROWS, LANES), np.float32)
    bits = np.empty((planes, LANES), np.int64)
    # A run is a stretch of lanes in one row of the output: first lane, length, image, row, column.
    runs = np.empty((LANES, 5), np.int64)
    inside = np.empty((LANES, kernel_w), np.int64)
    for number in range(first_panel, last_panel):
        count, lanes = _runs(number * LANES, images, pixels, out_w, runs)
        if masked:
            base[:] = 0
            for run in range(count):
                start, length, _, _, column = runs[run]
                for j in range(kernel_w):
                    shift = left - j * hole_w
                    begin = max(-(-shift // stride_w) - column, 0)
                    end = min((width - 1 + shift) // stride_w + 1 - column, length)
                    inside[run, j] = ((1 << end) - (1 << begin)) << start if end > begin else 0
            for i in range(kernel_h):
                for j in range(kernel_w):
                    seen = np.int64(0)
                    for run in range(count):
                        row = runs[run, 3] * stride_h - top + i * hole_h
                        if 0 <= row < height:
                            seen |= inside[run, j]
                    for lane in range(LANES):
                        base[lane] += np.int32((seen >> lane) & 1) * np.int32(channels)
                    for word in range(words):
                        for vector in range(LANES // 8):
                            masks[(i * kernel_w + j) * words + word, vector] = (seen >> (8 * vector)) & 255
        bits[:] = 0
        whole = lanes == LANES and runs[0, 2] == runs[count - 1, 2]
        for group in range(groups):
            for run in range(count):
                start, length, image, row, column = runs[run]
                corner = (image * groups + group) * words * area + row * stride_h * wide + column * stride_w
                to = panel.ctypes.data + 8 * start
                for i in range(kernel_h):
                    for j in range(kernel_w):
                        source = x + 8 * (corner + i * hole_h * wide + j * hole_w)
                        for word in range(words):
                            place, line = to + 8 * ((i * kernel_w + j) * words + word) * LANES, source + 8 * word * area
                            _gather(place, line, length, stride_w)
            ...
