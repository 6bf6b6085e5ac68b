"""HTTP/1.1 over one connection, no more than the generator of load needs: it must not be what is measured."""

from __future__ import annotations

import asyncio
from typing import Self


class Connection:
    """A connection that is kept open between requests. Use as an async context manager."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=1 << 24)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._writer.close()

    async def ask(self, method: str, target: str, body: bytes = b"", media: str = "") -> tuple[int, bytes]:
        """One request; status and body of its reply."""
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        if media:
            head += f"Content-Type: {media}\r\n"
        self._writer.write(head.encode() + b"\r\n" + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        status = int(answer[9:12])
        length = 0
        for line in answer.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line[15:])
        return status, await self._reader.readexactly(length) if length else b""
