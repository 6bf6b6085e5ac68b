"""One connection of a client, within bounds that the HTTP server itself does not set: how long the head of a request
may take and how long it may be. Without them a stranger holds a connection for ever with a byte now and then."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.problems import MEDIA_TYPE, PROBLEMS, problem_body

# Of a head that is not complete yet. Names, values and the URL of the API's own calls take a few hundred bytes.
MAX_HEAD_BYTES = 1 << 16


class PatientConnection(HttpToolsProtocol):
    """uvicorn's connection, which ends when a head does not come to its end, or a body that nobody reads.

    ``patience`` is in seconds, 0 for any time; see ``patient``.
    """

    patience = 0.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = False
        self._in_message = False
        self._head_bytes = 0

    # What uvicorn calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse("head-too-large", f"the head of a request must be at most {MAX_HEAD_BYTES} bytes")

    # What the parser calls

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._in_message = True
        self._head_bytes = 0
        if self._timer is None:
            self._wait()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_message = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_message and not self._in_head:
            # Answered before its body was there: the rest is thrown away, but not for ever.
            self._stop_waiting()
            self._wait()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn answers to what is not HTTP; as a problem."""
        del msg
        self._refuse("malformed-request", "must be a request of HTTP/1.1")

    # Inside

    @property
    def _answering(self) -> bool:
        cycle = cast("RequestResponseCycle | None", self.cycle)  # None before the first request
        return cycle is not None and not cycle.response_complete

    def _wait(self) -> None:
        if self.patience:
            self._timer = self.loop.call_later(self.patience, self._lose_patience)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _lose_patience(self) -> None:
        self._timer = None
        if self._answering:
            self._wait()  # a request before this one is being answered
        elif self._in_head:
            self._refuse("request-timeout", f"the head of a request must arrive within {self.patience:g} seconds")
        elif not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, code: str, rule: str) -> None:
        """Answer a problem and close. A request that is being answered on the connection is cut off instead."""
        self._in_head = False
        if self.transport.is_closing():
            return
        if not self._answering:
            problem = PROBLEMS[code]
            body = json.dumps(problem_body(problem, rule, "/")).encode()
            head = f"content-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[problem.status] + head.encode() + body)
        self.transport.close()


def patient(seconds: float) -> type[PatientConnection]:
    """The class of connections that wait ``seconds`` for a head."""
    return type("PatientConnection", (PatientConnection,), {"patience": seconds})
