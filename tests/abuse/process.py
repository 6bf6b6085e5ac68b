"""The server that is attacked, in a process of its own, and what an attack does to it.

All of them are forked by one process, which has imported everything: ``tests.faults.nursery``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from service.security.tokens import FileTokens, TokenScope, mint
from tests.faults.nursery import Nursery, Server, nursery

TOKEN = "the-token-of-the-abuse-tests-0123456789"
PATIENCE = 60.0


@dataclass
class Figures:
    """Of all servers of a run: the most bytes that one had, the longest that one kept /livez waiting, and the test that
    began it."""

    servers: int = 0
    peak: int = 0
    stall: float = 0.0
    asked: int = 0
    peak_in: str = ""
    stall_in: str = ""
    # Whether each server is watched, by a process of its own; `python -m tests.abuse` wants it.
    watching: bool = False


FIGURES = Figures()


@dataclass
class Service:
    """The server, the file that its standard error goes to, and the tokens that it goes by beside TOKEN."""

    server: Server
    log: Path
    tokens: FileTokens | None = None
    _most: int = 0
    _test: str = field(default_factory=lambda: os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0])
    _watcher: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def client(self, token: str | None = TOKEN) -> httpx2.Client:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=PATIENCE)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def token(self, tenant: str, scope: TokenScope = "write", expires: float | None = None) -> tuple[str, str]:
        """Id and text of a new token, which the server knows within its token_refresh."""
        assert self.tokens is not None
        now = datetime.now(UTC)
        end = now + timedelta(seconds=expires) if expires is not None else None
        record, text = mint(tenant, tenant=tenant, scope=scope, now=now, expires=end)
        self.tokens.add(record)
        return record.id, text

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def resident(self) -> int:
        """Bytes of memory that it has now."""
        return self.server.status("VmRSS")

    def peak(self) -> int:
        """The most that it has had since it was told to forget."""
        return self.server.status("VmHWM")

    def forget(self) -> int:
        """Let the peak begin anew, at what it has now."""
        self._most = max(self._most, self.peak())
        Path(f"/proc/{self.server.pid}/clear_refs").write_text("5")
        return self.resident()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it, if it has not ended, and add its figures to those of the run."""
        if not self.server.alive():
            return
        FIGURES.servers += 1
        peak = max(self._most, self.peak())
        if peak > FIGURES.peak:
            FIGURES.peak, FIGURES.peak_in = peak, self._test
        if self._watcher is not None:
            told, _ = self._watcher.communicate()
            stall, asked = told.split()
            FIGURES.asked += int(asked)
            if float(stall) > FIGURES.stall:
                FIGURES.stall, FIGURES.stall_in = float(stall), self._test
        self.server.kill(number)

    def watch(self) -> None:
        command = [sys.executable, "-S", "-E", str(Path(__file__).with_name("livez.py")), str(self.port)]
        self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@dataclass
class Watched:
    """What became of the server during an attack: its growth in bytes, and the longest wait for /livez in seconds."""

    grown: int = 0
    stall: float = 0.0
    asked: int = 0


@contextlib.contextmanager
def watched(victim: Service) -> Iterator[Watched]:
    """Ask /livez on a connection of its own, over and over, while the context lasts."""
    seen, stop, before = Watched(), threading.Event(), victim.resident()

    def watch() -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", victim.port, timeout=60)) as connection:
            while not stop.is_set():
                began = time.monotonic()
                connection.request("GET", "/livez")
                reply = connection.getresponse()
                assert reply.status == 200 and reply.read()
                seen.stall = max(seen.stall, time.monotonic() - began)
                seen.grown = max(seen.grown, victim.resident() - before)
                seen.asked += 1
                stop.wait(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


@functools.cache
def _children() -> Nursery:
    opened = contextlib.ExitStack()
    atexit.register(opened.close)
    return opened.enter_context(nursery())


def start(folder: Path, tokens: FileTokens | None = None, umask: int = 0o022, **settings: Any) -> Service:
    """A server, listening, whose log is in ``folder``."""
    service = Service(_children().start(stderr=folder / "log", umask=umask, **settings), folder / "log", tokens)
    if FIGURES.watching and service.url.startswith("http:"):
        service.watch()
    return service


@contextlib.contextmanager
def serving(umask: int = 0o022, **settings: Any) -> Iterator[Service]:
    """A server that needs TOKEN, with machines in memory unless the settings say otherwise; it ends in order."""
    with tempfile.TemporaryDirectory() as name:
        service = start(Path(name), umask=umask, **{"token": TOKEN, "store": "memory", **settings})
        try:
            yield service
        finally:
            service.kill(signal.SIGTERM)


def head(method: str, path: str, token: str | None = None, *fields: str) -> bytes:
    """A request up to its body."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *fields]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    return "\r\n".join([*lines, "", ""]).encode()


@dataclass
class Flood:
    """What was sent until the server wanted no more of it."""

    sent: int = 0
    reply: bytes = b""
    closed: bool = field(default=False)


def flood(connection: socket.socket, piece: bytes, seconds: float, most: int = 1 << 40) -> Flood:
    """Send ``piece`` over and over; end when the server closes, after a time, or after so many bytes."""
    done, until = Flood(), time.monotonic() + seconds
    connection.settimeout(0.05)
    while time.monotonic() < until and done.sent < most:
        try:
            done.sent += connection.send(piece)
        except TimeoutError:
            pass
        except OSError:
            done.closed = True
            break
        with contextlib.suppress(TimeoutError, BlockingIOError):
            try:
                while got := connection.recv(1 << 16, socket.MSG_DONTWAIT):
                    done.reply += got
            except (ConnectionError, ssl.SSLError):
                done.closed = True
                break
    return done


def settled(client: httpx2.Client, reply: httpx2.Response) -> dict[str, Any]:
    """The problem that a replay ended with, or {}."""
    if reply.status_code != 202:
        return dict(reply.json()) if reply.status_code != 201 else {}
    url = reply.headers["Location"]
    while (job := client.get(url).json())["state"] in ("queued", "running"):
        time.sleep(0.01)
    return dict(job["error"] or {})
