"""Servers that read bodies and do nothing with them: what the kernel, uvicorn and the service's connections take.

python -m bench.sink sockets|uvicorn|connections
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import uvicorn

from service.http.connection import patient

PIECE = 1 << 20
_DONE = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def sockets(listener: socket.socket) -> None:
    """One connection after the other, into memory that is there: nothing but the kernel."""
    memory = memoryview(bytearray(PIECE))
    while True:
        connection, _ = listener.accept()
        with connection:
            head = b""
            while b"\r\n\r\n" not in head and (piece := connection.recv(PIECE)):
                head += piece
            head, _, body = head.partition(b"\r\n\r\n")
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
            left = int(fields.get(b"content-length", b"0")) - len(body)
            while left and (count := connection.recv_into(memory, min(PIECE, left))):
                left -= count
            connection.sendall(_DONE)


async def discard(scope: Any, receive: Any, send: Any) -> None:
    """An application that wants nothing but the end of the body."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


def main() -> None:
    """Serve on a free loopback port and say which."""
    listener = socket.create_server(("127.0.0.1", 0))
    sys.stdout.write(f"listening on http://127.0.0.1:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    if sys.argv[1] == "sockets":
        sockets(listener)
        return
    config = uvicorn.Config(
        discard,
        loop="uvloop",
        http=patient(0) if sys.argv[1] == "connections" else "httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
    )
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    main()
