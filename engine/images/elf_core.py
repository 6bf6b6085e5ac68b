"""ELF cores of whole machines, as QEMU's ``dump-guest-memory`` writes them: a PT_LOAD for each range of memory by its
physical address, and notes about the vCPUs (ELF specification, chapters 1 and 2; QEMU, dump/dump.c).

The parts are taken in the order of the file: what is told of lies behind its program header.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import InvalidValue
from engine.images.base import Block, Image, ImageStream
from engine.images.elf_notes import registers_of

_IDENT = 16
_CLASS, _DATA, _LITTLE = 4, 5, 1
_CORE = 4
_EM_386, _EM_X86_64 = 3, 62
_LOAD, _NOTE = 1, 4
_EXTENDED = 0xFFFF  # PN_XNUM: how many there are is told elsewhere
# Bytes of all notes together: those of one vCPU are about 900.
_MOST_NOTES = 1 << 22


@dataclass(frozen=True, slots=True)
class _Layout:
    """Of one class: the header behind its identification, and a program header as (type, offset, physical address,
    bytes in the file)."""

    header: struct.Struct
    program: struct.Struct
    order: tuple[int, int, int, int]


# e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum, then sections.
# 32 bits: p_type, p_offset, p_vaddr, p_paddr, p_filesz, ...; 64 bits have p_flags behind p_type.
_LAYOUTS = {
    1: _Layout(struct.Struct("<HHIIIIIHHH6x"), struct.Struct("<8I"), (0, 1, 3, 4)),
    2: _Layout(struct.Struct("<HHIQQQIHHH6x"), struct.Struct("<II6Q"), (0, 2, 4, 5)),
}


@dataclass(frozen=True, slots=True)
class _Segment:
    """A program header: bytes ``offset`` on of the file, and what they are."""

    type: int
    offset: int
    gpa: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


class ElfCore(Image):
    """An ELF core of an x86 machine, of 32 or 64 bits."""

    format = "elf"

    def __init__(self, stream: ImageStream) -> None:
        super().__init__(stream)
        self._machine = 0

    def _blocks(self) -> Iterator[Block]:
        segments = self._segments()
        for segment in segments:
            if segment.type == _LOAD:
                self.ranges.add(segment.gpa, segment.size, segment.offset)
        for segment in segments:
            self._stream.skip(segment.offset - self._stream.offset, "what is before a segment")
            if segment.type == _NOTE:
                notes = self._stream.take(segment.size, "the notes")
                self.vcpus += registers_of(notes, segment.offset, long_mode=self._machine == _EM_X86_64)
            elif self._passing and not self._stream.seeks:
                return
            else:
                last = segment.gpa + segment.size - 1
                yield from self._exactly(segment.gpa, segment.size, f"the segment of GPA {segment.gpa:#x} to {last:#x}")
        if not self._passing:
            self._stream.drain()

    def _segments(self) -> list[_Segment]:
        """What is to be read, in order of the file and nothing twice. Raises InvalidValue."""
        ident = self._stream.take(_IDENT, "the header of ELF")
        layout = _LAYOUTS.get(ident[_CLASS])
        if ident[:4] != b"\x7fELF" or layout is None or ident[_DATA] != _LITTLE:
            rule = "must be an ELF core of a little-endian machine of 32 or 64 bits"
            raise InvalidValue(rule, field="body", value=ident[:6].hex())
        header = layout.header.unpack(self._stream.take(layout.header.size, "the header of ELF"))
        kind, self._machine, table, entry_size, count = header[0], header[1], header[4], header[8], header[9]
        self._check_header(kind, entry_size, count, layout)
        self._skip_to(table, "the program headers")
        found, notes = [], 0
        for _ in range(count):
            at = self._stream.offset
            fields = layout.program.unpack(self._stream.take(layout.program.size, "the program headers"))
            segment = _Segment(*(fields[i] for i in layout.order))
            if segment.type in (_LOAD, _NOTE) and segment.size:
                notes += segment.size if segment.type == _NOTE else 0
                _check_segment(segment, notes, at)
                found.append(segment)
        if not any(segment.type == _LOAD for segment in found):
            raise InvalidValue("must have memory: no program header is a PT_LOAD with bytes", field="body")
        early = min(found, key=lambda segment: segment.offset)
        if early.offset < self._stream.offset:
            rule = f"segments must lie behind the program headers, which end at byte {self._stream.offset}"
            raise InvalidValue(rule, field="body", value=early.offset)
        return _joined(found)

    def _check_header(self, kind: int, entry_size: int, count: int, layout: _Layout) -> None:
        if self._machine not in (_EM_386, _EM_X86_64):
            rule = f"must be of an x86 machine, which ELF numbers {_EM_386} or {_EM_X86_64}"
            raise InvalidValue(rule, field="body", value=self._machine)
        if kind != _CORE:
            rule = f"must be a core, type {_CORE} of ELF; a program or a kernel is none"
            raise InvalidValue(rule, field="body", value=kind)
        if count == _EXTENDED:
            rule = f"must have fewer than {_EXTENDED} program headers: `dump-guest-memory` without -p writes few"
            raise InvalidValue(rule, field="body", value=count)
        if count and entry_size != layout.program.size:
            rule = f"must have program headers of {layout.program.size} bytes"
            raise InvalidValue(rule, field="body", value=entry_size)

    def _skip_to(self, offset: int, what: str) -> None:
        if offset < self._stream.offset:
            rule = f"must have {what} behind its header of {self._stream.offset} bytes"
            raise InvalidValue(rule, field="body", value=offset)
        self._stream.skip(offset - self._stream.offset, what)


def _check_segment(segment: _Segment, notes: int, at: int) -> None:
    """``notes`` are the bytes of all notes up to it, ``at`` is where its program header is."""
    if segment.end >= 1 << 63:
        rule = f"must tell of bytes that a file can have; the program header at byte {at} does not"
        raise InvalidValue(rule, field="body", value=hex(segment.offset))
    if notes > _MOST_NOTES:
        rule = f"must have notes of {_MOST_NOTES} bytes at most in all"
        raise InvalidValue(f"{rule}; with the program header at byte {at} there are more", field="body", value=notes)


def _joined(segments: list[_Segment]) -> list[_Segment]:
    """Segments in order of the file. Several virtual mappings of the same memory (``-p``) become one range; other bytes
    are not in two segments."""
    done: list[_Segment] = []
    for segment in sorted(segments, key=lambda segment: (segment.offset, segment.end)):
        before = done[-1] if done else None
        if before is None or segment.offset >= before.end:
            done.append(segment)
            continue
        same = before.type == segment.type == _LOAD and segment.gpa - segment.offset == before.gpa - before.offset
        if not same:
            rule = f"byte {segment.offset} is in two segments, for GPA {before.gpa + segment.offset - before.offset:#x}"
            raise InvalidValue(f"{rule} and {segment.gpa:#x}", field="body", value=segment.offset)
        size = max(before.end, segment.end) - before.offset
        done[-1] = _Segment(_LOAD, before.offset, before.gpa, size)
    return done
