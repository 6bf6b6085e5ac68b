"""What a trace has between its accesses: hypercalls and loads of CR3 and INVLPG, by the columns op, arg and
address_space.

``arg`` is bytes, words little-endian:

hypercall  the three registers of a 64-bit caller, RCX (the input value), RDX and R8, then the rest of the input: of a
           fast call the contents of XMM0 to XMM5 as far as they count, else the block, which is stored at RDX first;
           without a rest the block is what guest memory holds there
mov-cr3    the operand, bit 63 included; without it the column address_space has it
invlpg     the linear address; without it the column gva has it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.arch import hypercall as hv
from engine.errors import TraceError

ACCESS, HYPERCALL, MOV_CR3, INVLPG = range(4)
OP_NAMES = ("access", "hypercall", "mov-cr3", "invlpg")

# The columns that make a trace one of this sort, and their names in errors.
OP_COLUMNS = ("address_space", "op", "arg")

# In place of an address space in ``Operations.spaces``: the record does not say.
NO_SPACE = (1 << 64) - 1

WORD = 8
REGISTER_BYTES = 3 * WORD
XMM_BYTES = 16 * hv.XMM_REGISTERS
LARGEST_ARGUMENT = REGISTER_BYTES + hv.PAGE


class Operation(NamedTuple):
    """One operation. ``position`` is that of its record in the chunk; what the record does not say is None."""

    position: int
    op: int
    arg: bytes | None
    gva: int | None
    address_space: int | None

    @property
    def name(self) -> str:
        """As in the results."""
        return OP_NAMES[self.op]


class Operations(NamedTuple):
    """Those of one chunk: ``at`` int64[m] their positions, ascending; ``items`` one for each; ``spaces`` uint64[n] the
    address space of each record, NO_SPACE where it says none, or empty where none does.
    """

    at: npt.NDArray[np.int64]
    items: tuple[Operation, ...]
    spaces: npt.NDArray[np.uint64]

    @property
    def plain(self) -> bool:
        """Whether there is nothing but accesses, and none says its address space."""
        return not len(self.at) and bool((self.spaces == NO_SPACE).all())


class HypercallArgument(NamedTuple):
    """The argument of a hypercall, taken apart. ``xmm`` are 128-bit numbers; ``block`` is None where memory has it."""

    rcx: int
    rdx: int
    r8: int
    xmm: tuple[int, ...]
    block: bytes | None


def gather(
    ops: npt.NDArray[np.uint64] | None,
    spaces: npt.NDArray[np.uint64] | None,
    args: Sequence[bytes | None] | None,
    gva_of: Callable[[int], int | None],
    first_index: int,
    length: int,
) -> Operations:
    """The operations of a chunk from its columns, of which None is absent. ``gva_of`` gives that of a position.

    Raises TraceError for an access with an argument, and for an operation whose argument is none.
    """
    kinds = np.zeros(length, dtype=np.uint64) if ops is None else ops
    if args is not None:
        for position in np.flatnonzero(kinds == ACCESS).tolist() if any(args) else ():
            if args[position]:
                raise _wrong("arg", first_index + position, args[position], "an access has no argument")
    at = np.flatnonzero(kinds)
    items = []
    for position in at.tolist():
        space = NO_SPACE if spaces is None else int(spaces[position])
        item = Operation(
            position,
            int(kinds[position]),
            (None if args is None else args[position]) or None,
            gva_of(position),
            None if space == NO_SPACE else space,
        )
        _CHECKS[item.op](item, first_index + position)
        items.append(item)
    return Operations(at, tuple(items), np.zeros(0, dtype=np.uint64) if spaces is None else spaces)


def hypercall_of(item: Operation) -> HypercallArgument:
    """The argument of a hypercall that ``gather`` has let through."""
    arg = item.arg or b""
    rcx, rdx, r8 = (_word(arg[at : at + WORD]) for at in range(0, REGISTER_BYTES, WORD))
    rest = arg[REGISTER_BYTES:]
    if not rcx & hv.FAST:
        return HypercallArgument(rcx, rdx, r8, (0,) * hv.XMM_REGISTERS, rest or None)
    rest = rest.ljust(XMM_BYTES, b"\0")
    return HypercallArgument(rcx, rdx, r8, tuple(_word(rest[at : at + 16]) for at in range(0, XMM_BYTES, 16)), None)


def operand_of(item: Operation) -> int:
    """The new CR3 of a mov-cr3, or the linear address of an invlpg, that ``gather`` has let through."""
    if item.arg is not None:
        return _word(item.arg)
    given = item.address_space if item.op == MOV_CR3 else item.gva
    assert given is not None
    return given


def _check_hypercall(item: Operation, index: int) -> None:
    arg = item.arg
    if arg is None or len(arg) < REGISTER_BYTES:
        rule = f"the argument of a hypercall begins with {REGISTER_BYTES} bytes: RCX, RDX and R8"
        raise _wrong("arg", index, arg, rule)
    rest = len(arg) - REGISTER_BYTES
    if not _word(arg[:WORD]) & hv.FAST:
        if rest > hv.PAGE:
            raise _wrong("arg", index, arg, f"the block of a hypercall has at most {hv.PAGE} bytes")
    elif rest > XMM_BYTES or rest % WORD:
        raise _wrong("arg", index, arg, f"a fast hypercall has whole words after R8, up to {XMM_BYTES} bytes")


def _check_mov_cr3(item: Operation, index: int) -> None:
    if item.arg is None and item.address_space is None:
        raise _wrong("arg", index, None, "a mov-cr3 has its operand in arg or in address_space")
    _check_word(item, index)


def _check_invlpg(item: Operation, index: int) -> None:
    if item.arg is None and item.gva is None:
        raise _wrong("arg", index, None, "an invlpg has its linear address in arg or in gva")
    _check_word(item, index)


def _check_word(item: Operation, index: int) -> None:
    if item.arg is not None and len(item.arg) != WORD:
        raise _wrong("arg", index, item.arg, f"the argument of a {item.name} has {WORD} bytes")


_CHECKS: dict[int, Callable[[Operation, int], None]] = {
    HYPERCALL: _check_hypercall,
    MOV_CR3: _check_mov_cr3,
    INVLPG: _check_invlpg,
}


def _wrong(field: str, index: int, value: bytes | None, rule: str) -> TraceError:
    shown = None if value is None else value[:64].hex()
    return TraceError(rule, index=index, field=field, value=shown)


def _word(data: bytes) -> int:
    return int.from_bytes(data, "little")
