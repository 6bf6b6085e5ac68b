"""A server that answers as it is told, to see what the client makes of it."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

VERSION = {"name": "subpage", "version": "0.1.0", "api": "v1", "python": "3.11.7"}


@dataclass
class Answer:
    """``cut``: the connection is closed after so many bytes of the body."""

    status: int = 200
    document: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    cut: int | None = None


@dataclass
class Stub:
    """``answers`` are given in order, the last one for ever; requests for ``/version`` apart."""

    url: str
    answers: list[Answer]
    version: Answer
    requests: list[tuple[str, str, dict[str, str], bytes]]


@contextlib.contextmanager
def stub(*answers: Answer, version: Answer | None = None) -> Iterator[Stub]:
    """On a port of its own, until the end."""
    known = Stub("", list(answers), version or Answer(document=VERSION), [])

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/version":
                said = known.version
            else:
                known.requests.append((self.command, self.path, dict(self.headers), body))
                said = known.answers.pop(0) if len(known.answers) > 1 else known.answers[0]
            content = said.body if said.body is not None else json.dumps(said.document).encode()
            kind = "application/json" if said.status < 400 else "application/problem+json"
            self.send_response(said.status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **said.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content if said.cut is None else content[: said.cut])
            self.close_connection = said.cut is not None

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing to tell."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        known.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield known
        finally:
            server.shutdown()
            thread.join()


def problem(status: int, code: str, retry_after: int | None = None, **members: Any) -> Answer:
    """A refusal."""
    document = {"type": f"/problems/{code}", "title": code, "status": status, "code": code, "detail": code, **members}
    return Answer(status, document, {} if retry_after is None else {"Retry-After": str(retry_after)})
