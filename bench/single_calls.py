"""Method (g): how many small requests a second a server answers, over keep-alive connections."""

from __future__ import annotations

import selectors
import shutil
import socket
import subprocess
import tempfile
import time

CONNECTIONS = 16
SECONDS = 1.0


# How wrk is told of a request with a body.
_LUA = """wrk.method = "{method}"
wrk.body = [[{body}]]
wrk.headers["Content-Type"] = "application/json"
"""


class SingleCalls:
    """As many requests of one kind as are answered in a second: with ``wrk`` if there is one, else the loop below.

    Either way the client is the same for everything it is pointed at; ``rate`` is that of the last round.
    """

    def __init__(self, port: int, path: str, method: str = "GET", body: str = "") -> None:
        self._port, self._path, self._method, self._body = port, path, method, body
        self._wrk = shutil.which("wrk")
        self.rates: list[float] = []

    def prepare(self) -> None:
        """Nothing to do."""

    def run(self) -> None:
        self.rates.append(self._with_wrk() if self._wrk else self._with_sockets())

    def _with_wrk(self) -> float:
        url = f"http://127.0.0.1:{self._port}{self._path}"
        command = [str(self._wrk), "-t1", f"-c{CONNECTIONS}", f"-d{max(1, round(SECONDS))}s"]
        with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
            if self._body:
                script.write(_LUA.format(method=self._method, body=self._body))
                script.flush()
                command += ["-s", script.name]
            output = subprocess.run([*command, url], check=True, capture_output=True, text=True).stdout
        if "Non-2xx" in output:
            raise RuntimeError(output)
        return float(output.split("Requests/sec:")[1].split()[0])

    def _with_sockets(self) -> float:
        head = f"{self._method} {self._path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/json\r\n"
        if self._body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(self._body)}\r\n"
        request = f"{head}\r\n{self._body}".encode()
        length = self._reply_length(request)
        waiting: dict[socket.socket, int] = {}
        done = 0
        with selectors.DefaultSelector() as selector:
            for _ in range(CONNECTIONS):
                connection = self._connect()
                selector.register(connection, selectors.EVENT_READ)
                waiting[connection] = length
                connection.sendall(request)
            start = time.perf_counter()
            while time.perf_counter() - start < SECONDS:
                for key, _ in selector.select(SECONDS):
                    connection = key.fileobj  # type: ignore[assignment]
                    waiting[connection] -= len(connection.recv(65536))
                    if not waiting[connection]:
                        done += 1
                        waiting[connection] = length
                        connection.sendall(request)
            taken = time.perf_counter() - start
        for connection in waiting:
            connection.close()
        return done / taken

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self._port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _reply_length(self, request: bytes) -> int:
        """Bytes of one reply, which are the same every time; it must be a 200 or a 204."""
        with self._connect() as connection:
            connection.sendall(request)
            reply = b""
            while b"\r\n\r\n" not in reply:
                reply += connection.recv(65536)
            head, _, body = reply.partition(b"\r\n\r\n")
            if not head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 204")):
                raise RuntimeError(reply[:500].decode(errors="replace"))
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
            total = int(fields.get(b"content-length", 0))
            while len(body) < total:
                body += connection.recv(65536)
        return len(head) + 4 + total
