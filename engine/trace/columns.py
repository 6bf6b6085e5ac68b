"""The columns of a guest access, and the chunk in which accesses travel from a reader to the replay.

A trace is a sequence of accesses in guest order. Whatever the body looks like on the wire, inside the engine it is runs
of ``TraceChunk``: two 64-bit words per access, which is also the packed ``record16`` format; or, of accesses that are
alike but for place and length, these two columns as they came. Neither of the two fast bodies is converted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from engine.arch import access as acc
from engine.errors import TraceError
from engine.trace.operations import NO_SPACE, OP_COLUMNS, OP_NAMES, Operations

# Target length of a chunk. 256 Ki records are 4 MiB: long enough that what a chunk costs whatever its length does not
# count, short enough to stay in the last-level cache between reader and replay.
CHUNK_RECORDS = 1 << 18


@dataclass(frozen=True)
class Column:
    """One column of a trace: its name, the width it is stored in, and what an absent column means.

    ``default`` is None for a column without one. One that is ``beside`` the records is part of none: it is about the
    operations between accesses (``trace.operations``). One that goes ``along`` says nothing to the replay.
    ``about`` is one line for documentation. ``largest`` is the largest value that means something, where that is less
    than what fits.
    """

    name: str
    dtype: str
    default: int | None
    beside: bool
    about: str
    largest: int | None = None
    along: bool = False

    @property
    def limit(self) -> int:
        """Largest value allowed."""
        return int(np.iinfo(np.dtype(self.dtype)).max) if self.largest is None else self.largest


COLUMNS: tuple[Column, ...] = (
    Column("gpa", "<u8", None, False, "guest-physical address of the first byte; required"),
    Column("size", "<u2", 8, False, "bytes accessed"),
    Column("access", "|u1", 1, False, "0 read, 1 write, 2 execute"),
    Column("vcpu", "<u2", 0, False, "KVM vCPU id"),
    Column("gva", "<u8", None, False, "guest-linear address of the first byte, if known"),
    Column(
        "kind",
        "|u1",
        acc.DATA,
        False,
        "0 data, 1 read-modify-write, 2 paging read, 3 paging A/D update, 4 shadow stack",
        len(acc.KIND_NAMES) - 1,
    ),
    Column(
        "linear",
        "|u1",
        acc.LINEAR_VALID,
        False,
        "the linear address, bits: 1 valid, 2 user, 4 writable, 8 execute-disable",
        acc.LINEAR_BITS,
    ),
    Column("source", "|u1", acc.GUEST, False, "0 guest, 1 emulated by KVM, 2 host", len(acc.SOURCE_NAMES) - 1),
    Column("address_space", "<u8", None, True, "the vCPU's CR3; absent or null: as it was", NO_SPACE - 1),
    Column("insn_len", "|u1", 0, False, "instruction length in bytes, 0 if not known", acc.MAX_INSTRUCTION),
    Column("op", "|u1", 0, True, "0 access, 1 hypercall, 2 mov-cr3, 3 invlpg", len(OP_NAMES) - 1),
    Column("arg", "binary", None, True, "argument of the operation, null for an access"),
    Column("pc", "<u8", None, False, "address of the instruction, if known; in exit records, too", along=True),
    Column("time", "<u8", None, False, "nanoseconds, if known; in exit records, too", along=True),
    Column("value", "binary", None, False, "what was read or written; not looked at", along=True),
)
# The columns that share bytes of a record: what kind of access it is, whose, and how long its instruction.
KINDS = frozenset({"kind", "linear", "source", "insn_len"})
# Those beside place and length that a record has: where all of a chunk are alike in them, it is no more than columns.
SHARED = frozenset({"access", "vcpu", *KINDS})
WORD_BYTES = 8
# The longest access that such a chunk can have.
SHORT = 255
_DEFAULT_ACCESS = np.array(acc.DEFAULT_ACCESS, dtype=np.uint8)

USABLE: Mapping[str, Column] = {column.name: column for column in COLUMNS}
RECORD: Mapping[str, Column] = {column.name: column for column in COLUMNS if not column.beside and not column.along}
# Those that are carried into exit records without being asked for.
ALONG = ("pc", "time")
# Columns without a default: every record has them, or none has.
ALL_OR_NONE = ("gva", *ALONG)

# The two words of a chunk row, field by field (little-endian, 16 bytes).
RECORD16 = np.dtype(
    [
        ("gpa", "<u8"),
        ("size", "<u2"),
        ("access", "|u1"),
        ("zero", "|u1"),
        ("vcpu", "<u2"),
        ("zero2", "<u2"),
    ]
)


class Columns(NamedTuple):
    """Accesses that are alike but for place and length: ``gpa`` uint64[n], ``size`` uint8[n], both contiguous;
    ``above`` is word 1 of each, the size left out."""

    gpa: npt.NDArray[np.uint64]
    size: npt.NDArray[np.uint8]
    above: int


class Late(Protocol):
    """The linear addresses of a chunk where its reader has not decoded them: few records need theirs."""

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Those of some records, by position in the chunk, in ascending order. Raises TraceError."""


@dataclass(slots=True)
class TraceChunk:
    """A run of consecutive accesses. Valid until the next chunk is asked for: readers fill the same memory again.

    ``packed``: uint64[n, 2], C-contiguous, writable; or None, and ``columns`` has what it would hold. Word 0 is the
    GPA. Word 1 holds the size in bytes in bits 15:0,
    the access in bits 23:16, the vCPU id in bits 47:32; bits 31:24 and 63:48 are zero in a valid record, but where
    ``kinds`` is set bits 30:24 hold the columns kind and linear, 49:48 source and 57:50 insn_len
    (``arch.access.record_bits``). A packed body never sets it: those bits of its records are zero.
    ``gva``: uint64[n], or None when the trace has no such column.
    ``carry``: the columns the caller asked to carry along, and those of ALONG that the trace has, each of length n and
    of a fixed-width type.
    ``operations``: what is between the accesses and under which page tables each is, None for a trace that has neither;
    the row of an operation has its vCPU and nothing else that counts.
    ``has_gpa``: not, where some record has no column ``gpa``; the trace has ``gva`` then (``trace.addresses``).
    ``room``: uint64[at least n, 2] to pack columns into, or None.
    ``late``: has the linear addresses, and ``gva`` is None; only for who asked the reader for it.
    """

    packed: npt.NDArray[np.uint64] | None
    gva: npt.NDArray[np.uint64] | None
    carry: dict[str, npt.NDArray[Any]]
    kinds: bool = False
    operations: Operations | None = None
    has_gpa: bool = True
    columns: Columns | None = None
    room: npt.NDArray[np.uint64] | None = None
    late: Late | None = None

    def __len__(self) -> int:
        return len(self.columns.gpa) if self.columns is not None else len(self.records)

    @property
    def records(self) -> npt.NDArray[np.uint64]:
        """``packed``; columns are packed when somebody asks for it."""
        if self.packed is None:
            assert self.columns is not None
            gpa, size, above = self.columns
            packed = np.empty((len(gpa), 2), dtype=np.uint64) if self.room is None else self.room[: len(gpa)]
            packed[:, 0] = gpa
            np.bitwise_or(size, np.uint64(above), out=packed[:, 1])
            self.packed = packed  # whole: two threads may want it
        return self.packed

    def at(self, position: int) -> tuple[int, int]:
        """The two words of a record, signed as kernels have them."""
        if self.columns is not None:
            gpa, size, above = self.columns
            return int(gpa[position : position + 1].view(np.int64)[0]), above | int(size[position])
        gpa, word = self.records[position].view(np.int64).tolist()
        return gpa, word

    def vcpus(self) -> set[int]:
        """The ids of the vCPUs that it says."""
        if self.columns is not None:
            return {self.columns.above >> 32 & 0xFFFF}
        return {int(vcpu) for vcpu in np.unique(self.records[:, 1] >> np.uint64(32) & np.uint64(0xFFFF))}

    def with_gva(self) -> TraceChunk:
        """The same with linear addresses that were late."""
        if self.late is None:
            return self
        return replace(self, gva=self.late.at(np.arange(len(self))), late=None)

    def moved(self, records: npt.NDArray[np.uint64], gva: npt.NDArray[np.uint64] | None) -> TraceChunk:
        """The same accesses at other addresses: ``records`` are theirs."""
        return replace(self, packed=records, gva=gva, has_gpa=True, columns=None, room=None)

    def copy(self) -> TraceChunk:
        """The same, valid for ever."""
        if self.late is not None:
            return self.with_gva().copy()
        gva = None if self.gva is None else self.gva.copy()
        carry = {name: column.copy() for name, column in self.carry.items()}
        if self.columns is None:
            return replace(self, packed=self.records.copy(), gva=gva, carry=carry)
        gpa, size, above = self.columns
        columns = Columns(gpa.copy(), size.copy(), above)
        return replace(self, packed=None, gva=gva, carry=carry, columns=columns, room=None)


class MalformedBody(TraceError):
    """A JSON body, or a line of one, that is not JSON at all."""

    code = "malformed-body"


class ColumnPlan(NamedTuple):
    """Which columns of a body are used, carried and left alone.

    They are in the order of the body, those to carry in the order asked for, then those of ALONG.
    """

    used: tuple[str, ...]
    carried: tuple[str, ...]
    ignored: tuple[str, ...]


def check_carry(carry: Sequence[str]) -> tuple[str, ...]:
    """The names to carry, once each, in the order asked for.

    Raises ``TraceError`` for a column that has a meaning of its own.
    """
    for name in carry:
        if name in USABLE and not USABLE[name].along:
            raise TraceError(
                f"{name} is part of every record and is not carried separately",
                field="carry",
                value=name,
            )
    return tuple(dict.fromkeys(carry))


def plan_columns(names: Iterable[str], carry: Sequence[str], *, index: int = 0) -> ColumnPlan:
    """Sort the column names of a body by what becomes of them.

    ``index`` is the first record that has these columns. Raises ``TraceError`` for one that occurs twice,
    for one without an address, ``gpa`` or ``gva``, and for a name to carry that is not there.
    """
    used: list[str] = []
    carried: list[str] = []
    ignored: list[str] = []
    twice: list[str] = []  # of those that nobody asked for: left alone
    for name in names:
        group = used if name in USABLE else carried if name in carry else ignored
        if name in twice:
            continue
        if name in group and name in USABLE and USABLE[name].along and name not in carry:
            twice.append(name)
        elif name not in group:
            group.append(name)
        elif group is not ignored:
            raise TraceError(f"the column {name} occurs twice", index=index, field=name)
    if "gpa" not in used and "gva" not in used:
        raise without_gpa(index)
    for name in carry:
        if name not in carried and name not in used:
            raise TraceError(
                f"the column {name} to be carried does not exist",
                index=index,
                field="carry",
                value=name,
            )
    along = tuple(name for name in ALONG if name in used and name not in (*carry, *twice))
    return ColumnPlan(tuple(n for n in used if not USABLE[n].along), (*carry, *along), (*ignored, *twice))


def does_not_fit(name: str, index: int, value: Any, limit: int, names: Iterable[str] = ()) -> TraceError:
    """The error for an integer that is negative or wider than its column, which may be written as one of ``names``."""
    named = f", or one of {', '.join(names)}" if names else ""
    return TraceError(
        f"{name} must be an integer from 0 to {limit}{named}",
        index=index,
        field=name,
        value=value,
    )


def without_gpa(index: int) -> TraceError:
    """The error for a record without an address that can be used."""
    return TraceError("the column gpa is required, or gva with address=gva or flat", index=index, field="gpa")


def is_null(name: str, index: int) -> TraceError:
    """The error for a null, which no column allows."""
    return TraceError(f"{name} must not be null", index=index, field=name)


class ChunkBuffer:
    """The memory that a reader fills again and again: rows, and the ``gva`` column if there is one.

    Columns that a body lacks keep their defaults for the life of the buffer: only those it has are written per chunk.
    """

    def __init__(self, used: Iterable[str], capacity: int = CHUNK_RECORDS) -> None:
        self.capacity = capacity
        self.records: npt.NDArray[np.uint64] = np.zeros((capacity, 2), dtype=np.uint64)
        fields = self.records.view(RECORD16).reshape(capacity)
        self._columns: dict[str, npt.NDArray[Any]] = {name: fields[name] for name in ("gpa", "size", "access", "vcpu")}
        self._gva: npt.NDArray[np.uint64] | None = None
        used = frozenset(used)
        self.beside = not used.isdisjoint(OP_COLUMNS)
        self._has_gpa = "gva" not in used or "gpa" in used
        if "gva" in used:
            self._gva = self._columns["gva"] = np.zeros(capacity, dtype=np.uint64)
        for name, column in self._columns.items():
            column[:] = RECORD[name].default or 0
        self._eights: npt.NDArray[np.uint8] | None = None
        self._wide: npt.NDArray[np.uint64] | None = None
        self._kinds = not used.isdisjoint(KINDS)
        self._kind_says_access = "kind" in used and "access" not in used
        self._byte3 = fields["zero"]
        self._top = fields["zero2"]

    def fill(self, name: str, values: npt.NDArray[Any]) -> None:
        """Store the first ``len(values)`` values of a column; they are known to be allowed."""
        if name in ("source", "insn_len"):
            self._fill_top(name, values.astype(np.uint16))
        elif name in KINDS:
            self._fill_byte3(name, values.astype(np.uint8))
        else:
            self._columns[name][: len(values)] = values

    def _fill_byte3(self, name: str, values: npt.NDArray[np.uint8]) -> None:
        """Kind and linear bits share a byte; see ``arch.access.record_bits``."""
        shared = self._byte3[: len(values)]
        if name == "linear":
            shared[:] = shared & 7 | (values ^ acc.LINEAR_VALID) << 3
            return
        shared[:] = shared & ~np.uint8(7) | values
        if self._kind_says_access:
            self._columns["access"][: len(values)] = _DEFAULT_ACCESS[values]

    def _fill_top(self, name: str, values: npt.NDArray[np.uint16]) -> None:
        """Source and instruction length share the last two bytes; see ``arch.access.record_bits``."""
        shared = self._top[: len(values)]
        if name == "source":
            shared[:] = shared & ~np.uint16(3) | values
        else:
            shared[:] = shared & np.uint16(3) | values << 2

    def alike(self, parts: Mapping[str, npt.NDArray[Any]]) -> Columns | None:
        """The columns of a chunk, known to be allowed, if they are those of accesses that are alike but for place and
        length, and short. Two columns that fit are not copied."""
        if self.beside or "gpa" not in parts or not len(parts["gpa"]):
            return None
        if any(not _is_same(values) for name, values in parts.items() if name in SHARED):
            return None
        size = parts.get("size")
        if size is None:
            if self._eights is None:
                self._eights = np.full(self.capacity, RECORD["size"].default, dtype=np.uint8)
            size = self._eights[: len(parts["gpa"])]
        elif size.dtype != np.uint8 and size.max() > SHORT:
            return None
        for name, values in parts.items():
            if name in SHARED:
                self.fill(name, values[:1])
        above = int(self.records[0, 1]) >> 16 << 16
        return Columns(self._words(parts["gpa"]), _contiguous(size, np.uint8), above)

    def _words(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Addresses as kernels take them: of fewer than 64 bits in memory that is used again."""
        if values.dtype.itemsize == WORD_BYTES and values.strides == (WORD_BYTES,):
            return _contiguous(values, np.uint64)
        if self._wide is None:
            self._wide = np.empty(self.capacity, dtype=np.uint64)
        self._wide[: len(values)] = values
        return self._wide[: len(values)]

    def chunk_of(
        self,
        parts: Mapping[str, npt.NDArray[Any]],
        carry: dict[str, npt.NDArray[Any]],
        operations: Operations | None = None,
    ) -> TraceChunk:
        """The accesses of some columns, known to be allowed and of one length."""
        columns = self.alike(parts)
        if columns is not None:
            gva = parts.get("gva")
            gva = None if gva is None else _contiguous(gva, np.uint64)
            return TraceChunk(None, gva, carry, self._kinds, columns=columns, room=self.records)
        for name, values in parts.items():
            self.fill(name, values)
        return self.chunk(max(len(values) for values in parts.values()), carry, operations)

    def chunk(
        self, length: int, carry: dict[str, npt.NDArray[Any]], operations: Operations | None = None
    ) -> TraceChunk:
        """The first ``length`` rows."""
        return TraceChunk(
            self.records[:length],
            None if self._gva is None else self._gva[:length],
            carry,
            self._kinds,
            operations,
            self._has_gpa,
        )


def _is_same(values: npt.NDArray[Any]) -> bool:
    """Whether all values are the same; of one that is spread over an array that is known."""
    return values.strides == (0,) or not len(values) or not (values != values[0]).any()


def _contiguous(values: npt.NDArray[Any], dtype: type[np.unsignedinteger[Any]]) -> npt.NDArray[Any]:
    """Values that fit, as kernels take them: without a copy if they lie so."""
    same = values.view(dtype) if values.dtype.kind in "iu" and values.itemsize == np.dtype(dtype).itemsize else values
    return np.require(same, dtype=dtype, requirements=("C", "A"))
