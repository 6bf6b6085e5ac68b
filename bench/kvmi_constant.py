"""The service, and on its loop what KVMI is measured against: every request is answered by one constant."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
from typing import cast

import uvicorn

from bench.kvmi import READ_REPLY_SIZE, READ_SIZE
from service.app import create_app
from service.server import configured
from service.settings import Settings


class Constant(asyncio.Protocol):
    """Answers with so many bytes for each so many that arrive."""

    def __init__(self) -> None:
        self._left = 0
        self._answer = bytes(READ_REPLY_SIZE)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        whole, self._left = divmod(self._left + len(data), READ_SIZE)
        for _ in range(whole):
            self._transport.write(self._answer)


class _Server(uvicorn.Server):
    """Connects to a path besides, as soon as it has started."""

    def __init__(self, config: uvicorn.Config, path: str) -> None:
        super().__init__(config)
        self._path = path

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.freeze()
        await asyncio.get_running_loop().create_unix_connection(Constant, self._path)
        sys.stdout.write(f"listening on http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()


def main() -> None:
    """Serve on a free loopback port and say which; the first argument is where the constants are asked for."""
    settings = Settings(host="127.0.0.1", port=0, store="memory")
    _Server(configured(create_app(settings), settings), sys.argv[1]).run()


if __name__ == "__main__":
    main()
