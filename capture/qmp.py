"""QEMU's control socket (QMP): a command at a time, and the events that came meanwhile."""

from __future__ import annotations

import json
import select
import socket
import time
from typing import Any

from capture.errors import CaptureError

_MOST_LINE = 1 << 24
_SECONDS = 120.0  # a machine under load starts slowly


class QmpClosed(CaptureError):
    """QEMU has closed the socket: it ends, or has ended."""


class Qmp:
    """The client's end of a connected socket. Not for several threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(False)
        self._buffer = b""
        self._events: list[dict[str, Any]] = []

    def begin(self, seconds: float = _SECONDS) -> None:
        """Wait for QEMU's greeting, and take it on."""
        self._reply("QMP", seconds)
        self.execute("qmp_capabilities", seconds=seconds)

    def execute(self, name: str, seconds: float = _SECONDS, **arguments: Any) -> Any:
        """What a command returns. Raises CaptureError with what QEMU says, QmpClosed."""
        self._send({"execute": name, **({"arguments": arguments} if arguments else {})})
        reply = self._reply("return", seconds)
        if "error" in reply:
            raise CaptureError(f"QEMU refused {name}: {reply['error'].get('desc', reply['error'])}")
        return reply["return"]

    def monitor(self, line: str) -> str:
        """What a command of the human monitor prints."""
        arguments: dict[str, Any] = {"command-line": line}
        return str(self.execute("human-monitor-command", **arguments))

    def events(self) -> list[dict[str, Any]]:
        """Events since the last call; does not wait, and does not mind that QEMU has gone."""
        try:
            while self._ready(0):
                if (message := self._message(0)) is not None and "event" in message:
                    self._events.append(message)
        except QmpClosed:
            pass
        found, self._events = self._events, []
        return found

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            raise QmpClosed("QEMU has gone") from None

    def _reply(self, member: str, seconds: float) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            message = self._message(left)
            if message is None:
                break
            if member in message or "error" in message:
                return message
            if "event" in message:
                self._events.append(message)
        raise CaptureError(f"QEMU did not answer within {seconds:g} s")

    def _ready(self, seconds: float) -> bool:
        return b"\n" in self._buffer or bool(select.select([self._socket], [], [], seconds)[0])

    def _message(self, seconds: float) -> dict[str, Any] | None:
        while b"\n" not in self._buffer:
            if not self._ready(seconds):
                return None
            try:
                piece = self._socket.recv(1 << 16)
            except OSError:
                piece = b""
            if not piece or len(self._buffer) > _MOST_LINE:
                raise QmpClosed("QEMU has gone")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
