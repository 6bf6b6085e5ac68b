"""One connection of a client, within bounds that the HTTP server itself does not set: how long the head of a request
may take and how long it may be, trailers included; what else than content a body may consist of; how many requests may
wait behind one another. Without them a stranger holds a connection for ever with a byte now and then, or fills the
memory with what nobody reads.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.http.long_bodies import LONG, Handing, LongBody
from service.problems import MEDIA_TYPE, PROBLEMS, problem_body

# Of the URL and the fields, also those behind a chunked body. The API's own calls take a few hundred bytes.
MAX_HEAD_BYTES = 1 << 16
MAX_FIELDS = 256
# Of the URL: each route's pattern looks at all of a path before it is known who asks.
MAX_URL_BYTES = 1 << 13
# Chunks that may be of any size; those after them carry so many bytes on average.
MAX_SMALL_CHUNKS = 4096
MIN_CHUNK_BYTES = 16
# Requests that came while others on the connection are being answered.
MAX_PIPELINED = 64

# A body that was answered before it was here is read to its end when its declared length has at most so many digits,
# and the connection is kept; else the connection closes.
_SHORT_DIGITS = 5
# How a connection is read whose client goes on sending after the answer: a pause after each read, and not for ever.
_LINGER_PAUSE = 0.005
_LINGER_SECONDS = 15.0


class _Excess(Exception):
    """Raised in a callback of the parser, which then stops."""


class _Lingering:
    """A transport as a request sees it that is answered while its body still arrives. It does not close at once: with
    bytes unread, the system would take back the answer before the client has read it."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


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
        self._deaf = False  # what comes is not looked at
        self._lingering = False  # the last answer is given
        self._keeps = False  # the connection, once the body of the request is here
        self._fault: tuple[str, str] | None = None
        # Of the message that is being read
        self._number = 0
        self._fields = self._head_bytes = 0
        self._body_bytes = self._chunks = 0
        self._framing = 0  # what is no body, of the reads after the one that it began in
        self._declared = 0  # how long its body is, where its head says so

    # What uvicorn calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            self._unread()
            return
        number, body = self._number, self._body_bytes
        super().data_received(data)
        if not self._in_message or self._deaf:
            return
        if number == self._number:
            self._framing += len(data) - (self._body_bytes - body)
            if self._framing > 2 * MAX_HEAD_BYTES + self._body_bytes:
                self._refuse(*_HEAD_TOO_LARGE)
                return
        if not self._in_head:
            self._answered_early_closes()
            left = self._declared - self._body_bytes
            if left > LONG and not self.transport.is_closing():
                self.transport.set_protocol(LongBody(self, left))

    def shutdown(self) -> None:
        self._keeps = False
        super().shutdown()

    # What the parser calls

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop_parsing("malformed-request", f"at most {MAX_PIPELINED} requests may wait on one connection")
        super().on_message_begin()
        self._in_head = self._in_message = True
        self._number += 1
        self._fields = self._head_bytes = self._body_bytes = self._chunks = self._framing = self._declared = 0
        if self._timer is None:
            self._wait()

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        if self._head_bytes > MAX_URL_BYTES:
            self._stop_parsing("head-too-large", f"the URL of a request must be at most {MAX_URL_BYTES} bytes")
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head, or a trailer: these count, and nobody reads them."""
        self._fields += 1
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > MAX_HEAD_BYTES or self._fields > MAX_FIELDS:
            self._stop_parsing(*_HEAD_TOO_LARGE)
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()
        if self.parser.should_upgrade():
            return
        self.cycle.__class__ = Handing
        fields = dict(self.headers)
        declared = b"0" if b"transfer-encoding" in fields else fields.get(b"content-length", b"0")
        self._declared = int(declared)  # digits: the parser has seen to it

    def on_chunk_header(self) -> None:
        self._chunks += 1
        if self._chunks > MAX_SMALL_CHUNKS + self._body_bytes // MIN_CHUNK_BYTES:
            rule = f"after the first {MAX_SMALL_CHUNKS}, chunks must be of {MIN_CHUNK_BYTES} bytes or more on average"
            self._stop_parsing("malformed-request", rule)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is not None and cycle.body and isinstance(cycle.body, bytes):
            cycle.body = bytearray(cycle.body)  # pieces may be small and many
        super().on_body(body)

    def on_part(self, size: int) -> None:
        """So many bytes of a long body have come."""
        self._body_bytes += size
        self._unset_keepalive_if_required()
        if self._deaf:
            self._unread()

    @property
    def wanted(self) -> RequestResponseCycle | None:
        """The request whose body comes; None when nobody wants the rest of it."""
        return None if self._deaf or not self._answering else self.cycle

    def on_message_complete(self) -> None:
        self._in_message = False
        if self._keeps:
            self._keeps = False
            self.cycle.keep_alive = not self.cycle.response_started
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._lingering:
            return
        super().on_response_complete()
        if self._in_message and not self._in_head:
            # Answered before its body was there: the rest is thrown away, but not for ever.
            self._stop_waiting()
            self._wait()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn answers to what is not HTTP, or was too much; as a problem."""
        del msg
        self._refuse(*(self._fault or ("malformed-request", "must be a request of HTTP/1.1")))

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

    def _stop_parsing(self, code: str, rule: str) -> None:
        self._fault = code, rule
        raise _Excess

    def _refuse(self, code: str, rule: str) -> None:
        """Answer a problem and close, after the answers that others before it wait for; in their place then."""
        behind = self._in_head or not self._in_message
        self._in_head = False
        if self.transport.is_closing():
            return
        self._deaf = True
        if self._answering:
            if behind:
                self._keeps = self.cycle.keep_alive = False
                self._in_message = True
                self.cycle.transport = cast(asyncio.Transport, _Lingering(self.transport, self._linger))
                return
            if self.cycle.response_started or self.pipeline:
                self.transport.close()
                return
            # The application learns that its client has left.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        problem = PROBLEMS[code]
        body = json.dumps(problem_body(problem, rule, "/")).encode()
        head = f"content-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[problem.status] + head.encode() + body)
        self._in_message = True
        self._linger()

    # The end of a connection whose client may still be sending

    def _answered_early_closes(self) -> None:
        """The body is not here: an answer that begins before it is closes the connection, unless the rest is short."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is None or cycle.response_started or isinstance(cycle.transport, _Lingering):
            return
        for name, value in self.headers:
            if name == b"content-length" and len(value) <= _SHORT_DIGITS:
                return
        self._keeps, cycle.keep_alive = cycle.keep_alive, False
        cycle.transport = cast(asyncio.Transport, _Lingering(self.transport, self._linger))

    def _linger(self) -> None:
        """Take no more requests; what the client still sends is not looked at, and one that does not stop is cut."""
        if not self._in_message or self.transport.is_closing():
            self.transport.close()
            return
        self._deaf = self._lingering = True
        self._stop_waiting()
        self._unset_keepalive_if_required()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer = self.loop.call_later(self.patience or _LINGER_SECONDS, self.transport.close)
        self._unread()

    def _unread(self) -> None:
        self.transport.pause_reading()
        self.loop.call_later(_LINGER_PAUSE, self._read_on)

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()


_HEAD_TOO_LARGE = (
    "head-too-large",
    f"the URL and the fields of a request must be at most {MAX_FIELDS} fields and {MAX_HEAD_BYTES} bytes",
)


def patient(seconds: float) -> type[PatientConnection]:
    """The class of connections that wait ``seconds`` for a head."""
    return type("PatientConnection", (PatientConnection,), {"patience": seconds})
