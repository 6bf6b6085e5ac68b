"""The file behind a memory slot: a page that nobody has written is the file's page, as the file is when it is read.

A kernel reads it where it needs it, with pread(2): eight bytes for a word, the whole page before the first write to it.
So a file of any size costs nothing to attach, what another process writes to it is seen, and a file that becomes
shorter is an error and no signal. Nothing is ever written to it.

The word of a slot that names its file: the descriptor plus one, NO_FILE, or GONE for one that could not be opened.
"""

from __future__ import annotations

import os
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from engine.cpu.frames import FRAME_SIZE, Machine
from engine.cpu.memory_slots import SLOT_FILE, SLOT_FILE_AT, SLOT_GFN, find_slot, within
from engine.errors import Conflict
from engine.jit import kernel

NO_FILE = np.int64(0)
GONE = np.int64(-1)
WORD_BYTES = 8

# numba's type hints do not list what compiled code may call.
_intrinsic: Any = intrinsic
_config: Any = numba.config
_types: Any = types
_cgutils: Any = cgutils


def page_from(descriptor: int, rows: NDArray[np.int64], row: int, offset: int) -> int:
    """Read a page into a row; returns the bytes that were read, -1 for an error."""
    try:
        return os.preadv(descriptor, [rows[row].data], offset)
    except OSError:
        return -1


def word_from(descriptor: int, offset: int) -> tuple[int, int]:
    """(bytes that were read, or -1; the word)."""
    word = np.zeros((1, 1), dtype=np.int64)
    try:
        return os.preadv(descriptor, [word.data], offset), int(word[0, 0])
    except OSError:
        return -1, 0


def _pread(builder: Any, descriptor: Any, place: Any, size: int, offset: Any) -> Any:
    """A call of pread(2) in machine code."""
    word, byte = ir.IntType(64), ir.IntType(8).as_pointer()
    number = builder.trunc(descriptor, ir.IntType(32))
    declared = ir.FunctionType(word, [number.type, byte, word, word])
    function = _cgutils.get_or_insert_function(builder.module, declared, "pread")
    return builder.call(function, [number, builder.bitcast(place, byte), ir.Constant(word, size), offset])


def _page_in_machine_code(_: Any, descriptor: Any, rows: Any, row: Any, offset: Any) -> Any:
    def read(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[1]
        array = context.make_array(kind)(context, builder, arguments[1])
        indices = [arguments[2], context.get_constant(_types.intp, 0)]
        place = _cgutils.get_item_pointer(context, builder, kind, array, indices)
        return _pread(builder, arguments[0], place, FRAME_SIZE, arguments[3])

    return _types.int64(_types.int64, rows, _types.int64, _types.int64), read


def _word_in_machine_code(_: Any, descriptor: Any, offset: Any) -> Any:
    def read(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _cgutils.alloca_once_value(builder, ir.Constant(ir.IntType(64), 0))
        count = _pread(builder, arguments[0], place, WORD_BYTES, arguments[1])
        return context.make_tuple(builder, signature.return_type, [count, builder.load(place)])

    return _types.UniTuple(_types.int64, 2)(_types.int64, _types.int64), read


if not _config.DISABLE_JIT:
    page_from = _intrinsic(_page_in_machine_code)
    word_from = _intrinsic(_word_in_machine_code)


@kernel
def source(m, page):
    """(file, offset in it) of a page that nobody has written; ``page`` is one that has its home there."""
    slot = find_slot(m, page)
    if slot < 0 or m.slots[slot, SLOT_FILE] == NO_FILE:
        return NO_FILE, np.int64(0)
    return m.slots[slot, SLOT_FILE], m.slots[slot, SLOT_FILE_AT] + ((page - m.slots[slot, SLOT_GFN]) << 12)


@kernel
def lose(m, page):
    """Note that the file has not what it should have; the change ends with an error (``check``)."""
    if m.lost[0] == 0:
        m.lost[0] = page + 1


@kernel
def read_word(m, page, file, offset):
    """The 64-bit word at an offset of a file, where a page is."""
    count, word = word_from(file - 1, offset)
    if count != WORD_BYTES:
        lose(m, page)
        return np.int64(0)
    return word


@kernel
def fill(m, page, row):
    """Put what the file behind a page has into a row of zeros; leave it alone where there is no file."""
    file, offset = source(m, page)
    if file != NO_FILE and page_from(file - 1, m.rows, row, offset) != FRAME_SIZE:
        lose(m, page)


def read_into(out: NDArray[np.uint8], page: int, file: int, offset: int) -> None:
    """Bytes of a file, where a page is. Raises Conflict if it has not all of them."""
    try:
        count = os.preadv(file - 1, [out.data], offset)
    except OSError:
        count = -1
    if count != len(out):
        raise _refusal(page)


def check(m: Machine) -> None:
    """Raise Conflict if a kernel found something missing in a file."""
    if m.lost[0]:
        raise _refusal(int(m.lost[0]) - 1)


def _refusal(page: int) -> Conflict:
    rule = "must be in the file behind its memory slot, which is gone, became shorter or cannot be read"
    todo = "put the file back and PUT the slot again, or delete the slot"
    return Conflict(f"{rule}: {todo}", field="gpa", value=int(within(page << 12)))
