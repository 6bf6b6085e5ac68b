"""KVMI: a replay whose tool answers CONTINUE to every violation, and reads of guest memory one after the other."""

from __future__ import annotations

import json
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.data import RAM_BYTES, Policy, Trace
from bench.http_replay import HttpReplay
from bench.servers import call, post

PAGE = 4096
READS = 8192
# Bytes of a READ_PHYSICAL, and of its reply for a page.
READ_SIZE, READ_REPLY_SIZE = 8 + 16, 8 + 8 + PAGE
# Entries of SET_PAGE_WRITE_BITMAP that fit into a message.
_MOST_ENTRIES = 511

_HEADER = struct.Struct("<HHI")
_EVENT_REPLY, _EVENT, _CONTROL_EVENTS, _READ, _SET_BITMAP = 0, 1, 9, 17, 26
_PF = 6


@contextmanager
def place() -> Iterator[Path]:
    """A directory of nobody else, where a tool may listen."""
    with tempfile.TemporaryDirectory(prefix="bench-kvmi-") as name:
        yield Path(name)


class Tool:
    """The listening side. After ``accept`` a machine, or what is measured against one, is at the other end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)

    def accept(self, *, greet: bool = True) -> None:
        self.socket, _ = self._listener.accept()
        if greet:
            self.exactly(104)
            self.socket.sendall(struct.pack("<I20x", 24))

    def exactly(self, size: int) -> bytes:
        """So many bytes; fewer where the other side has closed."""
        found = self.socket.recv(size, socket.MSG_WAITALL)
        return found if len(found) == size else b""

    def command(self, id: int, payload: bytes = b"") -> bytes:
        """What a command is answered after its error, which has to be 0."""
        self.socket.sendall(_HEADER.pack(id, len(payload), 1) + payload)
        _, size, _ = _HEADER.unpack(self.exactly(_HEADER.size))
        reply = self.exactly(size)
        if reply[:8] != bytes(8):
            raise RuntimeError(f"command {id}: error {-int.from_bytes(reply[:4], 'little', signed=True)}")
        return reply[8:]

    def close(self) -> None:
        self.socket.close()
        self._listener.close()
        self.path.unlink()


class KvmiReplay(HttpReplay):
    """As its base with ``ask``; a tool of KVMI has set the bitmaps and says CONTINUE each time."""

    def __init__(self, port: int, kind: str, trace: Trace, policy: Policy, directory: Path) -> None:
        super().__init__(port, kind, trace, policy)
        self._query += "&on_violation=ask"
        self._path = directory / "tool"
        self.questions = 0

    def prepare(self) -> None:
        self.close()
        slot = {"slot": 0, "gpa": 0, "size": RAM_BYTES}
        self.path = f"/v1/vms/{post(self._port, '/v1/vms', {'memory_slots': [slot], 'spp': True})['id']}"
        self._tool = Tool(self._path)
        attach(self._port, self.path, self._tool)
        pages = [(gfn, mask) for first, count, mask in self._policy.pages for gfn in range(first, first + count)]
        for at in range(0, len(pages), _MOST_ENTRIES):
            some = pages[at : at + _MOST_ENTRIES]
            entries = b"".join(struct.pack("<QII", gfn << 12, mask, 0) for gfn, mask in some)
            self._tool.command(_SET_BITMAP, struct.pack("<HHI", 0, len(some), 0) + entries)
        self._tool.command(_CONTROL_EVENTS, struct.pack("<8xHB5x", _PF, 1))

    def run(self) -> None:
        self.questions = 0
        answering = threading.Thread(target=self._answer_all)
        answering.start()
        super().run()
        self._tool.socket.shutdown(socket.SHUT_RDWR)
        answering.join()

    def _answer_all(self) -> None:
        while head := self._tool.exactly(_HEADER.size):
            id, size, seq = _HEADER.unpack(head)
            body = self._tool.exactly(size)
            if id == _EVENT:
                self.questions += 1
                answer = body[2:4] + struct.pack("<6xBB6x", 0, body[4]) + bytes(272)
                self._tool.socket.sendall(_HEADER.pack(_EVENT_REPLY, len(answer), seq) + answer)

    def close(self) -> None:
        if self.path is not None:
            self._tool.close()
        super().close()


class Reads:
    """Pages of a guest, one READ_PHYSICAL after the other."""

    def __init__(self, tool: Tool, image: bytes) -> None:
        self._tool = tool
        self._image = image
        self._requests = [
            _HEADER.pack(_READ, 16, page) + struct.pack("<QQ", page * PAGE, PAGE) for page in range(len(image) // PAGE)
        ]

    def prepare(self) -> None:
        """Nothing to do."""

    def run(self) -> None:
        tool = self._tool.socket
        for request in self._requests:
            tool.sendall(request)
            tool.recv(READ_REPLY_SIZE, socket.MSG_WAITALL)

    def check(self) -> bool:
        """Whether every page is what the guest has there."""
        found = []
        for request in self._requests:
            self._tool.socket.sendall(request)
            found.append(self._tool.exactly(READ_REPLY_SIZE)[READ_REPLY_SIZE - PAGE :])
        return b"".join(found) == self._image


def image() -> bytes:
    """Raw memory of a guest, no page of which is zeros."""
    return os.urandom(READS * PAGE)


def attach(port: int, path: str, tool: Tool) -> None:
    """Have a machine connect to a tool."""
    call(port, "PUT", f"{path}/kvmi", json.dumps({"connect": f"unix:{tool.path}"}).encode())
    tool.accept()


def loaded(port: int, raw: bytes) -> str:
    """The path of a machine that has it."""
    slot = {"slot": 0, "gpa": 0, "size": len(raw)}
    path = f"/v1/vms/{post(port, '/v1/vms', {'memory_slots': [slot]})['id']}"
    call(port, "PUT", f"{path}/memory?format=raw", raw, "application/octet-stream")
    return path
