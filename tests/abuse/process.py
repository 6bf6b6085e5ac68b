"""A server in a process of its own, as ``subpage serve`` starts it, and what an attack does to it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import json
import os
import re
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
from pathlib import Path

import httpx2

TOKEN = "the-token-of-the-abuse-tests-0123456789"
MIB = 1 << 20


@dataclass
class Victim:
    """The server. ``log`` is the file that its standard error goes to."""

    pid: int
    url: str
    port: int
    log: Path
    folder: Path

    @contextlib.contextmanager
    def client(self, token: str | None = TOKEN) -> Iterator[httpx2.Client]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with httpx2.Client(base_url=self.url, headers=headers, timeout=30.0) as client:
            yield client

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def resident(self) -> int:
        """Bytes of memory that it has now."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", text)[0]) << 10


@dataclass
class Watched:
    """What became of the server during an attack: its growth in bytes, and the longest wait for /livez in seconds."""

    grown: int = 0
    stall: float = 0.0
    asked: int = 0


@contextlib.contextmanager
def watched(victim: Victim) -> Iterator[Watched]:
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
def _nursery() -> subprocess.Popen[str]:
    """A process that has imported everything and forks a server for each line that it is given; see ``main``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.abuse.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )

    def end() -> None:
        process.communicate()

    atexit.register(end)
    return process


@contextlib.contextmanager
def serving(umask: int = 0o022, **settings: object) -> Iterator[Victim]:
    """A server that needs TOKEN, with machines in memory unless the settings say otherwise."""
    given = {"token": TOKEN, "store": "memory", "warm_up": False, "host": "127.0.0.1", "port": 0} | settings
    nursery = _nursery()
    assert nursery.stdin is not None and nursery.stdout is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        order = {"umask": umask, "log": str(folder / "stderr"), "settings": given}
        nursery.stdin.write(json.dumps(order, default=str) + "\n")
        nursery.stdin.flush()
        pid = int(nursery.stdout.readline())
        try:
            found = re.search(r"(https?://127\.0\.0\.1:(\d+))", nursery.stdout.readline())
            assert found is not None, (folder / "stderr").read_text()
            yield Victim(pid, found[1], int(found[2]), folder / "stderr", folder)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            assert nursery.stdout.readline() == f"{pid} ended\n"


def main() -> None:
    """Fork servers, one at a time or several: each line of JSON is one; its end is said, too."""
    from service import server
    from service.settings import Settings

    def wait(pid: int) -> None:
        os.waitpid(pid, 0)
        print(f"{pid} ended", flush=True)  # noqa: T201

    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.umask(order["umask"])
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(log, 2)
            print(os.getpid(), flush=True)  # noqa: T201
            try:
                server.run(Settings(**order["settings"]))
            except BaseException as error:  # noqa: BLE001 - the test is told
                print(error, flush=True)  # noqa: T201
            os._exit(0)
        threading.Thread(target=wait, args=(pid,)).start()


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


if __name__ == "__main__":
    main()
