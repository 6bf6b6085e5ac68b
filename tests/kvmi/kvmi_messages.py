"""Messages of KVMI as a tool writes and reads them: made from the protocol, without the service's code."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

# Commands by the names of the protocol, flat ids (v6 and v7).
IDS = {
    "EVENT_REPLY": 0,
    "GET_VERSION": 2,
    "CHECK_COMMAND": 3,
    "CHECK_EVENT": 4,
    "GET_GUEST_INFO": 5,
    "GET_VCPU_INFO": 6,
    "PAUSE_VCPU": 7,
    "CONTROL_VM_EVENTS": 8,
    "CONTROL_EVENTS": 9,
    "CONTROL_CR": 10,
    "CONTROL_MSR": 11,
    "GET_REGISTERS": 13,
    "SET_REGISTERS": 14,
    "GET_CPUID": 15,
    "GET_XSAVE": 16,
    "READ_PHYSICAL": 17,
    "WRITE_PHYSICAL": 18,
    "GET_PAGE_ACCESS": 20,
    "SET_PAGE_ACCESS": 21,
    "CONTROL_SPP": 24,
    "GET_PAGE_WRITE_BITMAP": 25,
    "SET_PAGE_WRITE_BITMAP": 26,
    "CONTROL_CMD_RESPONSE": 27,
    "GET_MAX_GFN": 29,
    "SWITCH_EPT_VIEW": 32,
    "GET_EPT_VIEW": 34,
    "TRANSLATE_GVA": 35,
    "CONTROL_SINGLESTEP": 63,
}
EVENT = 1
UNHOOK, CR, MSR, PF, CREATE_VCPU, PAUSE, SINGLESTEP = 0, 1, 2, 6, 9, 10, 11
CONTINUE, RETRY, CRASH = 0, 1, 2
ENOENT, EAGAIN, EINVAL, EOPNOTSUPP, ENOSYS = 2, 11, 22, 95, 1000


def frame(id: int, seq: int, payload: bytes = b"") -> bytes:
    return struct.pack("<HHI", id, len(payload), seq) + payload


def vcpu(index: int) -> bytes:
    return struct.pack("<HHI", index, 0, 0)


def switch(what: int, on: bool) -> bytes:
    """The body of CONTROL_EVENTS and CONTROL_VM_EVENTS."""
    return struct.pack("<HB5x", what, on)


def register_switch(register: int, on: bool) -> bytes:
    """The body of CONTROL_CR and CONTROL_MSR."""
    return struct.pack("<B3xI", on, register)


def access_list(*pages: tuple[int, int], view: int = 0) -> bytes:
    entries = b"".join(struct.pack("<QB7x", gpa, rights) for gpa, rights in pages)
    return struct.pack("<HHI", view, len(pages), 0) + entries


def bitmap_list(*pages: tuple[int, int], view: int = 0) -> bytes:
    entries = b"".join(struct.pack("<QII", gpa, bitmap, 0) for gpa, bitmap in pages)
    return struct.pack("<HHI", view, len(pages), 0) + entries


def gpa_list(*gpas: int, view: int = 0) -> bytes:
    return struct.pack("<HHI", view, len(gpas), 0) + struct.pack(f"<{len(gpas)}Q", *gpas)


def span(gpa: int, size: int) -> bytes:
    return struct.pack("<QQ", gpa, size)


def replies(on: bool, now: bool) -> bytes:
    return struct.pack("<BB6x", on, now)


def event_reply(index: int, action: int, event: int, own: bytes = b"") -> bytes:
    return vcpu(index) + struct.pack("<BB6x", action, event) + own


@dataclass(frozen=True)
class Reply:
    id: int
    seq: int
    error: int
    data: bytes


@dataclass(frozen=True)
class Event:
    """An event as a flat dialect lays it out; offsets are those of the payload."""

    seq: int
    payload: bytes

    @property
    def kind(self) -> int:
        return self.payload[4]

    @property
    def vcpu(self) -> int:
        return int.from_bytes(self.payload[2:4], "little")

    @property
    def mode(self) -> int:
        return self.payload[8]

    @property
    def rip(self) -> int:
        return self._word(144)

    @property
    def cr3(self) -> int:
        return self._word(400)

    @property
    def fault(self) -> tuple[int, int, int]:
        """gva, gpa, access of PF."""
        found: tuple[int, int, int] = struct.unpack_from("<QQB", self.payload, 544)
        return found

    @property
    def load(self) -> tuple[int, int, int]:
        """Register, old and new value of CR."""
        found: tuple[int, int, int] = struct.unpack_from("<H6xQQ", self.payload, 544)
        return found

    def _word(self, at: int) -> int:
        return int.from_bytes(self.payload[at : at + 8], "little")


def parsed(id: int, seq: int, payload: bytes) -> Any:
    """A message of the hypervisor: an Event or a Reply. Its form is held against the protocol's."""
    if id == EVENT and len(payload) > 8:  # 8 bytes are the error of a tool that sends an event
        size = int.from_bytes(payload[:2], "little")
        own = {PF: 24, CR: 24, SINGLESTEP: len(payload) - 544}.get(payload[4], 0)
        assert size == 544 and len(payload) == 544 + own, (size, len(payload))
        return Event(seq, payload)
    error, pad = struct.unpack_from("<iI", payload)
    assert pad == 0 and (error == 0 or len(payload) == 8), payload
    return Reply(id, seq, -error, payload[8:])
