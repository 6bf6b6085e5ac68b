"""A machine that answers from memory, for connections without a service."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from service.kvmi.connection import Answer, Close, Connection, Do, Send
from service.kvmi.events import EVENT_MSRS
from service.kvmi.guest import PageRights, Registers, SetPages, SwitchSppOn, WriteMemory
from service.kvmi.wire import ENOENT, Refused
from tests.kvmi import kvmi_messages as kvmi


@dataclass
class FakeGuest:
    count: int = 2
    gfns: int = 0x20000
    sub_pages: bool = True
    busy: bool = False
    pages: dict[int, PageRights] = field(default_factory=dict)
    written: list[tuple[int, bytes]] = field(default_factory=list)

    def vcpus(self) -> int:
        return self.count

    def max_gfn(self) -> int:
        return self.gfns

    def has_memory(self, gfn: int) -> bool:
        return gfn < self.gfns

    def spp(self) -> bool:
        return self.sub_pages

    def registers(self, vcpu: int, msrs: Sequence[int]) -> Registers:
        sregs = bytearray(312)
        sregs[19] = 1
        struct.pack_into("<Q", sregs, 240, 0x1000 + vcpu)
        struct.pack_into("<Q", sregs, 264, 0xD01)
        return Registers(bytes(144), bytes(sregs), tuple(index & 0xFF for index in msrs))

    def shown(self, vcpu: int) -> Registers:
        return self.registers(vcpu, EVENT_MSRS)

    def cpuid(self, vcpu: int, function: int, index: int) -> tuple[int, int, int, int]:
        if function != 1:
            raise Refused(ENOENT)
        return (1, 2, 3, 4)

    def read(self, gpa: int, size: int) -> bytes:
        if not self.has_memory(gpa >> 12):
            raise Refused(ENOENT)
        return bytes((gpa + i) & 0xFF for i in range(size))

    def translate(self, vcpu: int, gva: int) -> int:
        return gva & 0x7FFF_FFFF if gva >> 63 else (1 << 64) - 1

    def page(self, gfn: int) -> PageRights:
        return self.pages.get(gfn, PageRights(7, 0xFFFF_FFFF))

    def resting(self) -> bool:
        return not self.busy

    def do(self, change: Any) -> int:
        """Make a change; its error."""
        match change:
            case WriteMemory():
                self.written.append((change.gpa, change.data))
            case SwitchSppOn():
                return self.do(change.then) if change.then is not None else 0
            case SetPages():
                errors = [self._set(page) for page in change.pages]
                return next((error for error in errors if error), 0)
        return 0

    def _set(self, page: Any) -> int:
        if page.rights is None and page.bitmap is None:
            return kvmi.EINVAL
        if page.rights is not None:
            self.pages[page.gfn] = PageRights(page.rights, 0xFFFF_FFFF if page.rights & 2 else 0)
        else:
            full = page.bitmap == 0xFFFF_FFFF
            self.pages[page.gfn] = PageRights(7 if full else 5, page.bitmap)
        return 0


class Wire:
    """A connection to a fake guest: what it sends, answers, and why it ended."""

    def __init__(self, guest: FakeGuest | None = None, dialect: str = "v7") -> None:
        self.guest = guest or FakeGuest()
        self.connection = Connection(self.guest, dialect)
        self.answers: list[tuple[Any, str]] = []
        self.values: list[int | None] = []
        self.closed: str | None = None
        self._seq = 100

    def send(self, data: bytes) -> list[bytes]:
        """What comes back for these bytes, message by message."""
        self.connection.receive(data)
        return self.turn()

    def turn(self) -> list[bytes]:
        """Whatever is to be done."""
        sent: list[bytes] = []
        while (step := self.connection.step()) is not None:
            match step:
                case Send():
                    sent.append(step.data)
                case Do():
                    self.connection.done(self.guest.do(step.change))
                case Answer():
                    self.answers.append((step.token, step.action))
                    self.values.append(step.value)
                case Close():
                    self.closed = step.reason
        return sent

    def call(self, name: str, payload: bytes = b"") -> kvmi.Reply:
        """One command and its reply."""
        self._seq += 1
        [found] = self.read(self.send(kvmi.frame(kvmi.IDS[name], self._seq, payload)))
        assert isinstance(found, kvmi.Reply) and (found.id, found.seq) == (kvmi.IDS[name], self._seq)
        return found

    def read(self, sent: list[bytes]) -> list[Any]:
        """Replies and events."""
        return [kvmi.parsed(*struct.unpack_from("<HxxI", data), data[8:]) for data in sent]

    def events(self) -> list[kvmi.Event]:
        return [item for item in self.read(self.turn()) if isinstance(item, kvmi.Event)]
