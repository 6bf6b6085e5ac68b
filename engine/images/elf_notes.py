"""Notes of QEMU's cores: beside NT_PRSTATUS, which has no control registers, one named QEMU for each vCPU, in order
(QEMU, target/i386/arch_dump.c: ``QEMUCPUState``)."""

from __future__ import annotations

import struct

from engine.errors import InvalidValue
from engine.images.base import VcpuRegisters

_NOTE = struct.Struct("<III")  # bytes of the name, bytes of the description, type; each is padded to 4 bytes
_QEMU = b"QEMU\0"
_VERSION = 1
# Version and size; RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, R8 to R15, RIP, RFLAGS; ten segments of 24 bytes;
# CR0 to CR4.
_STATE = struct.Struct("<II18Q240x5Q")
_RSP, _RIP, _RFLAGS, _CR0, _CR2, _CR3, _CR4 = 8, 18, 19, 20, 22, 23, 24

_PAGING, _PAE = 1 << 31, 1 << 5
_LONG_MODE, _NO_EXECUTE = 1 << 8 | 1 << 10, 1 << 11


def registers_of(notes: bytes, offset: int, *, long_mode: bool) -> tuple[VcpuRegisters, ...]:
    """What the notes at byte ``offset`` of an image say of vCPUs. Raises InvalidValue.

    EFER is not among it. Where paging has entries of 64 bits it is taken to be used with no-execute pages, as every
    kernel of today does, and in an image of a 64-bit machine (``long_mode``) to be in long mode.
    """
    found = []
    at = 0
    while at + _NOTE.size <= len(notes):
        name_size, size, kind = _NOTE.unpack_from(notes, at)
        name_at = at + _NOTE.size
        begin = name_at + (name_size + 3 & ~3)
        end = begin + size
        if end > len(notes):
            rule = f"notes must not be longer than their segment; that at byte {offset + at} goes on to {offset + end}"
            raise InvalidValue(rule, field="body", value=offset + at)
        if notes[name_at : name_at + name_size] == _QEMU and kind == 0:
            found.append(_registers(notes[begin:end], offset + at, long_mode=long_mode))
        at = begin + (size + 3 & ~3)
    return tuple(found)


def _registers(state: bytes, offset: int, *, long_mode: bool) -> VcpuRegisters:
    if len(state) < _STATE.size or struct.unpack_from("<I", state)[0] != _VERSION:
        rule = f"QEMU's notes have version {_VERSION} and {_STATE.size} bytes or more; that at byte {offset} has not"
        raise InvalidValue(rule, field="body", value=len(state))
    words = _STATE.unpack_from(state)
    cr0, cr4 = words[_CR0], words[_CR4]
    wide = bool(cr0 & _PAGING and cr4 & _PAE)
    efer = (_NO_EXECUTE | (_LONG_MODE if long_mode else 0)) if wide else 0
    return VcpuRegisters(
        rip=words[_RIP],
        rsp=words[_RSP],
        rflags=words[_RFLAGS],
        cr0=cr0,
        cr2=words[_CR2],
        cr3=words[_CR3],
        cr4=cr4,
        efer=efer,
    )
