"""The loops around the micro-kernels: packing, matrix products and convolutions of words, compiled by numba.

All arguments are int64 numbers; those called x, out, words and the like are addresses of contiguous memory.
The functions hold no lock of the interpreter and no state, so any number of threads may call them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.np.numpy_support import carray

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
# Panels of a convolution up to so many bytes stay in the first cache while the rows of the weight pass by.
_PANELS = 2**14
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


@_inner
def _product(
    rows: int, form: int, masked: int, a: int, panel: int, masks: int, words: int, base: int, edge: int, sense: int,
    out: int, step: int, bit: int,
) -> None:  # fmt: skip
    """ROWS rows or one, by the micro-kernel for this form."""
    row = 8 * words
    if form == INTS:
        if rows == ROWS:
            _ints(a, row, panel, 0, words, base, 0, 0, out, step, 0)
        else:
            _int(a, row, panel, 0, words, base, 0, 0, out, step, 0)
    elif form == BITS_OF_LANES:
        if rows == ROWS:
            _lane_bits(a, row, panel, 0, words, base, edge, sense, out, step, 0)
        else:
            _lane_bit(a, row, panel, 0, words, base, edge, sense, out, step, 0)
    elif form == FLOATS and masked:
        if rows == ROWS:
            _masked_floats(a, row, panel, masks, words, base, 0, 0, out, step, 0)
        else:
            _masked_float(a, row, panel, masks, words, base, 0, 0, out, step, 0)
    elif form == FLOATS:
        if rows == ROWS:
            _floats(a, row, panel, 0, words, base, 0, 0, out, step, 0)
        else:
            _float(a, row, panel, 0, words, base, 0, 0, out, step, 0)
    elif masked:
        if rows == ROWS:
            _masked_row_bits(a, row, panel, masks, words, base, edge, sense, out, step, bit)
        else:
            _masked_row_bit(a, row, panel, masks, words, base, edge, sense, out, step, bit)
    elif rows == ROWS:
        _row_bits(a, row, panel, 0, words, base, edge, sense, out, step, bit)
    else:
        _row_bit(a, row, panel, 0, words, base, edge, sense, out, step, bit)


@_compiled(14)
def multiply(
    a: int, panels: int, out: int, step: int, form: int, low: int, flip: int, first_row: int, last_row: int,
    first_panel: int, last_panel: int, words: int, outputs: int, k: int,
) -> None:  # fmt: skip
    """Some rows of words (M, words) times some panels of the transposed right operand (outputs, words).

    Args:
        out, step: (M, outputs) of 4 bytes, int32 for INTS, float32 for FLOATS; for BITS_OF_LANES (M, words) int64 of
            zeros; step bytes from one row to the next.
        low, flip: thresholds of BITS_OF_LANES, int32 and bool (outputs,).
    """
    base, tile = np.full(LANES, k, np.int32), np.empty((ROWS, LANES), np.int32)
    edge, sense = np.zeros(LANES, np.int32), np.zeros(LANES, np.int32)
    block = max(ROWS, _BLOCK // (8 * words) // ROWS * ROWS)
    for begin in range(first_row, last_row, block):
        end = min(begin + block, last_row)
        for number in range(first_panel, last_panel):
            lane = number * LANES
            count = min(LANES, outputs - lane)
            if form == BITS_OF_LANES:
                _limits(low + 4 * lane, flip + lane, count, edge, sense)
            start = out + (lane // 8 if form == BITS_OF_LANES else 4 * lane)
            row = begin
            while row < end:
                rows = ROWS if row + ROWS <= end else 1
                whole = count == LANES or form == BITS_OF_LANES
                _product(
                    rows, form, 0, a + 8 * row * words, panels + 8 * lane * words, 0, words, base.ctypes.data,
                    edge.ctypes.data, sense.ctypes.data, start + row * step if whole else tile.ctypes.data,
                    step if whole else 4 * LANES, 0,
                )  # fmt: skip
                if not whole:
                    for m in range(rows):
                        line = carray(as_pointer(start + (row + m) * step), (count,), np.int32)
                        for place in range(count):
                            line[place] = tile[m, place]
                row += rows


@_inner
def _find_runs(first: int, images: int, pixels: int, out_w: int, runs: Any) -> Any:
    """Split the lanes from pixel ``first`` on into stretches within a row of the output; how many there are.

    A run is first lane, length, image, row and column.
    """
    image, pixel = divmod(first, pixels)
    row, column = divmod(pixel, out_w)
    count = lane = 0
    while lane < LANES and image < images:
        length = min(out_w - column, LANES - lane)
        runs[count, 0], runs[count, 1] = lane, length
        runs[count, 2], runs[count, 3], runs[count, 4] = image, row, column
        count, lane, row, column = count + 1, lane + length, row + 1, 0
        if row * out_w == pixels:
            image, row = image + 1, 0
    return count


@_inner
def _limit_taps(length: int, out: int, taps: int, stride: int, hole: int, before: int, limits: Any, met: Any) -> None:
    """Along one axis: the outputs, first and last + 1, that meet the image at each tap, and each output's taps."""
    met[:] = 0
    for tap in range(taps):
        shift = before - tap * hole
        limits[tap, 0] = max(-(-shift // stride), 0)
        limits[tap, 1] = min((length - 1 + shift) // stride + 1, out)
        for place in range(limits[tap, 0], limits[tap, 1]):
            met[place] += 1


@_inner
def _mask(
    runs: Any, count: int, words: int, channels: int, row_limits: Any, column_limits: Any, rows_met: Any,
    columns_met: Any, columns: Any, base: Any, masks: Any,
) -> None:  # fmt: skip
    """The lanes that lie inside the image at each tap, as bits, and how many products each lane sums."""
    for run in range(count):
        start, length, row, column = runs[run, 0], runs[run, 1], runs[run, 3], runs[run, 4]
        for lane in range(length):
            base[start + lane] = channels * rows_met[row] * columns_met[column + lane]
        for j in range(len(column_limits)):
            begin, end = max(column_limits[j, 0] - column, 0), min(column_limits[j, 1] - column, length)
            columns[j, run] = ((1 << end) - (1 << begin)) << start if end > begin else 0
    place = 0
    for i in range(len(row_limits)):
        for j in range(len(column_limits)):
            inside = np.int64(0)
            for run in range(count):
                if row_limits[i, 0] <= runs[run, 3] < row_limits[i, 1]:
                    inside |= columns[j, run]
            for _ in range(words):
                for vector in range(LANES // 8):
                    masks[place, vector] = inside >> (8 * vector) & 255
                place += 1


@_inner
def _gather(
    x: int, starts: Any, runs: Any, count: int, words: int, area: int, wide: int, kernel: Any, stride_w: int,
    hole: Any, panel: int,
) -> None:  # fmt: skip
    """Copy the patches of a panel's lanes: (kernel_h, kernel_w, words, LANES) int64."""
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            for word in range(words):
                tap = x + 8 * (i * hole[0] * wide + j * hole[1] + word * area)
                # Runs in ascending order, whole vectors at a time: what one writes past its end the next overwrites.
                for run in range(count):
                    source, to = tap + 8 * starts[run], panel + 8 * runs[run, 0]
                    if stride_w == 1:
                        for lane in range(0, runs[run, 1], 8):
                            copy_vector(to + 8 * lane, source + 8 * lane)
                    else:
                        lanes = carray(as_pointer(to), (runs[run, 1],), np.int64)
                        line = carray(as_pointer(source), (runs[run, 1] * stride_w,), np.int64)
                        for lane in range(runs[run, 1]):
                            lanes[lane] = line[lane * stride_w]
                panel += 8 * LANES


@_compiled(28)
def convolve(
    x: int, weight: int, out: int, form: int, low: int, flip: int, first_panel: int, last_panel: int, masked: int,
    images: int, groups: int, words: int, channels: int, outputs: int, tall: int, wide: int, top: int, left: int,
    height: int, width: int, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, hole_h: int, hole_w: int,
    out_h: int, out_w: int,
) -> None:  # fmt: skip
    """Some panels of LANES pixels of a convolution: patches are gathered for one panel at a time.

    Args:
        x: padded planes (images, groups * words, tall, wide) int64 and 8 words more; padding is 0.
        weight: (outputs, kernel_h * kernel_w * words) int64.
        out: FLOATS: float32 (images, outputs, pixels). BITS_OF_ROWS: int64 (images, ceil(outputs / 64), pixels), with
            thresholds low int32 and flip bool (outputs,).
        masked: 1 where a tap outside the image, (height, width) at (top, left), counts nothing.
        words, channels: of one group.
    """
    kernel, hole, area = (kernel_h, kernel_w), (hole_h, hole_w), tall * wide
    pixels, terms = out_h * out_w, kernel_h * kernel_w * words
    planes, per_group = (outputs + 63) // 64, outputs // groups
    edge, sense = np.empty(outputs, np.int32), np.empty(outputs, np.int32)
    if form == BITS_OF_ROWS:
        _limits(low, flip, outputs, edge, sense)
    # Neighboring panels together: their sums of one row are neighbors too, and the words of the row are at hand.
    block = max(1, min(8, _PANELS // (8 * LANES * terms)))
    counts, starts = np.empty(block, np.int64), np.empty(LANES, np.int64)
    runs, columns = np.empty((block, LANES, 5), np.int64), np.empty((kernel_w, LANES), np.int64)
    panels, masks = np.zeros((block, terms * LANES + 8), np.int64), np.zeros((block, terms, LANES // 8), np.uint8)
    base = np.empty((block, LANES), np.int32)
    base[:] = kernel_h * kernel_w * channels
    tile, bits = np.empty((ROWS, LANES), np.float32), np.empty((block, planes, LANES), np.int64)
    sums = carray(as_pointer(out), (images, outputs, pixels), np.float32)
    signs = carray(as_pointer(out), (images, planes, pixels), np.int64)
    row_limits, rows_met = np.empty((kernel_h, 2), np.int64), np.empty(out_h, np.int64)
    column_limits, columns_met = np.empty((kernel_w, 2), np.int64), np.empty(out_w, np.int64)
    _limit_taps(height, out_h, kernel_h, stride_h, hole_h, top, row_limits, rows_met)
    _limit_taps(width, out_w, kernel_w, stride_w, hole_w, left, column_limits, columns_met)
    for begin in range(first_panel, last_panel, block):
        held = min(block, last_panel - begin)
        for number in range(held):
            counts[number] = _find_runs((begin + number) * LANES, images, pixels, out_w, runs[number])
            if masked:
                _mask(
                    runs[number], counts[number], words, channels, row_limits, column_limits, rows_met, columns_met,
                    columns, base[number], masks[number],
                )  # fmt: skip
        if form == BITS_OF_ROWS:
            bits[:] = 0
        for group in range(groups):
            for number in range(held):
                for run in range(counts[number]):
                    plane = (runs[number, run, 2] * groups + group) * words
                    corner = runs[number, run, 3] * stride_h * wide + runs[number, run, 4] * stride_w
                    starts[run] = plane * area + corner
                to = panels[number].ctypes.data
                _gather(x, starts, runs[number], counts[number], words, area, wide, kernel, stride_w, hole, to)
            row, end = group * per_group, (group + 1) * per_group
            while row < end:
                rows = ROWS if row + ROWS <= end and (form == FLOATS or row % 64 + ROWS <= 64) else 1
                for number in range(held):
                    last = counts[number] - 1
                    whole = runs[number, last, 0] + runs[number, last, 1] == LANES
                    whole = whole and runs[number, last, 2] == runs[number, 0, 2]
                    if form == BITS_OF_ROWS:
                        to, step = bits[number].ctypes.data + 8 * (row // 64) * LANES, 0
                    elif whole:
                        first = runs[number, 0, 3] * out_w + runs[number, 0, 4]
                        to, step = out + 4 * ((runs[number, 0, 2] * outputs + row) * pixels + first), 4 * pixels
                    else:
                        to, step = tile.ctypes.data, 4 * LANES
                    _product(
                        rows, form, masked, weight + 8 * row * terms, panels[number].ctypes.data,
                        masks[number].ctypes.data, terms, base[number].ctypes.data, edge.ctypes.data + 4 * row,
                        sense.ctypes.data + 4 * row, to, step, row % 64,
                    )  # fmt: skip
                    if form == FLOATS and not whole:
                        for m in range(rows):
                            for run in range(last + 1):
                                lane, first = runs[number, run, 0], runs[number, run, 3] * out_w + runs[number, run, 4]
                                for place in range(runs[number, run, 1]):
                                    sums[runs[number, run, 2], row + m, first + place] = tile[m, lane + place]
                row += rows
        for number in range(held if form == BITS_OF_ROWS else 0):
            for run in range(counts[number]):
                lane, first = runs[number, run, 0], runs[number, run, 3] * out_w + runs[number, run, 4]
                for plane in range(planes):
                    for place in range(runs[number, run, 1]):
                        signs[runs[number, run, 2], plane, first + place] = bits[number, plane, lane + place]
