"""Records looked at side by side, LANES at a time: how many in a row the fast path serves.

``served.miss`` and ``served.refuses`` word for word, in vectors; without the compiler they are called themselves. What
numba compiles from a loop has a record after the other: its vectoriser is off (ADR 4), and would not see through the
table. The words of the table are gathered by one instruction where a processor has it, one by one elsewhere.

Each takes the ``cache``, and the records from position ``at`` on: columns as ``serving.Run`` has them, or its words
with what word 1 is but for the size (``above``), of the bits ``seen``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.np import arrayobj

from engine.cpu import fastpath
from engine.jit import COMPILED, intrinsic
from engine.trace.served import GUARDED, miss, refuses

LANES = 32
# Records of one vector: as many words as the longest that processors have.
WIDTH = 8

_WORD, _INDEX, _BIT, _BITS = ir.IntType(64), ir.IntType(32), ir.IntType(1), ir.IntType(LANES)
_VECTOR, _FLAGS = ir.VectorType(_WORD, WIDTH), ir.VectorType(_BIT, WIDTH)
_NO_LANE = ir.Constant(_BITS, 0)

Records = Callable[["_Vectors", int], tuple[Any, Any]]


# ---- without the compiler


def whole_columns(cache: Any, gpas: Any, sizes: Any, at: Any) -> bool:
    """Whether all LANES records are in pages that are in the fast path whole."""
    return not any(miss(cache, gpas[i], np.int64(sizes[i]) - 1) for i in range(at, at + np.uint64(LANES)))


def whole_words(cache: Any, words: Any, at: Any, above: Any, seen: Any) -> bool:
    """The same of packed records."""
    span = range(at, at + np.uint64(LANES))
    return not any(miss(cache, words[2 * i], ((words[2 * i + 1] & seen) ^ above) - 1) for i in span)


def some_columns(cache: Any, gpas: Any, sizes: Any, at: Any, minding: Any) -> tuple[int, int]:
    """(served, guarded): how many of LANES records are served before one that is not, and how many of them are in
    guarded pages; ``minding`` is -1 for writes, 0 for others."""
    span = range(at, at + np.uint64(LANES))
    return _one_by_one(cache, [(gpas[i], np.int64(sizes[i]) - 1) for i in span], minding)


def some_words(cache: Any, words: Any, at: Any, above: Any, seen: Any, minding: Any) -> tuple[int, int]:
    """The same of packed records."""
    span = range(at, at + np.uint64(LANES))
    return _one_by_one(cache, [(words[2 * i], ((words[2 * i + 1] & seen) ^ above) - 1) for i in span], minding)


def _one_by_one(cache: Any, records: list[tuple[Any, Any]], minding: Any) -> tuple[int, int]:
    guarded = 0
    for lane, (gpa, more) in enumerate(records):
        missed = miss(cache, gpa, more)
        if missed & ~GUARDED or refuses(cache, gpa, more) & minding:
            return lane, guarded
        guarded += missed != 0
    return len(records), guarded


# ---- as vectors


class _Vectors:
    """What the rule needs of vectors, and the arguments of one look."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        self.builder = builder
        self.arguments = [
            arrayobj.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        ]
        self._table = self.spread(builder.ptrtoint(self.arguments[0], _WORD))

    def spread(self, word: Any) -> Any:
        """A vector of one word."""
        first = self.builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), word, ir.Constant(_INDEX, 0))
        lanes = ir.Constant(ir.VectorType(_INDEX, WIDTH), [0] * WIDTH)
        return self.builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), lanes)

    def load(self, array: Any, at: Any, vector: ir.VectorType) -> Any:
        """So many items of an array, wherever they lie."""
        place = self.builder.bitcast(self.builder.gep(array, [at]), vector.as_pointer())
        return self.builder.load(place, align=1)

    def gathered(self, index: Any) -> Any:
        """Words of the table."""
        places = self.builder.add(self._table, self.builder.shl(index, _all(3)))
        pointers = ir.VectorType(_WORD.as_pointer(), WIDTH)
        kind = ir.FunctionType(_VECTOR, [pointers, _INDEX, _FLAGS, _VECTOR])
        gather = self._intrinsic(f"llvm.masked.gather.v{WIDTH}i64.v{WIDTH}p0", kind)
        every, nothing = ir.Constant(_FLAGS, [1] * WIDTH), _all(0)
        return self.builder.call(
            gather, [self.builder.inttoptr(places, pointers), ir.Constant(_INDEX, 8), every, nothing]
        )

    def lanes(self, vector: Any, first: int) -> Any:
        """The lanes, from ``first`` on, whose word is not 0, as bits."""
        flags = self.builder.icmp_unsigned("!=", vector, _all(0))
        bits = self.builder.zext(self.builder.bitcast(flags, ir.IntType(WIDTH)), _BITS)
        return self.builder.shl(bits, ir.Constant(_BITS, first))

    def count(self, bits: Any) -> Any:
        """How many bits are set."""
        counted = self.builder.call(self._intrinsic("llvm.ctpop.i32", ir.FunctionType(_BITS, [_BITS])), [bits])
        return self.builder.zext(counted, _WORD)

    def zeros_below(self, bits: Any) -> Any:
        """How many zeros there are below the lowest bit: all where none is set."""
        kind = ir.FunctionType(_BITS, [_BITS, _BIT])
        return self.builder.call(self._intrinsic("llvm.cttz.i32", kind), [bits, ir.Constant(_BIT, 0)])

    def _intrinsic(self, name: str, kind: ir.FunctionType) -> Any:
        module = self.builder.module
        return module.globals.get(name) or ir.Function(module, kind, name)


class _Missed(NamedTuple):
    missed: Any
    index: Any


def _all(word: int) -> ir.Constant:
    return ir.Constant(_VECTOR, [word] * WIDTH)


def _missed(v: _Vectors, gpa: Any, more: Any) -> _Missed:
    """``served.miss``, and where in the table the page is."""
    b = v.builder
    index = b.and_(b.lshr(gpa, _all(12)), _all(fastpath.CACHE_MASK))
    last = b.ashr(b.add(gpa, more), _all(12))
    return _Missed(b.or_(b.xor(v.gathered(index), last), b.ashr(more, _all(16))), index)


def _refused(v: _Vectors, gpa: Any, more: Any, index: Any) -> Any:
    """``served.refuses``."""
    b = v.builder
    last = b.and_(b.lshr(b.add(b.and_(gpa, _all(0xFFF)), more), _all(7)), _all(31))
    first = b.and_(b.lshr(gpa, _all(7)), _all(31))
    touched = b.sub(b.shl(_all(2), last), b.shl(_all(1), first))
    return b.and_(touched, b.not_(v.gathered(b.or_(index, _all(fastpath.PAGES)))))


def _columns(v: _Vectors, first: int) -> tuple[Any, Any]:
    """Addresses, and the bytes beyond the first, of WIDTH records of columns from a lane on."""
    b, (_, gpas, sizes, at, *_) = v.builder, v.arguments
    at = b.add(at, ir.Constant(_WORD, first))
    size = b.zext(v.load(sizes, at, ir.VectorType(ir.IntType(8), WIDTH)), _VECTOR)
    return v.load(gpas, at, _VECTOR), b.sub(size, _all(1))


def _words(v: _Vectors, first: int) -> tuple[Any, Any]:
    """The same of packed records."""
    b, (_, words, at, above, seen, *_) = v.builder, v.arguments
    at = b.shl(b.add(at, ir.Constant(_WORD, first)), ir.Constant(_WORD, 1))
    pairs = v.load(words, at, ir.VectorType(_WORD, 2 * WIDTH))
    gpa, word = (
        b.shuffle_vector(pairs, pairs, ir.Constant(ir.VectorType(_INDEX, WIDTH), list(range(start, 2 * WIDTH, 2))))
        for start in (0, 1)
    )
    return gpa, b.sub(b.xor(b.and_(word, v.spread(seen)), v.spread(above)), _all(1))


def _whole(records: Records) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v, missed = _Vectors(context, builder, signature, arguments), _all(0)
        for first in range(0, LANES, WIDTH):
            missed = builder.or_(missed, _missed(v, *records(v, first)).missed)
        flags = builder.bitcast(builder.icmp_unsigned("!=", missed, _all(0)), ir.IntType(WIDTH))
        return builder.icmp_unsigned("==", flags, ir.Constant(flags.type, 0))

    return build


def _some(records: Records) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = _Vectors(context, builder, signature, arguments)
        minding = v.spread(v.arguments[-1])
        stops = guarded = _NO_LANE
        for first in range(0, LANES, WIDTH):
            gpa, more = records(v, first)
            missed, index = _missed(v, gpa, more)
            refused = builder.and_(_refused(v, gpa, more, index), minding)
            bars = builder.or_(builder.and_(missed, _all(~fastpath.GUARDED)), refused)
            stops = builder.or_(stops, v.lanes(bars, first))
            guarded = builder.or_(guarded, v.lanes(missed, first))
        # Of the guarded ones those below the lowest stop.
        below = builder.and_(builder.not_(stops), builder.sub(stops, ir.Constant(_BITS, 1)))
        counts = [builder.zext(v.zeros_below(stops), _WORD), v.count(builder.and_(guarded, below))]
        return context.make_tuple(builder, signature.return_type, counts)

    return build


_PAIR = types.UniTuple(types.int64, 2)


def _compiled_whole_columns(_: Any, cache: Any, gpas: Any, sizes: Any, at: Any) -> Any:
    return types.boolean(cache, gpas, sizes, types.uint64), _whole(_columns)


def _compiled_whole_words(_: Any, cache: Any, words: Any, at: Any, above: Any, seen: Any) -> Any:
    return types.boolean(cache, words, types.uint64, types.int64, types.int64), _whole(_words)


def _compiled_some_columns(_: Any, cache: Any, gpas: Any, sizes: Any, at: Any, minding: Any) -> Any:
    return _PAIR(cache, gpas, sizes, types.uint64, types.int64), _some(_columns)


def _compiled_some_words(_: Any, cache: Any, words: Any, at: Any, above: Any, seen: Any, minding: Any) -> Any:
    return _PAIR(cache, words, types.uint64, types.int64, types.int64, types.int64), _some(_words)


if COMPILED:
    whole_columns = intrinsic(_compiled_whole_columns)
    whole_words = intrinsic(_compiled_whole_words)
    some_columns = intrinsic(_compiled_some_columns)
    some_words = intrinsic(_compiled_some_words)
