"""The inner loops of the packed products, written as LLVM vectors of eight 64-bit lanes.

LLVM widens plain loops over popcounts to half of the machine's vectors at most; explicit types give it no choice. On a
machine with narrower vectors, or none that count bits, it splits and lowers the same code. Importing this module
imports numba; `popcount` does so when a product is first asked for.

A micro-kernel multiplies ROWS rows of words (broadcast) with a panel (words, LANES): 8 lanes a vector. The sum over
the words stays in registers, and so does what follows: base - 2 popcount, stored as int32, as float32, or as the bit of
a threshold.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from numba import types
from numba.extending import intrinsic

__all__ = [
    "BITS_OF_LANES",
    "BITS_OF_ROWS",
    "FLOATS",
    "INTS",
    "LANES",
    "ROWS",
    "add_signs",
    "as_pointer",
    "copy_vector",
    "micro_kernel",
    "signs_of_8",
    "signs_of_64",
]

ir = import_module("llvmlite.ir")  # by name: it ships no types, and comes with numba

ROWS = 8
LANES = 16
INTS, FLOATS, BITS_OF_LANES, BITS_OF_ROWS = range(4)

_I1, _I8, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
_FLOAT = ir.FloatType()
_WIDTH = 8
_ADDRESS = types.int64


def _vector(of: Any) -> Any:
    return ir.VectorType(of, _WIDTH)


def _splat(builder: Any, value: Any) -> Any:
    empty = ir.Constant(_vector(value.type), ir.Undefined)
    first = builder.insert_element(empty, value, _I32(0))
    return builder.shuffle_vector(first, empty, ir.Constant(_vector(_I32), [0] * _WIDTH))


def _at(builder: Any, address: Any, offset: Any, of: Any) -> Any:
    """A pointer to a value of this type, so many bytes past an address."""
    offset = _I64(offset) if isinstance(offset, int) else offset
    return builder.inttoptr(builder.add(address, offset), of.as_pointer())


def _load(builder: Any, address: Any, offset: Any, of: Any) -> Any:
    return builder.load(_at(builder, address, offset, of), align=1)


def _store(builder: Any, value: Any, address: Any, offset: Any) -> None:
    builder.store(value, _at(builder, address, offset, value.type), align=1)


def _as_pointer(typing: Any, address: Any) -> Any:
    """An address as numba.carray takes it."""
    return types.voidptr(_ADDRESS), lambda context, builder, _, args: builder.inttoptr(args[0], _I8.as_pointer())


def _copy_vector(typing: Any, to: Any, source: Any) -> Any:
    """Copy eight words."""

    def emit(context: Any, builder: Any, _: Any, args: Any) -> Any:
        _store(builder, _load(builder, args[1], 0, _vector(_I64)), args[0], 0)
        return context.get_dummy_value()

    return types.void(_ADDRESS, _ADDRESS), emit


def _add_signs(typing: Any, words: Any, x: Any, bit: Any) -> Any:
    """Set this bit of each of 16 words where the float that belongs to it is negative."""

    def emit(context: Any, builder: Any, _: Any, args: Any) -> Any:
        words, x, bit = args
        one = _splat(builder, builder.shl(_I64(1), bit))
        for v in range(2):
            floats, lanes = _load(builder, x, 32 * v, _vector(_FLOAT)), _load(builder, words, 64 * v, _vector(_I64))
            negative = builder.fcmp_ordered("<", floats, ir.Constant(floats.type, [0.0] * _WIDTH))
            found = builder.select(negative, one, ir.Constant(lanes.type, [0] * _WIDTH))
            _store(builder, builder.or_(lanes, found), words, 64 * v)
        return context.get_dummy_value()

    return types.void(_ADDRESS, _ADDRESS, _ADDRESS), emit


def _signs_of(count: int) -> Any:
    """Emit the signs of so many floats side by side, as the low bits of a word."""

    def typed(typing: Any, x: Any) -> Any:
        def emit(context: Any, builder: Any, _: Any, args: Any) -> Any:
            floats = _load(builder, args[0], 0, ir.VectorType(_FLOAT, count))
            negative = builder.fcmp_ordered("<", floats, ir.Constant(floats.type, [0.0] * count))
            return builder.zext(builder.bitcast(negative, ir.IntType(count)), _I64)

        return types.int64(_ADDRESS), emit

    return intrinsic(typed)


def micro_kernel(rows: int, masked: bool, form: int) -> Any:
    """Emit one micro-kernel.

    Called with int64 numbers, addresses and strides in bytes:

    a, row: of the first row of words, and between rows.
    panel: (words, LANES) int64.
    masks: (words, LANES / 8) bytes, a bit for each lane that counts; not read unless ``masked``.
    words: how many.
    base: (LANES,) int32, the dot of a lane whose bits all agree.
    edge, sense: int32 thresholds of the lanes or of the rows, negative iff (dot ^ sense) < edge.
    out, step: where the first row is stored, and between rows.
    bit: of (LANES,) int64 words at ``out``, the one to which the first row's sign is added.
    """
    vectors = LANES // _WIDTH

    def emit(context: Any, builder: Any, _: Any, args: Any) -> Any:
        a, row, panel, masks, words, base, edge, sense, out, step, bit = args
        name = "llvm.ctpop.v8i64"
        lanes = _vector(_I64)
        count = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(lanes, [lanes]), name)
        starts = [builder.add(a, builder.mul(row, _I64(m))) for m in range(rows)]
        entry, loop, done = builder.block, builder.append_basic_block("words"), builder.append_basic_block("sums")
        builder.branch(loop)

        builder.position_at_end(loop)
        k = builder.phi(_I64)
        k.add_incoming(_I64(0), entry)
        sums = [builder.phi(lanes) for _ in range(rows * vectors)]
        columns = [
            _load(builder, panel, builder.add(builder.mul(k, _I64(8 * LANES)), _I64(64 * v)), lanes)
            for v in range(vectors)
        ]
        counted = [
            builder.bitcast(
                _load(builder, masks, builder.add(builder.mul(k, _I64(vectors)), _I64(v)), _I8), _vector(_I1)
            )
            for v in range(vectors if masked else 0)
        ]
        zero, added = ir.Constant(lanes, [0] * _WIDTH), []
        for m in range(rows):
            word = _splat(builder, _load(builder, starts[m], builder.mul(k, _I64(8)), _I64))
            for v in range(vectors):
                differs = builder.xor(word, columns[v])
                if masked:
                    differs = builder.select(counted[v], differs, zero)
                added.append(builder.add(sums[m * vectors + v], builder.call(count, [differs])))
        following = builder.add(k, _I64(1))
        k.add_incoming(following, loop)
        for total, new in zip(sums, added, strict=True):
            total.add_incoming(zero, entry)
            total.add_incoming(new, loop)
        builder.cbranch(builder.icmp_signed("<", following, words), loop, done)

        builder.position_at_end(done)
        bits = [_load(builder, out, 64 * v, lanes) for v in range(vectors if form == BITS_OF_ROWS else 0)]
        for m in range(rows):
            line = builder.add(out, builder.mul(step, _I64(m)))
            for v in range(vectors):
                places, ints = 4 * _WIDTH * v, _vector(_I32)
                differ = builder.trunc(added[m * vectors + v], ints)
                dot = builder.sub(_load(builder, base, places, ints), builder.add(differ, differ))
                if form == INTS:
                    _store(builder, dot, line, places)
                elif form == FLOATS:
                    _store(builder, builder.sitofp(dot, _vector(_FLOAT)), line, places)
                elif form == BITS_OF_LANES:
                    turned = builder.xor(dot, _load(builder, sense, places, ints))
                    negative = builder.icmp_signed("<", turned, _load(builder, edge, places, ints))
                    _store(builder, builder.bitcast(negative, _I8), line, v)
                else:
                    turned = builder.xor(dot, _splat(builder, _load(builder, sense, 4 * m, _I32)))
                    low = _splat(builder, _load(builder, edge, 4 * m, _I32))
                    one = _splat(builder, builder.shl(_I64(1), builder.add(bit, _I64(m))))
                    found = builder.select(builder.icmp_signed("<", turned, low), one, zero)
                    bits[v] = builder.or_(bits[v], found)
        for v, word in enumerate(bits):
            _store(builder, word, out, 64 * v)
        return context.get_dummy_value()

    def typed(
        typing: Any, a: Any, row: Any, panel: Any, masks: Any, words: Any, base: Any, edge: Any, sense: Any, out: Any,
        step: Any, bit: Any,
    ) -> Any:  # fmt: skip
        return types.void(*[_ADDRESS] * 11), emit

    return intrinsic(typed)


as_pointer: Any = intrinsic(_as_pointer)
copy_vector: Any = intrinsic(_copy_vector)
add_signs: Any = intrinsic(_add_signs)
signs_of_64, signs_of_8 = _signs_of(64), _signs_of(8)
