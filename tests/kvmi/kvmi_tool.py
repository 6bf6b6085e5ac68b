"""A tool of KVMI as libkvmi makes one: it listens, a machine connects. Made from the protocol, not from the service."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from tests.kvmi import kvmi_messages as kvmi

PATIENCE = 60.0


class Guest:
    """One machine that has connected. Events that come while a reply is waited for are kept, as libkvmi keeps them."""

    def __init__(self, made: socket.socket, cookie: bytes = bytes(20), answer_size: int = 24) -> None:
        made.settimeout(PATIENCE)
        self.socket = made
        self.kept: list[kvmi.Event] = []
        self.seq = 0
        hello = self._exactly(104)
        self.size, self.uuid, _, self.started = struct.unpack_from("<I16sIq", hello)
        self.name = hello[32:96].rstrip(b"\0").decode()
        self.max_gpa = int.from_bytes(hello[96:], "little")
        made.sendall(struct.pack("<I20s", answer_size, cookie).ljust(answer_size, b"\0"))

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.socket.close()

    def _exactly(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            piece = self.socket.recv(size - len(found))
            if not piece:
                raise ConnectionResetError("the machine has closed the connection")
            found += piece
        return found

    def _next(self) -> kvmi.Reply | kvmi.Event:
        id, size, seq = struct.unpack("<HHI", self._exactly(8))
        found: kvmi.Reply | kvmi.Event = kvmi.parsed(id, seq, self._exactly(size))
        return found

    def post(self, name: str, payload: bytes = b"") -> int:
        """Send a command without waiting for its reply; its number."""
        self.seq += 1
        self.socket.sendall(kvmi.frame(kvmi.IDS[name], self.seq, payload))
        return self.seq

    def call(self, name: str, payload: bytes = b"") -> kvmi.Reply:
        """Send a command; its reply."""
        seq = self.post(name, payload)
        while isinstance(found := self._next(), kvmi.Event):
            self.kept.append(found)
        assert (found.id, found.seq) == (kvmi.IDS[name], seq), found
        return found

    def done(self, name: str, payload: bytes = b"") -> bytes:
        """The same, of a command that must succeed."""
        found = self.call(name, payload)
        assert found.error == 0, (name, found.error)
        return found.data

    def event(self, kind: int | None = None) -> kvmi.Event:
        """The next event; of ``kind``."""
        found = self.kept.pop(0) if self.kept else self._next()
        assert isinstance(found, kvmi.Event) and kind in (None, found.kind), found
        return found

    def answer(self, event: kvmi.Event, action: int, value: int | None = None) -> None:
        own = bytes(272) if event.kind == kvmi.PF else b"" if value is None else struct.pack("<Q", value)
        self.socket.sendall(
            kvmi.frame(kvmi.IDS["EVENT_REPLY"], event.seq, kvmi.event_reply(event.vcpu, action, event.kind, own))
        )

    def pause_all(self, count: int) -> list[kvmi.Event]:
        """As libkvmi does: one batch, of which the last command is answered; the events come before that."""
        batch = kvmi.frame(kvmi.IDS["CONTROL_CMD_RESPONSE"], 0x1000, kvmi.replies(False, True))
        for vcpu in range(count):
            batch += kvmi.frame(kvmi.IDS["PAUSE_VCPU"], 0x1001, kvmi.vcpu(vcpu) + b"\1" + bytes(7))
        self.socket.sendall(batch)
        self.done("CONTROL_CMD_RESPONSE", kvmi.replies(True, True))
        return [self.event(kvmi.PAUSE) for _ in range(count)]

    def enable(self, vcpu: int, *events: int) -> None:
        for event in events:
            self.done("CONTROL_EVENTS", kvmi.vcpu(vcpu) + kvmi.switch(event, True))

    def restrict(self, gfn: int, rights: int) -> None:
        self.done("SET_PAGE_ACCESS", kvmi.access_list((gfn << 12, rights)))

    def ended(self) -> bool:
        """Read until the machine closes."""
        with contextlib.suppress(ConnectionResetError):
            while True:
                found = self._next()
                if isinstance(found, kvmi.Event):
                    self.kept.append(found)
        return True


class Listening:
    """The listening socket of a tool."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE)
        self.socket.bind(str(path))
        self.socket.listen(0)

    def accept(self, cookie: bytes = bytes(20), answer_size: int = 24) -> Guest:
        made, _ = self.socket.accept()
        return Guest(made, cookie, answer_size)


@contextlib.contextmanager
def listening(path: Path) -> Iterator[Listening]:
    tool = Listening(path)
    try:
        yield tool
    finally:
        tool.socket.close()
        path.unlink(missing_ok=True)
